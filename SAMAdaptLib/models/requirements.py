"""What a model needs of its card and its volume, refused in the same words by all that need it."""

from __future__ import annotations

from pathlib import Path

from SAMAdaptLib.cards import ModelCard, cards_that_take_colour
from SAMAdaptLib.errors import CardError, VolumeError
from SAMAdaptLib.volume import Volume


def require_grey(card: ModelCard, volume: Volume) -> None:
    """Refuse a colour volume.

    Raises:
        VolumeError: Names the models that take colour.
    """
    if volume.is_colour:
        raise VolumeError(
            f"{card.title} takes grey volumes, but this one is in colour. Convert it or choose "
            f"a model that takes colour: {', '.join(cards_that_take_colour())}."
        )


def require_base(card: ModelCard, base: Path | None) -> Path:
    """Return the file of the model that an adapter stands on.

    Raises:
        CardError: The card names none.
    """
    if base is None:
        raise CardError(
            f"The card {card.name} must name the SAM model it stands on, but names none. Correct it."
        )
    return base
