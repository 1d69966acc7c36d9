"""Series to volumes: every voxel where the headers say, and bad folders refused with one sentence."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from SAMAdaptLib.dicom import DicomSeries, find_series, read_series
from SAMAdaptLib.errors import DicomError
from SAMAdaptLib.geometry import LPS_TO_RAS
from Testing.dicom_samples import CORONAL, FLIPPED, SAGITTAL, Sample, place_code, rotated, save

UNEVEN = (0, 2, 4, 6, 9.5, 13)
REGULAR = {
    "axial": Sample(),
    "one slice": Sample(steps=(0,)),
    "flipped": Sample(FLIPPED),
    "sagittal": Sample(SAGITTAL),
    "coronal": Sample(CORONAL, modality="MR", slope=1, intercept=-3000),
    "oblique": Sample(rotated((20, -35, 50))),
    "feet to head and turned over": Sample(((1, 0, 0), (0, -1, 0))),
}
UNUSUAL = {
    "tilted": Sample(shift_per_mm=(0, np.tan(np.radians(18.5)), 0)),
    "tilted and oblique": Sample(rotated((10, 5, 7)), shift_per_mm=(0.1, -0.2, 0)),
    "uneven": Sample(steps=UNEVEN),
    "uneven, tilted and oblique": Sample(rotated((25, 10, -70)), steps=UNEVEN, shift_per_mm=(0.2, 0.1, 0)),
}


def assert_every_voxel_in_place(series: DicomSeries, sample: Sample) -> None:
    """Positions to a millionth of a millimetre, and every voxel with the number of its place."""
    geometry = series.volume.geometry
    assert geometry.shape_kji == sample.shape_kji
    order = np.argsort(sample.steps)
    for k, source_k in enumerate(order):
        j, i = np.indices(sample.shape_kji[1:])
        points_ijk = np.column_stack([i.ravel(), j.ravel(), np.full(i.size, k)])
        wanted_lps = sample.points_lps(source_k).reshape(-1, 3)
        found_lps = geometry.ijk_to_ras(points_ijk) * (-1, -1, 1)
        assert np.abs(found_lps - wanted_lps).max() < 1e-6
        back_ijk = geometry.ras_to_ijk(wanted_lps * (-1, -1, 1))
        assert np.abs(back_ijk - points_ijk).max() < 1e-6
        np.testing.assert_array_equal(series.volume.voxels[k].ravel(), place_code(wanted_lps))


@pytest.mark.parametrize("sample", [*REGULAR.values(), *UNUSUAL.values()], ids=[*REGULAR, *UNUSUAL])
def test_every_voxel_lies_where_the_headers_say(sample: Sample, tmp_path: Path) -> None:
    series = read_series(sample.write(tmp_path))
    assert_every_voxel_in_place(series, sample)
    assert series.volume.modality == sample.modality
    assert series.volume.voxels.dtype == np.int16


@pytest.mark.parametrize("sample", REGULAR.values(), ids=REGULAR)
def test_regular_grids_agree_with_simpleitk(sample: Sample, tmp_path: Path) -> None:
    geometry = read_series(sample.write(tmp_path)).volume.geometry
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    image = sitk.ReadImage(names)
    assert image.GetSize() == geometry.shape_ijk
    corners_ijk = geometry.corners_ijk()
    wanted_lps = [image.TransformContinuousIndexToPhysicalPoint(corner) for corner in corners_ijk.tolist()]
    if sample.shape_kji[0] == 1:  # ITK gives a single slice the thickness 1
        assert geometry.spacing_mm[2] == 3
    np.testing.assert_allclose(geometry.ijk_to_ras(corners_ijk) * (-1, -1, 1), wanted_lps, atol=1e-6)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_grids_say_what_they_are(name: str, tmp_path: Path) -> None:
    series = read_series(UNUSUAL[name].write(tmp_path))
    assert series.volume.geometry.is_sheared == ("tilted" in name)
    assert series.volume.geometry.is_regular == ("uneven" not in name)
    said = " ".join(series.warnings)
    assert ("tilted by" in said) == ("tilted" in name)
    assert ("uneven distances" in said) == ("uneven" in name)
    if name == "tilted":
        assert "18.5 degrees" in said
    positions = UNUSUAL[name].positions_lps
    mean_step_lps = series.volume.geometry.affine_ijk_to_ras[:3, 2] * (-1, -1, 1)
    np.testing.assert_allclose(mean_step_lps, (positions[-1] - positions[0]) / 5, atol=1e-9)


def test_file_names_and_instance_numbers_do_not_matter(tmp_path: Path) -> None:
    sample = Sample(rotated((5, 6, 7)), steps=(15, 0, 9, 3, 12, 6))
    names = [f"{n:02d}.bin" for n in range(6)]
    random.Random(3).shuffle(names)

    def number_backwards(dataset: Dataset, k: int) -> None:
        dataset.InstanceNumber = 99 - 7 * k % 5

    series = read_series(sample.write(tmp_path, number_backwards, names))
    assert_every_voxel_in_place(series, sample)
    order = np.argsort(sample.steps)
    assert [header.SOPInstanceUID for header in series.headers] == [sample.instance_uids[k] for k in order]
    assert [path.name for path in series.paths] == [names[k] for k in order]
    assert not any("PixelData" in header for header in series.headers)


def test_k_grows_along_row_cross_column(tmp_path: Path) -> None:
    """Slicer's importer does the same; a flipped plane therefore stacks the other way."""
    geometry = read_series(Sample(FLIPPED).write(tmp_path)).volume.geometry
    normal_lps = np.cross(FLIPPED[0], FLIPPED[1])
    assert (LPS_TO_RAS[:3, :3] @ geometry.affine_ijk_to_ras[:3, 2]) @ normal_lps == pytest.approx(3)


@pytest.mark.parametrize("per_frame", [False, True], ids=["shared groups", "groups of every frame"])
@pytest.mark.parametrize("kind", ["axial", "oblique", "tilted", "uneven"])
def test_enhanced_multiframe(kind: str, per_frame: bool, tmp_path: Path) -> None:
    sample = {**REGULAR, **UNUSUAL}[kind]
    frames = [3, 0, 5, 1, 4, 2]
    save(sample.enhanced(frames, per_frame=per_frame), tmp_path / "multi.dcm")
    series = read_series(tmp_path / "multi.dcm")
    assert series.is_multiframe
    assert_every_voxel_in_place(series, sample)
    assert [source.frame_number for source in series.slices] == [frames.index(k) + 1 for k in range(6)]


def test_legacy_converted_multiframe_of_another_writer(tmp_path: Path) -> None:
    sample = REGULAR["oblique"]
    slices = []
    for k in range(6):
        dataset = sample.slice(k)
        save(dataset, tmp_path / "one.dcm")
        dataset.AcquisitionNumber = 1
        slices.append(dataset)
    converted = hd.legacy.LegacyConvertedEnhancedCTImage(
        slices, hd.UID(), 9, hd.UID(), 1, transfer_syntax_uid="1.2.840.10008.1.2.1"
    )
    converted.save_as(tmp_path / "converted.dcm")
    assert_every_voxel_in_place(read_series(tmp_path / "converted.dcm"), sample)


def test_one_series_is_chosen_by_number_or_uid(tmp_path: Path) -> None:
    first, second = Sample(), Sample(SAGITTAL, modality="MR", intercept=-3000)
    first.write(tmp_path / "a", lambda dataset, _: setattr(dataset, "SeriesNumber", 7))
    second.write(tmp_path / "b", lambda dataset, _: setattr(dataset, "SeriesNumber", 2))
    with pytest.raises(DicomError) as caught:
        read_series(tmp_path)
    said = str(caught.value)
    assert "2 were found (1: MR, 6 images, series number 2; 2: CT, 6 images, series number 7)" in said
    assert "series=1" in said
    assert "Anna" not in said
    assert "T-17" not in said
    assert_every_voxel_in_place(read_series(tmp_path, series=2), first)
    assert_every_voxel_in_place(read_series(tmp_path, series=second.uids["series"]), second)
    with pytest.raises(DicomError, match="Series 3 was chosen, but these were found: 1: MR"):
        read_series(tmp_path, series=3)


def test_a_list_of_files_is_a_series(tmp_path: Path) -> None:
    sample = Sample()
    sample.write(tmp_path / "wanted")
    Sample().write(tmp_path / "other")
    assert_every_voxel_in_place(read_series(list((tmp_path / "wanted").iterdir())), sample)


def test_other_files_and_objects_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    sample = Sample()
    sample.write(tmp_path / "sub")
    (tmp_path / "notes.txt").write_text("about the study")
    (tmp_path / "DICOMDIR").write_bytes(b"index")
    report = sample.slice(0)
    report.Modality, report.SOPClassUID = "SR", "1.2.840.10008.5.1.4.1.1.88.11"
    report.SeriesInstanceUID = "1.2.3"
    save(report, tmp_path / "report.dcm")
    assert len(find_series(tmp_path)) == 1
    assert_every_voxel_in_place(read_series(tmp_path), sample)


def test_files_without_preamble_are_read(tmp_path: Path) -> None:
    sample = Sample()
    sample.write(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[132:])
        path.rename(path.with_suffix(""))
    assert_every_voxel_in_place(read_series(tmp_path), sample)


def test_copies_of_a_file_are_passed_over(tmp_path: Path) -> None:
    sample = Sample()
    sample.write(tmp_path)
    shutil.copy(tmp_path / "002.dcm", tmp_path / "copy of 2.dcm")
    series = read_series(tmp_path)
    assert_every_voxel_in_place(series, sample)
    assert series.warnings[0].startswith("1 files were copies")


# --- bad folders ---


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(DicomError) as caught:
        read_series(folder, **options)
    text = str(caught.value)
    assert "Anna" not in text
    assert "T-17" not in text
    assert str(folder) not in text
    return text


@pytest.mark.parametrize("kind", ["classic", "multiframe"])
def test_damaged_bytes_give_a_volume_or_a_sentence(kind: str, tmp_path: Path) -> None:
    """Whatever a disk or a network did to a header: never a raw error, a warning or a hang."""
    sample = Sample(steps=(0, 3, 6))
    sample.write(tmp_path)
    path = tmp_path / "001.dcm"
    if kind == "multiframe":
        for other in tmp_path.iterdir():
            other.unlink()
        save(sample.enhanced(per_frame=True), path)
    sound = path.read_bytes()
    random_bytes = np.random.default_rng(4)
    refusals = 0
    for _ in range(120):
        damaged = bytearray(sound)
        start = int(random_bytes.integers(128, len(sound) - 800))
        damaged[start : start + 1] = random_bytes.bytes(int(random_bytes.integers(0, 5)))
        path.write_bytes(damaged)
        try:
            read_series(tmp_path)
        except DicomError:
            refusals += 1
    assert 0 < refusals < 120


def test_no_folder(tmp_path: Path) -> None:
    assert "there is none at this path" in refused(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    assert "holds no files" in refused(tmp_path)


def test_no_dicom_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 500)
    (tmp_path / "b.png").write_bytes(bytes(500))
    assert "none of the 2 files is DICOM" in refused(tmp_path)


def test_only_objects_that_are_no_images(tmp_path: Path) -> None:
    Sample().write(tmp_path, lambda dataset, _: setattr(dataset, "Modality", "SEG"))
    assert "holds only SEG" in refused(tmp_path)


@pytest.mark.parametrize("size", [0, 100, 140, 400])
def test_a_file_cut_short_within_its_header(size: int, tmp_path: Path) -> None:
    Sample().write(tmp_path)
    path = tmp_path / "003.dcm"
    path.write_bytes(path.read_bytes()[:size])
    text = refused(tmp_path)
    assert "file 4 of 6" in text or "missing" in text


def test_a_file_cut_short_within_its_pixels(tmp_path: Path) -> None:
    Sample().write(tmp_path)
    path = tmp_path / "003.dcm"
    path.write_bytes(path.read_bytes()[:-40])
    assert "The pixels of image 4 of 6 cannot be read" in refused(tmp_path)


def test_no_pixels(tmp_path: Path) -> None:
    def drop(dataset: Dataset, k: int) -> None:
        if k == 2:
            del dataset.PixelData

    Sample().write(tmp_path, drop)
    assert "image 3 of 6 holds only its header" in refused(tmp_path)


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ([3], "1 slice of 3 mm seems to be missing between slice 3 and 4 of 5"),
        ([2, 3], "2 slices of 3 mm seem to be missing between slice 2 and 3 of 4"),
        ([1, 3], "1 slice of 3 mm seems to be missing between slice 1 and 2 of 8"),
    ],
)
def test_missing_slices(left_out: list[int], said: str, tmp_path: Path) -> None:
    sample = Sample() if "of 8" not in said else Sample(steps=range(0, 30, 3))
    sample.write(tmp_path)
    for k in left_out:
        (tmp_path / f"{k:03d}.dcm").unlink()
    text = refused(tmp_path)
    assert said in text
    assert "allow_gaps=True" in text
    assert "S = " in text
    series = read_series(tmp_path, allow_gaps=True)
    kept = [k for k in range(len(sample.steps)) if k not in left_out]
    assert series.volume.geometry.shape_kji[0] == len(kept)
    np.testing.assert_allclose(series.stack.positions_lps, sample.positions_lps[kept], atol=1e-6)
    np.testing.assert_array_equal(series.volume.voxels, sample.values()[kept])


@pytest.mark.parametrize(
    ("steps", "thickness"),
    [
        ((0, 2.5, 5, 7.5, 12.5, 17.5, 22.5), None),  # base of the skull scanned twice as finely
        ((0, 2.5, 5, 7.5, 12.5, 17.5), ("2.5", "2.5", "2.5", "2.5", "5", "5")),
        ((0, 4, 8, 9.1, 16.1, 23.1), None),  # two regions that overlap by a part of a slice
        ((0, 4, 8, 12, 14, 18, 22), None),  # one odd slice between two runs
        ((0, 3), None),
    ],
)
def test_two_spacings_of_one_scan_are_no_holes(steps: Any, thickness: Any, tmp_path: Path) -> None:
    sample = Sample(steps=steps)

    def thicken(dataset: Dataset, k: int) -> None:
        dataset.SliceThickness = thickness[k] if thickness else "2.5"

    assert_every_voxel_in_place(read_series(sample.write(tmp_path, thicken)), sample)


def test_mixed_orientations_and_localizers(tmp_path: Path) -> None:
    sample = Sample()
    sample.write(tmp_path / "axial")
    scout = Sample(SAGITTAL, steps=(0, 5), uids=dict(sample.uids))

    def call_localizer(dataset: Dataset, _: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    scout.write(tmp_path / "scout", call_localizer)
    text = refused(tmp_path)
    assert "2 were found: axial (6), sagittal (2); 2 of them call themselves localizers" in text


def test_a_localizer_across_the_stack_is_refused_by_its_size(tmp_path: Path) -> None:
    sample = Sample()
    sample.write(tmp_path / "axial")
    Sample(SAGITTAL, rows=20, steps=(0,), uids=dict(sample.uids)).write(tmp_path / "scout")
    assert "they have 10 x 13 in 6, 20 x 13 in 1 files" in refused(tmp_path)


def test_rounded_directions_are_one_orientation(tmp_path: Path) -> None:
    sample = REGULAR["oblique"]

    def add_noise(dataset: Dataset, k: int) -> None:
        dataset.ImageOrientationPatient[1] = f"{float(dataset.ImageOrientationPatient[1]) + k * 1e-7:.12g}"

    geometry = read_series(sample.write(tmp_path, add_noise)).volume.geometry
    assert geometry.is_regular


def test_directions_are_made_perpendicular(tmp_path: Path) -> None:
    """Headers round directions to a few digits; a grid that is sheared by that would be taken for a tilt."""
    series = read_series(Sample(((1, 0, 0), (0.0003, 0.9999, 0.0141))).write(tmp_path))
    directions = series.volume.geometry.directions
    np.testing.assert_allclose(directions[:, 0] @ directions[:, 1], 0, atol=1e-15)
    np.testing.assert_allclose(directions[:, 1] * (-1, -1, 1), [0, 0.9999006, 0.0141], atol=1e-6)


def test_repeated_positions_need_a_phase(tmp_path: Path) -> None:
    sample = Sample()
    later = Sample(uids=dict(sample.uids))

    def in_phase(number: int) -> Any:
        def change(dataset: Dataset, _: int) -> None:
            dataset.AcquisitionNumber = number
            if number == 2:
                dataset.RescaleIntercept = "-1000"

        return change

    later.write(tmp_path / "0", in_phase(2))
    sample.write(tmp_path / "1", in_phase(1))
    text = refused(tmp_path)
    assert "each of the 6 positions holds 2 (phases, echoes or time points)" in text
    assert "phase=1 to phase=2" in text
    assert_every_voxel_in_place(read_series(tmp_path, phase=1), sample)
    second = read_series(tmp_path, phase=2)
    np.testing.assert_array_equal(second.volume.voxels, sample.values() + 24)
    assert "phase 3 was asked for" in refused(tmp_path, phase=3)


def test_one_repeated_position(tmp_path: Path) -> None:
    sample = Sample()
    sample.write(tmp_path / "a")
    again = Sample(steps=(6,), uids=dict(sample.uids))
    again.write(tmp_path / "b")
    assert "hold between 1 and 2 images" in refused(tmp_path)


def test_other_rows_and_columns(tmp_path: Path) -> None:
    sample = Sample()
    sample.write(tmp_path / "a")
    Sample(rows=12, steps=(18,), uids=dict(sample.uids)).write(tmp_path / "b")
    assert "10 x 13 in 6, 12 x 13 in 1" in refused(tmp_path)


def test_other_pixel_spacing(tmp_path: Path) -> None:
    sample = Sample()
    sample.write(tmp_path / "a")
    Sample(spacing_ji=(0.8, 0.9), steps=(18,), uids=dict(sample.uids)).write(tmp_path / "b")
    assert "the same pixel spacing, but it goes from 0.7 to 0.9 mm" in refused(tmp_path)


@pytest.mark.parametrize("name", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_a_slice_that_does_not_say_where_it_lies(name: str, tmp_path: Path) -> None:
    def drop(dataset: Dataset, k: int) -> None:
        if k in (1, 4):
            delattr(dataset, name)

    Sample().write(tmp_path, drop)
    assert f"{name} (in 2 of 6 images)" in refused(tmp_path)


def test_directions_that_are_not_perpendicular(tmp_path: Path) -> None:
    Sample(((1, 0, 0), (0.5, 0.9, 0))).write(tmp_path)
    assert "must be perpendicular" in refused(tmp_path)
