from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from goldens import GOLDENS, published_keys
from SAMAdaptLib.cards import ModelCard, Source, find_card
from SAMAdaptLib.errors import CardError, PromptError, VolumeError, WeightsError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models import build_predictor, desam, desam_predictors
from SAMAdaptLib.models.desam import (
    INSTANCE_EPS,
    DeSam,
    DeSamDecoder,
    DeSamEncoder,
    Gate,
    ResidualBlock,
    load_desam,
)
from SAMAdaptLib.models.desam_predictors import (
    Candidates,
    DeSamVolumePredictor,
    cleaned_mask,
    grey_values,
    grid_points,
    point_grid,
    select,
    shown,
    whole_box,
)
from SAMAdaptLib.models.framing import LongestSide
from SAMAdaptLib.models.mask_decoder import THREE_MASKS
from SAMAdaptLib.models.prompt_encoder import PromptEncoder
from SAMAdaptLib.models.vit import VIT_B, VIT_H, ImageEncoderViT, ViTShape
from SAMAdaptLib.prompts import Point, Prompts
from SAMAdaptLib.session import Session
from SAMAdaptLib.verify import verify
from SAMAdaptLib.verify.desam import tiny_desam
from SAMAdaptLib.verify.golden_sets import find_sets
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptLib.weights import Checkpoint, load_into, recognise

CPU = torch.device("cpu")
TINY = ViTShape(
    embed_dim=16, depth=4, heads=2, global_blocks=(0, 1, 2, 3), input_size=64, window=3, out_channels=64
)
OPTIONS = {"slice_size": 32, "grid": 2, "smallest_area": 4, "lowest_iou": -100.0}
CARD = ModelCard("desam.golden", "DeSAM", "desam", Source("manual"), "", OPTIONS, dimensions=3)
IDLE = ("output_upscaling", "output_hypernetworks_mlps", "mask_downscaling", "point_embeddings.0")


@pytest.fixture
def network() -> DeSam:
    return tiny()


def tiny() -> DeSam:
    built = DeSam(TINY, PromptEncoder(64, (4, 4), (64, 64), 8), DeSamDecoder(16, 64, 24, 2, 12))
    generator = torch.Generator().manual_seed(0)
    for tensor in built.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return built.eval()


@torch.inference_mode()
def outputs_of(network: DeSam) -> Tensor:
    """All that is used of the network: a mask of both levels for a box, a point and a filler, and scores."""
    generator = torch.Generator().manual_seed(1)
    features = network.image_encoder(torch.randn(1, 3, 64, 64, generator=generator))
    points, labels = torch.rand(1, 1, 2, generator=generator) * 64, torch.ones(1, 1)
    box = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    found = []
    for given in ({"boxes_xyxy": box}, {"points_xy": points, "labels": labels}):
        sparse, dense = network.prompt_encoder(**given)
        levels, scores = network.mask_decoder.decode_levels(
            features, network.prompt_encoder.dense_pe(), sparse, dense
        )
        found += [*levels, scores]
    return torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize(("name", "inputs"), [("grid_select", 2), ("preprocess", 3)])
def test_choice_and_preprocessing_are_those_of_the_official_code(name: str, inputs: int) -> None:
    (found,) = find_sets(GOLDENS / "desam" / name)
    rows = verify(found.path)
    assert (
        len(rows) == len(found.arrays()) - inputs
    )  # the preprocessing records labels too, which we have not
    for row in rows:
        assert row.passed, row


def test_the_network_gives_the_official_numbers(shared_data: Path) -> None:
    path = shared_data.parent / "goldens" / "desam" / "vit.json"
    if not path.is_file():
        pytest.skip("the recorded set desam is not beside the shared data")
    rows = verify(path)
    assert {row.output for row in rows} == {
        name for name in find_sets(path)[0].arrays() if name[:4] == "out_"
    }
    for row in rows:
        assert row.passed, row


def test_every_tensor_of_the_recorded_network_counts(shared_data: Path) -> None:
    """Against the recorded numbers: perturbed, each changes them, but for those the official code ignores."""
    path = shared_data.parent / "goldens" / "desam" / "vit.json"
    if not path.is_file():
        pytest.skip("the recorded set desam is not beside the shared data")
    (golden,) = find_sets(path)
    z, tensors, network = golden.arrays(), golden.tensors(None), tiny_desam(golden).eval()
    box = torch.tensor([[0.0, 0.0, 128.0, 128.0]])

    @torch.inference_mode()
    def difference() -> float:
        load_into(network, tensors, "DeSAM")
        features = network.image_encoder(LongestSide(128).to_input(z["in_image_hwc"]))
        pe, seen = network.prompt_encoder.dense_pe(), []
        for given in (
            {"boxes_xyxy": box},
            {"points_xy": torch.from_numpy(z["in_points"][:1])[None], "labels": torch.ones(1, 1)},
        ):
            levels, scores = network.mask_decoder.decode_levels(
                features, pe, *network.prompt_encoder(**given)
            )
            seen.append((levels, scores))
        (box_levels, box_scores), (point_levels, point_scores) = seen
        pairs = [
            (box_levels[0], "out_wholebox_logits"),
            (box_levels[1], "out_deepsup_1"),
            (box_scores, "out_wholebox_iou"),
            (point_levels[0], "out_point0_logits"),
            (point_scores, "out_point0_iou"),
        ]
        return max(float(np.abs(value.numpy() - z[name]).max()) for value, name in pairs)

    assert difference() < 1e-4
    silent = set()
    for key, kept in list(tensors.items()):
        tensors[key] = kept + 0.1 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
        if difference() < 1e-4:
            silent.add(key)
        tensors[key] = kept
    official = set(golden.facts["keys_without_effect_on_these_outputs"])
    gates = {key for key in tensors if ".se." in key}  # of a map whose mean is zero
    shifts = {key for key in tensors if key.endswith("k_proj.bias")}  # the softmax takes them out
    assert official - silent <= gates
    assert silent <= official | gates | shifts


def test_every_tensor_has_its_place(network: DeSam) -> None:
    """On random sizes: what is idle is known by name, all else changes masks or scores."""
    before = outputs_of(network)
    assert bool(torch.isfinite(before).all())
    silent = []
    for key, tensor in network.state_dict().items():
        kept = tensor.clone()
        tensor.add_(torch.randn(kept.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
        if float((outputs_of(network) - before).abs().max()) < 1e-5:
            silent.append(key)
        tensor.copy_(kept)
    unneeded = [
        key
        for key in network.state_dict()
        if any(part in key for part in IDLE) or key.endswith("k_proj.bias") or ".se." in key
    ]
    levels = "mask_decoder.pimm.conv_blocks_context"
    same_width = [
        f"{levels}.1.residual_block.0.1.conv3.conv.weight",
        f"{levels}.2.block_init.conv3.conv.weight",  # 16 channels in and out
        f"{levels}.2.residual_block.0.1.conv3.conv.weight",
        f"{levels}.2.residual_block.1.1.conv3.conv.weight",
    ]
    assert set(silent) <= {*unneeded, *same_width}
    assert set(same_width) <= set(silent)


def test_a_file_has_exactly_the_official_keys_and_shapes() -> None:
    with torch.device("meta"):
        network = DeSam(VIT_H)
    found = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert found == published_keys("desam_vit_h")
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == pytest.approx(
        650.85e6, rel=1e-4
    )


def test_every_norm_has_the_epsilon_of_the_official_code(network: DeSam) -> None:
    assert {m.eps for m in network.image_encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.eps for m in network.mask_decoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert INSTANCE_EPS == 1e-5


def test_the_encoder_gives_its_global_blocks_and_sams_embedding() -> None:
    shape = replace(TINY, depth=6, global_blocks=(0, 2, 3, 5))
    torch.manual_seed(0)
    encoder, plain = DeSamEncoder(shape).eval(), ImageEncoderViT(shape).eval()
    nn.init.normal_(encoder.pos_embed)
    plain.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        features = encoder(x)
        tokens = plain.patch_embed(x) + plain.pos_embed
        for index, block in enumerate(plain.blocks):
            tokens = block(tokens)
            if index in (0, 2, 3):
                seen = features[(0, 2, 3).index(index)]
                torch.testing.assert_close(seen, tokens.permute(0, 3, 1, 2), atol=0, rtol=0)
        torch.testing.assert_close(features[-1], plain(x), atol=0, rtol=0)
    assert len(features) == 4


def test_a_residual_block_is_that_of_the_paper_code() -> None:
    torch.manual_seed(3)
    block = ResidualBlock(16, 32)
    x = torch.randn(1, 16, 5, 6)

    def norm(y: Tensor) -> Tensor:
        mean, variance = y.mean(dim=(2, 3), keepdim=True), y.var(dim=(2, 3), keepdim=True, correction=0)
        return (y - mean) / (variance + 1e-5).sqrt()

    def leaky(y: Tensor) -> Tensor:
        return torch.where(y > 0, y, 0.01 * y)

    y = leaky(norm(nn.functional.conv2d(x, block.conv1.conv.weight, padding=1)))
    y = 0.5 * norm(nn.functional.conv2d(y, block.conv2.conv.weight, padding=1))  # the gate sees means of zero
    y = leaky(y + norm(nn.functional.conv2d(x, block.conv3.conv.weight)))
    torch.testing.assert_close(block(x), y, atol=1e-5, rtol=0)


def test_a_gate_weighs_channels_by_their_means() -> None:
    torch.manual_seed(4)
    gate = Gate(32)
    x = torch.randn(2, 32, 3, 3)
    means = x.mean(dim=(2, 3))
    share = torch.sigmoid(torch.relu(means @ gate.fc[0].weight.T) @ gate.fc[2].weight.T)
    torch.testing.assert_close(gate(x), x * share[:, :, None, None], atol=1e-6, rtol=0)


def test_more_than_one_mask_is_refused(network: DeSam) -> None:
    with pytest.raises(PromptError, match="DeSAM gives one mask"):
        network.mask_decoder([], torch.zeros(0), torch.zeros(0), torch.zeros(0), THREE_MASKS)


def test_each_point_of_the_grid_stands_alone(network: DeSam) -> None:
    """Whatever is decoded together, and whatever the size of the last batch."""
    picture = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    framing = LongestSide(64)
    with torch.inference_mode():
        features = network.image_encoder(framing.to_input(picture))
        found = point_grid(network, framing, features, (24, 32), 3)
        np.testing.assert_allclose(found.points_xy[1], [16, 4])
        np.testing.assert_allclose(found.points_xy[3], [32 / 6, 12])
        for index in (0, 5, 8):
            x, y = found.points_xy[index]
            point = torch.tensor([[[x * 2, y * 2]]], dtype=torch.float32)
            sparse, dense = network.prompt_encoder(point, torch.ones(1, 1))
            logits, scores = network.mask_decoder(features, network.prompt_encoder.dense_pe(), sparse, dense)
            full = framing.to_picture(logits, (24, 32))[0, 0]
            np.testing.assert_allclose(found.logits[index], full, atol=1e-5)
            assert found.scores[index] == pytest.approx(float(scores), abs=1e-5)


def candidates(masks: list[tuple[slice, slice]], scores: list[float], size: int = 40) -> Candidates:
    drawn = np.zeros((len(masks), size, size), dtype=bool)
    for mask, place in zip(drawn, masks, strict=True):
        mask[place] = True
    logits = np.where(drawn, 4.0, -4.0).astype(np.float32)
    return Candidates(drawn, logits, np.array(scores, np.float32), np.zeros((len(masks), 2)))


def test_the_best_mask_without_noise_comes_first_though_another_scores_better() -> None:
    given = candidates([np.s_[2:12, 2:12], np.s_[20:30, 20:30], np.s_[20:30, 2:12]], [0.9, 0.8, 0.4])
    given.masks[0, 6, 6] = False  # a hole
    best = select(given, smallest_area=10)
    np.testing.assert_allclose(best.scores, [0.8, 0.9])
    assert best.masks[1, 6, 6]
    assert len(select(given, lowest_iou=0.9, smallest_area=10)) == 0


def test_of_two_masks_of_one_box_the_better_one_stays() -> None:
    given = candidates([np.s_[2:12, 2:12], np.s_[2:12, 2:13], np.s_[2:12, 8:18]], [0.7, 0.8, 0.6])
    best = select(given, smallest_area=1)
    np.testing.assert_allclose(best.scores, [0.8, 0.6])
    np.testing.assert_array_equal(best.boxes_xyxy[0], [2, 2, 12, 11])
    np.testing.assert_allclose(best.stability, [1, 1])


def test_small_holes_are_filled_and_islands_removed_but_the_largest_stays() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:10, 2:10] = True
    mask[4, 4] = mask[5, 5] = False  # one hole of two pixels that touch at a corner
    mask[15, 15] = True
    whole, changed = cleaned_mask(mask, 3)
    assert changed
    assert whole.sum() == 64
    same, changed = cleaned_mask(whole, 3)
    assert not changed
    np.testing.assert_array_equal(same, whole)
    all_small, _ = cleaned_mask(whole, 100)
    np.testing.assert_array_equal(all_small, whole)
    two, _ = cleaned_mask(mask, 2)
    assert not two[4, 4]  # two pixels are not fewer than two


def test_an_empty_mask_has_no_box_and_nothing_to_clean() -> None:
    assert not cleaned_mask(np.zeros((5, 5), dtype=bool), 1)[0].any()
    empty = candidates([np.s_[0:0, 0:0]], [0.9])
    np.testing.assert_array_equal(empty.boxes_xyxy, [[0, 0, 0, 0]])


def test_grey_values_are_stretched_between_percentiles_of_the_whole_volume() -> None:
    voxels = np.arange(1000, dtype=np.int16).reshape(10, 10, 10)
    grey = grey_values(voxels)
    assert grey.dtype == np.uint8
    assert grey[0, 0, 0] == 0
    assert grey.max() == 255
    assert (grey == 255).sum() in range(5, 10)
    low, high = np.percentile(voxels, (0.5, 99.5))
    assert grey.ravel()[500] == int((500 - low) / (high - low) * 255)
    assert not grey_values(np.full((2, 3, 3), 7)).any()


def test_slices_are_shown_in_three_equal_channels() -> None:
    grey = np.zeros((30, 20), np.uint8)
    grey[10:20, 5:15] = 200
    picture = shown(grey, 16)
    assert picture.shape == (16, 16, 3)
    assert (picture[..., 0] == picture[..., 2]).all()
    assert 190 <= picture[8, 8, 0] <= 210
    assert grid_points(2, (10, 20)).tolist() == [[5, 2.5], [15, 2.5], [5, 7.5], [15, 7.5]]


def phantom(affine: np.ndarray | None = None) -> Volume:
    voxels = np.random.default_rng(1).integers(1, 50, (4, 20, 24)).astype(np.int16)
    voxels[1:3, 3:12, 14:21] += 200
    return Volume(
        voxels, Geometry(voxels.shape, np.diag([-1.0, -1, 1, 1]) if affine is None else affine), "MR"
    )


class _Bright(DeSamVolumePredictor):
    """Finds what is bright: what a trained network would do, to test what surrounds it."""

    def segment_shown(self, picture: np.ndarray) -> tuple[np.ndarray, float]:
        self.shown = picture
        return picture[..., 0] > 128, 0.75


@pytest.mark.parametrize("mode", ["grid", "box"])
def test_a_session_segments_a_volume_by_itself_and_takes_no_prompts(network: DeSam, mode: str) -> None:
    card = replace(CARD, options=OPTIONS | {"mode": mode})
    predictor = DeSamVolumePredictor(network, card, "00", CPU)
    volume = phantom()
    session = Session(volume, predictor)
    session.propagate(range(1, 3))
    assert set(session.confidence) == {1, 2}
    picture = shown(grey_values(volume.voxels)[1], 32)
    framing = LongestSide(64)
    with torch.inference_mode():
        features = network.image_encoder(framing.to_input(picture))
        if mode == "box":
            expected, score = whole_box(network, framing, features, (32, 32))[0] > 0, 1.0
        else:
            best = select(point_grid(network, framing, features, (32, 32), 2), -100.0, smallest_area=4)
            expected, score = best.masks[0], float(np.clip(best.scores[0], 0, 1))
    found, confidence = predictor.segment_shown(picture)
    np.testing.assert_array_equal(found, expected)
    assert confidence == pytest.approx(score, abs=1e-6)
    with pytest.raises(PromptError, match=r"segments by itself and takes no prompts, but a point"):
        next(predictor.predict(Prompts((Point((0.0, 0.0, 0.0)),))))


def test_no_candidate_good_enough_is_an_empty_mask(network: DeSam) -> None:
    card = replace(CARD, options=OPTIONS | {"lowest_iou": 1000.0})
    mask, _ = DeSamVolumePredictor(network, card, "00", CPU).segment_shown(np.zeros((32, 32, 3), np.uint8))
    assert not mask.any()


def test_masks_come_back_to_where_the_object_lies(network: DeSam) -> None:
    for affine in (np.diag([-1.0, -1, 1, 1]), np.diag([1.0, -1, -1, 1])):
        volume = phantom(affine)
        predictor = _Bright(network, replace(CARD, options={"slice_size": 80}), "00", CPU)
        session = Session(volume, predictor)
        session.propagate(range(4))
        truth = volume.voxels > 100
        overlap = 2 * (session.mask & truth).sum() / (session.mask.sum() + truth.sum())
        assert overlap > 0.93


def test_the_network_sees_slices_the_way_its_training_arrays_ran(network: DeSam) -> None:
    """Arrays as stored: with x to the left and y to posterior that is the radiological picture."""
    seen = {}
    for codes in ("LPS", "RPS", "LAS"):
        card = replace(CARD, options={"slice_size": 48, "file_axes": codes})
        predictor = _Bright(network, card, "00", CPU)
        predictor.set_volume(phantom(), "K", IntensityWindow(0.0, 1.0))
        list(predictor.predict(Prompts(()), range(1, 2)))
        seen[codes] = predictor.shown
    plain = shown(grey_values(phantom().voxels)[1], 48)
    np.testing.assert_array_equal(seen["LPS"], plain)
    np.testing.assert_allclose(seen["RPS"].astype(int), plain[:, ::-1].astype(int), atol=1)
    np.testing.assert_allclose(seen["LAS"].astype(int), plain[::-1].astype(int), atol=1)


def test_what_cannot_be_segmented_is_refused(network: DeSam) -> None:
    predictor = DeSamVolumePredictor(network, CARD, "00", CPU)
    with pytest.raises(VolumeError, match="A volume must be set"):
        next(predictor.predict(Prompts(())))
    colour = Volume(np.zeros((2, 4, 4, 3), np.uint8), Geometry((2, 4, 4), np.eye(4)))
    with pytest.raises(VolumeError, match="in colour"):
        predictor.set_volume(colour, "K", IntensityWindow(0.0, 1.0))
    with pytest.raises(CardError, match="should be grid or box, but is 'points'"):
        DeSamVolumePredictor(network, replace(CARD, options={"mode": "points"}), "00", CPU)


@pytest.mark.parametrize("name", ["desam_vit_h.grid", "desam_vit_h.whole_box"])
def test_every_card_builds_its_network_from_a_file_of_the_official_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full size on the meta device, which holds names and shapes and no numbers."""
    tensors = {key: torch.empty(shape, device="meta") for key, shape in published_keys("desam_vit_h").items()}
    built = []

    def loaded(module: nn.Module, given: dict[str, Tensor], *_: object) -> None:
        assert {k: t.shape for k, t in module.state_dict().items()} == {k: t.shape for k, t in given.items()}
        built.append(len(given))

    monkeypatch.setattr(desam, "load_into", loaded)
    monkeypatch.setattr(desam_predictors, "read_checkpoint", lambda path: Checkpoint(tensors, "00", "f.pth"))
    with torch.device("meta"):
        predictor = build_predictor(find_card(name), Path("f.pth"), None, torch.device("meta"))
    assert isinstance(predictor, DeSamVolumePredictor)
    assert built == [646]
    assert recognise(tensors).startswith("DeSAM")


def test_files_of_other_networks_are_refused() -> None:
    sam = {key: torch.zeros(1).expand(shape) for key, shape in published_keys("sam_vit_b").items()}
    with (
        torch.device("meta"),
        pytest.raises(WeightsError, match=r"DeSAM was wanted.*lacks mask_decoder.pimm"),
    ):
        load_desam(sam)
    assert VIT_B.embed_dim == 768
