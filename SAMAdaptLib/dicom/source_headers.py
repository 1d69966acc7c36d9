"""The headers that a DICOM-SEG is built from: one per slice, clean, with nothing that must not leave.

highdicom reads geometry and patient from the headers of the source, compares them as text and copies whole
modules. So it is given headers made here: only attributes on a list, text in one character set, one
orientation and one spacing for all slices, and the exact position of each slice. Frames of a multi-frame
source become one header each under a name of their own, and `restore_references` puts the real file and
frame number back.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, generate_uid
from pydicom.valuerep import DA, TM

from .series import DicomSeries
from .slices import SliceSource

CHARACTER_SET = "ISO_IR 192"
"""UTF-8: holds every name, whatever the source was written in."""

_DEIDENTIFICATION = ("DeidentificationMethod", "DeidentificationMethodCodeSequence")

_COPIED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "PatientIdentityRemoved",
    *_DEIDENTIFICATION,
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
    "SeriesInstanceUID",
    "SeriesNumber",
    "Modality",
    "Manufacturer",
    "ManufacturerModelName",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "BodyPartExamined",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
"""Who, which study and where in space: what archives need to file the segmentation, and nothing else."""

_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)


def slice_headers(series: DicomSeries) -> list[Dataset]:
    """Return one single-frame header per k; the headers of the series are not touched."""
    common = _common_header(series)
    return [_slice_header(series, source, common) for source in series.slices]


def restore_references(segmentation: Dataset, series: DicomSeries, headers: list[Dataset]) -> None:
    """Point every reference of a segmentation of multi-frame images at the real file and frame, in place."""
    if not series.is_multiframe:
        return
    sources = {
        str(header.SOPInstanceUID): source for header, source in zip(headers, series.slices, strict=True)
    }
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        for derivation in frame.DerivationImageSequence:
            for item in derivation.SourceImageSequence:
                source = sources.get(str(item.ReferencedSOPInstanceUID))
                if source is not None:  # frames of several segments share one item, which is restored once
                    _point_at(item, series.headers[source.header_index])
                    item.ReferencedFrameNumber = source.frame_number
    files = [_point_at(Dataset(), header) for header in series.headers]
    segmentation.SourceImageSequence = files
    segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence = files


def _point_at(item: Dataset, header: Dataset) -> Dataset:
    item.ReferencedSOPClassUID = header.SOPClassUID
    item.ReferencedSOPInstanceUID = header.SOPInstanceUID
    return item


def _common_header(series: DicomSeries) -> Dataset:
    first = series.headers[0]
    common = Dataset()
    for keyword in _COPIED:
        if first.get(keyword) not in (None, "", []) and _is_sound(keyword, first[keyword].value):
            setattr(common, keyword, deepcopy(first[keyword].value))
    for keyword in _MAY_BE_EMPTY:
        if keyword not in common:
            setattr(common, keyword, "")
    if not any(keyword in common for keyword in _DEIDENTIFICATION):
        common.pop("PatientIdentityRemoved", None)  # the standard wants the method beside it
    common.SpecificCharacterSet = CHARACTER_SET
    common.Rows, common.Columns = series.volume.voxels.shape[1:3]
    common.ImageOrientationPatient = _orientation(series)
    common.PixelSpacing = [_number_text(value) for value in series.stack.spacing_ji_mm]
    common.SliceThickness = _number_text(_thickness_mm(series))
    return common


def _slice_header(series: DicomSeries, source: SliceSource, common: Dataset) -> Dataset:
    original = series.headers[source.header_index]
    header = Dataset()
    header.update(common)
    if source.frame_number is None:
        header.SOPClassUID = original.SOPClassUID
        header.SOPInstanceUID = original.SOPInstanceUID
    else:
        header.SOPClassUID = CTImageStorage
        header.SOPInstanceUID = generate_uid()
    header.ImagePositionPatient = [_number_text(value) for value in source.position_lps]
    return header


def _orientation(series: DicomSeries) -> list[str]:
    """Return the first slice's direction cosines; those of others may differ by rounding."""
    return [_number_text(value) for value in series.slices[0].orientation_lps.ravel()]


def _thickness_mm(series: DicomSeries) -> float:
    """Return the thickness, else the smallest distance of slices, else 1: an empty one breaks readers."""
    thickness = series.slices[0].thickness_mm
    if thickness:
        return thickness
    gaps = series.stack.gaps_mm
    return float(gaps.min()) if gaps.size else 1.0


def _number_text(value: float) -> str:
    """Write a number in the 16 characters that DICOM gives it, as exactly as they allow."""
    for digits in range(17, 0, -1):
        text = f"{value:.{digits}g}"
        if len(text) <= 16:
            return text
    return "0"


def _is_sound(keyword: str, value: Any) -> bool:
    """Whether a date or time can be read as one; archives hold many like 19600000, which no writer takes."""
    kind = {"Date": DA, "Time": TM}.get(keyword[-4:])
    if kind is None:
        return True
    try:
        return kind(str(value)) is not None
    except ValueError:
        return False
