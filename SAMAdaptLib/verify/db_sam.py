"""DB-SAM: two pictures with a box each, a box with points, both ways of resizing, and how boxes are made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from SAMAdaptLib.models.db_sam import DbSam, build_db_sam, load_into_db_sam, official_box
from SAMAdaptLib.models.framing import LongestSide
from SAMAdaptLib.models.mask_decoder import SINGLE_MASK, THREE_MASKS
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, chosen_device, taps, tensor_of, to_array


def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run network or preprocessing of a set; see `Verifier`."""
    if "config" not in golden.facts:
        yield from _preprocessed(golden)
        return
    network = load_golden(golden, checkpoint)
    yield from _network_outputs(golden, network)
    if "out_low_res_logits_antialias" in golden.arrays():
        network.image_encoder.adapter.spatial_prior_module.antialias = True
        _, logits = _both(network, golden.arrays())
        yield "out_low_res_logits_antialias", to_array(logits)


def load_golden(golden: GoldenSet, checkpoint: Path | None = None) -> DbSam:
    """Build the network of a set with its weights."""
    tensors, sizes = golden.tensors(checkpoint), golden.config
    network = build_db_sam(
        tensors,
        decoder_heads=sizes["decoder_heads"],
        channel_attention=sizes.get("vit_conv_position") or "before",
        stages=tuple((first, last) for first, last in sizes["interaction_indexes"]),
    )
    return load_into_db_sam(network, tensors)


def _framing(network: DbSam) -> LongestSide:
    return LongestSide(network.image_encoder.input_size[0])


@torch.inference_mode()
def _both(network: DbSam, arrays: dict[str, Array]) -> tuple[Tensor, Tensor]:
    """Embeddings of all pictures, and logits (B, h, w) of a box in each."""
    framing = _framing(network)
    embedding = network.image_encoder(
        torch.cat([framing.to_input(each) for each in arrays["in_images"]]).to(chosen_device())
    )
    boxes = tensor_of(arrays["in_boxes"][:, 0]).float()
    logits, _ = _decoded(network, embedding, SINGLE_MASK, boxes_xyxy=boxes)
    return embedding, logits[:, 0]


@torch.inference_mode()
def _network_outputs(golden: GoldenSet, network: DbSam) -> Iterator[tuple[str, Array]]:
    arrays = golden.arrays()
    with taps({"pyramid": network.image_encoder.adapter.spatial_prior_module}) as seen:
        embedding, logits = _both(network, arrays)
    for index in range(seen["pyramid"].shape[1]):
        yield f"out_spm_c{index + 1}", seen["pyramid"][:, index]
    yield "out_image_embedding", to_array(embedding[:1])
    yield "out_low_res_logits", to_array(logits)
    several, scores = _decoded(
        network,
        embedding[:1],
        THREE_MASKS,
        boxes_xyxy=tensor_of(arrays["in_boxes"][0]).float(),
        points_xy=tensor_of(arrays["in_point_coords"]),
        labels=tensor_of(arrays["in_point_labels"]),
    )
    yield "out_multi_low_res", to_array(several)
    yield "out_multi_iou", to_array(scores)
    inner_yx = arrays["in_images"].shape[1:3]
    rows, columns = (int(extent) for extent in arrays["in_original_size"])
    yield "out_multi_masks", (_framing(network).cut_to(several, inner_yx, (rows, columns)) > 0).cpu().numpy()


def _decoded(network: DbSam, embedding: Tensor, masks: slice, **prompts: Tensor) -> tuple[Tensor, Tensor]:
    sparse, dense = network.prompt_encoder(**prompts)
    logits, scores = network.mask_decoder(embedding, network.prompt_encoder.dense_pe(), sparse, dense, masks)
    return logits, scores


def _preprocessed(golden: GoldenSet) -> Iterator[tuple[str, Array]]:
    arrays = golden.arrays()
    framing = LongestSide(golden.facts["long_side"])
    yield "out_images", np.stack([framing.resize(picture) for picture in arrays["in_imgs"]])
    inner_yx = framing.inner_shape(arrays["in_imgs"].shape[1:3])
    for widened in (False, True):
        boxes = [official_box(truth > 0, inner_yx, widened)[None] for truth in arrays["in_gts"]]
        yield f"out_boxes_perturb_{widened}", np.stack(boxes)
