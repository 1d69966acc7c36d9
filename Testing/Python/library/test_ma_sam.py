from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from goldens import arrays, bare_ma_sam_of, golden, ma_sam_of, published_keys
from SAMAdaptLib.cards import ModelCard, Source
from SAMAdaptLib.errors import CardError, PromptError, VolumeError, WeightsError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models import build_predictor, ma_sam
from SAMAdaptLib.models.ma_sam import (
    DepthAdapter,
    FacT,
    MaSam,
    MaSamVolumePredictor,
    base_tensors,
    load_into_ma_sam,
    load_ma_sam,
    published_tensors,
)
from SAMAdaptLib.models.vit import VIT_B, VIT_H, ViTShape, blocks_of
from SAMAdaptLib.prompts import Box, Point, Prompts
from SAMAdaptLib.volume import IntensityWindow, Volume

CARD = ModelCard(
    "ma_sam.golden", "MA-SAM", "ma_sam", Source("manual"), "", options={"window": [-200, 250]}, dimensions=3
)
BOX_CARD = replace(CARD, title="MA-SAM with boxes", prompts=("box",))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> MaSam:
    return ma_sam_of("ma_sam")


@pytest.fixture(scope="module")
def volume() -> Volume:
    voxels = arrays("ma_sam")["hu_volume_xyz"].transpose(2, 1, 0)
    return Volume(voxels, Geometry(voxels.shape, np.eye(4)), "CT")


def logits_of(network: MaSam, name: str) -> torch.Tensor:
    boxes = arrays(name).get("bbox_xyxy_bd4")
    with torch.inference_mode():
        stacks = torch.from_numpy(arrays(name)["input_bdhw"])
        return network(stacks, None if boxes is None else torch.from_numpy(boxes))[0]


def difference(network: MaSam, name: str) -> float:
    return float((logits_of(network, name) - torch.from_numpy(arrays(name)["low_res_logits"])).abs().max())


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("ma_sam_vit_b_nc12", VIT_B, 12), ("ma_sam_vit_h_nc12", VIT_H, 12), ("ma_sam_vit_h_nc1", VIT_H, 1)],
)
def test_the_published_files_have_exactly_these_keys_and_shapes(
    name: str, shape: ViTShape, classes: int
) -> None:
    with torch.device("meta"):
        network = MaSam(replace(shape, input_size=512), classes)
        fact = FacT(shape.embed_dim, 32, shape.depth)
    named = published_tensors(network, fact)
    assert {key: list(tensor.shape) for key, tensor in named.items()} == published_keys(name)
    sam = published_keys({768: "sam_vit_b", 1280: "sam_vit_h"}[shape.embed_dim])
    assert set(base_tensors(network)) == {key for key in sam if key.startswith("image_encoder.")}


@pytest.mark.parametrize("name", ["ma_sam", "ma_sam_bbox"])
def test_the_official_numbers_come_out(name: str) -> None:
    network = ma_sam_of(name)
    assert difference(network, name) < 1e-4
    labels = logits_of(network, name).argmax(dim=1).numpy()
    np.testing.assert_array_equal(labels, arrays(name)["pred_labels"])


@pytest.mark.parametrize("name", ["ma_sam", "ma_sam_bbox"])
def test_every_adapter_counts(name: str) -> None:
    network = ma_sam_of(name)
    for block in blocks_of(network.image_encoder):
        for place in ("before_attention", "after_attention"):
            adapter = getattr(block, place)
            setattr(block, place, nn.Identity())
            assert difference(network, name) > 1e-3
            setattr(block, place, adapter)
    assert difference(network, name) < 1e-4


def test_every_tensor_of_both_files_counts() -> None:
    """Each is perturbed in the file, so that a tensor loaded to the wrong place or not at all is found."""
    base, adapter = golden("ma_sam").base_tensors(), golden("ma_sam").tensors(None)
    # Blocks 0 (windows) and 1 (the whole grid) stand for all: every kind of tensor once.
    keys = [(base, key) for key in base if key.startswith("image_encoder.") and not _later_block(key)]
    keys += [(adapter, key) for key in adapter if not _later_block(key)]
    silent = _silent(keys, base, adapter, "ma_sam")
    without_effect = set(golden("ma_sam").facts["tensors_with_no_effect"]["in_checkpoint"])
    shifts = {key for key in adapter if key.endswith("k_proj.bias")}  # the softmax takes them out
    scores = {key for key in adapter if "iou_prediction_head" in key}  # seen in the scores, not in the masks
    assert silent == without_effect | shifts | scores


def test_boxes_use_the_corners_and_nothing_else_of_the_prompt_encoder() -> None:
    base, adapter = golden("ma_sam_bbox").base_tensors(), golden("ma_sam_bbox").tensors(None)
    keys = [(adapter, key) for key in adapter if key.startswith("prompt_encoder.")]
    without_effect = golden("ma_sam_bbox").facts["tensors_with_no_effect"]["in_checkpoint"]
    assert _silent(keys, base, adapter, "ma_sam_bbox") == set(without_effect)


def _later_block(key: str) -> bool:
    return re.search(r"(blocks\.|_FacTs_00)[2-9]", key) is not None


def _silent(
    keys: list[tuple[dict[str, torch.Tensor], str]],
    base: dict[str, torch.Tensor],
    adapter: dict[str, torch.Tensor],
    name: str,
) -> set[str]:
    network, silent = bare_ma_sam_of(name), set()
    for file, key in keys:
        kept = file[key]
        file[key] = kept + 0.1 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
        load_into_ma_sam(network, base, adapter)
        if difference(network, name) < 1e-3:
            silent.add(key)
        file[key] = kept
    return silent


def test_the_scale_of_the_increments_counts() -> None:
    assert difference(ma_sam_of("ma_sam", scale=0.9), "ma_sam") > 1e-3


def test_folded_increments_equal_increments_beside(network: MaSam) -> None:
    """Unfolded: y -> v @ Q @ u @ y for queries and values, nothing for keys."""
    adapter, base = golden("ma_sam").tensors(None), golden("ma_sam").base_tensors()
    u, v = adapter["image_encoder.FacTu.weight"], adapter["image_encoder.FacTv.weight"]
    y = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    for index, block in enumerate(blocks_of(network.image_encoder)):
        prefix = f"image_encoder.blocks.{index}.attn.qkv"
        q, k, w = (y @ base[f"{prefix}.weight"].T + base[f"{prefix}.bias"]).chunk(3, dim=1)
        q = q + y @ u.T @ adapter[f"q_FacTs_{index:03}"].T @ v.T
        w = w + y @ u.T @ adapter[f"v_FacTs_{index:03}"].T @ v.T
        torch.testing.assert_close(block.attn.qkv(y), torch.cat([q, k, w], dim=1), atol=2e-5, rtol=0)


def test_the_adapter_is_a_convolution_over_slices_with_zeros_outside() -> None:
    torch.manual_seed(0)
    adapter = DepthAdapter(embed_dim=6, channels=4, slices=3)
    x = torch.randn(6, 2, 5, 6)
    y = adapter.linear_down(adapter.norm(x)).reshape(2, 3, 2, 5, 4).permute(0, 4, 1, 2, 3)
    y = nn.functional.gelu(adapter.conv(y)).permute(0, 2, 3, 4, 1).reshape(6, 2, 5, 4)
    torch.testing.assert_close(adapter(x), x + adapter.linear_up(y), atol=1e-6, rtol=0)
    assert adapter.norm.eps == 1e-6


def test_a_batch_of_stacks_is_the_same_as_one_by_one() -> None:
    network, z = ma_sam_of("ma_sam_bbox"), arrays("ma_sam_bbox")
    stacks, boxes = torch.from_numpy(z["input_bdhw"]), torch.from_numpy(z["bbox_xyxy_bd4"])
    with torch.inference_mode():
        second = network(stacks[1:], boxes[1:])[0]
    np.testing.assert_allclose(second, z["low_res_logits"][5:], atol=1e-4)


def test_the_whole_volume_has_the_official_labels(network: MaSam, volume: Volume) -> None:
    predictor = MaSamVolumePredictor(network, CARD, "", CPU)
    predictor.set_volume(volume, "K", IntensityWindow(0, 1))  # the card's window overrules
    labels = np.zeros(volume.geometry.shape_kji, dtype=np.uint8)
    results = list(predictor.predict(Prompts()))
    for result in results:
        volume.geometry.plane("K", result.index).insert(labels, result.labels)
    np.testing.assert_array_equal(labels.transpose(2, 1, 0), arrays("ma_sam")["prediction_xyz"])
    assert [result.index for result in results] == [0, 1, 2, 3, 4, 5]
    assert all(0 < result.confidence < 1 for result in results)


def test_part_of_a_volume_is_the_same_part_of_the_whole(network: MaSam, volume: Volume) -> None:
    predictor = MaSamVolumePredictor(network, CARD, "", CPU)
    predictor.set_volume(volume, "K", IntensityWindow(0, 1))
    expected = arrays("ma_sam")["prediction_xyz"]
    for result in predictor.predict(Prompts(), range(2, 4)):
        picture = volume.geometry.plane("K", result.index).extract(expected.transpose(2, 1, 0))
        np.testing.assert_array_equal(result.labels, picture)


def test_a_patient_stored_the_other_way_round_gets_the_same_labels(network: MaSam, volume: Volume) -> None:
    flipped = Volume(
        volume.voxels[::-1, :, ::-1].copy(), Geometry((6, 80, 80), np.diag([-1.0, 1, -1, 1])), "CT"
    )
    predictor = MaSamVolumePredictor(network, CARD, "", CPU)
    predictor.set_volume(flipped, "K", IntensityWindow(0, 1))
    labels = np.zeros((6, 80, 80), dtype=np.uint8)
    for result in predictor.predict(Prompts(), range(1, 3)):
        flipped.geometry.plane("K", result.index).insert(labels, result.labels)
    expected = arrays("ma_sam")["prediction_xyz"].transpose(2, 1, 0)
    np.testing.assert_array_equal(labels[1:3], expected[::-1, :, ::-1][1:3])


def test_the_card_says_which_way_the_training_files_ran(network: MaSam, volume: Volume) -> None:
    """For a network trained on files whose x runs to the left, the official labels belong to such a file."""
    voxels = volume.voxels
    as_left = Volume(voxels, Geometry(voxels.shape, np.diag([-1.0, 1, 1, 1])), "CT")
    predictor = MaSamVolumePredictor(
        network, replace(CARD, options={"window": [-200, 250], "file_axes": "LAS"}), "", CPU
    )
    predictor.set_volume(as_left, "K", IntensityWindow(0, 1))
    labels = np.zeros(voxels.shape, dtype=np.uint8)
    for result in predictor.predict(Prompts(), range(3, 4)):
        as_left.geometry.plane("K", 3).insert(labels, result.labels)
    np.testing.assert_array_equal(labels[3], arrays("ma_sam")["prediction_xyz"][:, :, 3].T)


def test_oblong_slices_of_another_size_are_segmented(network: MaSam) -> None:
    voxels = np.random.default_rng(0).integers(-300, 300, (2, 48, 60)).astype(np.int16)
    predictor = MaSamVolumePredictor(network, CARD, "", CPU)
    predictor.set_volume(Volume(voxels, Geometry(voxels.shape, np.eye(4))), "K", IntensityWindow(0, 1))
    assert [result.labels.shape for result in predictor.predict(Prompts())] == [(48, 60)] * 2


class TestBoxes:
    @pytest.fixture
    def predictor(self) -> MaSamVolumePredictor:
        predictor = MaSamVolumePredictor(ma_sam_of("ma_sam_bbox"), BOX_CARD, "", CPU)
        voxels = np.random.default_rng(0).integers(-300, 300, (9, 64, 64)).astype(np.int16)
        volume = Volume(voxels, Geometry(voxels.shape, np.diag([-1.0, -1, 1, 1])))
        predictor.set_volume(volume, "K", IntensityWindow(0, 1))
        return predictor

    def test_a_box_speaks_for_the_slices_of_its_stack(self, predictor: MaSamVolumePredictor) -> None:
        box = Box.from_corners((-10, -12, 4), (-40, -50, 4))
        assert [result.index for result in predictor.predict(Prompts((box,)))] == [4]
        spread = predictor.predict(Prompts((box,)), range(9))
        assert [result.index for result in spread] == [2, 3, 4, 5, 6]
        thick = Box.from_corners((-10, -12, 0), (-40, -50, 6))
        assert [result.index for result in predictor.predict(Prompts((thick,)), range(1, 9))] == [
            1,
            2,
            3,
            4,
            5,
            6,
        ]

    def test_the_box_reaches_the_network_in_its_pixels(self, predictor: MaSamVolumePredictor) -> None:
        box = np.float32([10, 12, 40, 50])
        with torch.inference_mode():
            stack = torch.from_numpy(predictor.stacks.stack(4))[None]
            logits, _ = ma_sam_of("ma_sam_bbox")(stack, torch.from_numpy(box).expand(1, 5, 4))
        expected = logits.softmax(dim=1).numpy()
        np.testing.assert_allclose(predictor.probabilities(4, box), expected, atol=1e-6)
        only = Box.from_corners((-10, -12, 4), (-40, -50, 4))
        mean = predictor.stacks.ensemble(range(2, 7), lambda centre: predictor.probabilities(centre, box))
        labels = {index: value.argmax(axis=0) for index, value, _ in mean}
        results = list(predictor.predict(Prompts((only,)), range(9)))
        assert len(results) == 5
        for result in results:
            np.testing.assert_array_equal(result.labels, labels[result.index])

    def test_other_prompts_and_none_are_refused(self, predictor: MaSamVolumePredictor) -> None:
        with pytest.raises(PromptError, match=r"MA-SAM with boxes takes box, but got point"):
            list(predictor.predict(Prompts((Point((-10, -10, 3)),))))
        with pytest.raises(PromptError, match=r"takes box, but got nothing"):
            list(predictor.predict(Prompts()))


def test_an_automatic_network_refuses_prompts_and_a_missing_volume(network: MaSam) -> None:
    predictor = MaSamVolumePredictor(network, CARD, "", CPU)
    with pytest.raises(VolumeError, match="must be set"):
        list(predictor.predict(Prompts()))
    predictor.set_volume(
        Volume(np.zeros((2, 80, 80), np.int16), Geometry((2, 80, 80), np.eye(4))), "K", IntensityWindow(0, 1)
    )
    with pytest.raises(PromptError, match="takes no prompts, but got point"):
        list(predictor.predict(Prompts((Point((1, 1, 1)),))))


def test_files_of_other_networks_are_refused() -> None:
    base, adapter = golden("ma_sam").base_tensors(), golden("ma_sam").tensors(None)
    with pytest.raises(WeightsError, match=r"lacks image_encoder.FacTu.weight; it looks like SAM or MedSAM"):
        load_into_ma_sam(bare_ma_sam_of("ma_sam"), base, base)
    with pytest.raises(WeightsError, match=r"SAM \(the base of MA-SAM\) was wanted.*looks like a MA-SAM"):
        load_into_ma_sam(bare_ma_sam_of("ma_sam"), adapter, adapter)
    with pytest.raises(WeightsError, match="holds an encoder of 32 channels"):
        load_ma_sam(base, adapter)
    del adapter["v_FacTs_002"]
    with pytest.raises(WeightsError, match="lacks v_FacTs_002;"):
        load_into_ma_sam(bare_ma_sam_of("ma_sam"), base, adapter)


def test_sizes_are_read_off_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = bare_ma_sam_of("ma_sam")
    built: list[tuple[object, ...]] = []

    def build(*sizes: object) -> MaSam:
        built.append(sizes)
        return bare

    monkeypatch.setattr(ma_sam, "vit_shape_of", lambda tensors, input_size: golden("ma_sam").vit_shape())
    monkeypatch.setattr(ma_sam, "MaSam", build)
    load_ma_sam(golden("ma_sam").base_tensors(), golden("ma_sam").tensors(None), 80)
    assert built == [(golden("ma_sam").vit_shape(), 3, 24, 5)]
    assert difference(bare, "ma_sam") < 1e-4


def test_a_card_without_a_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="must name the SAM model"):
        build_predictor(CARD, tmp_path / "x.pth", None, CPU)
