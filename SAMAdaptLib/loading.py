"""From a model's name to something that segments volumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from SAMAdaptLib import store
from SAMAdaptLib.cards import ModelCard, find_card
from SAMAdaptLib.device import pick_device
from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.models import build_predictor
from SAMAdaptLib.models.predictor import SlicePredictor, VolumePredictor
from SAMAdaptLib.propagation import SliceBySlice


def load_model(
    name: str | None = None, *, device: str | None = None, checkpoint: str | Path | None = None
) -> VolumePredictor:
    """Load a model of the list.

    Args:
        name: Of a card; None for the default model, which needs no download.
        device: "cpu", "cuda", "mps"; None for the fastest one present.
        checkpoint: A file to use instead of the stored one; it must be of the card's architecture.

    Raises:
        CardError: No such model.
        WeightsError: The file is not on this machine, damaged, unsafe or of another network.
        DeviceError: The device is not there.
    """
    card = find_card(name)
    if checkpoint is None:
        path = checkpoint_path(card)
    else:
        path = Path(checkpoint)
        card = replace(card, sha256="")  # another file of the same architecture, such as a fine-tuned one
    base = checkpoint_path(find_card(card.base)) if card.base else None
    predictor = build_predictor(card, path, base, pick_device(device))
    if card.dimensions == 3:
        return cast("VolumePredictor", predictor)
    return SliceBySlice(cast("SlicePredictor", predictor))


def is_here(card: ModelCard) -> bool:
    """Whether the file of a card lies on this machine."""
    return _file_of(card) is not None


def stored_sha256(card: ModelCard) -> str | None:
    """Return the hash under which the model store keeps the file of a card, None if it does not.

    Files whose publisher states no hash were added by hand under the card's name.
    """
    for entry in store.list_models():
        if entry.sha256 == card.sha256 or (not card.sha256 and entry.card.get("name") == card.name):
            return entry.sha256
    return None


def checkpoint_path(card: ModelCard) -> Path:
    """Return where the file of a card lies on this machine.

    Raises:
        WeightsError: It does not; says how to get it.
    """
    path = _file_of(card)
    if path is not None:
        return path
    if card.source.kind == "shipped":
        remedy = "Install SAMAdapt again"
    elif card.source.kind == "manual":
        remedy = f"Get it from {card.source.url} and run `samadapt models add FILE --card {card.name}`"
    else:
        remedy = f"Run `samadapt models download {card.name}`"
    raise WeightsError(f"The weights of {card.title} are needed, but are not on this machine. {remedy}.")


def _file_of(card: ModelCard) -> Path | None:
    if card.shipped_path is not None:
        return card.shipped_path if card.shipped_path.is_file() else None
    sha256 = stored_sha256(card)
    return store.find(sha256) if sha256 else None
