"""The weights that ship: their file, and what they do on a picture that anyone can make again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from SAMAdaptLib.cards import find_card, resources_folder
from SAMAdaptLib.models import build_predictor
from SAMAdaptLib.models.predictor import SliceEmbedding, SlicePredictor
from SAMAdaptLib.models.tiny_vit import UNUSED_KEYS
from SAMAdaptLib.prompts import PixelPrompts
from SAMAdaptLib.training.simulate import box_of, dice, next_click

FILE = resources_folder() / "Models" / "mobile_sam.samadapt.safetensors"
KEYS = Path(__file__).parents[2] / "Data" / "keys" / "mobile_sam.json"
RECORDED = Path(__file__).parents[2] / "Data" / "goldens" / "default_model" / "recorded.json"


def ellipse(x: float, y: float, wide: float, high: float) -> np.ndarray:
    rows, columns = np.mgrid[:200, :240]
    return ((columns - x) / wide) ** 2 + ((rows - y) / high) ** 2 <= 1


BODY, ORGAN, VESSEL = ellipse(120, 100, 100, 80), ellipse(85, 90, 34, 26), ellipse(150, 120, 12, 12)


def phantom() -> np.ndarray:
    """A body with an organ and a vessel, smooth shading and texture without a random number."""
    rows, columns = np.mgrid[:200, :240]
    grey = np.where(BODY, 90.0 + 0.1 * rows, 5.0)
    grey[ORGAN], grey[VESSEL] = 150, 205
    return np.rint(grey + 6 * np.sin(columns / 3.0) * np.cos(rows / 4.0)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def predictor() -> SlicePredictor:
    card = replace(find_card("mobile_sam.sa1b"), options={"input_size": 512, "first_click": "single"})
    return build_predictor(card, FILE, None, torch.device("cpu"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def embedding(predictor: SlicePredictor) -> SliceEmbedding:
    return predictor.encode(phantom())


def test_file_has_the_official_names_in_half_precision_and_says_what_made_it() -> None:
    published = json.loads(KEYS.read_text())
    with safe_open(FILE, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        kinds = {file.get_slice(name).get_dtype() for name in file.keys() if len(shapes[name]) > 1}  # noqa: SIM118
        facts = file.metadata()
    assert shapes == {name: shape for name, shape in published.items() if name not in UNUSED_KEYS}
    assert kinds == {"F16", "F32"}  # the positional frequencies stay whole
    assert FILE.stat().st_size < 25_000_000
    assert facts["base_sha256"] == find_card("mobile_sam.sa1b").sha256
    assert facts["input_size"] == "512"


@pytest.mark.parametrize("truth", [ORGAN, VESSEL], ids=["organ", "vessel"])
def test_box_and_click_find_the_structure(
    predictor: SlicePredictor, embedding: SliceEmbedding, truth: np.ndarray
) -> None:
    boxed = predictor.decode(embedding, PixelPrompts.of(box_xyxy=box_of(truth)))
    assert dice(truth, boxed.logits > 0) > 0.93
    ys, xs = np.nonzero(truth)
    clicks = [((xs.mean(), ys.mean()), 1)]
    answer = predictor.decode(embedding, PixelPrompts.of([clicks[0][0]], [1]))
    assert dice(truth, answer.logits > 0) > 0.9
    for _ in range(2):
        click = next_click(truth, answer.logits > 0)
        assert click is not None
        clicks.append((click.xy, int(click.positive)))
        prompts = PixelPrompts.of([xy for xy, _ in clicks], [label for _, label in clicks])
        answer = predictor.decode(embedding, prompts, answer.low_res)
    assert dice(truth, answer.logits > 0) > 0.9


def test_logits_are_those_recorded(predictor: SlicePredictor, embedding: SliceEmbedding) -> None:
    recorded = json.loads(RECORDED.read_text())
    assert recorded["sha256"] == predictor.checkpoint_sha256
    box = predictor.decode(embedding, PixelPrompts.of(box_xyxy=box_of(ORGAN)))
    click = predictor.decode(embedding, PixelPrompts.of([[85, 90]], [1]))
    for name, answer in (("box", box), ("click", click)):
        np.testing.assert_allclose(answer.logits[20::40, 20::40], recorded[name], atol=0.02)
        assert answer.score == pytest.approx(recorded[f"{name}_score"], abs=0.002)
