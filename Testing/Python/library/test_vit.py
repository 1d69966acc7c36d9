from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from goldens import arrays, golden, published_keys, sam_of
from SAMAdaptLib.models import vit
from SAMAdaptLib.models.layers import LayerNorm2d
from SAMAdaptLib.models.sam import build_sam
from SAMAdaptLib.models.vit import VIT_B, VIT_H, VIT_L, Attention, ImageEncoderViT, ViTShape

TINY = ViTShape(embed_dim=12, depth=2, heads=2, global_blocks=(1,), input_size=80, window=3, out_channels=8)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return module.eval()


@pytest.mark.parametrize(
    ("name", "shape"), [("sam_vit_b", VIT_B), ("sam_vit_l", VIT_L), ("sam_vit_h", VIT_H)]
)
def test_the_published_sizes_have_exactly_the_official_keys_and_shapes(name: str, shape: ViTShape) -> None:
    with torch.device("meta"):
        network = build_sam(shape)
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == published_keys(name)


def test_every_norm_of_the_encoder_has_the_epsilon_of_the_paper_code() -> None:
    with torch.device("meta"):
        network = build_sam(VIT_B)
    encoder = [m.eps for m in network.image_encoder.modules() if isinstance(m, nn.LayerNorm)]
    decoder = [m.eps for m in network.mask_decoder.modules() if isinstance(m, nn.LayerNorm)]
    maps = [m.eps for m in network.modules() if isinstance(m, LayerNorm2d)]
    assert encoder == [1e-6] * 24
    assert decoder == [1e-5] * 9
    assert maps == [1e-6] * 5


def test_padding_takes_part_as_keys_made_of_the_bias() -> None:
    attention = randomised(Attention(TINY, extent=3))
    x = torch.randn(1, 2, 4, 12, generator=torch.Generator().manual_seed(1))
    padded = nn.functional.pad(x, (0, 0, 0, 2, 0, 1))
    expected = torch.cat([attention(padded[:, :, :3]), attention(padded[:, :, 3:])], dim=2)[:, :2, :4]
    torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=0)


def test_attention_is_the_softmax_written_out() -> None:
    attention = randomised(Attention(TINY, extent=3))
    x = torch.randn(1, 3, 3, 12, generator=torch.Generator().manual_seed(2))
    q, k, v = attention.qkv(x).reshape(9, 3, 2, 6).permute(1, 2, 0, 3)  # heads, tokens, c
    places = [(row, column) for row in range(3) for column in range(3)]
    scores = q @ k.transpose(1, 2) / 6**0.5
    for a, (row, column) in enumerate(places):
        for b, (key_row, key_column) in enumerate(places):
            relative = attention.rel_pos_h[row - key_row + 2] + attention.rel_pos_w[column - key_column + 2]
            scores[:, a, b] += q[:, a] @ relative
    expected = attention.proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(9, 12))
    torch.testing.assert_close(attention(x).reshape(9, 12), expected, atol=1e-6, rtol=0)


def test_cutting_the_scores_into_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = randomised(ImageEncoderViT(TINY))
    pictures = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(3))
    whole = encoder(pictures)
    monkeypatch.setattr(vit, "_SCORES_AT_ONCE", 1)
    torch.testing.assert_close(encoder(pictures), whole, atol=1e-6, rtol=0)


def test_gradients_reach_every_tensor() -> None:
    encoder = randomised(ImageEncoderViT(TINY))
    encoder(torch.randn(1, 3, 80, 80)).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_positions_are_resized_for_another_input_size() -> None:
    shape = replace(TINY, input_size=160)
    positions = torch.arange(5.0).expand(1, 5, 5)[..., None].expand(1, 5, 5, 12)
    table = torch.arange(9.0)[:, None].expand(9, 6)
    checkpoint = {
        "e.pos_embed": positions,
        "e.blocks.1.attn.rel_pos_h": table,
        "e.blocks.0.attn.rel_pos_h": table,
    }
    resized = vit.with_positions_for(checkpoint, shape, "e.")
    # Twice the cells, half the step, and flat beyond the outermost centres.
    row = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4])
    torch.testing.assert_close(resized["e.pos_embed"][0, 7, :, 3], row)
    assert resized["e.blocks.1.attn.rel_pos_h"].shape == (19, 6)
    assert resized["e.blocks.1.attn.rel_pos_h"][9, 0] == 4
    assert resized["e.blocks.0.attn.rel_pos_h"].shape == (9, 6), "windows keep their size"


def test_folded_increments_equal_increments_beside_the_projection() -> None:
    attention = randomised(Attention(TINY, extent=3))
    generator = torch.Generator().manual_seed(4)
    x, query, value = (torch.randn(*s, generator=generator) for s in ((5, 12), (12, 12), (12, 12)))
    beside = attention.qkv(x) + torch.cat([x @ query.T, torch.zeros(5, 12), x @ value.T], dim=1)
    vit.add_to_qkv(attention, query, value)
    torch.testing.assert_close(attention.qkv(x), beside, atol=1e-5, rtol=0)


def test_adapters_stand_before_and_after_the_attention() -> None:
    class Shift(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(12)

    block = randomised(vit.Block(TINY, 0))
    x = torch.randn(1, 5, 5, 12, generator=torch.Generator().manual_seed(5))
    before = x + torch.arange(12)
    after = before + block.attn(block.norm1(before)) + torch.arange(12)
    expected = after + block.mlp(block.norm2(after))
    block.before_attention = block.after_attention = Shift()
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", ["sam", "medsam"])
def test_every_tensor_of_the_encoder_shows_in_the_embedding(name: str) -> None:
    encoder = sam_of(name).image_encoder
    key = {"sam": "preprocessed", "medsam": "network_input"}[name]
    pixels, expected = torch.from_numpy(arrays(name)[key]), torch.from_numpy(arrays(name)["image_embedding"])
    silent = []
    with torch.inference_mode():
        for tensor_name, tensor in encoder.state_dict().items():
            kept = tensor.clone()
            tensor[...] += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(6))
            if (encoder(pixels) - expected).abs().max() < 1e-3:
                silent.append(tensor_name)
            tensor[...] = kept
        assert (encoder(pixels) - expected).abs().max() < 1e-4
    assert silent == []
    assert golden(name).config["img_size"] // 16 % golden(name).config["window_size"] != 0, (
        "padding is tested"
    )
