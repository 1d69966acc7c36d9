"""Slices to one stack: the same orientation, sorted along the normal, one image at each position.

The order is that of Slicer's importer: k grows along (direction of growing column) x (direction of growing
row), whatever the files are called and whatever their instance numbers say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from SAMAdaptLib.errors import DicomError

from .slices import Array, SliceSource

SAME_POSITION_MM = 0.01
"""Two slices nearer than this lie at the same place; headers round positions to about a micrometre."""

_ORIENTATION_TOLERANCE = 1e-4  # of a direction cosine: 0.03 mm across a field of view of 300 mm
_SPACING_TOLERANCE = 1e-4
_MULTIPLE_TOLERANCE = 0.05
_RUN_OF_ONE_SPACING = 3


@dataclass(frozen=True, eq=False)
class Stack:
    """The slices of one volume, k ascending.

    Attributes:
        slices: One per k.
        directions_lps: Unit vectors of I, J and of the slice normal, as rows of a (3, 3) array.
        spacing_ji_mm: Distance between rows and between columns.
    """

    slices: tuple[SliceSource, ...]
    directions_lps: Array
    spacing_ji_mm: tuple[float, float]

    @property
    def positions_lps(self) -> Array:
        """Centre of the first pixel of every slice, (K, 3)."""
        return np.array([one.position_lps for one in self.slices])

    @property
    def gaps_mm(self) -> Array:
        """Distances of neighbouring slices along the normal, (K - 1,)."""
        return np.asarray(np.diff(self.positions_lps @ self.directions_lps[2]), dtype=np.float64)


def stack_slices(
    headers: Sequence[Dataset], sources: Sequence[SliceSource], phase: int | None, allow_gaps: bool
) -> Stack:
    """Check that the slices make one volume and sort them.

    Args:
        headers: The headers that `sources` point into.
        sources: Every slice of the series, in any order.
        phase: Which image to take where each position holds several (from 1), None where it holds one.
        allow_gaps: Accept missing slices.

    Raises:
        DicomError: Different sizes, spacings or orientations, several images at one position, missing slices.
    """
    _check_one_size(headers)
    _check_one_spacing(sources)
    directions = _one_orientation(headers, sources)
    slices = _one_image_each(sources, directions[2], phase)
    stack = Stack(tuple(slices), directions, sources[0].spacing_ji_mm)
    if not allow_gaps:
        _check_none_missing(stack)
    return stack


def _check_one_size(headers: Sequence[Dataset]) -> None:
    sizes = Counter(f"{header.Rows} x {header.Columns}" for header in headers)
    if len(sizes) > 1:
        listed = ", ".join(f"{size} in {count}" for size, count in sizes.most_common())
        raise DicomError(
            f"All images of a series must have the same rows and columns, but they have {listed} files. "
            "Take out the files that do not belong to the volume."
        )


def _check_one_spacing(sources: Sequence[SliceSource]) -> None:
    spacings = np.array([one.spacing_ji_mm for one in sources])
    if np.any(np.abs(spacings / spacings[0] - 1) > _SPACING_TOLERANCE):
        raise DicomError(
            "All images of a series must have the same pixel spacing, but it goes from "
            f"{spacings.min():g} to "
            f"{spacings.max():g} mm. Take out the images that do not belong to the volume."
        )


def _one_orientation(headers: Sequence[Dataset], sources: Sequence[SliceSource]) -> Array:
    """Return unit vectors of I, J and their normal; J is made exactly perpendicular to I."""
    orientations = np.array([one.orientation_lps for one in sources])
    if np.any(np.abs(orientations - orientations[0]) > _ORIENTATION_TOLERANCE):
        raise DicomError(_mixed_orientations(headers, orientations))
    row, column = orientations[0]
    if (
        abs(np.linalg.norm(row) - 1) > 0.01
        or abs(np.linalg.norm(column) - 1) > 0.01
        or abs(row @ column) > 0.01
    ):
        raise DicomError(
            "The directions of rows and columns must be perpendicular and of length 1, but in this "
            "series they are "
            "not. Export the series again from the archive; its ImageOrientationPatient is damaged."
        )
    row = row / np.linalg.norm(row)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    return np.array([row, np.cross(normal, row), normal])


def _mixed_orientations(headers: Sequence[Dataset], orientations: Array) -> str:
    groups = Counter(tuple(np.round(one, 2).ravel() + 0.0) for one in orientations)
    listed = ", ".join(f"{_plane_name(key)} ({count})" for key, count in groups.most_common(4))
    scouts = sum("LOCALIZER" in [str(part) for part in header.get("ImageType", [])] for header in headers)
    scouts_said = f" {scouts} of them call themselves localizers;" if scouts else ""
    return (
        f"All images of a volume must have one orientation, but {len(groups)} were found: "
        f"{listed};{scouts_said} "
        "take out the images of the other orientations, or read them by themselves."
    )


def _plane_name(orientation: Sequence[float]) -> str:
    normal = np.abs(np.cross(orientation[:3], orientation[3:]))
    return ("sagittal", "coronal", "axial")[int(np.argmax(normal))] + (
        " oblique" if normal.max() < 0.999 else ""
    )


def _one_image_each(sources: Sequence[SliceSource], normal: Array, phase: int | None) -> list[SliceSource]:
    """Sort along the normal and take one image of every position."""
    ordered = sorted(sources, key=lambda one: float(one.position_lps @ normal))
    places: list[list[SliceSource]] = []
    for one in ordered:
        if places and (one.position_lps - places[-1][0].position_lps) @ normal < SAME_POSITION_MM:
            places[-1].append(one)
        else:
            places.append([one])
    counts = sorted({len(place) for place in places})
    if counts[-1] == 1 and phase in (None, 1):
        return ordered
    if len(counts) > 1:
        raise DicomError(
            f"One image at each position was wanted, but the {len(places)} positions hold between "
            f"{counts[0]} and "
            f"{counts[-1]} images. Take out the repeated ones, or choose the files of one phase."
        )
    if phase is None or not 1 <= phase <= counts[0]:
        asked = "" if phase is None else f" and phase {phase} was asked for"
        raise DicomError(
            f"One image at each position was wanted, but each of the {len(places)} positions holds "
            f"{counts[0]} "
            f"(phases, echoes or time points){asked}. Choose one of them by phase=1 to phase={counts[0]}."
        )
    return [sorted(place, key=lambda one: one.phase_key)[phase - 1] for place in places]


def _check_none_missing(stack: Stack) -> None:
    gaps = stack.gaps_mm
    for k, gap in enumerate(gaps):
        missing = _missing_before(gaps, k, stack.slices)
        if missing:
            step = gap / (missing + 1)
            raise DicomError(
                f"The slices must follow each other without holes, but {missing} slice{'s' * (missing > 1)} "
                f"of {step:.4g} mm seem{'s' * (missing == 1)} to be missing between slice {k + 1} and "
                f"{k + 2} of "
                f"{len(stack.slices)} (a gap of {gap:.4g} mm at {_place(stack, k)}). "
                "Fetch the whole series again, or accept the hole with allow_gaps=True."
            )


def _missing_before(gaps: Array, k: int, slices: Sequence[SliceSource]) -> int:
    """Return how many slices a gap swallows: 0 for one that the scanner made.

    A hole is a whole multiple of the spacing around it. It was made by the scanner if the slices beside it
    are as thick as the gap is wide, or if it belongs to a run of equal gaps (a second region scanned more
    coarsely).
    """
    step = _spacing_around(gaps, k)
    if step is None:
        return 0
    multiple = gaps[k] / step
    whole = round(multiple)
    if whole < 2 or abs(multiple - whole) > _MULTIPLE_TOLERANCE * whole:
        return 0
    thick = [one.thickness_mm for one in slices[k : k + 2] if one.thickness_mm is not None]
    if any(abs(thickness - gaps[k]) < abs(thickness - step) for thickness in thick):
        return 0
    return 0 if _run_length(gaps, k) >= _RUN_OF_ONE_SPACING else whole - 1


def _spacing_around(gaps: Array, k: int) -> float | None:
    """Return the smallest of the four nearest gaps that is no single odd one, None where nothing compares."""
    near = np.delete(gaps, k)[max(0, k - 2) : k + 2]
    if len(gaps) >= 4:
        near = near[[np.count_nonzero(_alike(gaps, gap)) > 1 for gap in near]]
    return float(near.min()) if near.size else None


def _run_length(gaps: Array, k: int) -> int:
    """Return how many neighbouring gaps, this one counted, are as wide as this one."""
    alike = _alike(gaps, gaps[k])
    first = last = k
    while first > 0 and alike[first - 1]:
        first -= 1
    while last + 1 < len(gaps) and alike[last + 1]:
        last += 1
    return last - first + 1


def _alike(gaps: Array, gap: float) -> NDArray[np.bool_]:
    return np.asarray(np.abs(gaps - gap) <= _MULTIPLE_TOLERANCE * gap)


def _place(stack: Stack, k: int) -> str:
    """Name the slice before a hole by its position along the axis nearest to the normal."""
    axis = int(np.argmax(np.abs(stack.directions_lps[2])))
    return f"{'LPS'[axis]} = {stack.positions_lps[k, axis]:.1f} mm"
