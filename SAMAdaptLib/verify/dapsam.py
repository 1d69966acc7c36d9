"""DAPSAM: pictures one by one and in a batch, and how slices and photographs enter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from SAMAdaptLib.models.dapsam import Dapsam, load_dapsam, standardised_photograph, standardised_slice
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, taps, tensor_of, to_array

_PHOTOGRAPH = "out_fundus_"


def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run network or preprocessing of a set; see `Verifier`."""
    if "config" in golden.facts:
        yield from _network_outputs(golden, load_golden(golden, checkpoint))
    else:
        yield from _preprocessed(golden)


def load_golden(golden: GoldenSet, checkpoint: Path | None = None) -> Dapsam:
    """Build the network of a set with its weights."""
    return load_dapsam(golden.tensors(checkpoint), golden.config["decoder_heads"])


@torch.inference_mode()
def _network_outputs(golden: GoldenSet, network: Dapsam) -> Iterator[tuple[str, Array]]:
    arrays = golden.arrays()
    watched = {
        "out_image_embedding": network.image_encoder,
        "out_embedding_feature": network.image_encoder.l_adapter,
        "out_dense_prompt": network.prompt_generator,
    }
    with taps(watched) as seen:
        logits, scores = network(tensor_of(arrays["in_image"]))
    seen["out_embedding_feature"] = seen["out_embedding_feature"].transpose(0, 3, 1, 2)
    yield from seen.items()
    grid = seen["out_dense_prompt"].shape
    yield "out_dense_pe", to_array(network.prompt_generator.pe_layer.of_cells((grid[2], grid[3])))
    yield "out_low_res_logits", to_array(logits)
    yield "out_iou_predictions", to_array(scores)
    yield "out_masks", to_array(network.enlarged(logits))
    if "in_image_batch" in arrays:
        logits, scores = network(tensor_of(arrays["in_image_batch"]))
        yield "out_batch_low_res_logits", to_array(logits)
        yield "out_batch_iou_predictions", to_array(scores)


def _preprocessed(golden: GoldenSet) -> Iterator[tuple[str, Array]]:
    arrays = golden.arrays()
    labelled = arrays["in_label"].any(axis=(1, 2))
    slices = [standardised_slice(values) for values in arrays["in_volume"][labelled]]
    yield "out_prostate", np.stack([values for values in slices if values is not None])
    for name in arrays:
        if name.startswith(_PHOTOGRAPH):
            picture = standardised_photograph(arrays["in_rgb"], int(name.removeprefix(_PHOTOGRAPH)))
            if picture is not None:
                yield name, picture
