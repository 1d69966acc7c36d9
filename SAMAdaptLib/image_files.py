"""Image files in and out (NIfTI, NRRD, MHA, pictures) through SimpleITK; LPS is turned to RAS here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from SAMAdaptLib.errors import VolumeError
from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.geometry import LPS_TO_RAS, Geometry
from SAMAdaptLib.volume import Volume


@dataclass(frozen=True)
class SegmentEntry:
    """What a label value means in a `.seg.nrrd`.

    Args:
        label: Value in the voxels, 1 to 255.
        name: What Slicer shows.
        colour_rgb: 0 to 1 each.
        terminology: Slicer's seven parts divided by `~`, each code `scheme^value^meaning`.
    """

    label: int
    name: str
    colour_rgb: tuple[float, float, float]
    terminology: str


def read_volume(path: str | os.PathLike[str], modality: str | None = None) -> Volume:
    """Read a 2-D or 3-D image file.

    Args:
        path: NIfTI, NRRD, MHA, TIFF, PNG and whatever else SimpleITK reads; for DICOM see `dicom`.
        modality: DICOM modality if known; most such files do not say.

    Raises:
        VolumeError: No such file, not an image, of more than three dimensions, or with unusable voxels.
    """
    file = Path(path)
    if not file.is_file():
        raise VolumeError(f"An image file was wanted, but there is no file {file.name}. Check the path.")
    try:
        image = sitk.ReadImage(str(file))
    except RuntimeError as error:
        why, remedy = _reason(error), _remedy(error)
        raise VolumeError(f"{file.name} cannot be read as an image ({why}). {remedy}") from error
    if image.GetDimension() == 2:
        image = sitk.JoinSeries(image)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() not in (1, 3):
        raise VolumeError(
            f"{file.name} should be one grey or RGB volume, but has {image.GetDimension()} dimensions and "
            f"{image.GetNumberOfComponentsPerPixel()} values a voxel. Save one frame of it as a file of "
            "its own."
        )
    voxels = sitk.GetArrayFromImage(image)
    return Volume(voxels, _geometry_of(image), modality, name=_stem(file))


def write_volume(path: str | os.PathLike[str], voxels_kji: NDArray[Any], geometry: Geometry) -> None:
    """Write voxels (K, J, I) as the format that the name asks for, complete or not at all.

    Uneven slices are put on an even grid by nearest slice, since no such format can say them.

    Raises:
        VolumeError: The format is unknown, cannot hold the grid, or the folder cannot be written to.
    """
    if geometry.is_sheared and ".nii" in Path(path).suffixes:
        raise VolumeError(
            f"{Path(path).name} cannot hold this volume: NIfTI keeps axes at right angles only, and a "
            "tilted gantry "
            "leaves them sheared. Write .nrrd or .mha instead."
        )
    _write(Path(path), _image_of(voxels_kji, geometry))


def write_seg_nrrd(
    path: str | os.PathLike[str],
    labels_kji: NDArray[Any],
    geometry: Geometry,
    segments: Sequence[SegmentEntry],
) -> None:
    """Write labels (K, J, I) as Slicer's `.seg.nrrd`, with names, colours and terminology.

    Raises:
        VolumeError: A label in the voxels that no segment names, or a folder that cannot be written to.
    """
    unnamed = sorted(set(np.unique(labels_kji).tolist()) - {0} - {segment.label for segment in segments})
    if unnamed:
        raise VolumeError(f"Every label needs a segment, but {unnamed} have none. Name them.")
    image = _image_of(np.asarray(labels_kji, dtype=np.uint8), geometry)
    columns, rows, slices = (n - 1 for n in image.GetSize())
    fields = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_SourceRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for number, segment in enumerate(segments):
        fields |= {
            f"Segment{number}_ID": f"Segment_{segment.label}",
            f"Segment{number}_Name": segment.name,
            f"Segment{number}_Color": " ".join(f"{value:.6g}" for value in segment.colour_rgb),
            f"Segment{number}_LabelValue": str(segment.label),
            f"Segment{number}_Layer": "0",
            f"Segment{number}_Extent": f"0 {columns} 0 {rows} 0 {slices}",
            f"Segment{number}_Tags": f"TerminologyEntry:{segment.terminology}|",
        }
    for key, value in fields.items():
        image.SetMetaData(key, value)
    _write(Path(path), image)


def _geometry_of(image: sitk.Image) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(image.GetDirection()).reshape(3, 3) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    columns, rows, slices = image.GetSize()
    return Geometry.from_lps((slices, rows, columns), affine)


def _image_of(voxels_kji: NDArray[Any], geometry: Geometry) -> sitk.Image:
    if not geometry.is_regular:
        voxels_kji, geometry = _on_even_slices(voxels_kji, geometry)
    values = voxels_kji.astype(np.uint8) if voxels_kji.dtype == np.bool_ else np.ascontiguousarray(voxels_kji)
    image = sitk.GetImageFromArray(values, isVector=values.ndim == 4)
    affine = LPS_TO_RAS @ geometry.affine_ijk_to_ras
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / np.asarray(geometry.spacing_mm)).ravel().tolist())
    return image


def _on_even_slices(voxels_kji: NDArray[Any], geometry: Geometry) -> tuple[NDArray[Any], Geometry]:
    """Repeat slices so that an even grid with the smallest slice distance shows each where it lies."""
    origins = geometry.slice_origins_ras
    assert origins is not None
    along = origins - origins[0]
    reach_mm = np.linalg.norm(along, axis=1)
    step_mm = float(np.diff(reach_mm).min())
    count = int(np.ceil(reach_mm[-1] / step_mm - 1e-6)) + 1
    affine = geometry.affine_ijk_to_ras.copy()
    affine[:3, 2] = along[-1] / reach_mm[-1] * step_mm
    affine[:3, 3] = origins[0]
    nearest = np.abs(reach_mm[None, :] - (np.arange(count) * step_mm)[:, None]).argmin(axis=1)
    return voxels_kji[nearest], Geometry((count, *geometry.shape_kji[1:]), affine)


def _write(path: Path, image: sitk.Image) -> None:
    try:
        with atomic_path(path) as temporary:
            sitk.WriteImage(image, str(temporary), useCompression=True)
    except (RuntimeError, OSError) as error:
        raise VolumeError(
            f"{path.name} cannot be written ({_reason(error)}). Choose a folder that exists and can be "
            "written to, and a "
            "name that ends in .nii.gz, .nrrd or .mha."
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    text = str(error)
    if "orthonormal" in text:
        return "its axes are not at right angles"
    return "damaged or of an unknown format" if "ImageIO" in text or "read" in text else "the library refused"


def _remedy(error: Exception) -> str:
    if "orthonormal" in str(error):
        return "Save it as NRRD, which can hold a sheared grid, or give the DICOM series."
    return "Give a NIfTI, NRRD or MHA file, or a folder with one DICOM series."


def _stem(path: Path) -> str:
    return path.name.split(".")[0] or path.name
