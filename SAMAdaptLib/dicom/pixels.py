"""Stored pixels to real values: decoding, rescaling, one array for the whole series.

Values keep their physical meaning: rescale slope and intercept of every slice or frame are applied, and a
MONOCHROME1 picture keeps its numbers although it is shown inverted (ITK, and with it Slicer, inverts them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from SAMAdaptLib.errors import DicomError

from .slices import SliceSource

_PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def read_voxels(paths: Sequence[Path], slices: Sequence[SliceSource]) -> NDArray[Any]:
    """Read the pixels of the slices, k ascending.

    Args:
        paths: The file of every header.
        slices: Which file and frame each k comes from.

    Returns:
        (K, J, I) in the smallest of the stored type, int16, int32 and float32 that holds every value, or
        (K, J, I, 3) uint8 for colour.

    Raises:
        DicomError: A file has no pixels, is cut short, or is compressed in a way that nothing here decodes.
    """
    voxels: NDArray[Any] | None = None
    for k, values in _slices_with_values(paths, slices):
        if voxels is None:
            voxels = np.zeros((len(slices), *values.shape), dtype=values.dtype)
        if values.shape != voxels.shape[1:]:
            raise DicomError(
                f"All images of a series must be of one size and kind, but image {k + 1} of "
                f"{len(slices)} differs "
                "from the first (grey against colour, or other rows and columns). Take it out of the folder."
            )
        if values.dtype != voxels.dtype:
            voxels = voxels.astype(_common_type(voxels.dtype, values.dtype), copy=False)
        voxels[k] = values
    assert voxels is not None
    return voxels


def _slices_with_values(
    paths: Sequence[Path], slices: Sequence[SliceSource]
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (k, real values) file by file, so that a multi-frame file is decoded once."""
    wanted: dict[int, list[int]] = {}
    for k, source in enumerate(slices):
        wanted.setdefault(source.header_index, []).append(k)
    for header_index, ks in wanted.items():
        which = f"image {ks[0] + 1} of {len(slices)}"
        frames, is_real = _decoded(paths[header_index], which)
        for k in ks:
            frame = frames[(slices[k].frame_number or 1) - 1]
            yield k, frame if is_real else _rescaled(frame, slices[k])


def _decoded(path: Path, which: str) -> tuple[NDArray[Any], bool]:
    """Return the frames (F, J, I[, 3]) of a file and whether they are real values already."""
    try:
        dataset = dcmread(path, force=True)
    except Exception as error:
        raise DicomError(_cut_short(which)) from error
    if not any(keyword in dataset for keyword in _PIXEL_KEYWORDS):
        raise DicomError(
            f"Images with pixels were wanted, but {which} holds only its header or is cut short. "
            "Copy the whole file again from the archive."
        )
    syntax = UID(dataset.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2"))
    if not _can_decode(syntax):
        return _decoded_by_itk(path, dataset, syntax, which), True
    try:
        frames = _real_colours(pixel_array(dataset), dataset)
        has_table = bool(dataset.get("ModalityLUTSequence"))
        frames = apply_modality_lut(frames, dataset) if has_table else frames
    except Exception as error:
        raise DicomError(_cut_short(which)) from error
    return _with_frame_axis(frames, dataset, which), has_table


def _can_decode(syntax: UID) -> bool:
    if not syntax.is_compressed or syntax.is_deflated:
        return True
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _decoded_by_itk(path: Path, dataset: Dataset, syntax: UID, which: str) -> NDArray[Any]:
    """Decode what pydicom cannot (lossless JPEG above all) by ITK, which rescales as it reads."""
    from SimpleITK import GetArrayFromImage, ReadImage  # heavy, and seldom needed

    try:
        if int(dataset.get("NumberOfFrames") or 1) > 1 or dataset.PhotometricInterpretation == "MONOCHROME1":
            raise RuntimeError("ITK would rescale all frames alike, and would invert the numbers")
        frames: NDArray[Any] = GetArrayFromImage(ReadImage(str(path)))
    except RuntimeError as error:
        raise DicomError(
            f"{which.capitalize()} is compressed as {syntax.name}, which cannot be decoded here. "
            "Export the series uncompressed (Explicit VR Little Endian) from the archive."
        ) from error
    return _with_frame_axis(_narrowed(frames), dataset, which)


def _real_colours(frames: NDArray[Any], dataset: Dataset) -> NDArray[Any]:
    """Return palette pictures as 8-bit RGB; other pictures are left alone."""
    if dataset.get("PhotometricInterpretation") != "PALETTE COLOR":
        return frames
    colours = apply_color_lut(frames, dataset)
    return (colours >> 8).astype(np.uint8) if colours.dtype == np.uint16 else colours


def _with_frame_axis(frames: NDArray[Any], dataset: Dataset, which: str) -> NDArray[Any]:
    size = (int(dataset.Rows), int(dataset.Columns))
    shaped = frames.reshape(-1, *size, *((3,) if frames.shape[-1:] == (3,) and frames.ndim > 2 else ()))
    if shaped.shape[0] < int(dataset.get("NumberOfFrames") or 1):
        raise DicomError(_cut_short(which))
    return shaped


def _rescaled(frame: NDArray[Any], source: SliceSource) -> NDArray[Any]:
    """Apply slope and intercept; whole numbers stay whole numbers."""
    slope, intercept = source.slope, source.intercept
    if slope == 1 and intercept == 0:
        return frame if frame.dtype.kind != "f" or frame.dtype == np.float32 else frame.astype(np.float32)
    if frame.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        return _narrowed(frame.astype(np.int64) * int(slope) + int(intercept))
    return np.asarray(frame * slope + intercept, dtype=np.float32)


def _narrowed(values: NDArray[Any]) -> NDArray[Any]:
    """Return whole numbers as int16 where they fit, else int32; other numbers as float32."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "iu":
        return values.astype(np.float32)
    fits = values.size == 0 or (values.min() >= -(2**15) and values.max() < 2**15)
    return values.astype(np.int16 if fits else np.int32)


def _common_type(one: np.dtype[Any], other: np.dtype[Any]) -> np.dtype[Any]:
    both = np.promote_types(one, other)
    return np.dtype(np.float32) if both == np.float64 else both


def _cut_short(which: str) -> str:
    return (
        f"The pixels of {which} cannot be read: the file is cut short or damaged. "
        "Copy it again from the archive."
    )
