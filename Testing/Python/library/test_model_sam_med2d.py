from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from goldens import GOLDENS, arrays, golden, published_keys
from SAMAdaptLib.cards import ModelCard, find_card
from SAMAdaptLib.errors import PromptError, WeightsError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models import build_predictor, sam_med2d
from SAMAdaptLib.models.mask_decoder import THREE_MASKS
from SAMAdaptLib.models.sam_med2d import (
    GatedAdapter,
    NearestPixels,
    SamMed2d,
    SamMed2dSlicePredictor,
    load_into_sam_med2d,
    load_sam_med2d,
    published_tensors,
)
from SAMAdaptLib.models.vit import VIT_B, blocks_of
from SAMAdaptLib.prompts import Box, MaskPrompt, PixelPrompts, Point
from SAMAdaptLib.propagation import SliceBySlice
from SAMAdaptLib.session import Session
from SAMAdaptLib.verify import verify
from SAMAdaptLib.verify.sam_med2d import tiny_sam_med2d
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptLib.weights import Checkpoint, read_checkpoint, recognise

OFFICIAL_FILE = GOLDENS / "sam_med2d" / "sam-med2d_b.pth"
CARD = find_card("sam_med2d_vit_b.sam_med2d")
NO_EFFECT = "k_proj.bias"  # the same for all keys, so the softmax takes it out


def network_of(tensors: dict[str, Tensor]) -> SamMed2d:
    return load_into_sam_med2d(tiny_sam_med2d(golden("sam_med2d")), tensors)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return read_checkpoint(OFFICIAL_FILE).tensors


@pytest.fixture(scope="module")
def network(tensors: dict[str, Tensor]) -> SamMed2d:
    return network_of(tensors)


@pytest.fixture(scope="module")
def predictor(network: SamMed2d) -> SamMed2dSlicePredictor:
    return SamMed2dSlicePredictor(network, CARD, "a" * 64, NearestPixels(96))


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """The recorded picture as a reader gives it: red first, while the network was given blue first."""
    return arrays("sam_med2d")["image_uint8_hwc_rgb"][..., ::-1]


def full_size(adapters: bool) -> SamMed2d:
    with torch.device("meta"):
        return SamMed2d(replace(VIT_B, input_size=256), 0.25 if adapters else 0)


def without_adapters(keys: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: shape for name, shape in keys.items() if ".Adapter." not in name}


def test_every_case_is_that_of_the_official_code_from_its_own_kind_of_file() -> None:
    rows = verify(golden("sam_med2d").path, OFFICIAL_FILE)
    assert len(rows) == 24
    assert {row.output.split("/")[0] for row in rows} == {
        "pt1_multi",
        "pt3_mask_multi",
        "box_multi",
        "box_single",
        "pt3_neg1_box_multi",
        "batch_boxes",
        "forward_batch2",
    }
    for row in rows:
        assert row.passed, row


def test_all_recorded_values_are_those_of_the_official_code(shared_data: Path) -> None:
    folder = shared_data.parent / "goldens" / "sam_med2d"
    if not folder.is_dir():
        pytest.skip(f"the recorded set {folder.name} is not beside the shared data")
    rows = verify(folder)
    assert len(rows) == 37
    for row in rows:
        assert row.passed, row


def test_the_published_size_has_exactly_the_official_keys_and_shapes() -> None:
    named = published_tensors(full_size(adapters=True))
    assert {key: list(tensor.shape) for key, tensor in named.items()} == published_keys("sam_med2d_vit_b")
    assert sum(tensor.numel() for tensor in named.values()) == 271_242_032


def test_without_adapters_it_has_the_keys_of_sam_at_another_size() -> None:
    named = {key: list(tensor.shape) for key, tensor in published_tensors(full_size(adapters=False)).items()}
    assert named == without_adapters(published_keys("sam_med2d_vit_b"))
    assert set(named) == set(published_keys("sam_vit_b"))


def test_every_norm_has_the_epsilon_of_the_paper_code() -> None:
    blocks = blocks_of(full_size(adapters=True).image_encoder)
    adapters = [block.beside_mlp for block in blocks]
    assert len(adapters) == 12
    for block, adapter in zip(blocks, adapters, strict=True):
        assert isinstance(adapter, GatedAdapter)
        assert adapter.norm.eps == 1e-5
        assert block.norm1.eps == block.norm2.eps == 1e-6


def test_the_adapter_does_what_the_specification_says() -> None:
    """Written out with sums, for two channels on a 2 x 2 grid."""
    torch.manual_seed(0)
    adapter, n = GatedAdapter(2, ratio=0.5), torch.randn(1, 2, 2, 2)
    narrow, wide = adapter.channel[0].weight, adapter.channel[2].weight
    gate = torch.sigmoid(wide @ torch.relu(narrow @ n.mean(dim=(1, 2))[0]))
    z = torch.zeros(2, 4, 4)  # channels first, one pixel of zeros around
    z[:, 1:3, 1:3] = (n[0] * gate).permute(2, 0, 1)
    small = torch.relu(
        (adapter.spatial[0].weight * z[None, :, :3, :3]).sum(dim=(1, 2, 3))
    )  # one output pixel
    spread = torch.einsum("c,cdyx->dyx", small, adapter.spatial[2].weight)[:, 1:3, 1:3]
    y = n[0] + torch.relu(spread).permute(1, 2, 0)
    normed = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-5)
    torch.testing.assert_close(adapter(n)[0], normed)


def outputs_of(network: SamMed2d) -> Tensor:
    """Logits and scores of two recorded cases that use every kind of prompt between them."""
    found = arrays("sam_med2d")
    framing = NearestPixels(96, reverse_colours=False)
    shape_yx = found["image_uint8_hwc_rgb"].shape[:2]
    values = []
    with torch.inference_mode():
        embedding = network.image_encoder(framing.to_input(found["image_uint8_hwc_rgb"]))
        for case in ("pt3_mask_multi", "pt3_neg1_box_multi"):
            points = framing.to_input_xy(found[f"{case}/point_coords"], shape_yx)
            box, mask = found.get(f"{case}/box"), found.get(f"{case}/mask_input")
            corners = None if box is None else framing.to_input_xy(box.reshape(2, 2), shape_yx).reshape(1, 4)
            sparse, dense = network.prompt_encoder(
                torch.from_numpy(points)[None],
                torch.from_numpy(found[f"{case}/point_labels"])[None],
                None if corners is None else torch.from_numpy(corners),
                None if mask is None else torch.from_numpy(mask)[None],
            )
            logits, scores = network.mask_decoder(
                embedding, network.prompt_encoder.dense_pe(), sparse, dense, THREE_MASKS
            )
            values += [logits.flatten(), scores.flatten()]
    return torch.cat(values)


def recorded() -> Tensor:
    cases = ("pt3_mask_multi", "pt3_neg1_box_multi")
    return torch.cat(
        [torch.from_numpy(arrays("sam_med2d")[f"{c}/decoder_low_res_all"]).flatten() for c in cases]
    )


def test_every_tensor_counts(tensors: dict[str, Tensor]) -> None:
    network = network_of(tensors)
    whole = outputs_of(network)
    unseen = set()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in published_tensors(network).items():
        before = tensor.clone()
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        if (outputs_of(network) - whole).abs().max() < 1e-4:
            unseen.add(name)
        tensor.copy_(before)
    # Three masks are always returned: the token, the hypernetwork and the score of the first are not.
    first = {name for name in tensors if name.startswith("mask_decoder.output_hypernetworks_mlps.0.")}
    assert unseen == first | {name for name in tensors if name.endswith(NO_EFFECT)}


@pytest.mark.parametrize("index", range(4))
def test_no_adapter_can_be_left_out(tensors: dict[str, Tensor], index: int) -> None:
    network = network_of(tensors)
    whole = outputs_of(network)
    blocks_of(network.image_encoder)[index].beside_mlp = None
    assert (outputs_of(network) - whole).abs().max() > 1e-3


def test_adapters_of_a_file_can_be_left_out_on_purpose(tensors: dict[str, Tensor]) -> None:
    def bare() -> SamMed2d:
        full = tiny_sam_med2d(golden("sam_med2d"))
        for block in blocks_of(full.image_encoder):
            block.beside_mlp = None
        full.has_adapters = False
        return full

    kept = {name: tensor for name, tensor in tensors.items() if ".Adapter." not in name}
    expected = outputs_of(load_into_sam_med2d(bare(), kept))
    torch.testing.assert_close(outputs_of(load_into_sam_med2d(bare(), tensors)), expected)
    assert (outputs_of(network_of(tensors)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("size", "given", "places"),
    [
        (8, 5, {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 3, 6: 3, 7: 4}),
        (5, 8, {0: 0, 1: 1, 2: 3, 3: 4, 4: 6}),
        # Here the exact quotient is a whole number, and OpenCV's rounding falls one short of it.
        (256, 186, {127: 92, 128: 92, 129: 93, 255: 185}),
        (256, 420, {64: 104, 128: 209, 192: 314, 255: 418}),
        (96, 68, {72: 50, 95: 67}),
    ],
)
def test_the_nearest_pixel_is_that_of_opencv(size: int, given: int, places: dict[int, int]) -> None:
    ramp = np.arange(given)
    wide = np.stack([ramp // 256, ramp % 256], axis=0).astype(np.uint8)  # high and low byte of the column
    seen = NearestPixels(size, (0, 0, 0), (1, 1, 1)).to_input(wide)[0, 0]
    columns = seen[0] * 256 + seen[-1]
    for place, expected in places.items():
        assert columns[place] == expected


def test_colours_come_blue_first_and_are_standardised_red_first() -> None:
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 0] = 255
    seen = NearestPixels(8).to_input(red)
    assert seen.shape == (1, 3, 8, 8)
    expected = [(0 - 123.675) / 58.395, (0 - 116.28) / 57.12, (255 - 103.53) / 57.375]
    np.testing.assert_allclose(seen[0].mean(dim=(1, 2)), expected, rtol=1e-6)


def test_grey_fills_all_channels_and_the_whole_square() -> None:
    seen = NearestPixels(8).to_input(np.full((4, 16), 100, np.uint8))
    expected = [(100 - 123.675) / 58.395, (100 - 116.28) / 57.12, (100 - 103.53) / 57.375]
    np.testing.assert_allclose(seen[0, :, 0, 0], expected, rtol=1e-5)
    assert (seen == seen[:, :, :1, :1]).all()


def test_points_are_scaled_along_each_side_by_itself() -> None:
    points = NearestPixels(96).to_input_xy(np.array([[44.0, 35.0]], np.float32), (70, 88))
    np.testing.assert_allclose(points, [[48.0, 48.0]])


class TestPredictor:
    def test_a_box_gets_the_best_scored_of_three_masks(
        self, predictor: SamMed2dSlicePredictor, picture: np.ndarray
    ) -> None:
        found = arrays("sam_med2d")
        prompts = PixelPrompts.of(box_xyxy=found["box_multi/box"])
        prediction = predictor.decode(predictor.encode(picture), prompts)
        np.testing.assert_allclose(prediction.low_res, found["box_multi/low_res_selected"], atol=1e-4)
        assert prediction.score == pytest.approx(float(found["box_multi/iou_selected"][0]), abs=1e-4)
        assert prediction.logits.shape == picture.shape[:2]

    def test_a_mask_is_fed_back_as_a_probability(
        self, predictor: SamMed2dSlicePredictor, picture: np.ndarray
    ) -> None:
        found = arrays("sam_med2d")
        probability = torch.from_numpy(found["pt3_mask_multi/mask_input"])
        points, labels = (found[f"pt3_mask_multi/point_{what}"] for what in ("coords", "labels"))
        prediction = predictor.decode(
            predictor.encode(picture), PixelPrompts.of(points, labels), torch.logit(probability).numpy()
        )
        expected = found["pt3_mask_multi/mask_logits_fullres"][0]
        np.testing.assert_allclose(prediction.logits, expected, atol=1e-4)

    def test_a_painted_mask_reaches_the_network_between_0_and_1(
        self, predictor: SamMed2dSlicePredictor, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: list[Tensor] = []
        encoder = predictor._prompt_encoder
        forward = encoder.forward
        monkeypatch.setattr(
            encoder, "forward", lambda *a, masks=None: (given.append(masks), forward(*a, masks=masks))[1]
        )
        mask = np.zeros(picture.shape[:2], bool)
        mask[:, :44] = True
        predictor.decode(predictor.encode(picture), PixelPrompts.of([(20, 30)], [1], mask=mask))
        assert given[0].shape == (1, 1, 24, 24)
        assert (given[0][..., :11] > 0.99).all()
        assert (given[0][..., 13:] < 0.01).all()
        assert (given[0][..., 13:] > 0).all()


def bright_volume() -> Volume:
    voxels = np.full((5, 40, 48), 20, np.uint8)
    voxels[1:4, 10:30, 14:36] = 200
    return Volume(voxels, Geometry(voxels.shape, np.eye(4)))


def test_a_session_corrects_click_by_click_and_can_be_replayed(predictor: SamMed2dSlicePredictor) -> None:
    fed: list[np.ndarray | None] = []

    class Watched(SamMed2dSlicePredictor):
        def decode(self, embedding, prompts, previous=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            fed.append(previous)
            return super().decode(embedding, prompts, previous)

    def session() -> Session:
        watched = Watched.__new__(Watched)
        watched.__dict__.update(predictor.__dict__)
        return Session(bright_volume(), SliceBySlice(watched), "K", IntensityWindow(0, 255))

    first = session()
    first.add(Point((20, 20, 2)))
    once = first.mask
    first.add(Point((40, 5, 2), positive=False))
    assert fed[0] is None
    assert fed[1] is not None
    assert fed[1].shape == (1, 24, 24)
    first.add(Box.from_corners((14, 10, 2), (36, 30, 2)))
    assert first.mask.any(axis=(1, 2)).tolist() in ([False, False, True, False, False], [False] * 5)
    again = Session.replay(first.record(), bright_volume(), session().predictor)
    np.testing.assert_array_equal(again.labels, first.labels)
    first.undo()
    first.undo()
    np.testing.assert_array_equal(first.mask, once)


def test_a_session_takes_a_segment_as_prompt_and_refuses_to_work_without_one(
    predictor: SamMed2dSlicePredictor,
) -> None:
    session = Session(bright_volume(), SliceBySlice(predictor), "K", IntensityWindow(0, 255))
    with pytest.raises(PromptError, match="needs a prompt, but none was placed"):
        session.propagate()
    painted = np.zeros((5, 40, 48), bool)
    painted[2, 12:20, 16:30] = True
    session.add(MaskPrompt.from_array(painted), Point((20, 16, 2)))
    assert set(session.confidence) == {2}


@pytest.mark.parametrize("name", ["sam_med2d_vit_b.sam_med2d", "sam_med2d_ft_vit_b.sam_med2d"])
def test_every_card_builds_its_network_from_published_files(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    card: ModelCard = find_card(name)
    adapted = card.options["adapters"]
    keys = published_keys("sam_med2d_vit_b")
    keys = keys if adapted else without_adapters(keys)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    monkeypatch.setattr(sam_med2d, "read_checkpoint", lambda path: Checkpoint(tensors, "b" * 64, path.name))
    with torch.device("meta"):
        built = build_predictor(card, Path("x.pth"), None, torch.device("meta"))
    assert isinstance(built, SamMed2dSlicePredictor)
    assert built.checkpoint_sha256 == "b" * 64
    assert recognise(tensors) == (
        "SAM-Med2D, ViT-B" if adapted else "SAM-Med2D without adapters (FT-SAM), ViT-B"
    )


def test_files_of_other_networks_are_refused(tensors: dict[str, Tensor]) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if ".Adapter." not in name}
    with pytest.raises(
        WeightsError, match=r"lacks image_encoder\.blocks\.0\.Adapter\..*looks like SAM or MedSAM"
    ):
        network_of(kept)
    with pytest.raises(WeightsError, match="holds an encoder of 24 channels"):
        load_sam_med2d(tensors)
    other = {key: torch.empty(shape, device="meta") for key, shape in published_keys("sam_vit_b").items()}
    with (
        torch.device("meta"),
        pytest.raises(WeightsError, match=r"another shape at image_encoder\.pos_embed.*SAM or MedSAM, ViT-B"),
    ):
        load_sam_med2d(other, adapters=False)


def test_an_unknown_module_named_adapter_is_not_taken_for_ours(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"also holds image_encoder\.blocks\.0\.Adapter\.extra"):
        network_of({**tensors, "image_encoder.blocks.0.Adapter.extra": torch.zeros(1)})


def test_the_encoder_without_adapters_is_sams(network: SamMed2d) -> None:
    for block in blocks_of(full_size(adapters=False).image_encoder):
        assert block.beside_mlp is None
        assert not any(isinstance(part, nn.Conv2d) for part in block.modules())
