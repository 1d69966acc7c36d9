from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from goldens import arrays, golden, ma_sam_of, sam_of
from SAMAdaptLib.cards import ModelCard, Source
from SAMAdaptLib.errors import PromptError, WeightsError
from SAMAdaptLib.files import sha256_of_file
from SAMAdaptLib.models import sam
from SAMAdaptLib.models.framing import LongestSide
from SAMAdaptLib.models.medsam import Stretched
from SAMAdaptLib.models.sam import SamSlicePredictor, load_sam, vit_shape_of
from SAMAdaptLib.prompts import PixelPrompts

SAM_CARD = ModelCard(
    "sam.golden", "SAM", "sam", Source("manual"), "", prompts=("point", "box", "scribble", "mask")
)
MEDSAM_CARD = ModelCard("medsam.golden", "MedSAM", "medsam", Source("manual"), "", prompts=("box",))


@pytest.fixture(scope="module")
def predictor() -> SamSlicePredictor:
    return SamSlicePredictor(sam_of("sam"), SAM_CARD, "00")


def case(name: str) -> PixelPrompts:
    z = arrays("sam")
    return PixelPrompts.of(
        z.get(f"{name}/point_coords", ()), z.get(f"{name}/point_labels", ()), z.get(f"{name}/box")
    )


@pytest.mark.parametrize("name", ["box_single", "pt3_single"])
def test_prompts_that_mean_one_thing_give_sams_single_mask(predictor: SamSlicePredictor, name: str) -> None:
    z = arrays("sam")
    prediction = predictor.decode(predictor.encode(z["image_uint8_hwc_rgb"]), case(name))
    np.testing.assert_allclose(prediction.low_res, z[f"{name}/low_res_logits"], atol=1e-4)
    assert prediction.score == pytest.approx(float(z[f"{name}/iou"][0]), abs=1e-5)
    assert prediction.logits.dtype == np.float32
    if f"{name}/mask_logits_fullres" in z:
        np.testing.assert_allclose(prediction.logits, z[f"{name}/mask_logits_fullres"][0], atol=1e-4)


def test_one_click_gives_the_best_scored_of_three_masks(predictor: SamSlicePredictor) -> None:
    z = arrays("sam")
    prediction = predictor.decode(predictor.encode(z["image_uint8_hwc_rgb"]), case("pt1_multi"))
    best = int(z["pt1_multi/iou"].argmax())
    np.testing.assert_allclose(prediction.logits, z["pt1_multi/mask_logits_fullres"][best], atol=1e-4)
    np.testing.assert_allclose(prediction.low_res, z["pt1_multi/low_res_logits"][best][None], atol=1e-4)
    assert prediction.score == pytest.approx(float(z["pt1_multi/iou"][best]), abs=1e-5)


def test_an_earlier_result_is_corrected(predictor: SamSlicePredictor) -> None:
    z = arrays("sam")
    embedding = predictor.encode(z["image_uint8_hwc_rgb"])
    fed = predictor.decode(embedding, case("pt3_box_mask_multi"), z["mask_input_1hw"])
    alone = predictor.decode(embedding, case("pt3_box_mask_multi"))
    with torch.inference_mode():  # the golden case asks for three masks; mask 0 of the same call is ours
        network = sam_of("sam")
        points = LongestSide(96).to_input_xy(case("pt3_box_mask_multi").points_xy, (75, 100))
        box = LongestSide(96).to_input_xy(case("pt3_box_mask_multi").box_xyxy.reshape(2, 2), (75, 100))
        sparse, dense = network.prompt_encoder(
            torch.from_numpy(points)[None],
            torch.from_numpy(case("pt3_box_mask_multi").labels)[None],
            torch.from_numpy(box).reshape(1, 4),
            torch.from_numpy(z["mask_input_1hw"])[None],
        )
        image = torch.from_numpy(z["image_embedding"])
        masks, _ = network.mask_decoder(image, network.prompt_encoder.dense_pe(), sparse, dense)
    np.testing.assert_allclose(fed.low_res, masks[0, :1], atol=1e-4)
    np.testing.assert_allclose(z["pt3_box_mask_multi/low_res_logits"], masks[0, 1:], atol=1e-4)
    assert np.abs(fed.low_res - alone.low_res).max() > 0.1


def test_a_painted_mask_is_a_prompt(predictor: SamSlicePredictor) -> None:
    embedding = predictor.encode(arrays("sam")["image_uint8_hwc_rgb"])
    mask = np.zeros((75, 100), dtype=bool)
    mask[20:50, 30:60] = True
    painted = predictor.decode(embedding, PixelPrompts.of(mask=mask))
    other = predictor.decode(embedding, PixelPrompts.of(mask=~mask))
    assert painted.logits.shape == (75, 100)
    assert np.abs(painted.logits - other.logits).max() > 0.1


def test_no_prompt_is_an_error(predictor: SamSlicePredictor) -> None:
    embedding = predictor.encode(arrays("sam")["image_uint8_hwc_rgb"])
    with pytest.raises(PromptError, match=r"wants a prompt of the kinds point, box.*got none"):
        predictor.decode(embedding, PixelPrompts.of())


def test_medsam_takes_boxes_only_and_gives_the_official_mask() -> None:
    z = arrays("medsam")
    predictor = SamSlicePredictor(sam_of("medsam"), MEDSAM_CARD, "00", Stretched(128))
    embedding = predictor.encode(z["image_uint8_hw"])
    prompts = PixelPrompts.of(box_xyxy=z["box_original_xyxy"])
    prediction = predictor.decode(embedding, prompts)
    np.testing.assert_array_equal(prediction.logits > 0, z["seg"] == 1)
    again = predictor.decode(embedding, prompts, prediction.low_res)
    np.testing.assert_array_equal(again.logits, prediction.logits)
    with pytest.raises(PromptError, match=r"MedSAM wants a prompt of the kinds box.*got point"):
        predictor.decode(embedding, PixelPrompts.of([[3, 4]], [1]))


def test_a_checkpoint_of_another_width_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"768, 1024 or 1280 channels.*48 channels"):
        load_sam(golden("sam").tensors(None))
    with pytest.raises(WeightsError, match="no ViT encoder"):
        load_sam({"weight": torch.zeros(3)})


def test_the_published_sizes_are_told_by_their_width() -> None:
    for width, depth in ((768, 12), (1024, 24), (1280, 32)):
        shape = vit_shape_of({"image_encoder.pos_embed": torch.zeros(1, 64, 64, width)}, 512)
        assert (shape.depth, shape.grid) == (depth, 32)


def test_the_checkpoint_file_names_the_predictor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = golden("sam").vit_shape()
    monkeypatch.setattr(sam, "VIT_B", tiny)
    monkeypatch.setattr(sam, "build_sam", lambda shape: sam_of("sam"))
    file = golden("sam").path.parent / "checkpoint.safetensors"
    card = ModelCard("sam.t", "SAM", "sam", Source("manual"), "", {"input_size": 96}, prompts=("box",))
    built = sam.build_predictor(card, file, None, torch.device("cpu"))
    assert built.checkpoint_sha256 == sha256_of_file(file)
    assert built.card is card


@torch.inference_mode()
def test_no_tensor_is_made_on_another_device_than_the_networks() -> None:
    """On the meta device every operation with a tensor of another device fails, as it would on a GPU."""
    network = sam_of("sam").to("meta")
    points, labels = torch.zeros(2, 3, 2, device="meta"), torch.zeros(2, 3, dtype=torch.long, device="meta")
    boxes, masks = torch.zeros(2, 4, device="meta"), torch.zeros(2, 1, 24, 24, device="meta")
    for prompts in ((points, labels, boxes, masks), (points, labels), ()):
        sparse, dense = network.prompt_encoder(*prompts)
        embedding = network.image_encoder(torch.zeros(1, 3, 96, 96, device="meta"))
        logits, _ = network.mask_decoder(embedding, network.prompt_encoder.dense_pe(), sparse, dense)
        assert logits.shape == (len(sparse), 4, 24, 24)
    stacks = torch.zeros(1, 5, 64, 64, device="meta")
    logits, _ = ma_sam_of("ma_sam_bbox").to("meta")(stacks, torch.zeros(1, 5, 4, device="meta"))
    assert logits.shape == (5, 3, 64, 64)
