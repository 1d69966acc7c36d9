"""MobileSAM and LiteMedSAM with their published checkpoints: pictures, a box, clicks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from SAMAdaptLib.models.framing import LongestSide, LongestSideMinMax
from SAMAdaptLib.models.mask_decoder import SINGLE_MASK, THREE_MASKS
from SAMAdaptLib.models.mobile_sam import MobileSam
from SAMAdaptLib.models.tiny_vit import UNUSED_KEYS, TinyViTConfig
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, chosen_device, tensor_of, to_array
from SAMAdaptLib.weights import load_into


@torch.inference_mode()
def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run all pictures of a set; see `Verifier`."""
    lite = golden.architecture == "lite_medsam"
    arrays = golden.arrays()
    pictures = sorted(name for name in arrays if name.startswith("image_uint8_"))
    size = arrays[pictures[0]].shape[0]
    network = MobileSam(size, TinyViTConfig(pointwise_patches=lite))
    load_into(network, golden.tensors(checkpoint), golden.architecture, ignore=UNUSED_KEYS)
    network.eval()
    framing = LongestSideMinMax(size) if lite else LongestSide(size)
    for name in pictures:
        number = name.removeprefix("image_uint8_")
        embedding = network.image_encoder(framing.to_input(arrays[name]).to(chosen_device()))
        yield f"embedding_every_16th_channel_{number}", to_array(embedding)[:, ::16]
        box = tensor_of(arrays[f"box_xyxy_{number}"])[None]
        yield from _decoded(network, embedding, f"box_{number}", SINGLE_MASK, boxes_xyxy=box)
        if f"points_xy_{number}" in arrays:
            points = tensor_of(arrays[f"points_xy_{number}"])[None]
            labels = tensor_of(arrays[f"point_labels_{number}"])[None]
            prompts = {"points_xy": points, "labels": labels}
            yield from _decoded(network, embedding, f"points_{number}", THREE_MASKS, **prompts)


def _decoded(
    network: MobileSam, embedding: Tensor, case: str, masks: slice, **prompts: Tensor
) -> Iterator[tuple[str, Array]]:
    kind, number = case.split("_")
    sparse, dense = network.prompt_encoder(**prompts)
    logits, scores = network.mask_decoder(embedding, network.prompt_encoder.dense_pe(), sparse, dense, masks)
    yield f"{kind}_low_res_logits_{number}", to_array(logits)
    yield f"{kind}_iou_{number}", to_array(scores)
