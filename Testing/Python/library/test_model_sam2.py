"""SAM 2 on pictures against its official code: recorded numbers, mutations, sizes, and a session."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from families import silent_keys
from goldens import golden
from phantoms import ball_volume
from SAMAdaptLib.cards import ModelCard, Source
from SAMAdaptLib.device import pick_device
from SAMAdaptLib.errors import PromptError, WeightsError
from SAMAdaptLib.models import build_predictor
from SAMAdaptLib.models.hiera import (
    HIERA_BASE_PLUS,
    HIERA_TINY,
    PUBLISHED,
    FpnNeck,
    Hiera,
    HieraShape,
    hiera_shape_of,
    into_windows,
    out_of_windows,
)
from SAMAdaptLib.models.mask_decoder import SINGLE_MASK, THREE_MASKS
from SAMAdaptLib.models.sam2 import Sam2, Sam2Sizes, Sam2SlicePredictor, load_sam2, predictor_of
from SAMAdaptLib.prompts import PixelPrompts, Point
from SAMAdaptLib.propagation import SliceBySlice
from SAMAdaptLib.session import Session
from SAMAdaptLib.verify import verify
from SAMAdaptLib.verify.sam2 import decoded, prompts_of, tiny_sam2
from SAMAdaptLib.weights import recognise

SET = "sam2_tiny"
CARD = ModelCard("sam2.golden", "SAM 2", "sam2", Source("manual"), "", prompts=("point", "box", "mask"))


def test_every_recorded_number_of_the_official_code_is_met() -> None:
    rows = verify(golden(SET).path)
    assert len(rows) == 3 + 2 * 5 + 2
    assert all(row.passed for row in rows), rows


def answers(network: Sam2, pixels: Tensor) -> list[Tensor]:
    """What the network gives for prompts that together use every tensor."""
    features = network(pixels)
    found = list(features)
    for case in ("click", "box_points_mask"):
        for masks in (slice(None), SINGLE_MASK):
            found += decoded(network, features, masks, **prompts_of(golden(SET), case))
    return found


def test_every_tensor_counts() -> None:
    network = tiny_sam2(golden(SET))
    pixels = torch.linspace(-2, 2, 3 * 128 * 128).sin().reshape(1, 3, 128, 128) * 2
    silent = silent_keys(network.state_dict(), lambda: answers(network, pixels))
    # A bias of all keys shifts every logit of a softmax alike.
    assert {name for name in silent if not name.endswith("k_proj.bias")} == set()
    assert len(silent) <= 7


@torch.inference_mode()
def test_a_box_keeps_the_point_that_is_none_and_comes_before_the_points() -> None:
    encoder = tiny_sam2(golden(SET)).sam_prompt_encoder
    box, points = torch.tensor([[9.0, 20, 90, 77]]), torch.tensor([[[5.0, 6]]])
    sparse, _ = encoder(points, torch.tensor([[1]]), box)
    alone, _ = encoder(points, torch.tensor([[1]]))
    assert sparse.shape[1] == 4
    assert torch.equal(sparse[:, 3], encoder.not_a_point_embed.weight)
    assert torch.equal(sparse[:, 2:], alone)


@torch.inference_mode()
def test_an_unsteady_single_mask_gives_way_and_a_steady_one_stays() -> None:
    network, golden_set = tiny_sam2(golden(SET)), golden(SET)
    features = network(torch.from_numpy(np.zeros((1, 3, 128, 128), np.float32)))
    prompts = prompts_of(golden_set, "points")
    every, scores = decoded(network, features, slice(None), **prompts)
    one, score = decoded(network, features, SINGLE_MASK, **prompts)
    best = int(scores[0, 1:].argmax()) + 1
    single = every[0, 0]
    steady = float((single > 0.05).sum() / (single > -0.05).sum().clamp(min=1)) >= 0.98
    assert torch.equal(one[0, 0], single if steady else every[0, best])
    assert float(score) == float(scores[0, 0 if steady else best])
    # A mask far from the threshold everywhere is as steady as can be.
    last = network.sam_mask_decoder.output_hypernetworks_mlps[0].layers[-1]
    last.weight.zero_()
    last.bias.zero_()
    blank, score = decoded(network, features, SINGLE_MASK, **prompts)
    assert float(blank.abs().max()) > 0, "all zeros lie between the thresholds: unsteady"
    assert float(score) == float(decoded(network, features, THREE_MASKS, **prompts)[1].max())


def test_windows_that_do_not_fit_are_filled_up_and_cut() -> None:
    x = torch.arange(2 * 5 * 7 * 3, dtype=torch.float32).reshape(2, 5, 7, 3)
    windows, count_yx = into_windows(x, 4)
    assert windows.shape == (8, 4, 4, 3)
    assert count_yx == (2, 2)
    assert torch.equal(windows[1, :, :3], x[0, :4, 4:])
    assert float(windows[1, :, 3].abs().max()) == 0
    assert torch.equal(out_of_windows(windows, count_yx, (5, 7)), x)


@torch.inference_mode()
def test_only_the_third_level_takes_in_the_one_above() -> None:
    neck = FpnNeck(2, (4, 8, 16, 32))
    features = [torch.randn(1, 4 * 2**level, 16 >> level, 16 >> level) for level in range(4)]
    before = neck(features)
    features[3] = features[3] + 1
    after = neck(features)
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, False, True, True]
    features[2] = features[2] + 1
    assert torch.equal(neck(features)[1], before[1])


@pytest.mark.parametrize("shape", PUBLISHED, ids=lambda shape: str(shape.stages))
def test_published_trunks_are_told_apart(shape: HieraShape) -> None:
    with torch.device("meta"):
        state = Hiera(shape).state_dict()
    assert hiera_shape_of(state, "", {}) == shape


def test_published_sizes() -> None:
    with torch.device("meta"):
        tiny, large = (Sam2(Sam2Sizes(shape)).state_dict() for shape in (HIERA_TINY, HIERA_BASE_PLUS))
    sizes = {name: tuple(value.shape) for name, value in tiny.items()}
    assert len(sizes) == 305
    assert sum(value.numel() for value in tiny.values()) == 31_309_136
    assert sizes["image_encoder.trunk.blocks.10.attn.qkv.weight"] == (2304, 384)
    assert sizes["image_encoder.trunk.blocks.10.proj.weight"] == (768, 384)
    assert sizes["image_encoder.neck.convs.3.conv.weight"] == (256, 96, 1, 1)
    assert sizes["sam_mask_decoder.transformer.layers.1.mlp.layers.0.weight"] == (2048, 256)
    assert sizes["sam_mask_decoder.conv_s0.weight"] == (32, 256, 1, 1)
    assert sizes["no_mem_embed"] == (1, 1, 256)
    assert large["image_encoder.trunk.pos_embed"].shape == (1, 112, 14, 14)
    assert recognise(tiny).startswith("SAM 2")


def test_normalisations_have_the_official_eps() -> None:
    network = tiny_sam2(golden(SET))
    trunk = {module.eps for module in network.image_encoder.modules() if isinstance(module, nn.LayerNorm)}
    decoder = {
        module.eps for module in network.sam_mask_decoder.modules() if isinstance(module, nn.LayerNorm)
    }
    assert trunk == {1e-6}
    assert decoder == {1e-5}


def test_keys_for_videos_are_passed_over_and_others_are_not() -> None:
    tensors = dict(golden(SET).tensors(None))
    config = golden(SET).config
    assert any(name.startswith("sam_mask_decoder.pred_obj_score_head.") for name in tensors)
    tensors["memory_attention.layers.0.norm1.weight"] = torch.ones(1)
    load_sam2(tensors, 128, config["trunk"])
    with pytest.raises(WeightsError, match="also holds what_is_this"):
        load_sam2(tensors | {"what_is_this": torch.ones(1)}, 128, config["trunk"])
    with pytest.raises(WeightsError, match="tiny, small, base-plus or large"):
        load_sam2(tensors, 128)
    with pytest.raises(WeightsError, match=r"lacks image_encoder\.trunk\.pos_embed"):
        load_sam2({"x": torch.ones(1)}, 128)


def predictor() -> Sam2SlicePredictor:
    config = golden(SET).config
    card = replace(CARD, options={"input_size": config["input_size"], "trunk": config["trunk"]})
    file = golden(SET).path.parent / "checkpoint.safetensors"
    built = build_predictor(card, file, None, pick_device("cpu"))
    assert isinstance(built, Sam2SlicePredictor)
    return built


def test_a_picture_and_prompts_through_the_predictor() -> None:
    arrays, model = golden(SET).arrays(), predictor()
    embedding = model.encode(arrays["image_uint8_hwc_rgb"])
    nothing = np.zeros((0, 2), np.float32), np.zeros(0, np.int32)
    found = model.decode(embedding, PixelPrompts(*nothing, box_xyxy=arrays["box/box"]))
    np.testing.assert_allclose(found.logits, arrays["box/mask_logits_fullres"][0, 0], atol=2e-4)
    assert found.score == pytest.approx(float(arrays["box/iou"][0, 0]), abs=1e-5)
    click = PixelPrompts(arrays["click/point_coords"], arrays["click/point_labels"])
    best = int(arrays["click/iou"][0].argmax())
    found = model.decode(embedding, click)
    np.testing.assert_allclose(found.logits, arrays["click/mask_logits_fullres"][0, best], atol=2e-4)
    with pytest.raises(PromptError, match="point, box, mask"):
        model.decode(embedding, PixelPrompts(*nothing))


def test_logits_that_are_fed_back_are_limited() -> None:
    network = tiny_sam2(golden(SET))
    with torch.no_grad():
        for mlp in network.sam_mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(1e3)
    model = predictor_of(network, CARD, "")
    embedding = model.encode(golden(SET).arrays()["image_uint8_hwc_rgb"])
    found = model.decode(embedding, PixelPrompts(np.float32([[9, 9]]), np.int32([1])))
    assert float(np.abs(found.low_res).max()) == 32
    assert float(np.abs(found.logits).max()) > 32


def test_a_session_runs_with_the_three_features() -> None:
    volume, _ = ball_volume(shape_kji=(3, 30, 36))
    model = SliceBySlice(predictor())
    session = Session(volume, model, "K")
    session.add(Point((17, 14, 1)))
    session.add(Point((5, 5, 1), positive=False))
    session.undo()
    assert list(session.confidence) == [1]
    assert model.embeddings.held_bytes > 0
