from __future__ import annotations

import pytest
import torch

from goldens import arrays, sam_of
from SAMAdaptLib.models.mask_decoder import EVERY_MASK, SINGLE_MASK, THREE_MASKS, MaskDecoder
from SAMAdaptLib.models.prompt_encoder import PromptEncoder


@pytest.fixture
def decoder() -> MaskDecoder:
    torch.manual_seed(0)
    return MaskDecoder(embed_dim=32, heads=4, mlp_dim=24, score_width=12).eval()


def inputs(embeddings: int, prompts: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    dense = torch.randn(prompts, 32, 3, 5)
    return torch.randn(embeddings, 32, 3, 5), torch.randn(1, 32, 3, 5), torch.randn(prompts, 2, 32), dense


@pytest.mark.parametrize(("embeddings", "prompts"), [(1, 3), (3, 3), (3, 1)])
def test_a_batch_is_the_same_as_one_by_one(decoder: MaskDecoder, embeddings: int, prompts: int) -> None:
    image, pe, sparse, dense = inputs(embeddings, prompts)
    masks, scores = decoder(image, pe, sparse, dense)
    assert masks.shape == (3, 4, 12, 20)
    for n in range(3):
        one = [x[min(n, len(x) - 1)][None] for x in (image, sparse, dense)]
        mask, score = decoder(one[0], pe, one[1], one[2])
        torch.testing.assert_close(masks[n : n + 1], mask, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores[n : n + 1], score, atol=1e-5, rtol=0)


def test_masks_and_scores_are_chosen_together(decoder: MaskDecoder) -> None:
    every_mask, every_score = decoder(*inputs(1, 1), EVERY_MASK)
    for chosen, count in ((SINGLE_MASK, 1), (THREE_MASKS, 3)):
        masks, scores = decoder(*inputs(1, 1), chosen)
        assert masks.shape[1] == scores.shape[1] == count
        torch.testing.assert_close(masks, every_mask[:, chosen])
        torch.testing.assert_close(scores, every_score[:, chosen])


def test_ma_sams_decoder_enlarges_sixteen_times() -> None:
    decoder = MaskDecoder(64, 3, heads=4, mlp_dim=24, upscale_divisors=(4, 8, 16, 32))
    masks, _ = decoder(
        torch.randn(2, 64, 3, 3), torch.randn(1, 64, 3, 3), torch.randn(1, 0, 64), torch.zeros(1, 64, 1, 1)
    )
    assert masks.shape == (2, 3, 48, 48)


def test_gradients_reach_every_tensor(decoder: MaskDecoder) -> None:
    masks, scores = decoder(*inputs(2, 2))
    (masks.square().sum() + scores.square().sum()).backward()
    # The bias of keys shifts all scores of a softmax alike, so its gradient is nothing but rounding.
    names = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in names if not name.endswith("k_proj.bias")] == []


def test_every_tensor_of_prompts_and_decoder_shows_in_the_masks() -> None:
    network = sam_of("sam")
    embedding = torch.from_numpy(arrays("sam")["image_embedding"])
    encoder: PromptEncoder = network.prompt_encoder
    points, labels = torch.tensor([[[20.0, 30], [50, 40], [0, 0]]]), torch.tensor([[1, 0, -1]])
    box, mask = torch.tensor([[10.0, 12, 70, 66]]), torch.from_numpy(arrays("sam")["mask_input_1hw"])[None]

    def run() -> torch.Tensor:
        parts = []
        for prompts in (encoder(points, labels, box, mask), encoder()):
            masks, scores = network.mask_decoder(embedding, encoder.dense_pe(), *prompts)
            parts += [masks.flatten(), scores.flatten()]
        return torch.cat(parts)

    silent = []
    with torch.inference_mode():
        expected = run()
        for part in (encoder, network.mask_decoder):
            for name, tensor in part.state_dict().items():
                kept = tensor.clone()
                tensor[...] += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
                if (run() - expected).abs().max() < 1e-3:
                    silent.append(name)
                tensor[...] = kept
    assert [name for name in silent if not name.endswith("k_proj.bias")] == []
