"""A torso that is known to the last voxel: a synthetic CT series with its exact truth.

It stands in for a patient where no real study is at hand, and shows whether a chain from series to
segmentation is right, because the truth can be asked for on any grid.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.ndimage import gaussian_filter

from SAMAdaptLib.errors import DicomError
from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.geometry import Geometry

from .phantom_shapes import AIR_HU, Part, Points, torso_parts
from .terminology import Terminology, terminology_for

SHAPE_KJI = (48, 256, 256)
SPACING_IJK_MM = (1.5, 1.5, 5.0)

_NOISE_HU = 12.0
_NOISE_GRAIN_PIXELS = 0.6
_BLUR_PIXELS = 0.6  # width of the scanner's point spread: edges of organs are mixed voxels
_SLICE_SAMPLES = (-0.25, 0.25)  # parts of the slice thickness that are averaged


@dataclass(frozen=True)
class PhantomOrgan:
    """An organ with a truth: its label there, its name and its codes."""

    label_value: int
    name: str
    colour_rgb: tuple[int, int, int]

    @property
    def terminology(self) -> Terminology:
        """Codes for a DICOM segmentation."""
        return terminology_for(self.name)


PHANTOM_ORGANS = (
    PhantomOrgan(1, "liver", (221, 130, 101)),
    PhantomOrgan(2, "spleen", (157, 108, 162)),
    PhantomOrgan(3, "right kidney", (185, 102, 83)),
    PhantomOrgan(4, "left kidney", (185, 102, 83)),
    PhantomOrgan(5, "aorta", (224, 97, 76)),
    PhantomOrgan(6, "right lung", (197, 165, 145)),
    PhantomOrgan(7, "left lung", (197, 165, 145)),
    PhantomOrgan(8, "stomach", (216, 132, 105)),
)
"""Organs that `torso_truth` labels."""


def torso_truth(geometry: Geometry, seed: int = 0) -> NDArray[np.uint8]:
    """Return the exact labels of the phantom's organs at the voxel centres of any grid.

    Args:
        geometry: Where to ask, in the patient space of the phantom's series.
        seed: That of the phantom.

    Returns:
        (K, J, I) with the label values of `PHANTOM_ORGANS`, 0 elsewhere.
    """
    parts = torso_parts(seed)
    labels_by_name = {organ.name: organ.label_value for organ in PHANTOM_ORGANS}
    truth = np.zeros(geometry.shape_kji, dtype=np.uint8)
    for k in range(geometry.shape_kji[0]):
        points = _slice_points(geometry, float(k))
        for part in parts:
            truth[k][_within(part, points)] = labels_by_name.get(part.name, 0)
    return truth


def torso_geometry(
    shape_kji: tuple[int, int, int] = SHAPE_KJI, spacing_ijk_mm: tuple[float, float, float] = SPACING_IJK_MM
) -> Geometry:
    """Return the grid of the phantom's series: axial slices around the middle, from feet to head."""
    lps = np.diag([*spacing_ijk_mm, 1.0])
    lps[:3, 3] = -0.5 * (np.asarray(shape_kji[::-1]) - 1) * spacing_ijk_mm
    return Geometry.from_lps(shape_kji, lps)


def write_torso_phantom(
    folder: str | os.PathLike[str],
    seed: int = 0,
    *,
    shape_kji: tuple[int, int, int] = SHAPE_KJI,
    spacing_ijk_mm: tuple[float, float, float] = SPACING_IJK_MM,
) -> list[Path]:
    """Write the phantom as a classic CT series, one file per slice.

    The same seed gives the same pixels and the same identifiers.

    Args:
        folder: Made if it is not there.
        seed: Varies the organs and the noise.
        shape_kji: Slices, rows, columns.
        spacing_ijk_mm: Between columns, rows and slices.

    Returns:
        The files, from feet to head.

    Raises:
        DicomError: The folder cannot be written to.
    """
    geometry = torso_geometry(shape_kji, spacing_ijk_mm)
    target = Path(folder)
    written: list[Path] = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for k, density_hu in enumerate(_densities(geometry, seed)):
            path = target / f"slice_{k + 1:03d}.dcm"
            with atomic_path(path) as temporary:
                _slice_dataset(geometry, k, density_hu, seed).save_as(temporary, enforce_file_format=True)
            written.append(path)
    except OSError as error:
        raise DicomError(
            f"The phantom could not be written ({error.strerror or type(error).__name__}). Choose "
            "another folder."
        ) from error
    return written


def _densities(geometry: Geometry, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield each slice (J, I) in HU: blurred like a scanner's picture, with its grain."""
    parts = torso_parts(seed)
    random = np.random.default_rng([seed, 1618])
    for k in range(geometry.shape_kji[0]):
        samples = [_painted(parts, _slice_points(geometry, k + part)) for part in _SLICE_SAMPLES]
        density = gaussian_filter(np.mean(samples, axis=0), _BLUR_PIXELS)
        grain = gaussian_filter(random.standard_normal(density.shape), _NOISE_GRAIN_PIXELS)
        yield density + _NOISE_HU * grain / grain.std()


def _painted(parts: list[Part], points: Points) -> NDArray[np.float64]:
    density = np.full(np.broadcast_shapes(*(axis.shape for axis in points)), AIR_HU)
    for part in parts:
        density[_within(part, points)] = part.density_hu
    return density


def _within(part: Part, points: Points) -> NDArray[np.bool_]:
    shape = np.broadcast_shapes(*(axis.shape for axis in points))
    return np.broadcast_to(part.inside(points), shape)


def _slice_points(geometry: Geometry, slice_k: float) -> Points:
    """Return R, A and S of every voxel centre of a slice, of shapes that broadcast to (J, I).

    On an axial grid each depends on one index only, which is what makes the phantom quick.
    """
    rows, columns = geometry.shape_kji[1:]
    if np.count_nonzero(geometry.affine_ijk_to_ras[:3, :2]) == 2 and np.all(np.diag(geometry.directions)[:2]):
        along_i = geometry.ijk_to_ras([(i, 0, slice_k) for i in range(columns)])
        along_j = geometry.ijk_to_ras([(0, j, slice_k) for j in range(rows)])
        return along_i[None, :, 0], along_j[:, None, 1], along_i[None, :1, 2]
    j, i = np.indices((rows, columns))
    points_ijk = np.column_stack([i.ravel(), j.ravel(), np.full(i.size, slice_k)])
    ras = geometry.ijk_to_ras(points_ijk).reshape(rows, columns, 3)
    return ras[..., 0], ras[..., 1], ras[..., 2]


def _slice_dataset(geometry: Geometry, k: int, density_hu: NDArray[np.float64], seed: int) -> Dataset:
    dataset = _common_attributes(seed)
    position_ras = geometry.ijk_to_ras([[0, 0, k]])[0]
    spacing = geometry.spacing_mm
    dataset.SOPInstanceUID = _uid(seed, f"slice {k} of {geometry.shape_kji} at {spacing}")
    dataset.SeriesInstanceUID = _uid(seed, f"series {geometry.shape_kji} at {spacing}")
    dataset.InstanceNumber = k + 1
    dataset.ImagePositionPatient = [f"{value:.10g}" for value in position_ras * (-1, -1, 1)]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [spacing[1], spacing[0]]
    dataset.SliceThickness = spacing[2]
    dataset.Rows, dataset.Columns = density_hu.shape
    stored = np.clip(np.rint(density_hu + 1024), 0, 4095).astype("<u2")
    dataset.PixelData = stored.tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _common_attributes(seed: int) -> Dataset:
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    dataset.SOPClassUID = CTImageStorage
    dataset.StudyDate = dataset.ContentDate = "20260101"
    dataset.StudyTime = dataset.ContentTime = "120000"
    dataset.Modality = "CT"
    dataset.Manufacturer = "SAMAdapt"
    dataset.SeriesDescription = "Synthetic torso"
    dataset.PatientName = "Phantom^Torso"
    dataset.PatientID = f"PHANTOM-{seed}"
    dataset.BodyPartExamined = "ABDOMEN"
    dataset.StudyInstanceUID = _uid(seed, "study")
    dataset.FrameOfReferenceUID = _uid(seed, "frame of reference")
    dataset.StudyID, dataset.SeriesNumber, dataset.AcquisitionNumber = "1", 1, 1
    for keyword in (
        "PatientBirthDate",
        "PatientSex",
        "AccessionNumber",
        "ReferringPhysicianName",
        "PositionReferenceIndicator",
        "KVP",
    ):
        setattr(dataset, keyword, None)
    dataset.PatientPosition = "HFS"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = -1024, 1, "HU"
    dataset.WindowCenter, dataset.WindowWidth = 40, 400
    return dataset


def _uid(seed: int, what: str) -> str:
    return str(generate_uid(entropy_srcs=["SAMAdapt torso phantom", str(seed), what]))
