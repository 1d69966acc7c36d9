"""Reading a DICOM segmentation back onto the slices of its series.

Frames find their slice by position, never by order: writers sort them differently and leave out empty ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from SAMAdaptLib.errors import DicomError

from .guards import quiet, told_as
from .segments import Segment, segment_from_item
from .series import DicomSeries

_SAME_PLACE_MM = 0.05  # writers round positions to about a micrometre; slices are never so close
_SAME_DIRECTION = 1e-3
_LABELMAP_CLASS = "1.2.840.10008.5.1.4.1.1.66.7"

Picture = NDArray[np.bool_]
Packed = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ReadSegmentation:
    """Segments of a file on the grid of a series; only slices that hold something are kept.

    Attributes:
        segments: As described in the file; `label_value` is the SegmentNumber.
        shape_kji: Grid of the series.
        packed: For each SegmentNumber its pictures by slice k, as `numpy.packbits` gives them.
        warnings: What could not be taken over as it is.
    """

    segments: tuple[Segment, ...]
    shape_kji: tuple[int, int, int]
    packed: Mapping[int, Mapping[int, Packed]]
    warnings: tuple[str, ...] = ()

    def mask(self, number: int) -> Picture:
        """Return one segment as (K, J, I) by its SegmentNumber; all False where the file shows none of it."""
        mask = np.zeros(self.shape_kji, dtype=bool)
        for k, picture in self.packed.get(number, {}).items():
            mask[k] = self._unpacked(picture)
        return mask

    @property
    def overlaps(self) -> bool:
        """Whether a voxel belongs to two segments."""
        claimed: dict[int, Packed] = {}
        for by_slice in self.packed.values():
            for k, picture in by_slice.items():
                before = claimed.get(k)
                if before is not None and np.any(before & picture):
                    return True
                claimed[k] = picture if before is None else before | picture
        return False

    def labels(self) -> NDArray[Any]:
        """Return all segments as one label map (K, J, I), uint8 or uint16, of SegmentNumbers.

        Raises:
            DicomError: Segments overlap, so that one label per voxel would lose some of them.
        """
        if self.overlaps:
            raise DicomError(
                "One label per voxel was wanted, but the segments of this file overlap. Take them one by one."
            )
        largest = max((segment.label_value for segment in self.segments), default=0)
        labels = np.zeros(self.shape_kji, dtype=np.uint8 if largest < 256 else np.uint16)
        for number, by_slice in self.packed.items():
            for k, picture in by_slice.items():
                labels[k][self._unpacked(picture)] = number
        return labels

    def _unpacked(self, picture: Packed) -> Picture:
        _, rows, columns = self.shape_kji
        return np.unpackbits(picture, count=rows * columns).reshape(rows, columns).view(bool)


@quiet()
@told_as("A DICOM segmentation was wanted, but the file is none or is damaged. Choose a DICOM-SEG file.")
def read_segmentation(path: str | os.PathLike[str], series: DicomSeries) -> ReadSegmentation:
    """Read a DICOM-SEG (binary, fractional or label map) of ours or another writer onto its series.

    Fractional pictures count as inside from half of their maximum.

    Raises:
        DicomError: No DICOM segmentation, or one that does not lie on the slices of the series.
    """
    dataset = hd.seg.segread(Path(path))
    _check_plane(dataset, series)
    packed: dict[int, dict[int, Packed]] = {}
    for index, place in enumerate(_slices_of_frames(dataset, series)):
        for number, picture in _pictures_in(dataset, index):
            by_slice = packed.setdefault(number, {})
            by_slice[place] = by_slice[place] | picture if place in by_slice else picture
    items = [item for item in dataset.SegmentSequence if int(item.SegmentNumber) > 0]
    segments = tuple(segment_from_item(item, int(item.SegmentNumber)) for item in items)
    fractional = dataset.SegmentationType == "FRACTIONAL"
    said = ("The file holds fractions; voxels of at least one half were taken.",) if fractional else ()
    return ReadSegmentation(segments, series.volume.geometry.shape_kji, packed, said)


def _check_plane(dataset: Dataset, series: DicomSeries) -> None:
    shape = series.volume.geometry.shape_kji
    if (dataset.Rows, dataset.Columns) != shape[1:]:
        raise DicomError(
            f"A segmentation of {shape[1]} x {shape[2]} pixels was wanted, as the series has, but the "
            "file has "
            f"{dataset.Rows} x {dataset.Columns}. Choose the series that it was made on."
        )
    frame_uid = series.headers[0].get("FrameOfReferenceUID")
    if frame_uid and dataset.get("FrameOfReferenceUID") not in (None, frame_uid):
        raise DicomError(
            "A segmentation in the frame of reference of the series was wanted, but the file lies in "
            "another one. "
            "Choose the series that it was made on."
        )


def _slices_of_frames(dataset: Dataset, series: DicomSeries) -> list[int]:
    """Return the slice k of every frame."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    positions = series.stack.positions_lps
    places: list[int] = []
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        position = _values(frame, shared, "PlanePositionSequence", "ImagePositionPatient")
        orientation = _values(frame, shared, "PlaneOrientationSequence", "ImageOrientationPatient")
        distances = np.linalg.norm(positions - position, axis=1)
        turned = np.abs(orientation.reshape(2, 3) - series.stack.directions_lps[:2]).max()
        k = int(np.argmin(distances))
        if distances[k] > _SAME_PLACE_MM or turned > _SAME_DIRECTION:
            raise DicomError(
                "Every picture of the segmentation was wanted on a slice of the series, but frame "
                f"{len(places) + 1} "
                f"lies {distances[k]:.2f} mm from the nearest one or is turned. Choose the series it "
                "was made on."
            )
        places.append(k)
    return places


def _values(frame: Dataset, shared: Dataset, group: str, name: str) -> NDArray[np.float64]:
    for item in (frame, shared):
        if item.get(group):
            return np.array([float(value) for value in item[group].value[0][name].value])
    raise DicomError(
        f"A segmentation that says where its pictures lie was wanted, but {name} is missing. "
        "Export it again with the program that made it."
    )


def _pictures_in(dataset: hd.seg.Segmentation, index: int) -> list[tuple[int, Packed]]:
    """Return (SegmentNumber, picture) for every segment that a frame shows."""
    stored = dataset.get_stored_frame(index + 1)
    if dataset.SOPClassUID == _LABELMAP_CLASS:
        return [(int(number), np.packbits(stored == number)) for number in np.unique(stored) if number]
    threshold = int(dataset.MaximumFractionalValue) / 2 if dataset.SegmentationType == "FRACTIONAL" else 1
    groups = (dataset.PerFrameFunctionalGroupsSequence[index], dataset.SharedFunctionalGroupsSequence[0])
    item = next(group for group in groups if group.get("SegmentIdentificationSequence"))
    number = int(item.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
    picture: Picture = stored >= threshold
    return [(number, np.packbits(picture))] if picture.any() else []
