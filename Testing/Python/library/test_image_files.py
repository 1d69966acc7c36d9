"""Image files keep voxels and place, or are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from phantoms import ANISOTROPIC, FLIPPED, GRIDS, SHEARED, oblique
from SAMAdaptLib.dicom.terminology import TISSUE
from SAMAdaptLib.errors import VolumeError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.image_files import SegmentEntry, read_volume, write_seg_nrrd, write_volume

SHAPE = (4, 5, 6)
VOXELS = np.arange(120, dtype=np.int16).reshape(SHAPE) - 50


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_survives_nrrd_and_mha(tmp_path: Path, name: str, suffix: str) -> None:
    grid = Geometry(SHAPE, GRIDS[name])
    write_volume(tmp_path / f"a{suffix}", VOXELS, grid)
    again = read_volume(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(again.voxels, VOXELS)
    assert again.geometry.same_grid(grid, 1e-4)


@pytest.mark.parametrize("affine", [ANISOTROPIC, FLIPPED, oblique()])
def test_right_angled_grids_survive_nifti(tmp_path: Path, affine: np.ndarray) -> None:
    grid = Geometry(SHAPE, affine)
    write_volume(tmp_path / "a.nii.gz", VOXELS, grid)
    assert read_volume(tmp_path / "a.nii.gz").geometry.same_grid(grid, 1e-3)


def test_a_sheared_grid_is_not_straightened_in_silence(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="right angles"):
        write_volume(tmp_path / "a.nii.gz", VOXELS, Geometry(SHAPE, SHEARED))
    assert list(tmp_path.iterdir()) == []


def test_what_simpleitk_calls_lps_is_ras_here(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(VOXELS)
    image.SetSpacing((0.5, 0.6, 2.0))
    image.SetOrigin((10, 20, 30))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    grid = read_volume(tmp_path / "a.nrrd").geometry
    point_lps = image.TransformIndexToPhysicalPoint((3, 2, 1))
    np.testing.assert_allclose(grid.ijk_to_ras([[3, 2, 1]])[0], np.array([-1, -1, 1]) * point_lps)


def test_uneven_slices_are_repeated_where_they_lie(tmp_path: Path) -> None:
    origins = np.array([[0, 0, 0], [0, 0, 2], [0, 0, 4], [0, 0, 10.0]])
    affine = np.diag([1.0, 1.0, 10 / 3, 1.0])
    write_volume(tmp_path / "a.nrrd", VOXELS, Geometry(SHAPE, affine, origins))
    again = read_volume(tmp_path / "a.nrrd")
    assert again.geometry.shape_kji == (6, 5, 6)
    np.testing.assert_allclose(again.geometry.ijk_to_ras([[0, 0, 5]]), [[0, 0, 10]])
    np.testing.assert_array_equal(again.voxels[[0, 1, 2, 5]], VOXELS)
    np.testing.assert_array_equal(again.voxels[3], VOXELS[2])


def test_a_picture_is_a_volume_of_one_slice(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.full((5, 6), 7, np.uint8)), str(tmp_path / "a.png"))
    assert read_volume(tmp_path / "a.png").geometry.shape_kji == (1, 5, 6)


def test_colour_is_read_as_colour(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    assert read_volume(tmp_path / "a.mha").is_colour


def test_a_series_in_time_is_refused(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((2, 4, 5, 6), np.float32), isVector=False)
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    with pytest.raises(VolumeError, match="one frame"):
        read_volume(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("content", [b"", b"not an image", b"NRRD0004\ntype: short\n"])
def test_what_is_no_image_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.nrrd").write_bytes(content)
    with pytest.raises(VolumeError, match=r"^a\.nrrd cannot be read as an image"):
        read_volume(tmp_path / "a.nrrd")
    with pytest.raises(VolumeError, match=r"no file b\.nrrd"):
        read_volume(tmp_path / "b.nrrd")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nrrd", VOXELS, Geometry(SHAPE, ANISOTROPIC))
    whole = (tmp_path / "a.nrrd").read_bytes()
    (tmp_path / "a.nrrd").write_bytes(whole[: len(whole) - 30])
    with pytest.raises(VolumeError):
        read_volume(tmp_path / "a.nrrd")


def test_writing_fails_in_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    grid = Geometry(SHAPE, ANISOTROPIC)
    with pytest.raises(VolumeError, match="cannot be written"):
        write_volume(tmp_path / "missing" / "a.nrrd", VOXELS, grid)
    with pytest.raises(VolumeError, match="cannot be written"):
        write_volume(tmp_path / "a.unknown", VOXELS, grid)
    assert list(tmp_path.iterdir()) == []


def test_seg_nrrd_names_every_label(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1, 2, 3], labels[2] = 1, 7
    grid = Geometry(SHAPE, oblique())
    tissue = TISSUE.to_slicer()
    entries = [
        SegmentEntry(1, "Leber", (1, 0.5, 0), tissue),
        SegmentEntry(7, "Niere links", (0.5, 0.68, 0.5), tissue),
    ]
    write_seg_nrrd(tmp_path / "a.seg.nrrd", labels, grid, entries)
    image = sitk.ReadImage(str(tmp_path / "a.seg.nrrd"))
    assert image.GetMetaData("Segment1_Name") == "Niere links"
    assert image.GetMetaData("Segment1_LabelValue") == "7"
    assert image.GetMetaData("Segment0_Color") == "1 0.5 0"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), labels)
    with pytest.raises(VolumeError, match=r"\[7\] have none"):
        write_seg_nrrd(tmp_path / "b.seg.nrrd", labels, grid, entries[:1])
