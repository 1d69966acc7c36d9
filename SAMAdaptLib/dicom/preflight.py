"""Everything that is missing or doubtful about a segmentation, in plain words, before anything is written."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID

from SAMAdaptLib.geometry import Geometry

from .finding import DAMAGED_HEADER
from .geometry import tilt_degrees
from .grids import Masks, overlap_in, same_voxels, values_in
from .guards import quiet, told_as
from .segments import Segment
from .series import DicomSeries

Severity = Literal["error", "warning"]

_OVERLAP_LIMIT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know before a segmentation is written.

    Attributes:
        severity: An "error" keeps the file from being written, a "warning" does not.
        sentence: What is wrong.
        fix: What to do about it.
    """

    severity: Severity
    sentence: str
    fix: str

    def __str__(self) -> str:
        return f"{self.sentence} {self.fix}"


@quiet()
@told_as(DAMAGED_HEADER)
def preflight(
    masks: Masks,
    segments: Sequence[Segment],
    series: DicomSeries,
    *,
    geometry: Geometry | None = None,
    path: str | os.PathLike[str] | None = None,
    series_description: str | None = None,
) -> list[Finding]:
    """List everything that stands against writing `masks` as a DICOM-SEG, errors first.

    Args:
        masks: A label map (K, J, I) of whole numbers, or one mask (K, J, I) per segment.
        segments: What the segments are.
        series: The images that the segmentation belongs to.
        geometry: Grid of the masks; None means the grid of the series.
        path: Where the file would go.
        series_description: What the new series would be called.
    """
    grid = geometry or series.volume.geometry
    findings = [*_of_series(series), *_of_segments(segments)]
    mask_findings = list(_of_masks(masks, segments, grid))
    findings += mask_findings
    if not any(finding.severity == "error" for finding in mask_findings):
        findings += _of_contents(masks, segments)
    findings += _of_grid(grid, series)
    if path is not None:
        findings += _of_target(Path(path))
    if series_description is not None and not _is_text(series_description, 64):
        findings.append(
            Finding(
                "error",
                "The series description must have 1 to 64 characters without backslash or controls.",
                "Shorten it.",
            )
        )
    return sorted(findings, key=lambda finding: finding.severity != "error")


def _of_series(series: DicomSeries) -> Iterator[Finding]:
    total = len(series.headers)
    for keyword in (
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
    ):
        absent = sum(not header.get(keyword) for header in series.headers)
        if absent:
            yield Finding(
                "error",
                f"The images have no {keyword} (in {absent} of {total} files), which a segmentation "
                "must refer to.",
                "Use the original series from the archive.",
            )
    for keyword, said in (
        ("PatientID", "patients"),
        ("StudyInstanceUID", "studies"),
        ("FrameOfReferenceUID", "frames of reference"),
    ):
        count = len({str(header.get(keyword)) for header in series.headers})
        if count > 1:
            yield Finding(
                "error",
                f"The images of the series belong to {count} {said}.",
                "Take out those that do not belong.",
            )
    if not series.headers[0].get("PatientID"):
        yield Finding(
            "warning",
            "The images have no patient ID.",
            "An archive may not file the segmentation with its study.",
        )
    if any(header.get("LossyImageCompression") == "01" for header in series.headers):
        yield Finding(
            "warning",
            "The images were compressed with losses.",
            "Nothing to do; the segmentation says so too.",
        )
    yield from _of_stack(series)


def _of_stack(series: DicomSeries) -> Iterator[Finding]:
    if len(series.slices) == 1:
        yield Finding("warning", "The series has a single slice.", "Its thickness is taken from the header.")
    elif tilt_degrees(series.stack) or not series.volume.geometry.is_regular:
        kind = "tilted" if tilt_degrees(series.stack) else "unevenly spaced"
        yield Finding(
            "warning",
            f"The slices are {kind}; the segmentation is exact, but 3D Slicer's importer cannot open "
            "such a file.",
            "Keep the scene or a .seg.nrrd file to go on in 3D Slicer.",
        )


def _of_segments(segments: Sequence[Segment]) -> Iterator[Finding]:
    if not segments:
        yield Finding("error", "There is no segment to write.", "Describe at least one segment.")
    for number, segment in enumerate(segments, start=1):
        for problem in _problems(segment):
            yield Finding("error", f"Segment {number}: {problem}.", "Correct it in the list of segments.")


def _problems(segment: Segment) -> Iterator[str]:
    if not _is_text(segment.name, 64):
        yield "its name must have 1 to 64 characters without backslash or control characters"
    yield from (f"in its terminology, {text}" for text in segment.terminology.problems())
    if len(segment.colour_rgb) != 3 or not all(_is_colour(value) for value in segment.colour_rgb):
        yield "its colour must be three whole numbers from 0 to 255"
    if segment.algorithm_type not in ("AUTOMATIC", "SEMIAUTOMATIC", "MANUAL"):
        yield "its algorithm type must be AUTOMATIC, SEMIAUTOMATIC or MANUAL"
    elif segment.algorithm_type != "MANUAL" and not (
        _is_text(segment.algorithm_name, 64) and _is_text(segment.algorithm_version, 64)
    ):
        yield "unless drawn by hand it needs name and version of what made it (at most 64 characters)"
    if (segment.tracking_id is None) != (segment.tracking_uid is None):
        yield "a tracking ID and a tracking UID belong together, but one of them is missing"
    if segment.tracking_uid is not None and not UID(segment.tracking_uid).is_valid:
        yield "its tracking UID is no valid DICOM UID"
    if segment.tracking_id is not None and not _is_text(segment.tracking_id, 1024):
        yield "its tracking ID must have 1 to 1024 characters without backslash or control characters"
    if len(segment.description) > 1024 or re.search(r"[\\\x00-\x08\x0b-\x1f]", segment.description):
        yield "its description must have at most 1024 characters without backslash or control characters"


def _is_text(text: str, limit: int) -> bool:
    return bool(text.strip()) and len(text) <= limit and "\\" not in text and text.isprintable()


def _is_colour(value: object) -> bool:
    return isinstance(value, int | np.integer) and 0 <= int(value) <= 255


def _of_masks(masks: Masks, segments: Sequence[Segment], grid: Geometry) -> Iterator[Finding]:
    """Check type and shape; nothing else is worth saying before these are right."""
    arrays: list[NDArray[Any]] = (
        [masks] if isinstance(masks, np.ndarray) else [np.asarray(one) for one in masks]
    )
    if not isinstance(masks, np.ndarray) and len(arrays) != len(segments):
        yield Finding(
            "error",
            f"There are {len(arrays)} masks for {len(segments)} segments.",
            "Give one mask for every segment, in the same order.",
        )
    for array in arrays:
        if array.dtype.kind not in "bui" or (array.dtype.kind == "i" and array.size and array.min() < 0):
            yield Finding(
                "error",
                f"A mask must hold whole numbers from 0, but is of type {array.dtype} or has negative ones.",
                "Threshold a probability map first.",
            )
        if array.shape != grid.shape_kji:
            yield Finding(
                "error",
                f"A mask of {grid.shape_kji} voxels (slices, rows, columns) was wanted, but has "
                f"{array.shape}.",
                "Segment on the grid of the series, or say on which grid the mask lies.",
            )
        if array.dtype.kind in "ui" and array.size and int(array.max()) > 65535:
            yield Finding("error", "A label is above 65535.", "Number the segments from 1.")


def _of_contents(masks: Masks, segments: Sequence[Segment]) -> Iterator[Finding]:
    if isinstance(masks, np.ndarray):
        counts = values_in(masks)
        repeated = [
            value for value, count in Counter(one.label_value for one in segments).items() if count > 1
        ]
        unknown = sorted(set(counts) - {segment.label_value for segment in segments})
        if repeated:
            yield Finding(
                "error", f"Several segments have the label {repeated[0]}.", "Give each its own label."
            )
        if unknown:
            listed = ", ".join(map(str, unknown[:8]))
            yield Finding(
                "error",
                f"The mask holds labels without a segment: {listed}.",
                "Describe a segment for each of them.",
            )
        empty = [segment.name for segment in segments if not counts.get(segment.label_value)]
    else:
        empty = [segment.name for segment, mask in zip(segments, masks, strict=True) if not np.any(mask)]
        yield from _of_overlap(masks)
    if len(empty) == len(segments):
        yield Finding("error", "All segments are empty.", "Segment something first.")
    elif empty:
        yield Finding(
            "warning", f"These segments are empty and are left out: {', '.join(empty)}.", "Nothing to do."
        )


def _of_overlap(masks: Sequence[NDArray[Any]]) -> Iterator[Finding]:
    needed = sum(mask.size for mask in masks)
    if needed > _OVERLAP_LIMIT_BYTES and any(overlap_in(masks, k) for k in range(len(masks[0]))):
        yield Finding(
            "error",
            f"{len(masks)} overlapping segments would need more than {needed / 2**30:.0f} GB of memory.",
            "Write them in several files of fewer segments.",
        )


def _of_grid(grid: Geometry, series: DicomSeries) -> Iterator[Finding]:
    if not same_voxels(grid, series.volume.geometry):
        yield Finding(
            "warning",
            "The mask does not lie on the voxels of the series.",
            "It is sampled there (nearest voxel); segment on the series itself to keep every voxel.",
        )


def _of_target(path: Path) -> Iterator[Finding]:
    if not path.parent.is_dir():
        yield Finding("error", "The folder to write into does not exist.", "Create it or choose another one.")
    elif not os.access(path.parent, os.W_OK):
        yield Finding("error", "The folder to write into is read-only.", "Choose another folder.")
    elif path.is_dir():
        yield Finding("error", "A file was wanted to write to, but the path is a folder.", "Add a file name.")
