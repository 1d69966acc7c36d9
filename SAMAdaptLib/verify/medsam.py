"""MedSAM: one box, several boxes on one picture, and two pictures with a box each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from SAMAdaptLib.models.mask_decoder import SINGLE_MASK
from SAMAdaptLib.models.medsam import Stretched
from SAMAdaptLib.models.sam import Sam
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, chosen_device, tensor_of, to_array
from SAMAdaptLib.verify.sam import tiny_sam
from SAMAdaptLib.weights import load_into


@torch.inference_mode()
def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run all cases of a set; see `Verifier`."""
    network = tiny_sam(golden)
    load_into(network, golden.tensors(checkpoint), "MedSAM")
    network.eval()
    arrays = golden.arrays()
    framing = Stretched(golden.config["img_size"])
    picture = arrays["image_uint8_hw"]
    pixels = framing.to_input(picture).to(chosen_device())
    shape_yx = (picture.shape[0], picture.shape[1])
    corners = framing.to_input_xy(arrays["box_original_xyxy"].reshape(-1, 2), shape_yx)
    embedding = network.image_encoder(pixels)
    yield "resized_uint8_hwc", framing.resize(picture)
    yield "network_input", to_array(pixels)
    yield "box_model_xyxy", corners.reshape(-1, 4)
    yield "image_embedding", to_array(embedding)

    low_res = _decode(network, embedding, corners.reshape(-1, 4))
    probability = framing.to_probability(low_res, shape_yx)
    yield "low_res_logits", to_array(low_res)
    yield "prob_fullres", to_array(probability)
    yield "seg", to_array(probability)[0, 0] > 0.5

    boxes = arrays["boxes3_model_xyxy"]
    low_res = _decode(network, embedding, boxes)
    yield "low_res_logits_boxes3", to_array(low_res)
    yield "seg_boxes3", to_array(framing.to_probability(low_res, shape_yx))[:, 0] > 0.5

    both = network.image_encoder(
        torch.cat([pixels, pixels.flip(-1)])
    )  # the second picture is the mirrored one
    low_res = _decode(network, both, boxes[:2])
    yield "low_res_logits_batch2", to_array(low_res)
    yield "seg_batch2", to_array(framing.to_probability(low_res, shape_yx))[:, 0] > 0.5


def _decode(network: Sam, embedding: Tensor, boxes_xyxy: Array) -> Tensor:
    sparse, dense = network.prompt_encoder(boxes_xyxy=tensor_of(boxes_xyxy).float())
    dense_pe = network.prompt_encoder.dense_pe()
    logits: Tensor = network.mask_decoder(embedding, dense_pe, sparse, dense, SINGLE_MASK)[0]
    return logits
