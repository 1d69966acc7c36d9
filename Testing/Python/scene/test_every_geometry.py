"""Masks land where the object is, for every grid and every pair of transforms on volume and segmentation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import slicer.util
import vtk
from vtk.util.numpy_support import vtk_to_numpy

from SAMAdaptSlicer.labelmaps import image_matrix, image_to_array
from SAMAdaptSlicer.segments import add_segment, labelmap_of, new_segmentation, read_mask, write_mask
from SAMAdaptSlicer.volumes import geometry_from_node, volume_from_node

from .phantoms import (
    GRIDS,
    TRANSFORMS,
    Array,
    apply,
    composed,
    ellipsoid,
    inside_ellipsoid,
    voxel_centres_ras,
)

SHAPE = (7, 9, 11)


def put_under(node: Any, name: str, add_transform: Callable[..., Any]) -> Array:
    parent = None
    for matrix in TRANSFORMS[name]:
        parent = add_transform(matrix, parent)
    node.SetAndObserveTransformNodeID(parent.GetID() if parent is not None else None)
    return composed(TRANSFORMS[name])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("above", TRANSFORMS)
def test_volume_geometry_composes_matrix_and_parents(
    grid: str, above: str, add_volume: Any, add_transform: Any
) -> None:
    node = add_volume(GRIDS[grid], SHAPE)
    to_world = put_under(node, above, add_transform)
    geometry = geometry_from_node(node)
    assert geometry.shape_kji == SHAPE
    np.testing.assert_allclose(geometry.affine_ijk_to_ras, to_world @ GRIDS[grid], atol=1e-12)
    assert geometry.is_regular


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("above_volume", TRANSFORMS)
@pytest.mark.parametrize("above_segmentation", TRANSFORMS)
def test_mask_lies_on_the_ellipsoid(
    grid: str, above_volume: str, above_segmentation: str, add_volume: Any, add_transform: Any
) -> None:
    volume_node = add_volume(GRIDS[grid], SHAPE)
    volume_to_world = put_under(volume_node, above_volume, add_transform)
    segmentation_node = new_segmentation(volume_node)
    segmentation_to_world = put_under(segmentation_node, above_segmentation, add_transform)
    centre, axes, truth = ellipsoid(SHAPE, volume_to_world @ GRIDS[grid])
    assert 30 < truth.sum() < truth.size / 2

    segment_id = add_segment(segmentation_node, "ellipsoid")
    write_mask(segmentation_node, segment_id, truth, volume_node)

    image = labelmap_of(segmentation_node.GetSegmentation().GetSegment(segment_id))
    assert image.GetDimensions() == tuple(np.ptp(where) + 1 for where in np.nonzero(truth)[::-1])
    labels = image_to_array(image)
    first_ijk = np.array(image.GetExtent()[::2])
    filled_ijk = np.argwhere(labels)[:, ::-1] + first_ijk
    filled_ras = apply(segmentation_to_world @ image_matrix(image), filled_ijk.astype(float))
    assert inside_ellipsoid(filled_ras, centre, axes * (1 + 1e-9)).all()
    assert len(filled_ras) == truth.sum()
    expected_ras = voxel_centres_ras(SHAPE, volume_to_world @ GRIDS[grid])[truth]
    np.testing.assert_allclose(filled_ras, expected_ras, atol=1e-9)

    assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), truth)
    if above_volume == above_segmentation or {above_volume, above_segmentation} <= {"none", "rigid"}:
        # Slicer's own export is a second opinion; across a shear it resamples, so it has none there.
        exported = slicer.util.arrayFromSegmentBinaryLabelmap(segmentation_node, segment_id, volume_node)
        assert np.array_equal(exported != 0, truth)


def test_moving_the_shared_transform_moves_the_mask_with_the_volume(
    add_volume: Any, add_transform: Any
) -> None:
    volume_node = add_volume(GRIDS["oblique"], SHAPE)
    parent = add_transform(TRANSFORMS["rigid"][0])
    volume_node.SetAndObserveTransformNodeID(parent.GetID())
    segmentation_node = new_segmentation(volume_node)
    assert segmentation_node.GetParentTransformNode() is parent
    truth = ellipsoid(SHAPE, TRANSFORMS["rigid"][0] @ GRIDS["oblique"])[2]
    segment_id = add_segment(segmentation_node, "a")
    write_mask(segmentation_node, segment_id, truth, volume_node)
    parent.SetMatrixTransformToParent(vtk.vtkMatrix4x4())
    assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), truth)


def test_voxels_are_the_nodes_own_memory(add_volume: Any) -> None:
    voxels = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    node = add_volume(GRIDS["oblique"], voxels=voxels)
    volume = volume_from_node(node)
    assert np.array_equal(volume.voxels, voxels)
    assert volume.voxels.dtype == np.int16
    assert np.shares_memory(volume.voxels, vtk_to_numpy(node.GetImageData().GetPointData().GetScalars()))
    assert volume.name == node.GetID()


def test_voxels_outlive_their_node(scene: Any, add_volume: Any) -> None:
    voxels = np.random.default_rng(0).integers(-9, 9, (40, 50, 60)).astype(np.int16)
    node = add_volume(voxels=voxels)
    volume = volume_from_node(node)
    scene.RemoveNode(node)
    del node
    scene.Clear(False)
    gc.collect()
    assert np.array_equal(volume.voxels, voxels)


def test_colour_single_slice_and_modality(add_volume: Any) -> None:
    colours = np.random.default_rng(3).integers(0, 255, (1, 5, 6, 3)).astype(np.uint8)
    node = add_volume(GRIDS["anisotropic"], voxels=colours)
    assert node.IsA("vtkMRMLVectorVolumeNode")
    volume = volume_from_node(node)
    assert volume.is_colour
    assert np.array_equal(volume.voxels, colours)
    assert volume.geometry.shape_kji == (1, 5, 6)
    assert volume.modality is None


def test_hounsfield_units_mean_ct(add_volume: Any) -> None:
    node = add_volume()
    units = slicer.vtkCodedEntry()
    units.SetValueSchemeMeaning("[hnsf'U]", "UCUM", "Hounsfield unit")
    node.SetVoxelValueUnits(units)
    assert volume_from_node(node).modality == "CT"


def test_subject_hierarchy_knows_the_modality(scene: Any, add_volume: Any) -> None:
    node = add_volume()
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    item = hierarchy.CreateItem(hierarchy.GetSceneItemID(), node)
    hierarchy.SetItemAttribute(item, "DICOM.Modality", "MR")
    assert volume_from_node(node).modality == "MR"
