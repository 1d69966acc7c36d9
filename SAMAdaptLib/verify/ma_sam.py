"""MA-SAM, automatic or with boxes: stacks of slices, and whole volumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from SAMAdaptLib.cards import ModelCard, Source
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models.ma_sam import UPSCALE_DIVISORS, MaSam, MaSamVolumePredictor, load_into_ma_sam
from SAMAdaptLib.models.vit import blocks_of
from SAMAdaptLib.prompts import Prompts
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, chosen_device, taps, tensor_of, to_array
from SAMAdaptLib.verify.sam import encoder_taps, mask_decoder, prompt_encoder
from SAMAdaptLib.volume import IntensityWindow, Volume

_HU_WINDOW = (-200.0, 250.0)
"""Of the official script for abdominal CT."""
_MIDDLE = "probability_avg_padded_slice_mid_hwc"


@torch.inference_mode()
def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run stacks and volume of a set; see `Verifier`."""
    sizes, arrays = golden.config, golden.arrays()
    network = MaSam(
        golden.vit_shape(),
        sizes["num_classes"],
        sizes["adapter_channels"],
        sizes["depth_slices"],
        prompt_encoder(golden),
        mask_decoder(golden, sizes["num_classes"] + 1, UPSCALE_DIVISORS),
    )
    load_into_ma_sam(network, golden.base_tensors(), golden.tensors(checkpoint), sizes["scale"])
    boxes = arrays.get("bbox_xyxy_bd4")
    watched = {
        **encoder_taps(network.image_encoder),
        "enc/block0_adapter_up": blocks_of(network.image_encoder)[0].before_attention.get_submodule(
            "linear_up"
        ),
        "dec/dec_tokens": network.mask_decoder.transformer,
        "upscaled": network.mask_decoder.output_upscaling,
    }
    with taps(watched) as seen:
        logits, scores = network(tensor_of(arrays["input_bdhw"]), None if boxes is None else tensor_of(boxes))
    yield "dec/upscaled_mean_over_hw", seen.pop("upscaled").mean(axis=(2, 3))
    yield from seen.items()
    yield "low_res_logits", to_array(logits)
    yield "iou_predictions", to_array(scores)
    yield "pred_labels", to_array(logits).argmax(axis=1)
    if "hu_volume_xyz" in arrays:
        yield from _volume(network, arrays["hu_volume_xyz"])


def _volume(network: MaSam, voxels_xyz: Array) -> Iterator[tuple[str, Array]]:
    voxels = voxels_xyz.transpose(2, 1, 0)
    volume = Volume(voxels, Geometry(voxels.shape, np.eye(4)), "CT")
    card = ModelCard("golden", "MA-SAM", "ma_sam", Source("manual"), "", dimensions=3)
    predictor = MaSamVolumePredictor(network, card, "", chosen_device())
    predictor.set_volume(volume, "K", IntensityWindow(*_HU_WINDOW))
    stacks = predictor.stacks
    recorded = {0: "probability_avg_padded_slice2_hwc", len(stacks) // 2: _MIDDLE}
    for index, mean, count in stacks.ensemble(range(len(stacks)), predictor.probabilities):
        if index in recorded:
            # The official divisor counts one stack more than there are.
            yield recorded[index], mean.transpose(1, 2, 0) * (count / (count + 1))
    labels = np.zeros(voxels.shape, dtype=np.uint8)
    for result in predictor.predict(Prompts()):
        volume.geometry.plane("K", result.index).insert(labels, result.labels)
    yield "prediction_xyz", labels.transpose(2, 1, 0)
