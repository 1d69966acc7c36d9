"""HQ-SAM part by part: encoder with its early feature, then one decoding per prompt case."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from SAMAdaptLib.models.hq_sam import HqImageEncoder, HqMaskDecoder
from SAMAdaptLib.models.mask_decoder import SINGLE_MASK, THREE_MASKS
from SAMAdaptLib.models.sam import Sam
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, tensor_of, to_array
from SAMAdaptLib.verify.sam import prompt_encoder
from SAMAdaptLib.weights import load_into


@torch.inference_mode()
def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run all cases of a set; see `Verifier`."""
    network = tiny_hq_sam(golden)
    load_into(network, golden.tensors(checkpoint), "HQ-SAM")
    network.eval()
    decoder = network.mask_decoder
    assert isinstance(decoder, HqMaskDecoder)
    arrays = {name: tensor_of(value) for name, value in golden.arrays().items()}
    features = network.image_encoder(arrays["network_input"])
    yield "image_embedding", to_array(features[0])
    yield "early_features_bhwc", to_array(features[1])
    for case in dict.fromkeys(name.split("/")[0] for name in arrays if name.endswith("/low_res_logits")):
        what, how = case.split("_", 1)
        points = what in ("points", "all")
        sparse, dense = network.prompt_encoder(
            arrays["points_xy"] if points else None,
            arrays["point_labels"] if points else None,
            arrays["box_xyxy"] if what in ("box", "all") else None,
            arrays["mask_input"] if what == "all" else None,
        )
        decoder.hq_only = how == "hq_only"
        masks = THREE_MASKS if how == "multi" else SINGLE_MASK
        pe = network.prompt_encoder.dense_pe()
        logits, score = decoder(features, pe, sparse, dense, masks)
        yield f"{case}/low_res_logits", to_array(logits)
        yield f"{case}/iou", to_array(score)


def tiny_hq_sam(golden: GoldenSet) -> Sam:
    """Build HQ-SAM with the sizes of a set."""
    sizes = golden.config
    decoder = HqMaskDecoder(
        sizes["embed_dim"],
        sizes["out_chans"],
        mask_tokens=sizes["num_multimask_outputs"] + 1,
        depth=sizes["two_way_depth"],
        heads=sizes["decoder_heads"],
        mlp_dim=sizes["decoder_mlp_dim"],
        score_width=sizes["iou_head_hidden_dim"],
        score_depth=sizes["iou_head_depth"],
    )
    return Sam(HqImageEncoder(golden.vit_shape()), prompt_encoder(golden), decoder)
