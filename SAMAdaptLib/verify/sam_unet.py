"""SAM-UNet: boxes, several boxes, points, two pictures, and how pictures and boxes enter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from SAMAdaptLib.models.framing import LongestSide
from SAMAdaptLib.models.sam_unet import SamUnet, box_of_largest_part, load_sam_unet
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, chosen_device, taps, tensor_of, to_array


def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run network or preprocessing of a set; see `Verifier`."""
    if "config" in golden.facts:
        yield from _network_outputs(golden, load_golden(golden, checkpoint))
    else:
        yield from _preprocessed(golden)


def load_golden(golden: GoldenSet, checkpoint: Path | None = None) -> SamUnet:
    """Build the network of a set with its weights."""
    return load_sam_unet(golden.tensors(checkpoint), golden.config["decoder_heads"])


@torch.inference_mode()
def _network_outputs(golden: GoldenSet, network: SamUnet) -> Iterator[tuple[str, Array]]:
    arrays = golden.arrays()
    framing = LongestSide(network.image_encoder.input_size[0])
    pictures = [arrays[name].transpose(1, 2, 0) for name in ("in_image_chw", "in_image2_chw")]
    inputs = [framing.to_input(picture).to(chosen_device()) for picture in pictures]
    watched = {
        f"out_adapter_in_{index}": adapter for index, adapter in enumerate(network.image_encoder.adapters_in)
    }
    with taps(watched) as seen:
        features = network.image_encoder(inputs[0])
    yield from seen.items()
    for index, stage in enumerate(network.image_encoder.resnet(inputs[0])):
        yield f"out_resnet_{index}", to_array(stage)
    yield "out_multi_scale_feature", to_array(features[1])
    both = network.image_encoder(torch.cat(inputs))
    boxes = np.concatenate([arrays["in_box"], arrays["in_box2"]])
    logits = _decoded(network, both, boxes_xyxy=tensor_of(boxes))
    shape_yx = tuple(int(extent) for extent in arrays["in_original_size"])
    inner_yx = pictures[0].shape[:2]
    yield "out_low_res_logits", to_array(logits)
    yield "out_masks", (framing.cut_to(logits, inner_yx, (shape_yx[0], shape_yx[1])) > 0).cpu().numpy()
    three = tensor_of(arrays["in_boxes3"])
    yield "out_multi_box_logits", to_array(_decoded(network, features, boxes_xyxy=three))
    points, labels = (tensor_of(arrays[name])[None] for name in ("in_points", "in_point_labels"))
    yield "out_points_logits", to_array(_decoded(network, features, points_xy=points, labels=labels))


def _decoded(network: SamUnet, features: tuple[Tensor, Tensor], **prompts: Tensor) -> Tensor:
    sparse, dense = network.prompt_encoder(**prompts)
    logits: Tensor = network.mask_decoder(features, network.prompt_encoder.dense_pe(), sparse, dense)[0]
    return logits


def _preprocessed(golden: GoldenSet) -> Iterator[tuple[str, Array]]:
    arrays = golden.arrays()
    picture = arrays["in_image"]
    framing = LongestSide(golden.facts["img_size"])
    boxes = np.stack([box_of_largest_part(mask > 0) for mask in arrays["in_masks"]])
    corners = framing.to_input_xy(boxes.reshape(-1, 2), picture.shape[:2])
    yield "out_boxes", boxes
    yield "out_resized", framing.resize(picture)
    yield "out_boxes_resized", corners.reshape(-1, 4)
    yield "out_normalised_padded", to_array(framing.to_input(picture)[0])
