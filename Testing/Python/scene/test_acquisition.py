"""Tilted gantry and uneven slices, placed in the scene the way Slicer's DICOM importer does it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk

from SAMAdaptLib.errors import GeometryError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.volume import Volume
from SAMAdaptSlicer.acquisition import put_under_acquisition_transform
from SAMAdaptSlicer.editing import SegmentWriter
from SAMAdaptSlicer.labelmaps import image_matrix
from SAMAdaptSlicer.segments import add_segment, labelmap_of, new_segmentation, read_mask, write_mask
from SAMAdaptSlicer.transforms import matrix_to_vtk
from SAMAdaptSlicer.volumes import geometry_from_node

from .phantoms import GRIDS, Array, affine, apply, inside_ellipsoid, rotation

SHAPE = (6, 8, 9)
TILT = np.array([0.0, 1.3, 0.0])  # mm that each slice is shifted along the table by the tilted gantry
UNEVEN_MM = np.array([0.0, 2.0, 4.5, 6.5, 11.0, 13.0])

SERIES: dict[str, tuple[Array, Array]] = {
    "tilted": (np.eye(3), np.outer(np.arange(6), [0.0, 0, 3]) + np.outer(np.arange(6), TILT)),
    "uneven": (np.eye(3), np.outer(UNEVEN_MM, [0.0, 0, 1])),
    "tilted and uneven": (np.eye(3), np.outer(UNEVEN_MM, [0.0, 0.4, 1])),
    "oblique and uneven": (rotation(20, -30, 10), np.outer(UNEVEN_MM, rotation(20, -30, 10)[:, 2])),
}
"""Directions of I, J and the nominal K, and where the first voxel of every slice was acquired."""


def displacement(node: Any, grid_affine: Array, shape_kji: tuple[int, int, int], shifts: Array) -> None:
    """Give a grid transform node one vector per slice corner, a pixel past the last centre."""
    slices, rows, columns = shape_kji
    spacing = np.linalg.norm(grid_affine[:3, :3], axis=0)
    image = vtk.vtkImageData()
    image.SetDimensions(2, 2, slices)
    image.SetOrigin(*grid_affine[:3, 3])
    image.SetSpacing(spacing[0] * columns, spacing[1] * rows, spacing[2])
    image.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(shifts.reshape(-1, 3)), deep=True))
    directions = np.eye(4)
    directions[:3, :3] = grid_affine[:3, :3] / spacing
    field = slicer.vtkOrientedGridTransform()
    field.SetGridDirectionMatrix(matrix_to_vtk(directions))
    field.SetDisplacementGridData(image)
    node.SetAndObserveTransformToParent(field)


def imported(scene: Any, add_volume: Any, series: str) -> tuple[Any, Array, Array]:
    """A volume node as the importer leaves it; its in-plane axes (3, 2) and slice origins (K, 3)."""
    directions, positions = SERIES[series]
    origins = np.array([-10.0, 25, 40]) + positions
    regular = affine(directions, (0.8, 0.9, 2.0), tuple(origins[0]))
    node = add_volume(regular, SHAPE)
    nominal = origins[0] + np.outer(np.arange(SHAPE[0]), regular[:3, 2])
    shifts = np.broadcast_to((origins - nominal)[:, None, None], (SHAPE[0], 2, 2, 3))
    transform = scene.AddNewNodeByClass("vtkMRMLGridTransformNode")
    displacement(transform, regular, SHAPE, shifts)
    node.SetAndObserveTransformNodeID(transform.GetID())
    return node, regular[:3, :2], origins


def source_positions(in_plane: Array, origins: Array) -> Array:
    k, j, i = np.indices(SHAPE)
    return origins[k] + i[..., None] * in_plane[:, 0] + j[..., None] * in_plane[:, 1]


@pytest.mark.parametrize("series", SERIES)
def test_voxels_are_where_they_were_acquired(scene: Any, add_volume: Any, series: str) -> None:
    node, in_plane, origins = imported(scene, add_volume, series)
    geometry = geometry_from_node(node)
    k, j, i = np.indices(SHAPE)
    ijk = np.stack([i, j, k], axis=-1).reshape(-1, 3).astype(float)
    expected = source_positions(in_plane, origins).reshape(-1, 3)
    np.testing.assert_allclose(geometry.ijk_to_ras(ijk), expected, atol=1e-6)
    np.testing.assert_allclose(geometry.ras_to_ijk(expected), ijk, atol=1e-6)
    assert geometry.is_regular == (series == "tilted")
    assert geometry.is_sheared == series.startswith("tilted")


@pytest.mark.parametrize("series", SERIES)
def test_mask_lies_on_the_source_slices(scene: Any, add_volume: Any, series: str) -> None:
    node, in_plane, origins = imported(scene, add_volume, series)
    positions = source_positions(in_plane, origins)
    axes = np.diag([2.4, 2.6, 5.0])
    truth = inside_ellipsoid(positions, positions[3, 4, 4], axes)
    segmentation_node = new_segmentation(node)
    segment_id = add_segment(segmentation_node, "lesion")
    write_mask(segmentation_node, segment_id, truth, node)

    assert segmentation_node.GetParentTransformNode() is node.GetParentTransformNode()
    image = labelmap_of(segmentation_node.GetSegmentation().GetSegment(segment_id))
    in_node = apply(image_matrix(image), np.argwhere(truth)[:, ::-1].astype(float))
    to_world = vtk.vtkGeneralTransform()
    segmentation_node.GetParentTransformNode().GetTransformToWorld(to_world)
    shown = np.array([to_world.TransformPoint(point.tolist()) for point in in_node])
    np.testing.assert_allclose(shown, positions[truth], atol=1e-6)
    assert np.array_equal(read_mask(segmentation_node, segment_id, node), truth)


def test_editor_rules_hold_under_an_acquisition_transform(scene: Any, add_volume: Any) -> None:
    node, in_plane, origins = imported(scene, add_volume, "tilted and uneven")
    positions = source_positions(in_plane, origins)
    first = inside_ellipsoid(positions, positions[3, 4, 4], np.diag([2.4, 2.6, 5.0]))
    second = inside_ellipsoid(positions, positions[3, 4, 6], np.diag([2.4, 2.6, 5.0]))
    segmentation_node = new_segmentation(node)
    ids = [add_segment(segmentation_node, name) for name in ("first", "second")]
    editor_node = scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    editor_node.SetOverwriteMode(editor_node.OverwriteAllSegments)
    logic = slicer.vtkSlicerSegmentEditorLogic()
    logic.SetMRMLScene(scene)
    writer = SegmentWriter(logic, editor_node)
    writer.write(segmentation_node, ids[0], first, node)
    writer.write(segmentation_node, ids[1], second, node)
    assert (first & second).any()
    assert np.array_equal(read_mask(segmentation_node, ids[1], node), second)
    assert np.array_equal(read_mask(segmentation_node, ids[0], node), first & ~second)


def test_linear_transform_above_an_acquisition_transform(
    scene: Any, add_volume: Any, add_transform: Any
) -> None:
    node, in_plane, origins = imported(scene, add_volume, "uneven")
    moved = affine(rotation(10, 20, 30), (1, 1, 1), (7, 8, 9))
    node.GetParentTransformNode().SetAndObserveTransformNodeID(add_transform(moved).GetID())
    geometry = geometry_from_node(node)
    assert geometry.slice_origins_ras is not None
    np.testing.assert_allclose(geometry.slice_origins_ras, apply(moved, origins), atol=1e-6)
    np.testing.assert_allclose(geometry.affine_ijk_to_ras[:3, :2], moved[:3, :3] @ in_plane, atol=1e-9)


@pytest.mark.parametrize("handed", [1.0, -1.0])
def test_single_slice_under_a_grid(scene: Any, add_volume: Any, handed: float) -> None:
    grid = affine(np.diag([1.0, 1.0, handed]), (0.5, 0.6, 4.0), (1, 2, 3))
    node = add_volume(grid, (1, 4, 5))
    transform = scene.AddNewNodeByClass("vtkMRMLGridTransformNode")
    displacement(transform, grid, (1, 4, 5), np.full((1, 2, 2, 3), 2.5))
    node.SetAndObserveTransformNodeID(transform.GetID())
    geometry = geometry_from_node(node)
    expected = grid.copy()
    expected[:3, 3] += 2.5
    np.testing.assert_allclose(geometry.affine_ijk_to_ras, expected, atol=1e-6)


def test_a_transform_that_bends_slices_is_refused(scene: Any, add_volume: Any) -> None:
    node = add_volume(GRIDS["anisotropic"], SHAPE)
    shifts = np.zeros((SHAPE[0], 2, 2, 3))
    shifts[2, 1, 1, 2] = 0.5
    transform = scene.AddNewNodeByClass("vtkMRMLGridTransformNode", "warp")
    displacement(transform, GRIDS["anisotropic"], SHAPE, shifts)
    node.SetAndObserveTransformNodeID(transform.GetID())
    with pytest.raises(GeometryError, match=r"'warp', which bends its slices by up to 0\.\d+ mm.*Harden"):
        geometry_from_node(node)


def test_slices_of_different_pixels_are_refused(scene: Any, add_volume: Any) -> None:
    node = add_volume(GRIDS["identity"], SHAPE)
    shifts = np.zeros((SHAPE[0], 2, 2, 3))
    shifts[4, :, 1, 0] = 1.0  # slice 4 is one millimetre wider, flat as it is
    transform = scene.AddNewNodeByClass("vtkMRMLGridTransformNode", "zoom")
    displacement(transform, GRIDS["identity"], SHAPE, shifts)
    node.SetAndObserveTransformNodeID(transform.GetID())
    with pytest.raises(GeometryError, match="zoom"):
        geometry_from_node(node)


def test_segmentation_outside_the_acquisition_transform_is_refused(scene: Any, add_volume: Any) -> None:
    node, _, _ = imported(scene, add_volume, "uneven")
    segmentation_node = new_segmentation(node)
    segment_id = add_segment(segmentation_node, "a")
    segmentation_node.SetAndObserveTransformNodeID(None)
    mask = np.ones(SHAPE, dtype=bool)
    with pytest.raises(GeometryError, match="under the same transform"):
        write_mask(segmentation_node, segment_id, mask, node)
    assert (
        not segmentation_node.GetSegmentation()
        .GetSegment(segment_id)
        .GetRepresentation("Binary labelmap")
        .GetNumberOfPoints()
    )


def test_uneven_volume_put_into_a_scene_comes_back(headless: Any) -> None:
    origins = np.array([5.0, 6, 7]) + np.outer(UNEVEN_MM, rotation(20, -30, 10)[:, 2] + np.array([0.1, 0, 0]))
    matrix = affine(rotation(20, -30, 10), (0.8, 0.9, 1), tuple(origins[0]))
    matrix[:3, 2] = (origins[-1] - origins[0]) / (SHAPE[0] - 1)
    geometry = Geometry(SHAPE, matrix, origins)
    node = headless.add_volume_node(Volume(np.zeros(SHAPE, dtype=np.int16), geometry))
    assert geometry_from_node(node).same_grid(geometry, 1e-6)
    assert node.GetParentTransformNode().IsA("vtkMRMLGridTransformNode")


def test_even_volume_needs_no_acquisition_transform(add_volume: Any) -> None:
    node = add_volume(GRIDS["oblique"], SHAPE)
    with pytest.raises(GeometryError, match="uneven"):
        put_under_acquisition_transform(node, geometry_from_node(node))
