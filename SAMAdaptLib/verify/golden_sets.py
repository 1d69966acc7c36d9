"""Recorded inputs and outputs of official code: a JSON of facts, NumPy arrays, and a checkpoint."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from SAMAdaptLib import store
from SAMAdaptLib.cards import ModelCard, all_cards
from SAMAdaptLib.errors import JobError, WeightsError
from SAMAdaptLib.models.vit import ViTShape
from SAMAdaptLib.weights import read_checkpoint

Array = NDArray[Any]
_SOLE = "config"
"""Name of the JSON of a set that has a folder of its own."""
_TOLERANCE = 1e-4
_PUBLISHED_LOGITS = 1e-3
"""Published networks give logits of order 10, random ones of order 1."""


@dataclass(frozen=True)
class GoldenSet:
    """One set: `config.json` in its own folder, or `NAME.json` beside others.

    Args:
        path: The JSON file.
        facts: What it holds.
    """

    path: Path
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """How a report calls the set."""
        return self.path.parent.name if self.path.stem == _SOLE else self.path.stem

    @property
    def architecture(self) -> str:
        """What the official code implements."""
        return str(self.facts.get("model", self.path.resolve().parent.name))

    @property
    def config(self) -> Mapping[str, Any]:
        """Sizes of the network."""
        values: Mapping[str, Any] = self.facts["config"]
        return values

    def arrays(self) -> dict[str, Array]:
        """All recorded inputs and outputs by name."""
        return self._arrays

    @cached_property
    def _arrays(self) -> dict[str, Array]:
        files = sorted(self.path.parent.glob("*.npz")) if self.path.stem == _SOLE else [self._beside(".npz")]
        arrays: dict[str, Array] = {}
        for file in files:
            try:
                with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                    arrays |= {name: stored[name] for name in stored.files}
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise JobError(
                    f"The set {self.name} should hold arrays in {file.name}, but it is missing or damaged. "
                    "Restore it."
                ) from error
        if not arrays:
            raise JobError(f"The set {self.name} should hold recorded outputs, but holds none. Restore it.")
        return arrays

    def tensors(self, checkpoint: Path | None) -> dict[str, Tensor]:
        """Tensors of the set's own checkpoint, of the given file, or of the published one from the store.

        Raises:
            WeightsError: The published checkpoint is not on this machine, or the file is another one.
        """
        published = self.facts.get("published_checkpoint")
        if published is None:
            own = "checkpoint.safetensors" if self.path.stem == _SOLE else f"{self.path.stem}.safetensors"
            return read_checkpoint(checkpoint or self.path.parent / own).tensors
        hashes = [published["sha256"]] if isinstance(published["sha256"], str) else published["sha256"]
        known = [card.name for card in all_cards() if _hashes(card) == sorted(hashes)]
        # A file that was made of several has no hash of its own; its parts were verified when they came.
        sha256 = hashes[0] if len(hashes) == 1 else ""
        file = checkpoint or (store.find(sha256) if sha256 else _stored_under(known))
        if file is None:
            fetch = f"Run `samadapt models download {known[0]}`, or give" if known else "Give"
            raise WeightsError(
                f"The set {self.name} needs the published checkpoint {Path(published['member']).name} of "
                f"{published['package']}, but the model store does not hold it. {fetch} the file "
                "with --checkpoint."
            )
        return read_checkpoint(file, sha256).tensors

    def base_tensors(self) -> dict[str, Tensor]:
        """Tensors of the SAM checkpoint that an adapter file stands on."""
        return read_checkpoint(self.path.parent / "sam_base.safetensors").tensors

    def tolerance(self, output: str) -> float:
        """Largest difference allowed, as the set or, for published networks, the kind of output says."""
        if "published_checkpoint" in self.facts:
            return _PUBLISHED_LOGITS if "logits" in output or "masks" in output else _TOLERANCE
        stated = re.search(r"atol ([0-9.]+(?:e-?[0-9]+)?)", str(self.facts.get("tolerance_hint", "")))
        return float(stated[1]) if stated else _TOLERANCE

    def vit_shape(self) -> ViTShape:
        """Sizes of the ViT encoder."""
        sizes = self.config
        return ViTShape(
            embed_dim=sizes["embed_dim"],
            depth=sizes["depth"],
            heads=sizes["num_heads"],
            global_blocks=tuple(sizes["global_attn_indexes"]),
            input_size=sizes["img_size"] if "img_size" in sizes else sizes["image_size"],
            patch_size=sizes["patch_size"],
            window=sizes["window_size"],
            mlp_ratio=sizes["mlp_ratio"],
            out_channels=sizes["out_chans"],
            relative_positions=sizes.get("use_rel_pos", True),
            qkv_bias=sizes.get("qkv_bias", True),
        )

    def _beside(self, suffix: str) -> Path:
        return self.path.with_suffix(suffix)


Verifier = Callable[[GoldenSet, Path | None], Iterator[tuple[str, Array]]]
"""From a set and a checkpoint to the outputs by their recorded names, in the order of the computation."""


def find_sets(path: Path) -> list[GoldenSet]:
    """Return the set of a JSON file, or all sets of a folder.

    Raises:
        JobError: No set there, or a JSON file that cannot be read.
    """
    named = path.with_name(f"{path.name}.json")
    if path.is_file() or (named.is_file() and not path.is_dir()):
        return [_read(path if path.is_file() else named)]
    if not path.is_dir():
        raise JobError(f"A folder of golden sets or a JSON file was wanted, but {path.name} is not there.")
    sole = path / f"{_SOLE}.json"
    files = [sole] if sole.is_file() else sorted(path.glob("*.json"))
    sets = [_read(file) for file in files if file == sole or file.with_suffix(".npz").is_file()]
    if not sets:
        raise JobError(
            f"The folder {path.name} should hold a golden set (a JSON file and arrays), but holds none. "
            "Choose the folder of one set."
        )
    return sets


def chosen_device() -> torch.device:
    """Return the device on which sets are run: that of the surrounding `with torch.device(...)`."""
    return torch.empty(0).device


def tensor_of(values: Array) -> Tensor:
    """Return recorded values as a tensor on the chosen device."""
    return torch.from_numpy(values).to(chosen_device())


def to_array(value: Tensor) -> Array:
    """Return a tensor's values."""
    return value.detach().float().cpu().numpy()


@contextmanager
def taps(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Array]]:
    """Collect what modules give while the block runs; of several values the first."""
    seen: dict[str, Array] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _given: Any, result: Any) -> None:
            seen[name] = to_array(result[0] if isinstance(result, tuple) else result)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hashes(card: ModelCard) -> list[str]:
    return sorted(part.sha256 for part in card.source.parts) or [card.sha256]


def _stored_under(names: list[str]) -> Path | None:
    """A file of the model store that bears the name of a card."""
    return next((entry.path for entry in store.list_models() if entry.card.get("name") in names), None)


def _read(path: Path) -> GoldenSet:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JobError(
            f"{path.name} should be the JSON of a golden set, but cannot be read. Restore it."
        ) from error
    if not isinstance(facts, dict):
        raise JobError(f"{path.name} should describe a golden set, but is another JSON. Choose another file.")
    return GoldenSet(path, facts)
