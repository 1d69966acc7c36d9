"""Everything that a finished segmentation leaves behind: label map, DICOM-SEG, picture and record."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from SAMAdaptLib.dicom import (
    DicomSeries,
    Segment,
    Terminology,
    terminology_for,
    write_segmentation,
)
from SAMAdaptLib.errors import JobError
from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.image_files import SegmentEntry, write_seg_nrrd
from SAMAdaptLib.overview import write_overview
from SAMAdaptLib.segmenting import Segmentation, SegmentedObject
from SAMAdaptLib.session import record_to_text


@dataclass(frozen=True)
class WrittenResults:
    """What was written.

    Args:
        files: In the order in which they were finished.
        remarks: Sentences a user should read: dropped segments, doubts of the pre-flight.
    """

    files: tuple[Path, ...]
    remarks: tuple[str, ...]


def write_results(
    folder: str | os.PathLike[str], segmentation: Segmentation, series: DicomSeries | None = None
) -> WrittenResults:
    """Write `.seg.nrrd`, a PNG overview, the JSON record and, for a DICOM source, the DICOM-SEG.

    Args:
        folder: Made if it is not there; files of the same name are replaced when the new ones are complete.
        segmentation: From `segment_objects`.
        series: The DICOM series that was segmented; None for an image file.

    Raises:
        JobError: The folder cannot be made.
        DicomError: The DICOM-SEG failed its pre-flight; everything else was written.
        VolumeError: A file could not be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(
            f"The folder {target.name} cannot be made ({error.strerror}). Choose another one."
        ) from error
    stem = re.sub(r"[^\w.-]+", "-", segmentation.volume.name) or "volume"
    files = [target / f"{stem}.seg.nrrd", target / f"{stem}.png", target / f"{stem}.json"]
    entries = [_entry(item) for item in segmentation.objects]
    write_seg_nrrd(files[0], segmentation.labels, segmentation.volume.geometry, entries)
    write_overview(files[1], segmentation)
    with atomic_path(files[2]) as temporary:
        temporary.write_text(record_to_text(segmentation.record()), encoding="utf-8")
    remarks: list[str] = []
    if series is not None and not segmentation.labels.any():
        remarks.append("No DICOM-SEG was written, because every mask is empty.")
    elif series is not None:
        files.append(target / f"{stem}.seg.dcm")
        written = write_segmentation(files[-1], segmentation.labels, dicom_segments(segmentation), series)
        remarks += [str(finding) for finding in written.findings]
    return WrittenResults(tuple(files), tuple(remarks))


def terminology_of(item: SegmentedObject) -> Terminology:
    """Return the terminology the task names, else that of its name, else plain tissue."""
    if item.task.terminology:
        return Terminology.from_slicer(item.task.terminology)
    return terminology_for(item.task.name)


def dicom_segments(segmentation: Segmentation) -> list[Segment]:
    """Describe the objects for a DICOM-SEG, with model and checkpoint as the algorithm."""
    card = segmentation.predictor.card
    return [
        Segment(
            label_value=item.label,
            name=item.task.name,
            terminology=terminology_of(item),
            colour_rgb=item.task.colour_rgb,
            algorithm_type="AUTOMATIC" if card.is_automatic else "SEMIAUTOMATIC",
            algorithm_name=f"SAMAdapt {card.name}",
            algorithm_version=segmentation.predictor.checkpoint_sha256[:16],
        )
        for item in segmentation.objects
    ]


def _entry(item: SegmentedObject) -> SegmentEntry:
    red, green, blue = (value / 255 for value in item.task.colour_rgb)
    return SegmentEntry(item.label, item.task.name, (red, green, blue), terminology_of(item).to_slicer())
