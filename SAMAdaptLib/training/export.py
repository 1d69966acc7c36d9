"""The trained weights as the file that ships."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from SAMAdaptLib.files import atomic_path, sha256_of_file
from SAMAdaptLib.models.mobile_sam import MobileSam

_FULL_PRECISION = "positional_encoding_gaussian_matrix"


def half_state(model: MobileSam) -> dict[str, Tensor]:
    """Return the weights under their official names, matrices and kernels in half precision.

    Vectors (biases, norms and their statistics) and the positional frequencies stay as they are: they are
    small, and rounding them moves every output.
    """
    return {
        name: (value.half() if value.ndim > 1 and _FULL_PRECISION not in name else value).contiguous()
        for name, value in model.state_dict().items()
    }


def write_weights(model: MobileSam, facts: Mapping[str, str], path: Path) -> str:
    """Write a safetensors file with `facts` in its header and return its SHA-256."""
    with torch.no_grad(), atomic_path(path) as temporary:
        save_file(half_state(model), temporary, {"format": "pt", **facts})
    return sha256_of_file(path)


def write_summary(path: Path, summary: Mapping[str, object]) -> None:
    """Write what a card needs to know about a run as JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
