"""SAM through its predictor: a picture, then one prediction per prompt case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from SAMAdaptLib.models.framing import LongestSide
from SAMAdaptLib.models.mask_decoder import SINGLE_MASK, THREE_MASKS, MaskDecoder
from SAMAdaptLib.models.prompt_encoder import PromptEncoder
from SAMAdaptLib.models.sam import Sam
from SAMAdaptLib.models.vit import ImageEncoderViT
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, chosen_device, taps, tensor_of, to_array
from SAMAdaptLib.weights import load_into


@torch.inference_mode()
def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run all cases of a set; see `Verifier`."""
    network = tiny_sam(golden)
    load_into(network, golden.tensors(checkpoint), "SAM")
    network.eval()
    sizes, arrays = golden.config, golden.arrays()
    framing = LongestSide(sizes["img_size"], sizes["pixel_mean"], sizes["pixel_std"])
    picture = arrays["image_uint8_hwc_rgb"]
    pixels = framing.to_input(picture).to(chosen_device())
    yield "resized_uint8", framing.resize(picture)
    yield "preprocessed", to_array(pixels)
    with taps(encoder_taps(network.image_encoder)) as seen:
        embedding = network.image_encoder(pixels)
    yield from seen.items()
    yield "image_embedding", to_array(embedding)
    yield "dense_pe", to_array(network.prompt_encoder.dense_pe())
    for case in dict.fromkeys(name.split("/")[0] for name in arrays if name.endswith("/low_res_logits")):
        for name, value in _case(network, framing, embedding, case, arrays).items():
            yield f"{case}/{name}", value


def tiny_sam(golden: GoldenSet) -> Sam:
    """Build SAM with the sizes of a set."""
    shape = golden.vit_shape()
    masks = golden.config["num_multimask_outputs"] + 1
    return Sam(ImageEncoderViT(shape), prompt_encoder(golden), mask_decoder(golden, masks, (4, 8)))


def prompt_encoder(golden: GoldenSet) -> PromptEncoder:
    """Build the prompt encoder with the sizes of a set."""
    shape = golden.vit_shape()
    size = (shape.input_size, shape.input_size)
    return PromptEncoder(shape.out_channels, (shape.grid, shape.grid), size, golden.config["mask_in_chans"])


def mask_decoder(golden: GoldenSet, masks: int, upscale_divisors: tuple[int, ...]) -> MaskDecoder:
    """Build the mask decoder with the sizes of a set."""
    sizes = golden.config
    return MaskDecoder(
        embed_dim=sizes["out_chans"],
        mask_tokens=masks,
        depth=sizes["two_way_depth"],
        heads=sizes["decoder_heads"],
        mlp_dim=sizes["decoder_mlp_dim"],
        upscale_divisors=upscale_divisors,
        score_width=sizes["iou_head_hidden_dim"],
        score_depth=sizes["iou_head_depth"],
    )


def encoder_taps(encoder: nn.Module) -> dict[str, nn.Module]:
    """Name the places of a ViT encoder whose values are recorded."""
    parts = dict(encoder.named_children())
    blocks = {f"enc/block{name}": block for name, block in parts["blocks"].named_children()}
    return {"enc/patch_embed": parts["patch_embed"], **blocks, "enc/neck": parts["neck"]}


def _case(
    network: Sam, framing: LongestSide, embedding: Tensor, case: str, arrays: Mapping[str, Array]
) -> dict[str, Array]:
    """Predict for the prompts recorded under a name: points, box, several boxes, the mask, or nothing."""
    shape_yx = arrays["image_uint8_hwc_rgb"].shape[:2]
    given: dict[str, Any] = {}
    if f"{case}/point_coords" in arrays:
        points = framing.to_input_xy(arrays[f"{case}/point_coords"], shape_yx)
        given["points_xy"] = tensor_of(points)[None]
        given["labels"] = tensor_of(arrays[f"{case}/point_labels"])[None]
    boxes = arrays.get(f"{case}/box", arrays.get(f"{case}/boxes_original_xyxy"))
    if boxes is not None:
        corners = framing.to_input_xy(boxes.reshape(-1, 2), shape_yx)
        given["boxes_xyxy"] = tensor_of(corners).reshape(-1, 4)
    if "mask" in case.split("_"):
        given["masks"] = tensor_of(arrays["mask_input_1hw"])[None]
    expected = arrays[f"{case}/low_res_logits"]
    masks = SINGLE_MASK if expected.shape[-3] == 1 else THREE_MASKS
    watched = {
        "decoder_tokens_out": network.mask_decoder.transformer,
        "upscaled": network.mask_decoder.output_upscaling,
    }
    sparse, dense = network.prompt_encoder(**given)
    with taps(watched) as seen:
        low_res, scores = network.mask_decoder(
            embedding, network.prompt_encoder.dense_pe(), sparse, dense, masks
        )
    seen |= {"sparse_embeddings": to_array(sparse), "dense_embedding": to_array(dense)}
    recorded = 0 if expected.ndim == 3 else ...  # a single prompt set is recorded without its axis
    full = framing.to_picture(low_res, shape_yx)
    seen |= {"low_res_logits": to_array(low_res[recorded]), "iou": to_array(scores[recorded])}
    seen["mask_logits_fullres"] = to_array(full[recorded])
    if boxes is not None:
        seen["boxes_model_xyxy"] = to_array(given["boxes_xyxy"])
    return seen
