"""Small DICOM series whose every voxel tells where it lies, so that any mistake of place shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

Change = Callable[[Dataset, int], None]

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))
FLIPPED = ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


def rotated(degrees_xyz: Sequence[float]) -> tuple[Any, Any]:
    """Directions of an oblique plane: axial, turned about x, then y, then z."""
    x, y, z = np.radians(degrees_xyz)
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    turned = about_z @ about_y @ about_x
    return turned[:, 0], turned[:, 1]


@dataclass
class Sample:
    """A series to write; the defaults give six axial CT slices of non-square pixels."""

    orientation: tuple[Any, Any] = AXIAL
    rows: int = 10
    columns: int = 13
    spacing_ji: tuple[float, float] = (0.7, 0.9)
    steps: Sequence[float] = (0, 3, 6, 9, 12, 15)
    shift_per_mm: Sequence[float] = (0, 0, 0)
    origin: Sequence[float] = (-12.25, 30.5, -40.125)
    modality: str = "CT"
    slope: float = 1.0
    intercept: float = -1024.0
    uids: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("study", "series", "frame"):
            self.uids.setdefault(name, generate_uid())
        self.instance_uids = [str(generate_uid()) for _ in self.steps]

    @property
    def shape_kji(self) -> tuple[int, int, int]:
        return len(self.steps), self.rows, self.columns

    @property
    def directions(self) -> NDArray[np.float64]:
        row, column = (np.asarray(direction, dtype=float) for direction in self.orientation)
        return np.array([row, column, np.cross(row, column)])

    @property
    def positions_lps(self) -> NDArray[np.float64]:
        steps = np.asarray(self.steps, dtype=float)
        way = self.directions[2] + np.asarray(self.shift_per_mm, dtype=float)
        return np.asarray(self.origin, dtype=float) + steps[:, None] * way

    def points_lps(self, k: int) -> NDArray[np.float64]:
        """Centre of every pixel of slice k, (rows, columns, 3)."""
        j, i = np.indices((self.rows, self.columns), dtype=float)
        row, column, _ = self.directions
        in_plane = i[..., None] * self.spacing_ji[1] * row + j[..., None] * self.spacing_ji[0] * column
        return in_plane + self.positions_lps[k]

    def values(self) -> NDArray[np.int16]:
        """What reading must give: a whole number that says where each voxel lies."""
        return np.stack([place_code(self.points_lps(k)) for k in range(len(self.steps))])

    def stored(self) -> NDArray[np.uint16]:
        return np.rint((self.values() - self.intercept) / self.slope).astype(np.uint16)

    def slice(self, k: int) -> Dataset:
        """One classic image."""
        dataset = self._common(MRImageStorage if self.modality == "MR" else CTImageStorage)
        dataset.SOPInstanceUID = self.instance_uids[k]
        dataset.InstanceNumber = k + 1
        dataset.ImagePositionPatient = texts(self.positions_lps[k])
        dataset.ImageOrientationPatient = texts(self.directions[:2].ravel())
        dataset.PixelSpacing = texts(self.spacing_ji)
        dataset.SliceThickness = "3"
        dataset.RescaleSlope, dataset.RescaleIntercept = texts([self.slope, self.intercept])
        dataset.PixelData = self.stored()[k].tobytes()
        return dataset

    def write(self, folder: Path, change: Change | None = None, names: Sequence[str] | None = None) -> Path:
        """Write one file per slice; `change` may alter each before."""
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(len(self.steps)):
            dataset = self.slice(k)
            if change:
                change(dataset, k)
            save(dataset, folder / (names[k] if names else f"{k:03d}.dcm"))
        return folder

    def enhanced(self, order: Sequence[int] | None = None, *, per_frame: bool = False) -> Dataset:
        """One enhanced multi-frame CT image with the slices in the given order of frames.

        With `per_frame`, orientation, measures and rescaling are given for every frame, and each frame has
        its own slope.
        """
        order = range(len(self.steps)) if order is None else order
        dataset = self._common(EnhancedCTImageStorage)
        dataset.SOPInstanceUID = self.instance_uids[0]
        dataset.NumberOfFrames = len(order)
        slopes = [0.5 if per_frame and k % 2 else 1.0 for k in order]
        frames = [self._frame(k, slope, per_frame) for k, slope in zip(order, slopes, strict=True)]
        dataset.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
        shared = Dataset() if per_frame else self._shared_groups(self.slope)
        dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])
        values = self.values()
        dataset.PixelData = b"".join(
            np.rint((values[k] - self.intercept) / slope).astype(np.uint16).tobytes()
            for k, slope in zip(order, slopes, strict=True)
        )
        return dataset

    def _frame(self, k: int, slope: float, per_frame: bool) -> Dataset:
        frame = self._shared_groups(slope) if per_frame else Dataset()
        position = Dataset()
        position.ImagePositionPatient = texts(self.positions_lps[k])
        frame.PlanePositionSequence = DicomSequence([position])
        return frame

    def _shared_groups(self, slope: float) -> Dataset:
        orientation, measures, values = Dataset(), Dataset(), Dataset()
        orientation.ImageOrientationPatient = texts(self.directions[:2].ravel())
        measures.PixelSpacing, measures.SliceThickness = texts(self.spacing_ji), "3"
        values.RescaleSlope, values.RescaleIntercept = texts([slope, self.intercept])
        values.RescaleType = "HU"
        groups = Dataset()
        groups.PlaneOrientationSequence = DicomSequence([orientation])
        groups.PixelMeasuresSequence = DicomSequence([measures])
        groups.PixelValueTransformationSequence = DicomSequence([values])
        return groups

    def _common(self, sop_class: str) -> Dataset:
        dataset = Dataset()
        dataset.SOPClassUID = sop_class
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.Modality = self.modality
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = self.uids["study"], self.uids["series"]
        dataset.FrameOfReferenceUID = self.uids["frame"]
        dataset.PatientName, dataset.PatientID = "Test^Anna", "T-17"
        dataset.PatientBirthDate, dataset.PatientSex = "19700101", "F"
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20260102", "101112", "5"
        dataset.AccessionNumber, dataset.ReferringPhysicianName = "A1", "Doe^Jane"
        dataset.PositionReferenceIndicator, dataset.SeriesNumber = "", 4
        dataset.Manufacturer = "Scanner Works"
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = self.rows, self.columns, 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelRepresentation = 0
        return dataset


def place_code(points_lps: NDArray[np.float64]) -> NDArray[np.int16]:
    """A number for a place (..., 3); neighbours in every direction differ by more than rounding hides."""
    return np.rint(points_lps @ np.array([3.0, 7.0, 13.0])).astype(np.int16)


def texts(numbers: Any) -> list[str]:
    """Decimal strings of DICOM: at most 16 characters."""
    return [next(t for d in range(16, 0, -1) if len(t := f"{float(n):.{d}g}") <= 16) for n in numbers]


def save(dataset: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> None:
    """Write a DICOM file."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, enforce_file_format=True)
