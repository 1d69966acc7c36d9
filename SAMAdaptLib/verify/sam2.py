"""SAM 2 on pictures: published weights with a box and clicks, tiny ones with every kind of prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from SAMAdaptLib.models.mask_decoder import SINGLE_MASK, THREE_MASKS
from SAMAdaptLib.models.sam2 import Features, Sam2, Squared, load_sam2
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, chosen_device, tensor_of, to_array


@torch.inference_mode()
def published(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run all pictures of a set of published weights; see `Verifier`."""
    arrays = golden.arrays()
    pictures = sorted(name for name in arrays if name.startswith("image_uint8_"))
    size = arrays[pictures[0]].shape[0]
    network = load_sam2(golden.tensors(checkpoint), size)
    for name in pictures:
        number = name.removeprefix("image_uint8_")
        features = network(Squared(size).to_input(arrays[name]).to(chosen_device()))
        yield f"image_embed_every_16th_channel_{number}", to_array(features[0])[:, ::16]
        yield f"high_res_feats_1_every_16th_channel_{number}", to_array(features[1])[:, ::16]
        given = {
            key: tensor_of(arrays[f"{key}_{number}"])[None]
            for key in ("box_xyxy", "points_xy", "point_labels")
        }
        prompts = {
            "box": {"boxes_xyxy": given["box_xyxy"]},
            "points": {"points_xy": given["points_xy"], "labels": given["point_labels"]},
        }
        for kind, prompt in prompts.items():
            logits, scores = decoded(network, features, THREE_MASKS, **prompt)
            yield f"{kind}_masks_{number}", to_array(logits)
            yield f"{kind}_iou_{number}", to_array(scores)


@torch.inference_mode()
def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run all cases of a tiny set; see `Verifier`."""
    network = tiny_sam2(golden, checkpoint)
    arrays = golden.arrays()
    picture = arrays["image_uint8_hwc_rgb"]
    framing = Squared(golden.config["input_size"])
    pixels = framing.to_input(picture).to(chosen_device())
    yield "network_input", to_array(pixels)
    features = network(pixels)
    for name, value in zip(("image_embed", "high_res_feats_1", "high_res_feats_0"), features, strict=True):
        yield name, to_array(value)
    for case in dict.fromkeys(name.split("/")[0] for name in arrays if name.endswith("/low_res_logits")):
        masks = SINGLE_MASK if arrays[f"{case}/low_res_logits"].shape[1] == 1 else THREE_MASKS
        logits, scores = decoded(network, features, masks, **prompts_of(golden, case))
        yield f"{case}/low_res_logits", to_array(logits)
        yield f"{case}/iou", to_array(scores)
        yield f"{case}/mask_logits_fullres", to_array(framing.to_picture(logits, picture.shape[:2]))


def tiny_sam2(golden: GoldenSet, checkpoint: Path | None = None) -> Sam2:
    """Build the network of a tiny set with its weights."""
    return load_sam2(golden.tensors(checkpoint), golden.config["input_size"], golden.config["trunk"])


def prompts_of(golden: GoldenSet, case: str) -> dict[str, Tensor]:
    """Return the prompts of a case in pixels of the network input."""
    arrays = golden.arrays()
    shape_yx = arrays["image_uint8_hwc_rgb"].shape[:2]
    framing = Squared(golden.config["input_size"])
    given: dict[str, Tensor] = {}
    if f"{case}/point_coords" in arrays:
        points_xy = framing.to_input_xy(arrays[f"{case}/point_coords"], shape_yx)
        given["points_xy"] = tensor_of(points_xy)[None]
        given["labels"] = tensor_of(arrays[f"{case}/point_labels"])[None]
    if f"{case}/box" in arrays:
        corners_xy = framing.to_input_xy(arrays[f"{case}/box"].reshape(2, 2), shape_yx)
        given["boxes_xyxy"] = tensor_of(corners_xy).reshape(1, 4)
    if f"{case}/mask_input" in arrays:
        given["masks"] = tensor_of(arrays[f"{case}/mask_input"])[None]
    return given


def decoded(network: Sam2, features: Features, wanted: slice, **prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Decode prompts; see `Sam2MaskDecoder`."""
    sparse, dense = network.sam_prompt_encoder(**prompts)
    dense_pe = network.sam_prompt_encoder.dense_pe()
    found: tuple[Tensor, Tensor] = network.sam_mask_decoder(features, dense_pe, sparse, dense, wanted)
    return found
