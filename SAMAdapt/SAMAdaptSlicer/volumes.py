"""A volume node as the library's Volume: the node's own voxels, with their place in the world."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from vtk.util.numpy_support import vtk_to_numpy

from SAMAdaptLib.errors import VolumeError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.volume import Volume

from .acquisition import source_slices
from .transforms import ijk_to_node_matrix, matrix_between

_HOUNSFIELD_UNIT = "[hnsf'U]"  # the code of UCUM, which Slicer's DICOM importer gives to CT only


def volume_from_node(volume_node: Any) -> Volume:
    """Read a scalar or vector volume node.

    The voxels are a view of the node's memory, not a copy: never write to them, and read anew after the node
    changed. The grid includes every parent transform of the node.

    Args:
        volume_node: vtkMRMLScalarVolumeNode or vtkMRMLVectorVolumeNode.

    Returns:
        A Volume in RAS mm; its name is the node's ID, because a display name may hold patient data.

    Raises:
        VolumeError: No node, no voxels, or voxels that are neither grey nor RGB.
        GeometryError: A non-linear parent transform that bends the slices.
    """
    voxels = voxels_of_node(volume_node)
    return Volume(voxels, geometry_from_node(volume_node), modality_of_node(volume_node), volume_node.GetID())


def voxels_of_node(volume_node: Any) -> NDArray[Any]:
    """View the voxels of a volume node as (K, J, I), or (K, J, I, C) for several components.

    Raises:
        VolumeError: No node or no voxels.
    """
    image = volume_node.GetImageData() if volume_node is not None else None
    scalars = image.GetPointData().GetScalars() if image is not None else None
    if image is None or scalars is None or scalars.GetNumberOfTuples() == 0:
        raise VolumeError(
            "A volume with voxels was wanted, but none is loaded in the chosen volume. "
            "Load or choose another volume."
        )
    columns, rows, slices = image.GetDimensions()
    components = scalars.GetNumberOfComponents()
    shape = (slices, rows, columns) if components == 1 else (slices, rows, columns, components)
    voxels: NDArray[Any] = vtk_to_numpy(scalars).reshape(shape)
    return voxels


def geometry_from_node(volume_node: Any) -> Geometry:
    """Return where the voxels of a volume node lie in the world, in RAS mm.

    A linear parent transform is composed with the node's matrix: shear, flips and scaling stay as they are.
    Under an acquisition transform the result holds the source slices.

    Raises:
        VolumeError: No node or no voxels.
        GeometryError: A non-linear parent transform that bends the slices.
    """
    shape_kji = voxels_of_node(volume_node).shape[:3]
    to_world = matrix_between(volume_node, None)
    if to_world is None:
        return source_slices(volume_node)
    return Geometry(shape_kji, to_world @ ijk_to_node_matrix(volume_node))


def modality_of_node(volume_node: Any) -> str | None:
    """Return the DICOM modality that the scene knows of a volume node, else None."""
    import slicer

    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(volume_node.GetScene())
    item = hierarchy.GetItemByDataNode(volume_node) if hierarchy is not None else 0
    modality: str = hierarchy.GetItemAttribute(item, "DICOM.Modality") if item else ""
    if modality:
        return modality
    units = volume_node.GetVoxelValueUnits()
    return "CT" if units is not None and units.GetCodeValue() == _HOUNSFIELD_UNIT else None
