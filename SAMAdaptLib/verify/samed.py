"""SAMed and SAMed_s: slices, and whole volumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from SAMAdaptLib.cards import ModelCard, Source
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models.samed import Samed, SamedVolumePredictor, load_into_samed
from SAMAdaptLib.models.vit import ImageEncoderViT, blocks_of
from SAMAdaptLib.prompts import Prompts
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, chosen_device, taps, tensor_of, to_array
from SAMAdaptLib.verify.sam import encoder_taps, mask_decoder, prompt_encoder
from SAMAdaptLib.volume import IntensityWindow, Volume

_HU_WINDOW = (-125.0, 275.0)
"""Of the official script for abdominal CT."""
_AS_STORED = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Grid whose x runs to the left and y to posterior, as in a radiological picture: nothing is flipped."""


@torch.inference_mode()
def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run slices and volume of a set; see `Verifier`."""
    arrays = golden.arrays()
    network = tiny_samed(golden)
    load_into_samed(network, golden.base_tensors(), golden.tensors(checkpoint))
    encoder = network.image_encoder
    watched = {
        "normed": blocks_of(encoder)[0].norm1,
        **encoder_taps(encoder),
        "dec/tokens": network.mask_decoder.transformer,
    }
    with taps(watched) as seen:
        logits, scores = network(tensor_of(arrays["input_b1hw"])[:, 0])
    yield "enc/block0_qkv_first_window", _first_window(encoder, seen.pop("normed"))
    yield from seen.items()
    full = network.enlarged(logits)
    yield "low_res_logits", to_array(logits)
    yield "iou_predictions", to_array(scores)
    yield "masks_fullres_first", to_array(full[:1])
    yield "pred_labels", to_array(full).argmax(axis=1).astype(np.uint8)
    if "hu_volume_xyz" in arrays:
        yield from _volume(network, golden)


def _first_window(encoder: ImageEncoderViT, normed: Array) -> Array:
    """Queries, keys and values of the first window of the first block; beyond the grid there are zeros."""
    window = encoder.shape.window
    tokens = tensor_of(normed)[:1, :window, :window]
    down, across = window - tokens.shape[1], window - tokens.shape[2]
    padded = F.pad(tokens, (0, 0, 0, across, 0, down))
    return to_array(blocks_of(encoder)[0].attn.qkv(padded))


def tiny_samed(golden: GoldenSet) -> Samed:
    """Build SAMed with the sizes of a set, the weights not yet loaded."""
    classes = golden.config["num_classes"]
    return Samed(
        golden.vit_shape(),
        classes,
        golden.architecture == "samed_s",
        prompt_encoder(golden),
        mask_decoder(golden, classes + 1, (4, 8)),
    )


def golden_predictor(network: Samed, golden: GoldenSet) -> SamedVolumePredictor:
    """Make the predictor of a set; its arrays are shown as they are stored."""
    options = {
        "slice_size": golden.config["input_size"],
        "window": _HU_WINDOW,
        "file_axes": "LPS",
    }
    card = ModelCard("golden", "SAMed", "samed", Source("manual"), "", options, dimensions=3)
    return SamedVolumePredictor(network, card, "", chosen_device())


def _volume(network: Samed, golden: GoldenSet) -> Iterator[tuple[str, Array]]:
    voxels = golden.arrays()["hu_volume_xyz"].transpose(2, 1, 0)
    volume = Volume(voxels, Geometry(voxels.shape, _AS_STORED), "CT")
    predictor = golden_predictor(network, golden)
    predictor.set_volume(volume, "K", IntensityWindow(0, 1))
    labels = np.zeros(voxels.shape, dtype=np.uint8)
    for result in predictor.predict(Prompts()):
        volume.geometry.plane("K", result.index).insert(labels, result.labels)
    yield "prediction_zyx", labels
