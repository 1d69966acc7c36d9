"""DeSAM: the network with box and points, the choice among a grid's masks, and the preprocessing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from SAMAdaptLib.models.desam import DeSam, DeSamDecoder
from SAMAdaptLib.models.desam_predictors import (
    Candidates,
    grey_values,
    grid_points,
    point_grid,
    select,
    shown,
    whole_box,
)
from SAMAdaptLib.models.framing import LongestSide
from SAMAdaptLib.models.prompt_encoder import PromptEncoder
from SAMAdaptLib.models.vit import ViTShape
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, chosen_device, tensor_of, to_array
from SAMAdaptLib.weights import load_into


def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run what a set recorded; see `Verifier`."""
    arrays = golden.arrays()
    if "in_logits" in arrays:
        yield from _chosen(golden)
    elif "in_volume" in arrays:
        yield from _preprocessed(golden)
    else:
        yield from _network(golden, checkpoint)


def tiny_desam(golden: GoldenSet) -> DeSam:
    """Build DeSAM with the sizes of a set, the weights not yet loaded."""
    sizes = golden.config
    shape = ViTShape(
        embed_dim=sizes["embed_dim"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        global_blocks=tuple(sizes["global_attn_indexes"]),
        input_size=sizes["img_size"],
        window=sizes["window_size"],
        out_channels=sizes["prompt_dim"],
    )
    size, grid = (shape.input_size,) * 2, (shape.grid,) * 2
    return DeSam(
        shape,
        PromptEncoder(shape.out_channels, grid, size, sizes["mask_in_chans"]),
        DeSamDecoder(
            shape.embed_dim,
            shape.out_channels,
            sizes["decoder_mlp"],
            sizes["decoder_heads"],
            sizes["iou_hidden"],
        ),
    )


@torch.inference_mode()
def _network(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    sizes, arrays = golden.config, golden.arrays()
    network = tiny_desam(golden)
    load_into(network, golden.tensors(checkpoint), "DeSAM")
    network.eval()
    framing = LongestSide(sizes["img_size"])
    picture = arrays["in_image_hwc"]
    features = network.image_encoder(framing.to_input(picture).to(chosen_device()))
    for index, seen in enumerate(features[:-1]):
        yield f"out_feature_{index}", to_array(seen)
    yield "out_neck", to_array(features[-1])
    dense_pe = network.prompt_encoder.dense_pe()
    side = float(sizes["img_size"])
    sparse, dense = network.prompt_encoder(boxes_xyxy=torch.tensor([[0.0, 0.0, side, side]]))
    levels, scores = network.mask_decoder.decode_levels(features, dense_pe, sparse, dense)
    yield "out_wholebox_logits", to_array(levels[0])
    yield "out_wholebox_iou", to_array(scores)
    for index, level in enumerate(levels):
        yield f"out_deepsup_{index}", to_array(level)
    for index, point in enumerate(arrays["in_points"]):
        sparse, dense = network.prompt_encoder(tensor_of(point)[None, None], torch.ones(1, 1))
        logits, scores = network.mask_decoder(features, dense_pe, sparse, dense)
        yield f"out_point{index}_logits", to_array(logits)
        yield f"out_point{index}_iou", to_array(scores)
    shape_yx = picture.shape[:2]
    yield "out_predictor_logits", whole_box(network, framing, features, shape_yx)[None]
    found = point_grid(network, framing, features, shape_yx, sizes["grid"])
    yield "out_grid_all_points", found.points_xy
    yield "out_grid_all_iou", found.scores
    best = select(found, sizes["iou_thresh"], smallest_area=sizes["min_area"])
    yield "out_grid_count", np.asarray(len(best))
    for name, values in _described(best).items():
        yield f"out_grid_{name}", values


def _chosen(golden: GoldenSet) -> Iterator[tuple[str, Array]]:
    facts, arrays = golden.facts, golden.arrays()
    logits = arrays["in_logits"][:, 0].astype(np.float32)
    points_xy = grid_points(facts["grid"], logits.shape[1:])
    given = Candidates(logits > 0, logits, arrays["in_iou"][:, 0], points_xy)
    best = select(given, facts["pred_iou_thresh"], facts["box_nms_thresh"], facts["min_mask_region_area"])
    for name, values in _described(best).items():
        yield ("out_segmentations" if name == "segmentations" else f"out_{name}"), values


def _preprocessed(golden: GoldenSet) -> Iterator[tuple[str, Array]]:
    arrays, size = golden.arrays(), golden.facts["image_size"]
    grey = grey_values(arrays["in_volume"])
    labelled = np.flatnonzero(arrays["in_label"].any(axis=(1, 2)))
    slices = range(labelled[0], labelled[-1])  # the official range leaves out the last
    yield "out_imgs", np.stack([shown(grey[k], size) for k in slices])


def _described(found: Candidates) -> dict[str, Array]:
    boxes = found.boxes_xyxy
    boxes[:, 2:] -= boxes[:, :2]
    return {
        "segmentations": found.masks,
        "iou": found.scores,
        "point": found.points_xy,
        "bbox": boxes,
        "stability": found.stability,
    }
