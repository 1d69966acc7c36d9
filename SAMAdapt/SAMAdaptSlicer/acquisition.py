"""Volumes whose slices lie where one matrix cannot say: tilted gantry, uneven distances.

Slicer's DICOM importer stores such a series as a regular grid and puts the volume under a displacement field,
its acquisition transform, which moves every slice to where it was scanned. The field is recognised by what it
does, not by its name or class: each slice stays flat and keeps the pixels that all slices share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import vtk
from numpy.typing import NDArray
from vtk.util.numpy_support import numpy_to_vtk

from SAMAdaptLib.errors import GeometryError
from SAMAdaptLib.geometry import Geometry

from .transforms import describe_transform, ijk_to_node_matrix, matrix_to_vtk, node_to_world

Array = NDArray[np.float64]

_TOLERANCE_MM = 0.01  # positions in DICOM are often written with two or three decimals
_SAMPLES = 5  # per direction of a slice; a field of one cell per slice is known from its corners


def source_slices(volume_node: Any) -> Geometry:
    """Return where the slices of a volume under a non-linear transform were acquired.

    Raises:
        GeometryError: The transform bends a slice, or gives slices different pixels: it is no acquisition
            transform, and voxels do not stay voxels under it.
    """
    columns, rows, slices = volume_node.GetImageData().GetDimensions()
    pixels_ij = _sample_pixels(columns, rows)
    points = np.stack([_slice_in_world(volume_node, pixels_ij, k) for k in range(slices)])  # (K, N, 3)
    origins = points[:, 0]
    offsets = points - origins[:, None]
    in_plane = np.linalg.lstsq(pixels_ij, offsets.mean(axis=0), rcond=None)[0].T  # (3, 2)
    misfit_mm = np.abs(offsets - pixels_ij @ in_plane.T).max()
    if misfit_mm > _TOLERANCE_MM:
        raise GeometryError(
            "A volume under a linear transform was wanted, but it is under "
            f"{describe_transform(volume_node)}, which bends its slices by up to {misfit_mm:.2f} mm. "
            "Harden the transform on the volume, or resample the volume, and segment the result."
        )
    # A single slice has no next one: its node's own matrix says how thick it is and which way it faces.
    node_matrix = ijk_to_node_matrix(volume_node)
    step_mm = float(_normal(node_matrix) @ node_matrix[:3, 2])
    return _as_geometry((slices, rows, columns), origins, in_plane, step_mm)


def put_under_acquisition_transform(volume_node: Any, geometry: Geometry) -> Any:
    """Place a volume with uneven slices in a scene: its node gets the mean grid, a new transform the rest.

    Args:
        volume_node: Already holds the voxels of `geometry` and stands in a scene.
        geometry: A grid with `slice_origins_ras`.

    Returns:
        The new vtkMRMLGridTransformNode, parent of the volume.

    Raises:
        GeometryError: The slices are even: a matrix is enough.
    """
    if geometry.slice_origins_ras is None:
        raise GeometryError(
            "An acquisition transform is for slices at uneven positions, but these are even. "
            "Use the matrix alone."
        )
    affine = _right_angled(geometry)
    slices_k = np.arange(geometry.shape_kji[0], dtype=np.float64)
    shifts_ras = geometry.slice_origins_ras - (affine[:3, 3] + np.outer(slices_k, affine[:3, 2]))
    node = volume_node.GetScene().AddNewNodeByClass(
        "vtkMRMLGridTransformNode", f"{volume_node.GetName()} acquisition transform"
    )
    node.SetAndObserveTransformToParent(_displacement_field(affine, geometry.shape_kji, shifts_ras))
    volume_node.SetIJKToRASMatrix(matrix_to_vtk(affine))
    volume_node.SetAndObserveTransformNodeID(node.GetID())
    return node


def _sample_pixels(columns: int, rows: int) -> Array:
    """Corners and inner points of a slice as (N, 2) index points (I, J); the first is (0, 0).

    They reach one pixel beyond the last centre, as the importer's own field does, so that a slice of one row
    has two directions too.
    """
    i = np.linspace(0, columns, _SAMPLES)
    j = np.linspace(0, rows, _SAMPLES)
    return np.stack(np.meshgrid(i, j), axis=-1).reshape(-1, 2)


def _slice_in_world(volume_node: Any, pixels_ij: Array, slice_k: int) -> Array:
    matrix = ijk_to_node_matrix(volume_node)
    ijk = np.column_stack([pixels_ij, np.full(len(pixels_ij), float(slice_k))])
    return node_to_world(volume_node, ijk @ matrix[:3, :3].T + matrix[:3, 3])


def _as_geometry(
    shape_kji: tuple[int, int, int], origins: Array, in_plane: Array, step_mm: float
) -> Geometry:
    """Give even slices one matrix, uneven ones their positions."""
    affine = np.eye(4)
    affine[:3, :2] = in_plane
    affine[:3, 3] = origins[0]
    slices = shape_kji[0]
    if slices == 1:
        affine[:3, 2] = _normal(affine) * step_mm
        return Geometry(shape_kji, affine)
    affine[:3, 2] = (origins[-1] - origins[0]) / (slices - 1)
    even = origins[0] + np.arange(slices)[:, None] * affine[:3, 2]
    if np.abs(origins - even).max() <= _TOLERANCE_MM:
        return Geometry(shape_kji, affine)
    return Geometry(shape_kji, affine, origins)


def _right_angled(geometry: Geometry) -> Array:
    """The affine with its slices stacked along their normal, at the mean distance."""
    affine = geometry.affine_ijk_to_ras.copy()
    normal = _normal(affine)
    affine[:3, 2] = normal * (normal @ affine[:3, 2])
    return affine


def _normal(affine: Array) -> Array:
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    return normal / np.linalg.norm(normal)


def _displacement_field(affine: Array, shape_kji: tuple[int, int, int], shifts_ras: Array) -> Any:
    """Build the transform that moves slice k by shifts_ras[k]; one cell spans a slice."""
    import slicer

    slices, rows, columns = shape_kji
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = np.eye(4)
    directions[:3, :3] = affine[:3, :3] / spacing
    image = vtk.vtkImageData()
    image.SetDimensions(2, 2, slices)
    image.SetOrigin(*affine[:3, 3])
    image.SetSpacing(spacing[0] * columns, spacing[1] * rows, spacing[2])
    nodes = np.broadcast_to(shifts_ras[:, None, None], (slices, 2, 2, 3)).reshape(-1, 3)
    image.GetPointData().SetScalars(numpy_to_vtk(nodes, deep=True))
    field = slicer.vtkOrientedGridTransform()
    field.SetGridDirectionMatrix(matrix_to_vtk(directions))
    field.SetDisplacementGridData(image)
    return field
