"""Checkpoints: read without running anything of theirs, recognised by their keys, loaded without guessing."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import WeightsError
from .files import sha256_of_file
from .tensor_reader import read_tensors

_NAMED = 3
"""Keys that an error names before it counts the rest."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a file.

    Args:
        tensors: By the names that the file gives them; half precision is widened to float32.
        sha256: Of the file.
        name: Of the file, without its folder.
    """

    tensors: dict[str, Tensor]
    sha256: str
    name: str


def read_checkpoint(path: str | os.PathLike[str], sha256: str = "") -> Checkpoint:
    """Read a checkpoint: safetensors, or a PyTorch file that holds nothing but tensors and plain values.

    A state dict under "model", "state_dict" or "net" is taken out, and the prefix "module." of multi-GPU
    training removed.

    Args:
        path: The file.
        sha256: What its hash must be; empty to take any.

    Raises:
        WeightsError: Not there, damaged, another hash, no checkpoint, or more than tensors inside.
    """
    file = Path(path)
    if not file.is_file() or file.stat().st_size == 0:
        state = "is empty" if file.is_file() else "is not there"
        raise WeightsError(f"A checkpoint was wanted, but {file.name} {state}. Choose or fetch it again.")
    found = sha256_of_file(file)
    if sha256 and found != sha256:
        raise WeightsError(
            f"{file.name} should have the SHA-256 {sha256[:16]}..., but has {found[:16]}...: it is damaged "
            "or another file. Fetch it again."
        )
    tensors = _flattened(_read_safetensors(file) if _is_safetensors(file) else _read_torch(file))
    if not tensors:
        raise WeightsError(
            f"{file.name} should hold a network's tensors, but holds none. Choose another file."
        )
    return Checkpoint({name: _widened(tensor) for name, tensor in tensors.items()}, found, file.name)


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], network: str, ignore: Iterable[str] = ()
) -> None:
    """Fill a network with a checkpoint; nothing may be missing, left over or of another shape.

    Args:
        module: Changed in place, and only if everything fits.
        tensors: By the network's own key names.
        network: Its name, for the error.
        ignore: Keys of the checkpoint that the network does not need.

    Raises:
        WeightsError: Names the first keys that do not fit and what the checkpoint looks like.
    """
    copy_into(module.state_dict(), tensors, network, ignore)


def copy_into(
    targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], network: str, ignore: Iterable[str] = ()
) -> None:
    """Copy tensors into others by name; the same rules as `load_into`.

    Raises:
        WeightsError: Names the first keys that do not fit and what the checkpoint looks like.
    """
    given = {name: tensor for name, tensor in tensors.items() if name not in set(ignore)}
    problems = {
        "lacks": [name for name in targets if name not in given],
        "also holds": [name for name in given if name not in targets],
        "has another shape at": [
            f"{name} ({list(given[name].shape)} for {list(target.shape)})"
            for name, target in targets.items()
            if name in given and given[name].shape != target.shape
        ],
    }
    found = [f"{what} {_few(names)}" for what, names in problems.items() if names]
    if found:
        raise WeightsError(
            f"A checkpoint of {network} was wanted, but the file {' and '.join(found)}; it looks like "
            f"{recognise(tensors)}. Choose the file that belongs to the model."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(given[name])


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """Say in words which published network a checkpoint is of, by its keys and the width of its encoder."""
    names = [*tensors, *(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())]
    for title, marks in _SIGNATURES:
        if all(any(re.search(mark, name) for name in names) for mark in marks):
            return title + _size(tensors)
    return "no network that SAMAdapt knows"


def _size(tensors: Mapping[str, Tensor]) -> str:
    for name in _AS_WIDE_AS_THE_ENCODER:
        width = tensors[name].shape[-1] if name in tensors and tensors[name].ndim else 0
        if width in _WIDTHS:
            return f", {_WIDTHS[width]}"
    return ""


_WIDTHS = {768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H"}
_AS_WIDE_AS_THE_ENCODER = ("image_encoder.pos_embed", "image_encoder.FacTu.weight", "w_a_000")


_SIGNATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a MA-SAM adapter file", (r"^q_FacTs_000$",)),
    ("a SAMed_s adapter file", (r"^w_a_000$", r"^fati_qa")),
    ("a SAMed adapter file", (r"^w_a_000$",)),
    ("DAPSAM", (r"^prompt_generator\.memory_bank\.weight$",)),
    ("DB-SAM", (r"^image_encoder\.adapter\.aggregation\.",)),
    ("DeSAM", (r"^mask_decoder\.pimm\.",)),
    ("SAM-UNet", (r"^image_encoder\.sam_img_encoder\.",)),
    ("HQ-SAM", (r"^mask_decoder\.hf_token\.weight$",)),
    ("a Medical SAM Adapter checkpoint", (r"Space_Adapter", r"mask_decoder")),
    ("a Medical SAM Adapter file without its decoder", (r"Space_Adapter",)),
    ("SAM-Med2D", (r"blocks\.0\.Adapter\.channel\.0\.weight$",)),
    ("MobileSAM or LiteMedSAM", (r"image_encoder\.patch_embed\.seq\.0\.c\.weight$",)),
    ("SAM 2", (r"image_encoder\.trunk\.",)),
    ("SAM-Med2D without adapters (FT-SAM)", (r"^image_encoder\.pos_embed \[1, 16, 16, ", r"^mask_decoder\.")),
    (
        "SAM or MedSAM",
        (r"^image_encoder\.pos_embed$", r"^image_encoder\.blocks\.0\.attn\.qkv\.weight$", r"^mask_decoder\."),
    ),
)
"""Networks by keys, or keys with a shape, that only they have; the first that fits counts."""


def _is_safetensors(file: Path) -> bool:
    """A safetensors file starts with the length of its header, eight bytes, and the header is JSON."""
    with file.open("rb") as stream:
        start = stream.read(9)
    return start[8:] == b"{"


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(file))
    except SafetensorError as error:
        raise _damaged(file) from error


def _read_torch(file: Path) -> Any:
    if not zipfile.is_zipfile(file) and not _starts_as_pickle(file):
        raise _damaged(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # its unpickler lets through whatever a damaged or hostile file makes it raise
        return read_tensors(file)


def _starts_as_pickle(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(1) == b"\x80"


def _damaged(file: Path) -> WeightsError:
    return WeightsError(
        f"{file.name} should be a checkpoint (safetensors or PyTorch), but is cut short, damaged or "
        "something else. Fetch it again."
    )


def _flattened(content: Any) -> dict[str, Tensor]:
    """Find the state dict: the content itself, or what training scripts put under one of three names."""
    if not isinstance(content, Mapping):
        return {}
    for key in ("model", "state_dict", "net"):
        if isinstance(content.get(key), Mapping):
            return _flattened(content[key])
    tensors = {name: value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _few(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
