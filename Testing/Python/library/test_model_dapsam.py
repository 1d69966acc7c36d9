from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from families import randomised, shared_set, silent_keys
from goldens import GOLDENS, published_keys
from SAMAdaptLib.cards import find_card
from SAMAdaptLib.errors import CardError, PromptError, VolumeError, WeightsError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models import build_predictor
from SAMAdaptLib.models.dapsam import (
    ChannelAdapter,
    Dapsam,
    DapsamEncoder,
    DapsamVolumePredictor,
    LowLevelAdapter,
    PrototypePrompt,
    build_dapsam,
    load_dapsam,
    published_tensors,
    standardised_photograph,
    standardised_slice,
    with_new_names,
)
from SAMAdaptLib.models.mask_decoder import MaskDecoder
from SAMAdaptLib.models.vit import ViTShape, blocks_of
from SAMAdaptLib.prompts import Point, Prompts
from SAMAdaptLib.session import Session
from SAMAdaptLib.verify import verify
from SAMAdaptLib.verify.dapsam import load_golden
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptLib.weights import recognise

CPU = torch.device("cpu")
PROSTATE, FUNDUS = find_card("dapsam_vit_b.prostate"), find_card("dapsam_vit_b.fundus")
TINY = ViTShape(embed_dim=16, depth=2, heads=2, global_blocks=(1,), input_size=64, window=3, out_channels=16)
AS_STORED = np.diag([-1.0, -1.0, 1.0, 1.0])
WINDOW = IntensityWindow(0, 1)
OLD_NAMES = json.loads((GOLDENS / "dapsam" / "prostate_like_v1_0_0_key_names.json").read_text())[
    "head_to_v1_0_0"
]


def tiny(masks: int, seed: int = 0) -> Dapsam:
    network = Dapsam(
        DapsamEncoder(TINY, 4, 5), PrototypePrompt(16, 6), MaskDecoder(16, masks, mlp_dim=32, score_width=16)
    )
    randomised(network, seed)
    return network


@pytest.fixture(scope="module")
def network() -> Dapsam:
    return tiny(1)


@pytest.fixture(scope="module")
def volume() -> Volume:
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 400, (4, 50, 44)).astype(np.int16)
    voxels[2] = 0
    return Volume(voxels, Geometry(voxels.shape, AS_STORED), "MR")


def predictor_of(network: Dapsam, **options: object) -> DapsamVolumePredictor:
    return DapsamVolumePredictor(network, replace(PROSTATE, options=options), "a" * 64, CPU)


def in_old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def old(name: str) -> str:
        return name.replace("image_encoder.l_adapter.", "image_encoder.prompt_generator.").replace(
            ".channel_adapter.", ".Channel_MLP_Adapter."
        )

    return {old(name): tensor for name, tensor in tensors.items()}


def test_slices_and_photographs_enter_as_in_the_official_code() -> None:
    rows = verify(GOLDENS / "dapsam")
    assert {row.output for row in rows} == {"out_prostate", "out_fundus_48"}
    for row in rows:
        assert row.passed, row


@pytest.mark.parametrize("name", ["prostate_like", "fundus_like"])
def test_the_official_numbers_are_reached(shared_data: Path, name: str) -> None:
    rows = verify(shared_set(shared_data, "dapsam", name).path)
    assert len(rows) == 9
    for row in rows:
        assert row.passed, row


@pytest.mark.parametrize("name", ["prostate_like", "fundus_like"])
def test_every_tensor_of_the_official_files_has_its_effect(shared_data: Path, name: str) -> None:
    golden = shared_set(shared_data, "dapsam", name)
    network = load_golden(golden)
    picture = torch.from_numpy(golden.arrays()["in_image"])
    named = published_tensors(network)
    silent = silent_keys(named, lambda: list(network(picture)))
    assert silent == {key for key in named if key.endswith("k_proj.bias")}  # the softmax takes these out


def test_both_vocabularies_are_read(network: Dapsam) -> None:
    tensors = published_tensors(network)
    old = in_old_names(tensors)
    assert set(old) != set(tensors)
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(pictures)
        for file in (tensors, old):
            torch.testing.assert_close(load_dapsam(file)(pictures), expected, atol=1e-5, rtol=0)


def test_the_old_names_are_those_of_the_release() -> None:
    one = torch.zeros(1)
    for new, old in OLD_NAMES.items():
        assert list(with_new_names({old: one})) == [new]
        assert list(with_new_names({new: one})) == [new]
    unchanged = "prompt_generator.memory_bank.weight"
    assert list(with_new_names({unchanged: one})) == [unchanged]


@pytest.mark.parametrize(("name", "size", "masks"), [("prostate", 384, 1), ("fundus", 512, 2)])
def test_the_published_size_has_exactly_the_official_keys_and_shapes(
    name: str, size: int, masks: int
) -> None:
    keys = published_keys(f"dapsam_vit_b_{name}")
    tensors = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    with torch.device("meta"):
        network = build_dapsam(tensors)
    assert {key: list(tensor.shape) for key, tensor in published_tensors(network).items()} == keys
    assert network.image_encoder.input_size == (size, size)
    assert network.image_encoder.shape.global_blocks == (2, 5, 8, 11)
    assert network.image_encoder.shape.heads == 12
    assert network.mask_decoder.mask_tokens.num_embeddings == masks
    assert recognise(tensors) == "DAPSAM, ViT-B"
    assert recognise(in_old_names(tensors)) == "DAPSAM, ViT-B"


def test_every_norm_has_the_epsilon_of_the_official_code(network: Dapsam) -> None:
    for block in blocks_of(network.image_encoder):
        assert block.norm1.eps == block.norm2.eps == 1e-6
    assert network.image_encoder.neck[1].eps == network.image_encoder.neck[3].eps == 1e-6
    assert network.mask_decoder.transformer.norm_final_attn.eps == 1e-5


def test_the_low_level_feature_reads_memory_as_if_channels_came_first() -> None:
    adapter = LowLevelAdapter(3, 2, 1)
    adapter.embedding_generator = nn.Identity()  # type: ignore[assignment]
    tokens = torch.arange(12.0).reshape(1, 2, 2, 3)
    feature = adapter(tokens)
    assert feature.tolist() == [[[[0, 4, 8], [1, 5, 9]], [[2, 6, 10], [3, 7, 11]]]]
    turned = tokens.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # the same values, other strides
    assert torch.equal(adapter(turned), feature)


def test_before_a_block_columns_are_weighed() -> None:
    adapter = LowLevelAdapter(2, 2, 1)
    adapter.lightweight_mlp_0 = nn.Identity()
    tokens, low = torch.randn(2, 2, 3, 2), torch.randn(2, 2, 3, 2)
    expected = tokens.clone()
    for b in range(2):
        for column in range(3):
            mixed = 0.5 * tokens[b, :, column] + low[b, :, column]
            expected[b, :, column] += mixed / (1 + torch.exp(-(mixed.max() + mixed.mean())))
    torch.testing.assert_close(adapter.merged(0, tokens, low), expected)


def test_beside_the_mlp_channels_are_weighed() -> None:
    torch.manual_seed(0)
    adapter = ChannelAdapter(2, 3)
    x, low = torch.randn(2, 2, 3, 2), torch.randn(2, 2, 3, 2)
    mixed = x + low
    for b in range(2):
        for channel in range(2):
            part = (x + low)[b, :, :, channel]
            mixed[b, :, :, channel] = part / (1 + torch.exp(-(part.max() + part.mean())))
    hidden = mixed @ adapter.D_fc1.weight.T + adapter.D_fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = 0.5 * (hidden @ adapter.D_fc2.weight.T + adapter.D_fc2.bias)
    torch.testing.assert_close(adapter(x, low), expected)


def test_prototypes_are_recalled_by_the_product_and_compared_by_the_cosine() -> None:
    generator = PrototypePrompt(2, 3)
    embedding = torch.tensor([[[[1.0, 2.0], [3.0, 0.0]], [[0.0, -2.0], [4.0, 1.0]]]])
    memory = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.5]])
    generator.memory_bank.weight.data.copy_(memory)
    summary = np.array([1.5 + 3.0, 0.75 + 4.0])
    shares = np.exp(memory.numpy() @ summary)
    recalled = shares @ memory.numpy() / shares.sum()
    cosine = (np.moveaxis(embedding[0].numpy(), 0, -1) @ recalled) / (
        np.linalg.norm(recalled) * np.linalg.norm(embedding[0].numpy(), axis=0)
    )
    fuse = torch.zeros(2, 5, 1, 1)
    fuse[0, 4] = fuse[1, 3] = fuse[1, 0] = (
        1  # likeness alone; second of the recalled and first of the embedding
    )
    generator.fuse_conv.weight.data.copy_(fuse)
    generator.fuse_conv.bias.data.zero_()  # type: ignore[union-attr]
    prompt = generator(embedding).detach().numpy()[0]
    np.testing.assert_allclose(prompt[0], cosine, atol=1e-6)
    np.testing.assert_allclose(prompt[1], recalled[1] + embedding[0, 0].numpy(), atol=1e-5)


def test_only_positive_values_of_a_slice_are_cut_off() -> None:
    values = np.zeros((20, 20), np.int16)
    values[5:15] = np.arange(1, 201).reshape(10, 20)
    values[5, 0], values[14, 19] = -5000, 9000
    seen = standardised_slice(values)
    assert seen is not None
    assert seen.shape == (3, 20, 20)
    assert (seen == seen[0]).all()
    assert seen[0, 5, 0] == seen.min()  # what is below zero stays
    lower, upper = np.percentile(values[values > 0], [0.2, 99.8])
    cut = np.where(values > 0, values.clip(lower, upper), values)
    np.testing.assert_allclose(seen[0], (cut - cut.mean()) / cut.std(), atol=1e-5)


def test_a_slice_with_nothing_in_it_is_background(network: Dapsam, volume: Volume) -> None:
    assert standardised_slice(np.zeros((4, 4))) is None
    assert standardised_slice(np.full((4, 4), 7)) is None
    predictor = predictor_of(network)
    predictor.set_volume(volume, "K", WINDOW)
    (result,) = predictor.predict(Prompts(), range(2, 3))
    assert result.confidence == 1.0
    assert not result.labels.any()


def test_a_slice_of_the_trained_size_is_not_resized(network: Dapsam) -> None:
    picture = np.random.default_rng(3).integers(0, 300, (64, 64))
    seen = standardised_slice(picture)
    assert seen is not None
    with torch.inference_mode():
        logits, _ = network(torch.from_numpy(seen)[None])
        share = network.enlarged(logits)[0, 0].sigmoid().numpy()
    labels, confidence = predictor_of(network).segment(picture)
    np.testing.assert_array_equal(labels, share >= 0.5)
    assert 0 < labels.mean() < 1
    assert confidence == pytest.approx(share[share >= 0.5].mean(), abs=1e-6)


def test_a_session_segments_a_volume_by_itself(network: Dapsam, volume: Volume) -> None:
    predictor = predictor_of(network)
    session = Session(volume, predictor, axis="K")
    session.propagate()
    assert set(session.confidence) == {0, 1, 2, 3}
    for k in (0, 1, 3):
        np.testing.assert_array_equal(session.labels[k], predictor.segment(volume.voxels[k])[0])
        assert session.labels[k].any()
    assert not session.labels[2].any()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS"])
def test_the_network_sees_a_patient_the_way_it_was_trained(
    network: Dapsam, volume: Volume, codes: str
) -> None:
    predictor = predictor_of(network, file_axes=codes)
    predictor.set_volume(volume, "K", WINDOW)
    (result,) = predictor.predict(Prompts(), range(1))
    flips = tuple(
        slice(None, None, -1 if code in "RA" else 1) for code in (codes[1], codes[0])
    )  # the array runs to left and posterior
    expected = predictor.segment(np.ascontiguousarray(volume.voxels[0][flips]))[0][flips]
    np.testing.assert_array_equal(result.labels, expected)


def test_disc_and_cup_of_a_photograph() -> None:
    network = tiny(2, seed=9)  # one whose masks overlap in part
    predictor = DapsamVolumePredictor(network, FUNDUS, "a" * 64, CPU)
    picture = np.random.default_rng(5).integers(0, 256, (40, 70, 3)).astype(np.uint8)
    photograph = Volume(picture[None], Geometry((1, 40, 70), AS_STORED))
    session = Session(photograph, predictor, axis="K")
    session.propagate()
    seen = np.array(Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
    seen = (seen - seen.mean(axis=(0, 1))) / seen.std(axis=(0, 1))
    given = standardised_photograph(picture, 64)
    assert given is not None
    np.testing.assert_allclose(given, seen.transpose(2, 0, 1), atol=1e-5)
    labels = predictor.segment(picture)[0]
    np.testing.assert_array_equal(session.labels[0], labels)
    with torch.inference_mode():
        share = network.enlarged(network(torch.from_numpy(given)[None])[0])
        share = nn.functional.interpolate(share, (40, 70), mode="bilinear", antialias=True)[0].sigmoid()
    disc, cup = (share >= 0.5).numpy()
    np.testing.assert_array_equal(labels, np.where(cup, 2, np.where(disc, 1, 0)))
    assert set(np.unique(labels)) == {0, 1, 2}


def test_prompts_and_images_of_the_other_kind_are_refused(network: Dapsam, volume: Volume) -> None:
    session = Session(volume, predictor_of(network), axis="K")
    with pytest.raises(PromptError, match=r"takes no prompts, but a point was placed.*mobile_sam"):
        session.add(Point(tuple(volume.geometry.centre_ras)))
    colour = Volume(np.zeros((1, 4, 4, 3), np.uint8), Geometry((1, 4, 4), np.eye(4)))
    with pytest.raises(VolumeError, match="takes grey images, but this one is colour"):
        predictor_of(network).set_volume(colour, "K", WINDOW)
    with pytest.raises(VolumeError, match="takes colour images, but this one is grey"):
        DapsamVolumePredictor(tiny(2), FUNDUS, "", CPU).set_volume(volume, "K", WINDOW)
    with pytest.raises(VolumeError, match="must be set"):
        next(iter(predictor_of(network).predict(Prompts())))


def test_other_files_are_refused_and_the_right_one_is_loaded(network: Dapsam, tmp_path: Path) -> None:
    file = tmp_path / "dapsam.pth"
    torch.save({f"module.{name}": value for name, value in published_tensors(network).items()}, file)
    predictor = build_predictor(PROSTATE, file, None, CPU)
    assert isinstance(predictor, DapsamVolumePredictor)
    picture = np.random.default_rng(3).integers(0, 300, (64, 64))
    np.testing.assert_array_equal(predictor.segment(picture)[0], predictor_of(network).segment(picture)[0])
    with pytest.raises(CardError, match="names 2 classes, but the file has 1 masks"):
        build_predictor(FUNDUS, file, None, CPU)
    with pytest.raises(
        WeightsError, match=r"lacks prompt_generator\.memory_bank\.weight; it looks like SAM-UNet"
    ):
        load_dapsam({"image_encoder.sam_img_encoder.pos_embed": torch.zeros(1)})
    fewer = dict(published_tensors(network))
    del fewer["prompt_generator.fuse_conv.bias"]
    with pytest.raises(WeightsError, match=r"lacks prompt_generator\.fuse_conv\.bias; it looks like DAPSAM"):
        load_dapsam(fewer)
