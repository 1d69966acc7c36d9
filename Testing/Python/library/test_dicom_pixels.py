"""Stored pixels to real values: rescaling per slice and frame, compression, colour, damaged files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import JPEGLSLossless, RLELossless

from SAMAdaptLib.dicom import read_series
from SAMAdaptLib.errors import DicomError
from Testing.dicom_samples import Sample, save

DCMCJPEG = shutil.which("dcmcjpeg")


def itk_voxels(folder: Path) -> Any:
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    return sitk.GetArrayFromImage(sitk.ReadImage(names))


def test_every_slice_has_its_own_rescale(tmp_path: Path) -> None:
    """As in PET: the same stored numbers mean something else on each slice."""

    def rescale(dataset: Dataset, k: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{0.25 * (k + 1):g}", f"{-10 * k}"

    sample = Sample()
    voxels = read_series(sample.write(tmp_path, rescale)).volume.voxels
    k = np.arange(6)[:, None, None]
    assert voxels.dtype == np.float32
    np.testing.assert_allclose(voxels, sample.stored() * 0.25 * (k + 1) - 10 * k, rtol=1e-6)


def test_no_rescale_gives_the_stored_numbers(tmp_path: Path) -> None:
    def drop(dataset: Dataset, _: int) -> None:
        del dataset.RescaleSlope, dataset.RescaleIntercept

    sample = Sample(modality="MR")
    voxels = read_series(sample.write(tmp_path, drop)).volume.voxels
    assert voxels.dtype == np.uint16
    np.testing.assert_array_equal(voxels, sample.stored())


def test_values_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    def raise_one(dataset: Dataset, k: int) -> None:
        if k == 4:
            dataset.PixelData = np.full((10, 13), 65535, np.uint16).tobytes()

    sample = Sample()
    voxels = read_series(sample.write(tmp_path, raise_one)).volume.voxels
    assert voxels.dtype == np.int32
    assert np.all(voxels[4] == 65535 - 1024)
    np.testing.assert_array_equal(voxels[:4], sample.values()[:4])


def test_signed_12_bit_pixels(tmp_path: Path) -> None:
    stored = np.arange(-65, 65, dtype=np.int16).reshape(10, 13)

    def sign(dataset: Dataset, _: int) -> None:
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 12, 11
        dataset.PixelData = stored.tobytes()

    voxels = read_series(Sample(intercept=0).write(tmp_path, sign)).volume.voxels
    np.testing.assert_array_equal(voxels[2], stored)
    np.testing.assert_array_equal(voxels, itk_voxels(tmp_path))


def test_a_table_of_values(tmp_path: Path) -> None:
    def with_table(dataset: Dataset, _: int) -> None:
        item = Dataset()
        item.LUTDescriptor, item.ModalityLUTType = [256, 0, 16], "US"
        item.LUTData = np.arange(1000, 3560, 10, dtype=np.uint16).tobytes()
        item["LUTData"].VR = "OW"
        dataset.ModalityLUTSequence = Sequence([item])
        del dataset.RescaleSlope, dataset.RescaleIntercept
        dataset.PixelData = np.arange(130, dtype=np.uint16).tobytes()

    voxels = read_series(Sample().write(tmp_path, with_table)).volume.voxels
    np.testing.assert_array_equal(voxels[3].ravel(), 1000 + 10 * np.arange(130))


def test_monochrome1_keeps_its_numbers(tmp_path: Path) -> None:
    """It is a rule for the display; HU stay HU. (ITK inverts the stored numbers before it rescales them.)"""
    sample = Sample()

    def invert(dataset: Dataset, _: int) -> None:
        dataset.PhotometricInterpretation = "MONOCHROME1"

    series = read_series(sample.write(tmp_path, invert))
    assert series.is_monochrome1
    assert "shown inverted (MONOCHROME1); their values are kept" in series.warnings[0]
    np.testing.assert_array_equal(series.volume.voxels, sample.values())


@pytest.mark.parametrize("planar", [0, 1])
def test_colour(planar: int, tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 255, (10, 13, 3), dtype=np.uint8)

    def colour(dataset: Dataset, _: int) -> None:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
        dataset.PlanarConfiguration = planar
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelData = (np.moveaxis(colours, -1, 0) if planar else colours).tobytes()
        del dataset.RescaleSlope, dataset.RescaleIntercept

    volume = read_series(Sample().write(tmp_path, colour)).volume
    assert volume.is_colour
    np.testing.assert_array_equal(volume.voxels[4], colours)


def test_palette_pictures_become_colour(tmp_path: Path) -> None:
    table = np.random.default_rng(2).integers(0, 255, (3, 256)).astype(np.uint16) << 8

    def palette(dataset: Dataset, _: int) -> None:
        dataset.PhotometricInterpretation = "PALETTE COLOR"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        for name, values in zip(("Red", "Green", "Blue"), table, strict=True):
            setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
            setattr(dataset, f"{name}PaletteColorLookupTableData", values.tobytes())
        dataset.PixelData = np.arange(130, dtype=np.uint8).tobytes()
        del dataset.RescaleSlope, dataset.RescaleIntercept

    voxels = read_series(Sample().write(tmp_path, palette)).volume.voxels
    np.testing.assert_array_equal(voxels[0].reshape(-1, 3), table.T[:130] >> 8)


def test_grey_and_colour_in_one_series(tmp_path: Path) -> None:
    def colour_last(dataset: Dataset, k: int) -> None:
        if k == 5:
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
            dataset.PlanarConfiguration = 0
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
            dataset.PixelData = bytes(390)

    Sample().write(tmp_path, colour_last)
    with pytest.raises(DicomError, match="image 6 of 6 differs from the first"):
        read_series(tmp_path)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless], ids=["RLE", "JPEG-LS"])
def test_lossless_compression(syntax: str, tmp_path: Path) -> None:
    sample = Sample()
    sample.write(tmp_path)
    for path in tmp_path.iterdir():
        dataset = dcmread(path)
        dataset.compress(syntax)
        dataset.save_as(path)
    np.testing.assert_array_equal(read_series(tmp_path).volume.voxels, sample.values())


def test_compressed_multiframe(tmp_path: Path) -> None:
    sample = Sample()
    save(sample.enhanced(per_frame=True), tmp_path / "multi.dcm")
    dataset = dcmread(tmp_path / "multi.dcm")
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "multi.dcm")
    np.testing.assert_array_equal(read_series(tmp_path).volume.voxels, sample.values())


@pytest.mark.skipif(DCMCJPEG is None, reason="dcmcjpeg (package dcmtk) is not installed")
@pytest.mark.parametrize("option", ["+e1", "+el"], ids=["selection value 1", "process 14"])
def test_lossless_jpeg_is_decoded(option: str, tmp_path: Path) -> None:
    """The commonest compression of archives, which pydicom alone cannot read."""
    sample = Sample()
    sample.write(tmp_path)
    for path in tmp_path.iterdir():
        subprocess.run([str(DCMCJPEG), option, str(path), str(path)], check=True)
        assert dcmread(path).file_meta.TransferSyntaxUID.is_compressed
    np.testing.assert_array_equal(read_series(tmp_path).volume.voxels, sample.values())


def test_unknown_compression_is_named(tmp_path: Path) -> None:
    Sample().write(tmp_path)
    path = tmp_path / "001.dcm"
    dataset = dcmread(path)
    dataset.compress(RLELossless)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"  # MPEG-4
    dataset.save_as(path)
    with pytest.raises(DicomError, match="Image 2 of 6 is compressed as MPEG-4") as caught:
        read_series(tmp_path)
    assert "Explicit VR Little Endian" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_damaged_compression(tmp_path: Path) -> None:
    Sample().write(tmp_path)
    path = tmp_path / "001.dcm"
    dataset = dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DicomError, match="image 2 of 6 holds only its header or is cut short"):
        read_series(tmp_path)


def test_a_multiframe_file_with_too_few_frames(tmp_path: Path) -> None:
    dataset = Sample().enhanced()
    dataset.PixelData = dataset.PixelData[: 4 * 260]
    save(dataset, tmp_path / "short.dcm")
    with pytest.raises(DicomError, match="cannot be read: the file is cut short"):
        read_series(tmp_path)
