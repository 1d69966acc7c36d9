"""What a header says of each slice: its place, its size and the meaning of its values.

Classic series have one slice per file; enhanced multi-frame files have one per frame, with each fact either
shared by all frames or given per frame (DICOM PS3.3 C.7.6.16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from SAMAdaptLib.errors import DicomError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SliceSource:
    """One slice of a series as its file describes it.

    Attributes:
        header_index: Which header of the series.
        frame_number: Frame in a multi-frame file, from 1; None in a classic file.
        position_lps: Centre of the first pixel, (3,), LPS mm.
        orientation_lps: Directions of growing column and growing row, (2, 3), as written in the file.
        spacing_ji_mm: Distance between rows and between columns.
        thickness_mm: SliceThickness, None where not given.
        slope: Factor from stored to real values.
        intercept: Offset from stored to real values.
        phase_key: Orders the images that share a position (time, echo, acquisition).
    """

    header_index: int
    frame_number: int | None
    position_lps: Array
    orientation_lps: Array
    spacing_ji_mm: tuple[float, float]
    thickness_mm: float | None
    slope: float
    intercept: float
    phase_key: tuple[float, ...]


def slice_sources(headers: Sequence[Dataset]) -> list[SliceSource]:
    """Describe every slice of a series, in the order of files and frames.

    Raises:
        DicomError: Some slices lack position, orientation or pixel spacing, so cannot be placed in the
        patient.
    """
    found: list[SliceSource] = []
    missing: dict[str, int] = {}
    for index, header in enumerate(headers):
        for number, groups in _slices_of(header):
            try:
                found.append(_slice_source(index, number, groups, header))
            except _NotThere as absent:
                missing[absent.args[0]] = missing.get(absent.args[0], 0) + 1
    if missing:
        total = len(found) + sum(missing.values())
        listed = ", ".join(f"{name} (in {count} of {total} images)" for name, count in missing.items())
        raise DicomError(
            f"Every image must say where it lies in the patient, but this is missing: {listed}. "
            "Use the original series of the scanner, without scouts, screenshots or exported pictures."
        )
    return found


class _NotThere(Exception):
    """An attribute that places a slice is absent or not numeric."""


def _slices_of(header: Dataset) -> list[tuple[int | None, tuple[Dataset, ...]]]:
    """List (frame number, places where its attributes may stand, nearest first) for one file."""
    frames = header.get("PerFrameFunctionalGroupsSequence")
    if not frames:
        count = int(header.get("NumberOfFrames") or 1)
        return [(None, (header,))] if count == 1 else [(number, (header,)) for number in range(1, count + 1)]
    shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
    return [(number, (frame, shared[0])) for number, frame in enumerate(frames, start=1)]


def _slice_source(
    index: int, number: int | None, groups: tuple[Dataset, ...], header: Dataset
) -> SliceSource:
    measures = _group(groups, "PixelMeasuresSequence")
    values = _group(groups, "PixelValueTransformationSequence")
    orientation = _numbers(_group(groups, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
    spacing = _numbers(measures, "PixelSpacing", 2)
    if min(spacing) <= 0:
        raise _NotThere("PixelSpacing")
    return SliceSource(
        header_index=index,
        frame_number=number,
        position_lps=_numbers(_group(groups, "PlanePositionSequence"), "ImagePositionPatient", 3),
        orientation_lps=orientation.reshape(2, 3),
        spacing_ji_mm=(float(spacing[0]), float(spacing[1])),
        thickness_mm=_number(measures, "SliceThickness"),
        slope=_first(_number(values, "RescaleSlope"), 1.0),
        intercept=_first(_number(values, "RescaleIntercept"), 0.0),
        phase_key=_phase_key(number, groups, header),
    )


def _phase_key(number: int | None, groups: tuple[Dataset, ...], header: Dataset) -> tuple[float, ...]:
    content = _group(groups, "FrameContentSequence")
    names = (
        "TemporalPositionIndex",
        "TemporalPositionIdentifier",
        "EchoTime",
        "AcquisitionNumber",
        "TriggerTime",
    )
    times = [_number(content, name) or _number(header, name) for name in names]
    return (
        *(_first(time, 0.0) for time in times),
        _first(_number(header, "InstanceNumber"), 0.0),
        number or 0,
    )


def _group(groups: tuple[Dataset, ...], name: str) -> Dataset:
    """Find a functional group, per frame before shared; a classic header is its own group."""
    if "Rows" in groups[0]:
        return groups[0]
    for item in groups:
        if item.get(name):
            group: Dataset = item[name].value[0]
            return group
    return Dataset()


def _numbers(group: Dataset, name: str, count: int) -> Array:
    try:
        values = np.array([float(value) for value in group[name].value], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        raise _NotThere(name) from None
    if values.shape != (count,) or not np.all(np.isfinite(values)):
        raise _NotThere(name)
    return values


def _number(group: Dataset, name: str) -> float | None:
    try:
        value = float(group[name].value)
    except (KeyError, TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


def _first(value: float | None, default: float) -> float:
    return default if value is None else value
