"""SAM-Med2D through its predictor: a prediction per prompt case, several boxes, two pictures at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from SAMAdaptLib.models.mask_decoder import SINGLE_MASK, THREE_MASKS
from SAMAdaptLib.models.sam_med2d import NearestPixels, SamMed2d, load_into_sam_med2d
from SAMAdaptLib.models.vit import blocks_of
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, chosen_device, taps, tensor_of, to_array
from SAMAdaptLib.verify.sam import encoder_taps, mask_decoder, prompt_encoder


@torch.inference_mode()
def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run all cases of a set; see `Verifier`."""
    network = tiny_sam_med2d(golden)
    load_into_sam_med2d(network, golden.tensors(checkpoint))
    sizes, arrays = golden.config, golden.arrays()
    # The recorded picture is in the order that the network was given.
    size = golden.vit_shape().input_size
    framing = NearestPixels(size, sizes["pixel_mean"], sizes["pixel_std"], reverse_colours=False)
    pixels = framing.to_input(arrays["image_uint8_hwc_rgb"]).to(chosen_device())
    yield "network_input", to_array(pixels)
    adapter = blocks_of(network.image_encoder)[0].beside_mlp
    watched = encoder_taps(network.image_encoder)
    if adapter is not None:
        watched["enc/block0_adapter"] = adapter
    with taps(watched) as seen:
        embedding = network.image_encoder(pixels)
    yield from seen.items()
    yield "image_embedding", to_array(embedding)
    for case in dict.fromkeys(name.split("/")[0] for name in arrays if name.endswith("/low_res_selected")):
        yield from _case(network, framing, embedding, case, arrays)
    if "batch_boxes/boxes_original_xyxy" in arrays:
        yield from _boxes(network, framing, embedding, arrays)
        yield from _two_pictures(network, pixels, arrays)


def tiny_sam_med2d(golden: GoldenSet) -> SamMed2d:
    """Build SAM-Med2D with the sizes of a set, the weights not yet loaded."""
    sizes = golden.config
    return SamMed2d(
        golden.vit_shape(),
        sizes["adapter_ratio"] if sizes["encoder_adapter"] else 0,
        prompt_encoder(golden),
        mask_decoder(golden, sizes["num_multimask_outputs"] + 1, (4, 8)),
    )


def _case(
    network: SamMed2d, framing: NearestPixels, embedding: Tensor, case: str, arrays: dict[str, Array]
) -> Iterator[tuple[str, Array]]:
    shape_yx = arrays["image_uint8_hwc_rgb"].shape[:2]
    given: dict[str, Tensor] = {}
    if f"{case}/point_coords" in arrays:
        points = framing.to_input_xy(arrays[f"{case}/point_coords"], shape_yx)
        given["points_xy"] = tensor_of(points)[None]
        given["labels"] = tensor_of(arrays[f"{case}/point_labels"])[None]
    if f"{case}/box" in arrays:
        given["boxes_xyxy"] = _box(framing, arrays[f"{case}/box"], shape_yx)
    if f"{case}/mask_input" in arrays:
        given["masks"] = tensor_of(arrays[f"{case}/mask_input"])[None]
    single = arrays[f"{case}/decoder_low_res_all"].shape[1] == 1
    sparse, low_res, scores = _decoded(network, embedding, given, SINGLE_MASK if single else THREE_MASKS)
    best = int(scores[0].argmax())
    selected = low_res[:, best : best + 1]
    yield f"{case}/sparse_embeddings", to_array(sparse)
    yield f"{case}/decoder_low_res_all", to_array(low_res)
    yield f"{case}/low_res_selected", to_array(selected[0])
    yield f"{case}/iou_selected", to_array(scores[0, best : best + 1])
    yield f"{case}/mask_logits_fullres", to_array(framing.to_picture(selected, shape_yx)[0])


def _boxes(
    network: SamMed2d, framing: NearestPixels, embedding: Tensor, arrays: dict[str, Array]
) -> Iterator[tuple[str, Array]]:
    shape_yx = arrays["image_uint8_hwc_rgb"].shape[:2]
    boxes, full = [], []
    for box in arrays["batch_boxes/boxes_original_xyxy"]:
        boxes.append(_box(framing, box, shape_yx))
        _, low_res, scores = _decoded(network, embedding, {"boxes_xyxy": boxes[-1]}, THREE_MASKS)
        best = int(scores[0].argmax())
        full.append(framing.to_picture(low_res[:, best : best + 1], shape_yx))
    yield "batch_boxes/boxes_model_xyxy", to_array(torch.cat(boxes))
    yield "batch_boxes/mask_logits_fullres", to_array(torch.cat(full))


def _two_pictures(network: SamMed2d, pixels: Tensor, arrays: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    pair = network.image_encoder(torch.cat([pixels, pixels.flip(-1)]))
    boxes = {"boxes_xyxy": tensor_of(arrays["batch_boxes/boxes_model_xyxy"][:2])}
    _, low_res, scores = _decoded(network, pair, boxes, THREE_MASKS)
    yield "forward_batch2/low_res_logits", to_array(low_res)
    yield "forward_batch2/iou", to_array(scores)


def _box(framing: NearestPixels, box_xyxy: Array, shape_yx: Any) -> Tensor:
    return tensor_of(framing.to_input_xy(box_xyxy.reshape(2, 2), shape_yx)).reshape(1, 4)


def _decoded(
    network: SamMed2d, embedding: Tensor, given: dict[str, Tensor], masks: slice
) -> tuple[Tensor, Tensor, Tensor]:
    sparse, dense = network.prompt_encoder(**given)
    dense_pe = network.prompt_encoder.dense_pe()
    low_res, scores = network.mask_decoder(embedding, dense_pe, sparse, dense, masks)
    return sparse, low_res, scores
