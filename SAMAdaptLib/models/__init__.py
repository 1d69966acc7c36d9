"""The networks, one readable file each, and the table of architectures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from SAMAdaptLib.errors import CardError

if TYPE_CHECKING:
    import torch

    from SAMAdaptLib.cards import ModelCard
    from SAMAdaptLib.models.predictor import SlicePredictor, VolumePredictor

ARCHITECTURES: dict[str, str] = {
    "sam": "SAMAdaptLib.models.sam",
    "medsam": "SAMAdaptLib.models.medsam",
    "hq_sam": "SAMAdaptLib.models.hq_sam",
    "mobile_sam": "SAMAdaptLib.models.mobile_sam",
    "ma_sam": "SAMAdaptLib.models.ma_sam",
    "sam_med2d": "SAMAdaptLib.models.sam_med2d",
    "med_sa": "SAMAdaptLib.models.med_sa_predictors",
    "desam": "SAMAdaptLib.models.desam_predictors",
    "samed": "SAMAdaptLib.models.samed",
    "db_sam": "SAMAdaptLib.models.db_sam",
    "dapsam": "SAMAdaptLib.models.dapsam",
    "sam_unet": "SAMAdaptLib.models.sam_unet",
    "sam2": "SAMAdaptLib.models.sam2",
}
"""Architecture of a card -> module with a function `build_predictor` as `_Builder` describes."""


class _Builder(Protocol):
    def __call__(
        self, card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
    ) -> SlicePredictor | VolumePredictor:
        """Build the network, load the file (and the base file before it), return it in evaluation mode."""
        ...


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> SlicePredictor | VolumePredictor:
    """Build the network of a card with its weights.

    Args:
        card: Names the architecture and its options.
        checkpoint: The card's file.
        base: File of the base model, for adapters that are published alone.
        device: Where it runs.

    Returns:
        A `SlicePredictor` for a card of 2 dimensions, a `VolumePredictor` for 3.

    Raises:
        CardError: The architecture is unknown.
        WeightsError: The file is damaged, unsafe or of another network.
    """
    if card.architecture not in ARCHITECTURES:
        raise CardError(
            f"The architecture '{card.architecture}' of {card.name} is not one of "
            f"{', '.join(ARCHITECTURES)}. Correct the card or update SAMAdapt."
        )
    build = cast("_Builder", import_module(ARCHITECTURES[card.architecture]).build_predictor)
    return build(card, checkpoint, base, device)
