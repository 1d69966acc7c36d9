"""Networks that segment a volume by themselves, one slice after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from SAMAdaptLib.cards import ModelCard, cards_that_take
from SAMAdaptLib.errors import PromptError, VolumeError
from SAMAdaptLib.geometry import AXES, Axis, SlicePlane
from SAMAdaptLib.prompts import Prompts
from SAMAdaptLib.volume import IntensityWindow, Volume

from .predictor import SliceMask
from .slice_stacks import FileAxes


class AutomaticSlices(ABC):
    """A `VolumePredictor` of a network that takes one slice and no prompts.

    The card's option `file_axes` (see `FileAxes`) says which way the training arrays ran, whose rows went
    downwards and whose columns went to the right; pictures are shown to the network that way.

    Args:
        card: Names classes and options.
        checkpoint_sha256: Of the file.
    """

    def __init__(self, card: ModelCard, checkpoint_sha256: str) -> None:
        """Remember card and file."""
        self.card = card
        self.checkpoint_sha256 = checkpoint_sha256
        # Signs are those from the far ends on; these arrays start at the near ends.
        y_sign, x_sign = FileAxes(card.options.get("file_axes", "LPS")).signs_yx
        self._flips = slice(None, None, -y_sign), slice(None, None, -x_sign)
        self._opened: tuple[Volume, Axis] | None = None

    @abstractmethod
    def segment(self, picture: NDArray[Any]) -> tuple[NDArray[np.uint8], float]:
        """Segment one picture.

        Args:
            picture: (rows, columns[, 3]), the volume's own values, the way the network was trained.

        Returns:
            Class numbers (rows, columns), and what stands for the overlap with the truth, 0 to 1.
        """

    def set_volume(self, volume: Volume, axis: Axis, window: IntensityWindow) -> None:
        """Take a volume and the axis across its slices; the window is not used, see the network's file."""
        self._opened = volume, axis

    def predict(self, prompts: Prompts, slices: range | None = None) -> Iterator[SliceMask]:
        """Segment slice by slice, from the first of the range to the last.

        Args:
            prompts: None must be there.
            slices: Which; None for all.

        Raises:
            PromptError: A prompt was given.
            VolumeError: No volume was set.
            DeviceError: Not enough memory.
        """
        if self._opened is None:
            raise VolumeError("A volume must be set before it is segmented, but none is. Load one first.")
        self._refuse(prompts)
        volume, axis = self._opened
        wanted = range(volume.geometry.shape_ijk[AXES.index(axis)]) if slices is None else slices
        for index in wanted:
            yield self._segmented(volume, volume.geometry.plane(axis, index))

    def _segmented(self, volume: Volume, plane: SlicePlane) -> SliceMask:
        picture = plane.extract(volume.voxels)[self._flips]
        labels, confidence = self.segment(np.ascontiguousarray(picture))
        return SliceMask(plane.index, np.ascontiguousarray(labels[self._flips]), confidence)

    def _refuse(self, prompts: Prompts) -> None:
        for kind in sorted(prompts.kinds()):
            others = ", ".join(cards_that_take(kind)) or "none of the list"
            raise PromptError(
                f"{self.card.title} segments by itself and takes no prompts, but a {kind} was placed. Remove "
                f"it, or choose a model that takes it: {others}."
            )
