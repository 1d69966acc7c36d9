"""Writing a DICOM segmentation on the grid of its series (DICOM PS3.3 A.51).

Binary, Explicit VR Little Endian, one instance in a series of its own: the one form that every reader and
archive accepts. Each frame carries the exact position of its source slice and a reference to it. Segments
without voxels are left out, since readers give names and colours by order and would shift all later ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import highdicom as hd
import numpy as np
from pydicom.uid import ExplicitVRLittleEndian

from SAMAdaptLib import __version__
from SAMAdaptLib.errors import DicomError
from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.geometry import Geometry

from .finding import series_number
from .grids import Masks, NumberedMasks, moved_to_grid, numbered
from .guards import quiet, told_as
from .preflight import Finding, preflight
from .segments import Segment, segment_item
from .series import DicomSeries
from .source_headers import CHARACTER_SET, restore_references, slice_headers

MANUFACTURER = "SAMAdapt"
_UNFIT_HEADER = (
    "The segmentation was not written: the headers of the series hold values that it cannot take over. "
    "Use the original series from the archive."
)
_SERIES_NUMBER_OFFSET = 100  # the convention of Slicer's exporter
_LARGEST_SERIES_NUMBER = 2**31 - 1


@dataclass(frozen=True)
class WrittenSegment:
    """One segment in the file: its number there, and what it came from."""

    number: int
    label_value: int
    name: str
    voxels: int


@dataclass(frozen=True)
class WrittenSegmentation:
    """What was written and what was not.

    Attributes:
        path: The file.
        sop_instance_uid: Of the new instance.
        series_instance_uid: Of the new series.
        series_number: That of the source plus 100.
        frames: Number of pictures in the file: one per segment and slice that holds some of it.
        segments: What the file holds.
        dropped: Names of segments that held no voxel.
        findings: Warnings of the pre-flight.
    """

    path: Path
    sop_instance_uid: str
    series_instance_uid: str
    series_number: int
    frames: int
    segments: tuple[WrittenSegment, ...]
    dropped: tuple[str, ...]
    findings: tuple[Finding, ...]


@quiet()
def write_segmentation(
    path: str | os.PathLike[str],
    masks: Masks,
    segments: Sequence[Segment],
    series: DicomSeries,
    *,
    geometry: Geometry | None = None,
    series_description: str = "SAMAdapt segmentation",
    content_creator_name: str | None = None,
) -> WrittenSegmentation:
    """Write masks as a DICOM-SEG that refers to its series.

    Args:
        path: The file; it appears only when it is complete.
        masks: A label map (K, J, I), or one mask (K, J, I) per segment where segments may overlap.
        segments: What the segments are; those without voxels are left out and named in the result.
        series: The images, as `read_series` gave them.
        geometry: Grid of the masks where it is not that of the series; they are then moved there.
        series_description: 1 to 64 characters; Slicer names the loaded segmentation after it.
        content_creator_name: `Family^Given`; left empty unless asked for, since it names a person.

    Raises:
        DicomError: The pre-flight found errors (all are named), or the file could not be written.
    """
    target = Path(path)
    findings = preflight(
        masks, segments, series, geometry=geometry, path=target, series_description=series_description
    )
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if errors:
        raise DicomError(f"The segmentation was not written. {' '.join(errors)}")
    content = numbered(_on_series_grid(masks, geometry, series), segments)
    if not content.segments:
        raise DicomError(
            "A segmentation on the slices of the series was wanted, but no voxel of it lies there. "
            "Check that the mask belongs to this series."
        )
    with told_as(_UNFIT_HEADER):
        dataset = _build(content, series, series_description, content_creator_name)
    _save(dataset, target)
    return _result(target, dataset, content, findings)


def _on_series_grid(masks: Masks, geometry: Geometry | None, series: DicomSeries) -> Masks:
    wanted = series.volume.geometry
    if geometry is None or geometry.same_grid(wanted):
        return masks
    if isinstance(masks, np.ndarray):
        return moved_to_grid(masks, geometry, wanted)
    return [moved_to_grid(np.asarray(mask), geometry, wanted) for mask in masks]


def _build(
    content: NumberedMasks, series: DicomSeries, description: str, creator: str | None
) -> hd.seg.Segmentation:
    headers = slice_headers(series)
    dataset = hd.seg.Segmentation(
        source_images=headers,
        pixel_array=content.pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            segment_item(segment, number) for number, segment in enumerate(content.segments, start=1)
        ],
        series_instance_uid=hd.UID(),
        series_number=_series_number(series),
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MANUFACTURER,
        software_versions=__version__,
        device_serial_number="1",
        content_label="SEGMENTATION",
        content_description="Segmentation",
        content_creator_name=creator,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        series_description=description,
    )
    restore_references(dataset, series, headers)
    dataset.SpecificCharacterSet = CHARACTER_SET  # highdicom before 0.28 leaves it out
    dataset.SeriesDate, dataset.SeriesTime = dataset.ContentDate, dataset.ContentTime
    if headers[0].get("BodyPartExamined"):
        dataset.BodyPartExamined = headers[0].BodyPartExamined
    return dataset


def _series_number(series: DicomSeries) -> int:
    number = (series_number(series.headers[0]) or 0) + _SERIES_NUMBER_OFFSET
    return min(max(number, 1), _LARGEST_SERIES_NUMBER)


def _save(dataset: hd.seg.Segmentation, target: Path) -> None:
    try:
        with atomic_path(target) as temporary:
            dataset.save_as(temporary)
    except OSError as error:
        raise DicomError(
            f"The segmentation could not be written ({error.strerror or type(error).__name__}). "
            "Free some space or choose another folder."
        ) from error


def _result(
    target: Path, dataset: hd.seg.Segmentation, content: NumberedMasks, findings: Sequence[Finding]
) -> WrittenSegmentation:
    written = zip(content.segments, content.voxel_counts, strict=True)
    return WrittenSegmentation(
        path=target,
        sop_instance_uid=str(dataset.SOPInstanceUID),
        series_instance_uid=str(dataset.SeriesInstanceUID),
        series_number=int(dataset.SeriesNumber),
        frames=int(dataset.NumberOfFrames),
        segments=tuple(
            WrittenSegment(number, segment.label_value, segment.name, voxels)
            for number, (segment, voxels) in enumerate(written, start=1)
        ),
        dropped=content.dropped,
        findings=tuple(findings),
    )
