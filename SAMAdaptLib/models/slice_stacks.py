"""A volume as overlapping stacks of neighbouring slices, as MA-SAM sees it, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import zoom

from SAMAdaptLib.cards import cards_that_take_colour
from SAMAdaptLib.errors import CardError, VolumeError
from SAMAdaptLib.geometry import AXES, Axis, SlicePlane
from SAMAdaptLib.volume import IntensityWindow, Volume

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class FileAxes:
    """Which way the arrays ran that a network was trained on.

    MA-SAM's authors read a file as an array over x, y, z without looking at its orientation, and show x and y
    from their far ends on. If x ran to the right and y to anterior that is the radiological picture; if not,
    the network learned a mirrored patient, and must be shown one.

    Args:
        codes: Where x, y and z run to: R or L, A or P, S or I.

    Raises:
        CardError: Other letters.
    """

    codes: str = "RAS"

    def __post_init__(self) -> None:
        """Refuse what would silently mirror the patient."""
        fits = len(self.codes) == 3 and all(
            a in b for a, b in zip(self.codes, ("RL", "AP", "SI"), strict=True)
        )
        if not fits:
            raise CardError(
                f"File axes are three letters, R or L, A or P, S or I, but came as '{self.codes}'. Correct "
                "the card."
            )

    @property
    def signs_yx(self) -> tuple[int, int]:
        """Step through rows and columns of the radiological picture that gives the network's picture."""
        return (-1 if self.codes[1] == "P" else 1, -1 if self.codes[0] == "L" else 1)

    @property
    def runs_up(self) -> bool:
        """Whether the first slice of a stack is the lowest."""
        return self.codes[2] == "S"


@dataclass(frozen=True, eq=False)
class SliceStacks:
    """A volume cut across one axis, shown the way a network of stacks was trained.

    Colours are shown as they are; the window is one of grey values.

    Args:
        volume: Grey, or in colour for a network that takes it.
        axis: Across the slices; for frames of a video that is time.
        window: Grey values outside are cut off.
        size: Side of the network input.
        depth: Slices of a stack.
        file_axes: Orientation of the training arrays.
        takes_colour: Whether the network was trained on colours.

    Raises:
        VolumeError: A colour volume for a network of grey ones.
    """

    volume: Volume
    axis: Axis
    window: IntensityWindow
    size: int
    depth: int
    file_axes: FileAxes
    takes_colour: bool = False

    def __post_init__(self) -> None:
        """Refuse colours that the network was not trained on."""
        if self.volume.is_colour and not self.takes_colour:
            raise VolumeError(
                "This model of neighbouring slices takes grey volumes, but this one is in colour. Convert it "
                f"or choose a model that takes colour: {', '.join(cards_that_take_colour())}."
            )

    def __len__(self) -> int:
        """Count the slices."""
        return self.volume.geometry.shape_ijk[AXES.index(self.axis)]

    def plane(self, index: int) -> SlicePlane:
        """Return the slice as a picture in radiological orientation."""
        return self.volume.geometry.plane(self.axis, index)

    def positions(self, centre: int) -> list[int]:
        """Slices of the stack around `centre` in the network's order; some may lie outside the volume."""
        reach = range(centre - self.depth // 2, centre - self.depth // 2 + self.depth)
        return list(reach if self._ascending else reversed(reach))

    def stack(self, centre: int) -> Floats:
        """Return the network input (depth, size, size) around a slice, stretched to 0..1 over the stack.

        Outside the volume its first and last slice are repeated. Of a colour volume it is (depth, 3, size,
        size), the three colours stretched together, so that hues stay.
        """
        inside = [min(max(index, 0), len(self) - 1) for index in self.positions(centre)]
        pictures = {index: self._picture(index) for index in set(inside)}
        return _stretched(np.stack([pictures[index] for index in inside]))

    def to_picture(self, values: Floats, index: int) -> Floats:
        """Bring (channels, size, size) of a slice back to its picture (channels, rows, columns)."""
        y_sign, x_sign = self.file_axes.signs_yx
        return _resized(values, self.plane(index).shape_yx)[:, ::y_sign, ::x_sign]

    def box_to_input(self, box_xyxy: Floats, index: int) -> Floats:
        """Bring a box (4,) of a slice's picture to pixels of the network input."""
        shape_xy = np.array(self.plane(index).shape_yx[::-1])
        corners = box_xyxy.reshape(2, 2)
        signs = np.array(self.file_axes.signs_yx[::-1])
        corners = np.where(signs < 0, shape_xy - 1 - corners, corners)
        corners = corners * (self.size - 1) / np.maximum(shape_xy - 1, 1)
        return np.concatenate([corners.min(axis=0), corners.max(axis=0)]).astype(np.float32)

    def ensemble(self, wanted: range, predict: Callable[[int], Floats]) -> Iterator[tuple[int, Floats, int]]:
        """Average what the network says of a slice over all stacks that hold it.

        Never more slices are held than a stack has, however long the volume is.

        Args:
            wanted: Slices to segment, ascending.
            predict: From the centre of a stack to probabilities (depth, channels, size, size) in its order.

        Yields:
            A slice, its mean probabilities (channels, size, size), and the number of stacks.
        """
        half = self.depth // 2
        sums: dict[int, tuple[Floats, int]] = {}
        for centre in range(max(0, wanted.start - half), min(len(self), wanted.stop + half)):
            for index, values in zip(self.positions(centre), predict(centre), strict=True):
                if index in wanted:
                    total, count = sums.get(index, (np.zeros_like(values), 0))
                    sums[index] = total + values, count + 1
            if centre - half in sums:
                yield _mean(centre - half, sums)
        for index in sorted(sums):
            yield _mean(index, sums)

    @property
    def _ascending(self) -> bool:
        direction = self.volume.geometry.directions[:, AXES.index(self.axis)]
        return bool(direction[np.argmax(np.abs(direction))] > 0) == self.file_axes.runs_up

    def _picture(self, index: int) -> NDArray[np.float64]:
        y_sign, x_sign = self.file_axes.signs_yx
        values = self.plane(index).extract(self.volume.voxels)[::y_sign, ::x_sign]
        if self.volume.is_colour:
            return _resized(np.moveaxis(values.astype(np.float64) / 255, -1, 0), (self.size, self.size))
        cut = np.clip(values.astype(np.float64), self.window.lower, self.window.upper)
        return _resized(cut[None], (self.size, self.size))[0]


def _stretched(stack: NDArray[np.float64]) -> Floats:
    low, high = stack.min(), stack.max()
    return ((stack - low) / max(high - low, 1e-8)).astype(np.float32)


def _resized(pictures: NDArray[Any], shape_yx: tuple[int, int]) -> NDArray[Any]:
    """Resize (N, rows, columns) with cubic splines, corner pixel to corner pixel."""
    rows, columns = pictures.shape[1:]
    if (rows, columns) == shape_yx:
        return pictures
    factors = (shape_yx[0] / rows, shape_yx[1] / columns)
    return np.stack([zoom(picture, factors, order=3) for picture in pictures])


def _mean(index: int, sums: dict[int, tuple[Floats, int]]) -> tuple[int, Floats, int]:
    total, count = sums.pop(index)
    return index, (total / count).astype(np.float32), count
