from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from SAMAdaptLib.cards import find_card
from SAMAdaptLib.errors import PromptError, WeightsError
from SAMAdaptLib.models import build_predictor
from SAMAdaptLib.models.mobile_sam import MobileSam, load_mobile_sam
from SAMAdaptLib.models.predictor import SlicePredictor
from SAMAdaptLib.models.tiny_vit import UNUSED_KEYS, TinyViTConfig
from SAMAdaptLib.prompts import PixelPrompts

KEYS = Path(__file__).parents[2] / "Data" / "keys" / "mobile_sam.json"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return {name: value.clone() for name, value in MobileSam(64).state_dict().items()}


@pytest.fixture(scope="module")
def checkpoint(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mobile_sam.safetensors"
    save_file(state, path)
    return path


def test_keys_and_shapes_are_those_of_the_published_file() -> None:
    with torch.device("meta"):
        mine = {name: list(value.shape) for name, value in MobileSam().state_dict().items()}
    published = json.loads(KEYS.read_text())
    assert {name: shape for name, shape in published.items() if name not in UNUSED_KEYS} == mine
    assert set(UNUSED_KEYS) < set(published)


def test_lite_variant_differs_in_its_patches_only() -> None:
    with torch.device("meta"):
        full = {name: tuple(value.shape) for name, value in MobileSam().state_dict().items()}
        lite = {
            name: tuple(value.shape)
            for name, value in MobileSam(256, TinyViTConfig(pointwise_patches=True)).state_dict().items()
        }
    assert {name for name in full if full[name] != lite[name]} == {
        "image_encoder.patch_embed.seq.0.c.weight",
        "image_encoder.patch_embed.seq.2.c.weight",
    }


def test_the_classifier_of_the_published_file_is_passed_over(state: dict[str, torch.Tensor]) -> None:
    load_mobile_sam({**state, **dict.fromkeys(UNUSED_KEYS, torch.zeros(1))}, 64)
    with pytest.raises(WeightsError, match=r"also holds other\.weight"):
        load_mobile_sam({**state, "other.weight": torch.zeros(1)}, 64)


def test_file_of_the_other_variant_is_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(
        WeightsError, match=r"LiteMedSAM was wanted.*another shape at image_encoder\.patch_embed"
    ):
        load_mobile_sam(state, 64, lite=True)


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> SlicePredictor:
    card = replace(find_card("mobile_sam.sa1b"), options={"input_size": 128}, sha256="")
    return build_predictor(card, checkpoint, None, CPU)  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [(50, 80), (131, 40), (128, 128)])
def test_pictures_of_any_shape_give_masks_of_that_shape(
    predictor: SlicePredictor, shape: tuple[int, int]
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    embedding = predictor.encode(picture)
    answer = predictor.decode(embedding, PixelPrompts.of(box_xyxy=[5, 6, 30, 35]))
    assert answer.logits.shape == shape
    assert answer.logits.dtype == np.float32
    assert answer.low_res.shape == (1, 32, 32)
    again = predictor.decode(embedding, PixelPrompts.of([[10, 12]], [0], [5, 6, 30, 35]), answer.low_res)
    assert not np.array_equal(again.logits, answer.logits)


def test_folded_encoder_of_the_predictor_gives_what_the_network_gives(
    predictor: SlicePredictor, state: dict[str, torch.Tensor]
) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (128, 128), dtype=np.uint8)
    network = load_mobile_sam(state, 128)
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    with torch.inference_mode():
        expected = network.image_encoder(
            (torch.from_numpy(picture).float().expand(3, -1, -1) - mean)[None] / std
        )
        found = predictor.encode(picture).features
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_lite_medsam_takes_boxes_only_and_stretches_grey_values(tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = tmp_path / "lite.safetensors"
    save_file(MobileSam(64, TinyViTConfig(pointwise_patches=True)).state_dict(), path)
    card = replace(find_card("lite_medsam.medsam"), options={"lite": True, "input_size": 64})
    predictor = build_predictor(card, path, None, CPU)
    picture = np.random.default_rng(2).integers(10, 100, (48, 64), dtype=np.uint8)
    embedding = predictor.encode(picture)  # type: ignore[union-attr]
    brighter = predictor.encode(picture * 2 + 20)  # type: ignore[union-attr]
    torch.testing.assert_close(embedding.features, brighter.features, atol=1e-4, rtol=1e-4)
    assert embedding.features.shape == (1, 256, 16, 16)
    with pytest.raises(PromptError, match="LiteMedSAM wants a prompt of the kinds box"):
        predictor.decode(embedding, PixelPrompts.of([[3, 3]], [1]))  # type: ignore[union-attr]
