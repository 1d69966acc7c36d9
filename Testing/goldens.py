"""The golden sets of Testing/Data, and the networks they belong to, loaded."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from SAMAdaptLib.models.ma_sam import UPSCALE_DIVISORS, MaSam, load_into_ma_sam
from SAMAdaptLib.models.sam import Sam
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, find_sets
from SAMAdaptLib.verify.sam import mask_decoder, prompt_encoder, tiny_sam
from SAMAdaptLib.weights import load_into

DATA = Path(__file__).resolve().parent / "Data"
GOLDENS = DATA / "goldens"


@cache
def golden(name: str) -> GoldenSet:
    """Return a set of Testing/Data/goldens."""
    return find_sets(GOLDENS / name)[0]


@cache
def arrays(name: str) -> dict[str, Array]:
    """Return the recorded inputs and outputs of a set; not to be written to."""
    return golden(name).arrays()


def sam_of(name: str) -> Sam:
    """Build the network of a SAM or MedSAM set with its weights, anew each time."""
    network = tiny_sam(golden(name))
    load_into(network, golden(name).tensors(None), name)
    return network.eval()


def bare_ma_sam_of(name: str) -> MaSam:
    """Build the network of a MA-SAM set without its weights."""
    sizes = golden(name).config
    masks = sizes["num_classes"] + 1
    return MaSam(
        golden(name).vit_shape(),
        sizes["num_classes"],
        sizes["adapter_channels"],
        sizes["depth_slices"],
        prompt_encoder(golden(name)),
        mask_decoder(golden(name), masks, UPSCALE_DIVISORS),
    )


def ma_sam_of(name: str, scale: float = 1.0) -> MaSam:
    """Build the network of a MA-SAM set with its weights, anew each time."""
    found = golden(name)
    return load_into_ma_sam(bare_ma_sam_of(name), found.base_tensors(), found.tensors(None), scale)


def published_keys(name: str) -> dict[str, list[int]]:
    """Return names and shapes of a published checkpoint at full size, from Testing/Data/keys.

    The files fold repeated blocks: "blocks.*.norm1.weight [768]": "0-11".
    """
    folded = json.loads((DATA / "keys" / f"{name}.json").read_text(encoding="utf-8"))
    keys: dict[str, list[int]] = {}
    for line, indices in folded.items():
        pattern, _, shape = line.partition(" ")
        for index in _numbers(indices) if indices else [None]:
            digits = f"{index:03}" if index is not None and "." not in pattern else str(index)
            keys[pattern.replace("*", digits)] = json.loads(shape)
    return keys


def _numbers(ranges: str) -> list[int]:
    numbers: list[int] = []
    for part in ranges.split():
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
