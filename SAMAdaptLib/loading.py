"""From a model's name to something that segments volumes."""

from __future__ import annotations

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
    path = Path(checkpoint) if checkpoint is not None else checkpoint_path(card)
    base = checkpoint_path(find_card(card.base)) if card.base else None
    predictor = build_predictor(card, path, base, pick_device(device))
    if card.dimensions == 3:
        return cast("VolumePredictor", predictor)
    return SliceBySlice(cast("SlicePredictor", predictor))


def checkpoint_path(card: ModelCard) -> Path:
    """Return where the file of a card lies on this machine.

    Raises:
        WeightsError: It does not; says how to get it.
    """
    path = card.shipped_path or (store.find(card.sha256) if card.sha256 else None)
    if path is not None and path.is_file():
        return path
    if card.source.kind == "shipped":
        remedy = "Install SAMAdapt again"
    elif card.source.kind == "manual":
        remedy = f"Get it from {card.source.url} and run `samadapt models add FILE --card {card.name}`"
    else:
        remedy = f"Run `samadapt models download {card.name}`"
    raise WeightsError(f"The weights of {card.title} are needed, but are not on this machine. {remedy}.")
