"""Affine matrices and points between nodes: NumPy on one side, VTK on the other.

Parent transforms of a node are composed; a `None` node stands for the world.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import vtk
from numpy.typing import ArrayLike, NDArray

from SAMAdaptLib.errors import GeometryError

Array = NDArray[np.float64]


def matrix_to_numpy(matrix: vtk.vtkMatrix4x4) -> Array:
    """Copy a VTK matrix to a (4, 4) array."""
    return np.array([[matrix.GetElement(row, column) for column in range(4)] for row in range(4)])


def matrix_to_vtk(values: ArrayLike) -> vtk.vtkMatrix4x4:
    """Copy a (4, 4) array to a VTK matrix."""
    matrix = vtk.vtkMatrix4x4()
    matrix.DeepCopy(np.asarray(values, dtype=np.float64).ravel().tolist())
    return matrix


def ijk_to_node_matrix(volume_node: Any) -> Array:
    """Matrix from the voxels of a volume node to the node's own space, before any parent transform."""
    matrix = vtk.vtkMatrix4x4()
    volume_node.GetIJKToRASMatrix(matrix)
    return matrix_to_numpy(matrix)


def matrix_between(source_node: Any, target_node: Any) -> Array | None:
    """Matrix from one node's own space to another's.

    Args:
        source_node: A node that can stand under a transform; None for the world.
        target_node: Likewise.

    Returns:
        (4, 4), or None when no matrix says it: a non-linear transform lies between the two. A non-linear
        transform above both does not matter.
    """
    import slicer

    source, target = _parent(source_node), _parent(target_node)
    if source is target:
        return np.eye(4)
    linear = (
        source.IsTransformToNodeLinear(target) if source is not None else target.IsTransformToWorldLinear()
    )
    if not linear:
        return None
    matrix = vtk.vtkMatrix4x4()
    slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(source, target, matrix)
    return matrix_to_numpy(matrix)


def world_to_node(node: Any, points_ras: ArrayLike) -> Array:
    """Map RAS mm of the world (N, 3) to the node's own space, through any parent transform."""
    return _map_points(None, node, points_ras)


def node_to_world(node: Any, points_node: ArrayLike) -> Array:
    """Map points (N, 3) of the node's own space to RAS mm of the world, through any parent transform."""
    return _map_points(node, None, points_node)


def describe_transform(node: Any) -> str:
    """Name the parent transform of a node for a message."""
    parent = _parent(node)
    return f"the transform '{parent.GetName()}'" if parent is not None else "no transform"


def copy_parent_transform(source_node: Any, target_node: Any) -> None:
    """Put `target_node` under the parent transform of `source_node` (or under none)."""
    target_node.SetAndObserveTransformNodeID(source_node.GetTransformNodeID())


def require_matrix(source_node: Any, target_node: Any, what: str) -> Array:
    """Like `matrix_between`, but refuse a non-linear transform.

    Raises:
        GeometryError: Names `what` cannot be done and how to go on.
    """
    matrix = matrix_between(source_node, target_node)
    if matrix is None:
        raise GeometryError(
            f"{what} needs a linear transform between the two, but one is under "
            f"{describe_transform(source_node)} and the other under {describe_transform(target_node)}. "
            "Put both under the same transform in the Data module, or harden the transform on both."
        )
    return matrix


def _parent(node: Any) -> Any:
    return None if node is None else node.GetParentTransformNode()


def _map_points(source_node: Any, target_node: Any, points: ArrayLike) -> Array:
    import slicer

    transform = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(
        _parent(source_node), _parent(target_node), transform
    )
    given = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    return np.array([transform.TransformPoint(point.tolist()) for point in given]).reshape(-1, 3)
