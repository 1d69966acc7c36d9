"""The scene without windows: files in and out, one start per process, and what Slicer's own Python sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import slicer
import slicer.util

from SAMAdaptLib.dicom.terminology import terminology_for
from SAMAdaptLib.errors import VolumeError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.volume import Volume
from SAMAdaptSlicer import headless as module
from SAMAdaptSlicer.segments import add_segment, describe_segment, new_segmentation, read_mask, write_mask
from SAMAdaptSlicer.volumes import geometry_from_node, voxels_of_node

from .phantoms import GRIDS, Array, apply, ellipsoid, voxel_centres_ras

SHAPE = (7, 9, 11)


def filled_ras(mask: Any, ijk_to_ras: Array) -> Array:
    points = voxel_centres_ras(mask.shape, ijk_to_ras)[mask].round(4) + 0.0
    return points[np.lexsort(points.T)]


def test_boot_is_once_per_process(headless: Any) -> None:
    assert module.boot() is headless
    assert slicer.mrmlScene is headless.scene
    assert slicer.modules.segmentations.logic() is headless.logic("Segmentations")
    assert slicer.app.applicationLogic().GetMRMLScene() is headless.scene


def test_slicers_own_python_works(headless: Any) -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    node = slicer.util.addVolumeFromArray(voxels)
    assert np.array_equal(slicer.util.arrayFromVolume(node), voxels)
    assert slicer.util.getNode(node.GetID()) is node


def test_clear_brings_back_what_every_scene_has(headless: Any) -> None:
    headless.add_volume_node(Volume(np.zeros(SHAPE, dtype=np.int16), Geometry(SHAPE, np.eye(4))))
    headless.clear()
    scene = headless.scene
    assert scene.GetNumberOfNodesByClass("vtkMRMLVolumeNode") == 0
    for kind in ("Selection", "Interaction", "Crosshair"):
        assert scene.GetNumberOfNodesByClass(f"vtkMRML{kind}Node") == 1
    assert scene.GetNumberOfNodesByClass("vtkMRMLColorTableNode") > 10


@pytest.mark.parametrize("suffix", [".nrrd", ".nii.gz", ".mha"])
def test_image_files_load_with_their_geometry(headless: Any, tmp_path: Path, suffix: str) -> None:
    matrix = GRIDS["oblique"]
    voxels = np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16)
    image = SimpleITK.GetImageFromArray(voxels)
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    flip = np.diag([-1.0, -1.0, 1.0])
    image.SetDirection((flip @ matrix[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((flip @ matrix[:3, 3]).tolist())
    SimpleITK.WriteImage(image, str(tmp_path / f"image{suffix}"))
    node = headless.load_volume(tmp_path / f"image{suffix}")
    assert np.array_equal(voxels_of_node(node), voxels)
    assert geometry_from_node(node).same_grid(Geometry(SHAPE, matrix), 1e-3)


@pytest.mark.parametrize("grid", GRIDS)
def test_scene_file_keeps_image_and_mask_in_place(headless: Any, tmp_path: Path, grid: str) -> None:
    """Slicer may store a left-handed volume flipped; every voxel must stay at its place in the world."""
    voxels = np.random.default_rng(1).integers(0, 5000, SHAPE).astype(np.int16)
    node = headless.add_volume_node(Volume(voxels, Geometry(SHAPE, GRIDS[grid])))
    truth = ellipsoid(SHAPE, GRIDS[grid])[2]
    segmentation_node = new_segmentation(node, "masks")
    line = terminology_for("liver").to_slicer()
    segment_id = add_segment(segmentation_node, "Liver", (1.0, 0.2, 0.4), line)
    write_mask(segmentation_node, segment_id, truth, node)
    headless.save_scene(tmp_path / "case.mrb")
    headless.load_scene(tmp_path / "case.mrb")

    loaded = headless.scene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
    matrix = geometry_from_node(loaded).affine_ijk_to_ras
    ijk = apply(np.linalg.inv(GRIDS[grid]), voxel_centres_ras(SHAPE, matrix)).round().astype(int)
    assert np.array_equal(voxels_of_node(loaded), voxels[ijk[..., 2], ijk[..., 1], ijk[..., 0]])
    segmentation_node = headless.scene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    mask = read_mask(segmentation_node, segment_id, loaded)
    np.testing.assert_allclose(filled_ras(mask, matrix), filled_ras(truth, GRIDS[grid]), atol=2e-3)
    description = describe_segment(segmentation_node, segment_id)
    assert (description.name, description.terminology) == ("Liver", line)
    assert description.colour_rgb == (255, 51, 102)


def test_segmentation_file_round_trip(headless: Any, tmp_path: Path) -> None:
    node = headless.add_volume_node(
        Volume(np.zeros(SHAPE, dtype=np.int16), Geometry(SHAPE, GRIDS["oblique"]))
    )
    segmentation_node = new_segmentation(node)
    truth = ellipsoid(SHAPE, GRIDS["oblique"])[2]
    other = np.roll(truth, 2, axis=2)
    for name, mask in (("one", truth), ("two", other)):
        write_mask(segmentation_node, add_segment(segmentation_node, name), mask, node)
    headless.save_segmentation(segmentation_node, tmp_path / "case.seg.nrrd")
    assert [path.name for path in tmp_path.iterdir()] == ["case.seg.nrrd"]
    loaded = headless.load_segmentation(tmp_path / "case.seg.nrrd")
    ids = loaded.GetSegmentation().GetSegmentIDs()
    assert [describe_segment(loaded, segment_id).name for segment_id in ids] == ["one", "two"]
    for segment_id, mask in zip(ids, (truth, other), strict=True):
        assert np.array_equal(read_mask(loaded, segment_id, node), mask)


def test_uneven_volume_survives_the_scene_file(headless: Any, tmp_path: Path) -> None:
    matrix = GRIDS["oblique"].copy()
    depths = np.array([0.0, 1.5, 4, 5, 8, 9, 12])
    normal = matrix[:3, 2] / np.linalg.norm(matrix[:3, 2])
    origins = matrix[:3, 3] + np.outer(depths, normal)
    matrix[:3, 2] = (origins[-1] - origins[0]) / 6
    geometry = Geometry(SHAPE, matrix, origins)
    headless.add_volume_node(Volume(np.zeros(SHAPE, dtype=np.int16), geometry))
    headless.save_scene(tmp_path / "case.mrb")
    headless.load_scene(tmp_path / "case.mrb")
    loaded = geometry_from_node(headless.scene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode"))
    assert not loaded.is_regular
    assert loaded.same_grid(geometry, 2e-3)


def test_a_bad_scene_file_leaves_the_open_scene_alone(headless: Any, tmp_path: Path) -> None:
    node = headless.add_volume_node(Volume(np.zeros(SHAPE, dtype=np.int16), Geometry(SHAPE, np.eye(4))))
    (tmp_path / "bad.mrb").write_bytes(b"PK not a zip")
    with pytest.raises(VolumeError, match=r"bad\.mrb"):
        headless.load_scene(tmp_path / "bad.mrb")
    assert headless.scene.GetNodeByID(node.GetID()) is node


def test_bad_files_are_refused_and_nothing_is_left(headless: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.nrrd"
    broken.write_bytes(b"NRRD0004\nnot an image\n")
    for load in (headless.load_volume, headless.load_scene, headless.load_segmentation):
        for path in (tmp_path / "absent.mrb", broken):
            with pytest.raises(VolumeError, match=path.name):
                load(path)
    segmentation_node = headless.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    with pytest.raises(VolumeError, match=r"ends in \.nrrd"):
        headless.save_segmentation(segmentation_node, tmp_path / "case.nii.gz")
    with pytest.raises(VolumeError, match=r"ends in \.mrb"):
        headless.save_scene(tmp_path / "case.mrml")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.nrrd"]
