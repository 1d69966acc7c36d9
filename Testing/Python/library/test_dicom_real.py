"""Real studies: read whole, in the place that SimpleITK or the headers give, written and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread

from SAMAdaptLib.dicom import DicomSeries, Segment, read_segmentation, read_series, write_segmentation
from SAMAdaptLib.errors import DicomError

SERIES: dict[str, tuple[str, int | None, tuple[int, int, int], str]] = {
    "enhanced CT": ("ct_enhanced_multiframe/image", None, (2, 512, 512), "CT"),
    "tilted head": ("ct_head_gantry_tilt/image", None, (28, 512, 512), "CT"),
    "three slices": ("ct_liver_3slice_with_SEG/image", None, (3, 512, 512), "CT"),
    "liver": ("ct_liver_crlm/image", None, (51, 512, 512), "CT"),
    "oblique brain": ("mr_brain_tumour_oblique/image", None, (22, 320, 280), "MR"),
    "sagittal breast": ("mr_breast_sagittal_with_SEG/image_pe1", None, (60, 256, 256), "MR"),
    "thigh": ("mr_thigh_with_RTSTRUCT/image", None, (47, 138, 121), "MR"),
    "field map": ("mr_enhanced_multiframe/philips_fieldmap", 1, (32, 64, 64), "MR"),
    "field map, second map": ("mr_enhanced_multiframe/philips_fieldmap", 2, (32, 64, 64), "MR"),
    "third time point": ("mr_enhanced_multiframe/siemens_xa10_epi", 3, (6, 64, 64), "MR"),
}
REGULAR_CLASSIC = ("three slices", "liver", "oblique brain", "sagittal breast", "thigh")


@pytest.fixture
def folder(shared_data: Path) -> Path:
    if not (shared_data / "dicom").is_dir():
        pytest.skip("real data is not here: no folder dicom")
    return shared_data / "dicom"


def read(folder: Path, name: str) -> DicomSeries:
    where, phase, _, _ = SERIES[name]
    return read_series(folder / where, phase=phase)


@pytest.mark.parametrize("name", SERIES)
def test_every_series_is_read_in_place(name: str, folder: Path) -> None:
    """The corners of every slice lie where its own header says, to a hundredth of a millimetre."""
    series = read(folder, name)
    geometry = series.volume.geometry
    assert geometry.shape_kji == SERIES[name][2]
    assert series.volume.modality == SERIES[name][3]
    for k, source in enumerate(series.slices):
        header = series.headers[source.header_index]
        position, orientation, spacing = plane_of(header, source.frame_number)
        last = np.array([geometry.shape_kji[2] - 1, geometry.shape_kji[1] - 1])
        corner_lps = (
            position + last[0] * spacing[1] * orientation[:3] + last[1] * spacing[0] * orientation[3:]
        )
        found = geometry.ijk_to_ras([[0, 0, k], [*last, k]]) * (-1, -1, 1)
        np.testing.assert_allclose(found, [position, corner_lps], atol=0.01)
    if not geometry.is_regular:
        assert np.abs(geometry.slice_origins_ras * (-1, -1, 1) - series.stack.positions_lps).max() < 1e-9


def plane_of(header: Any, frame_number: int | None) -> tuple[Any, Any, Any]:
    if frame_number is None:
        values = (header.ImagePositionPatient, header.ImageOrientationPatient, header.PixelSpacing)
    else:
        frame = header.PerFrameFunctionalGroupsSequence[frame_number - 1]
        shared = header.SharedFunctionalGroupsSequence[0]
        orientation = frame.get("PlaneOrientationSequence") or shared.PlaneOrientationSequence
        measures = frame.get("PixelMeasuresSequence") or shared.PixelMeasuresSequence
        values = (
            frame.PlanePositionSequence[0].ImagePositionPatient,
            orientation[0].ImageOrientationPatient,
            measures[0].PixelSpacing,
        )
    return tuple(np.array(value, dtype=float) for value in values)  # type: ignore[return-value]


@pytest.mark.parametrize("name", REGULAR_CLASSIC)
def test_grid_and_voxels_agree_with_simpleitk(name: str, folder: Path) -> None:
    series = read(folder, name)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder / SERIES[name][0]))
    image = sitk.ReadImage(names)
    geometry = series.volume.geometry
    corners = geometry.corners_ijk()
    wanted_lps = [image.TransformContinuousIndexToPhysicalPoint(corner) for corner in corners.tolist()]
    tolerance = (
        1e-5 if name == "oblique brain" else 1e-6
    )  # ITK stacks along the normal, headers drift by 3e-6
    np.testing.assert_allclose(geometry.ijk_to_ras(corners) * (-1, -1, 1), wanted_lps, atol=tolerance)
    np.testing.assert_array_equal(series.volume.voxels, sitk.GetArrayFromImage(image))


def test_the_tilted_head_is_sheared_and_uneven(folder: Path) -> None:
    series = read(folder, "tilted head")
    assert series.volume.geometry.is_sheared
    assert not series.volume.geometry.is_regular
    assert "18.5 degrees" in series.warnings[0]
    assert "1.08 to 7.00 mm" in series.warnings[1]


def test_the_second_field_map_has_its_own_scale(folder: Path) -> None:
    """Frames 33 to 64 of the file, rescaled by the factors of their own frames."""
    series = read(folder, "field map, second map")
    dataset = dcmread(series.paths[0])
    for k, source in enumerate(series.slices):
        frame = dataset.PerFrameFunctionalGroupsSequence[source.frame_number - 1]  # type: ignore[operator]
        values = frame.PixelValueTransformationSequence[0]
        stored = dataset.pixel_array[source.frame_number - 1].astype(float)  # type: ignore[operator]
        wanted = stored * float(values.RescaleSlope) + float(values.RescaleIntercept)
        np.testing.assert_allclose(series.volume.voxels[k], wanted, rtol=1e-5)


@pytest.mark.parametrize("where", ["philips_fieldmap", "siemens_xa10_epi"])
def test_several_images_at_each_position_are_refused(where: str, folder: Path) -> None:
    with pytest.raises(DicomError, match="Choose one of them by phase=1"):
        read_series(folder / "mr_enhanced_multiframe" / where)


def test_a_study_with_image_and_segmentation_is_one_series(folder: Path) -> None:
    assert read_series(folder / "ct_liver_3slice_with_SEG").volume.geometry.shape_kji == (3, 512, 512)


def test_dcmqi_segmentations_are_read(folder: Path) -> None:
    series = read(folder, "three slices")
    liver = read_segmentation(only_file(folder / "ct_liver_3slice_with_SEG" / "seg_liver"), series)
    assert [segment.name for segment in liver.segments] == ["Liver"]
    assert liver.segments[0].terminology.type.meaning == "Liver"
    mask = liver.labels() == 1
    assert mask.sum() == stored_voxels(folder / "ct_liver_3slice_with_SEG" / "seg_liver")
    inside = series.volume.voxels[mask]
    assert 30 < np.median(inside) < 60  # it lies on the liver, not beside it
    assert np.mean(np.abs(inside - 45) < 100) > 0.9


def test_overlapping_dcmqi_segmentations_are_read(folder: Path) -> None:
    series = read(folder, "three slices")
    where = folder / "ct_liver_3slice_with_SEG" / "seg_partial_overlaps"
    found = read_segmentation(only_file(where), series)
    assert [segment.name for segment in found.segments] == [
        "GREEN",
        "ORANGE",
        "PURPLE",
        "LIGHT_BLUE",
        "DARK_BLUE",
    ]
    assert found.overlaps
    assert sum(int(found.mask(number).sum()) for number in range(1, 6)) == stored_voxels(where)


def test_fractional_segmentations_are_read(folder: Path) -> None:
    series = read(folder, "sagittal breast")
    where = folder / "mr_breast_sagittal_with_SEG" / "seg"
    found = read_segmentation(only_file(where), series)
    assert "fractions" in found.warnings[0]
    mask = found.mask(1)
    assert mask.sum() == stored_voxels(where)
    assert series.volume.voxels[mask].mean() > 50 * series.volume.voxels[~mask].mean()


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def stored_voxels(folder: Path) -> int:
    """Voxels that are on in the frames of a file, counted without regard to place."""
    return int(np.count_nonzero(dcmread(only_file(folder)).pixel_array))


@pytest.mark.parametrize("name", SERIES)
def test_segmentations_of_real_series_round_trip(name: str, folder: Path, tmp_path: Path) -> None:
    series = read(folder, name)
    shape = series.volume.geometry.shape_kji
    random = np.random.default_rng(5)
    labels = np.zeros(shape, np.uint8)
    labels[: shape[0] // 2 + 1, 10:40, 20:61] = random.integers(0, 3, (shape[0] // 2 + 1, 30, 41))
    segments = [Segment(1, "one"), Segment(2, "two"), Segment(3, "none")]
    written = write_segmentation(tmp_path / "seg.dcm", labels, segments, series)
    assert written.dropped == ("none",)
    np.testing.assert_array_equal(read_segmentation(tmp_path / "seg.dcm", series).labels(), labels)
    dataset = dcmread(tmp_path / "seg.dcm")
    uids = {header.SOPInstanceUID for header in series.headers}
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert source.ReferencedSOPInstanceUID in uids
