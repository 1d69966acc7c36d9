"""Medical SAM Adapter: pictures, or chunks of slices as a batch, with a click on each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from SAMAdaptLib.models.med_sa import Depth, Dialect, MedSa, load_into_med_sa
from SAMAdaptLib.models.med_sa_predictors import Squeezed
from SAMAdaptLib.models.vit import blocks_of
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, taps, tensor_of, to_array
from SAMAdaptLib.verify.sam import encoder_taps, mask_decoder, prompt_encoder
from SAMAdaptLib.weights import read_checkpoint


@torch.inference_mode()
def outputs(golden: GoldenSet, checkpoint: Path | None) -> Iterator[tuple[str, Array]]:
    """Run all clicks of a set; see `Verifier`."""
    sizes, arrays = golden.config, golden.arrays()
    tensors = read_checkpoint(checkpoint or _own_file(golden)).tensors
    network = tiny_med_sa(golden, Dialect.of(tensors))
    load_into_med_sa(network, tensors)
    framing = Squeezed(
        sizes["image_size"], sizes["out_size"], mean=sizes["pixel_mean"], std=sizes["pixel_std"]
    )
    pixels = framing.standardised(_pictures(arrays))
    yield "network_input_slice0", to_array(pixels[0])
    first = blocks_of(network.image_encoder)[0]
    watched = encoder_taps(network.image_encoder)
    watched |= {
        f"enc/block0_{name}_adapter": first.get_submodule(f"{name}_adapter")
        for name in ("space", "mlp", "depth")
    }
    with taps(watched) as seen:
        embedding = network.image_encoder(pixels)
    yield from seen.items()
    yield "image_embedding", to_array(embedding)
    masks = slice(0, sizes["multimask_output"])
    points, labels = (
        tensor_of(arrays["pt_b2"])[:, None],
        tensor_of(arrays["pt_label_b"])[:, None],
    )
    sparse, dense = network.prompt_encoder(points, labels)
    yield "sparse_embeddings", to_array(sparse)
    dense_pe = network.prompt_encoder.dense_pe()
    with taps({"dec/tokens": network.mask_decoder.transformer}) as seen:
        low_res, scores = network.mask_decoder(embedding, dense_pe, sparse, dense, masks)
    yield from seen.items()
    yield "low_res_logits", to_array(low_res)
    yield "iou", to_array(scores)
    official = framing.to_official_size(low_res)
    yield "logits_out_size", to_array(official[: len(arrays["logits_out_size"])])
    yield "seg", (to_array(official) > 0).astype(arrays["seg"].dtype)
    if "pts3_bn2" in arrays:
        several = tensor_of(arrays["pts3_bn2"]), tensor_of(arrays["pts3_labels_bn"])
        sparse, dense = network.prompt_encoder(*several)
        low_res, _ = network.mask_decoder(embedding, dense_pe, sparse, dense, masks)
        yield "low_res_logits_pts3", to_array(low_res)


def tiny_med_sa(golden: GoldenSet, dialect: Dialect) -> MedSa:
    """Build Med-SA with the sizes of a set, the weights not yet loaded."""
    sizes = golden.config
    return MedSa(
        golden.vit_shape(),
        dialect,
        Depth(sizes["chunk"]) if sizes["thd"] else None,
        sizes["adapter_ratio"],
        prompt_encoder(golden),
        mask_decoder(golden, max(sizes["num_mask_tokens"], sizes["multimask_output"]), (4, 8)),
    )


def _own_file(golden: GoldenSet) -> Path:
    """The set's checkpoint: safetensors, or a file as the official training writes it."""
    folder = golden.path.parent
    return next(iter([*folder.glob("checkpoint.safetensors"), *folder.glob("*.pth")]))


def _pictures(arrays: dict[str, Array]) -> torch.Tensor:
    """Colours (B, 3, H, W) in 0..255; slices of volumes one after the other."""
    if "image_b3hw_0_255" in arrays:
        return tensor_of(arrays["image_b3hw_0_255"])
    volumes = tensor_of(arrays["image_b1hwd"])
    return volumes.permute(0, 4, 1, 2, 3).flatten(0, 1).expand(-1, 3, -1, -1)
