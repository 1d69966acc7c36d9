"""Masks as segments: made, written and read, whatever transforms stand above volume and segmentation.

A mask is an array (K, J, I) on the grid of a volume node. The functions here write one segment and nothing
else; masking and overwriting by the Segment Editor's rules are in `editing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from SAMAdaptLib.errors import GeometryError, VolumeError

from .labelmaps import (
    BoxKJI,
    Patch,
    grid_box,
    image_matrix,
    image_to_patch,
    paste,
    patch_of_mask,
    patch_to_image,
    union,
    without_box,
)
from .ownership import mark_as_ours
from .transforms import copy_parent_transform, ijk_to_node_matrix, matrix_to_vtk, require_matrix
from .volumes import voxels_of_node

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SegmentDescription:
    """What a segment is called and shown as.

    Attributes:
        name: What the user reads.
        colour_rgb: 0 to 255 each.
        terminology: Slicer's one line (read it by `Terminology.from_slicer` of SAMAdaptLib.dicom), or None.
    """

    name: str
    colour_rgb: tuple[int, int, int]
    terminology: str | None


def new_segmentation(volume_node: Any, name: str = "Segmentation") -> Any:
    """Make an empty segmentation for a volume, in the volume's scene.

    It gets the volume as reference geometry and stands under the same parent transform. Under an acquisition
    transform this is what puts masks onto the source slices.

    Returns:
        A vtkMRMLSegmentationNode, marked as ours.
    """
    node = volume_node.GetScene().AddNewNodeByClass("vtkMRMLSegmentationNode", name)
    mark_as_ours(node)
    copy_parent_transform(volume_node, node)
    node.CreateDefaultDisplayNodes()
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume_node)
    return node


def add_segment(
    segmentation_node: Any,
    name: str,
    colour_rgb: ArrayLike | None = None,
    terminology: str | None = None,
) -> str:
    """Add an empty segment.

    Args:
        segmentation_node: Where to.
        name: What the user reads.
        colour_rgb: Three numbers from 0 to 1; None leaves the choice to Slicer.
        terminology: What the segment is, as `Terminology.to_slicer()` of SAMAdaptLib.dicom writes it.

    Returns:
        The ID of the segment.
    """
    segmentation = segmentation_node.GetSegmentation()
    colour = [] if colour_rgb is None else [[float(value) for value in np.ravel(colour_rgb)]]
    segment_id: str = segmentation.AddEmptySegment("", name, *colour)
    segment = segmentation.GetSegment(segment_id)
    if terminology is not None:
        segment.SetTerminology(terminology)
    reference = reference_grid(segmentation_node)
    if reference is not None:
        _lay_on_grid(segment, reference)
    return segment_id


def describe_segment(segmentation_node: Any, segment_id: str) -> SegmentDescription:
    """Return what a scene knows of a segment besides its voxels.

    Raises:
        VolumeError: No such segment.
    """
    segment = _require(segmentation_node, segment_id)
    r, g, b = (round(255 * value) for value in segment.GetColor())
    return SegmentDescription(segment.GetName(), (r, g, b), segment.GetTerminology() or None)


def write_mask(
    segmentation_node: Any,
    segment_id: str,
    mask_kji: NDArray[Any],
    volume_node: Any,
    changed_box_kji: BoxKJI | None = None,
) -> Patch | None:
    """Make a segment hold a mask, exactly and quickly; no other segment changes.

    Only the bounding box of the object is copied and kept. A segment that shared its layer with others gets a
    layer of its own, so that none of them can be touched.

    Args:
        segmentation_node: Holds the segment.
        segment_id: The segment to write.
        mask_kji: Mask on the whole grid of the volume; every value other than 0 counts.
        volume_node: Says where the grid lies. Its voxels are not read.
        changed_box_kji: Part of the grid that changed; the segment stays as it is elsewhere. None replaces
            the whole segment. One slice: `(slice(k, k + 1), slice(None), slice(None))`.

    Returns:
        The piece that was written; None when the segment is empty now.

    Raises:
        GeometryError: A non-linear transform between volume and segmentation, or a mask of another size.
        VolumeError: No such segment, or a segmentation that is stored as surfaces.
    """
    affine = grid_in_segmentation(volume_node, segmentation_node)
    piece = claimed(mask_kji, volume_node, changed_box_kji)
    patch = merged(segmentation_node, segment_id, piece, volume_node, changed_box_kji)
    set_patch(segmentation_node, segment_id, patch, affine)
    return patch


def read_mask(segmentation_node: Any, segment_id: str, volume_node: Any) -> NDArray[np.bool_]:
    """Return a segment as a mask (K, J, I) on the grid of a volume.

    Exact where the segment was made on that grid; otherwise every voxel takes the nearest one of the segment.

    Raises:
        GeometryError: A non-linear transform between volume and segmentation.
        VolumeError: No such segment, or a segmentation that is stored as surfaces.
    """
    mask = np.zeros(_shape_kji(volume_node), dtype=bool)
    paste(read_patch(segmentation_node, segment_id, volume_node), mask)
    return mask


def read_patch(segmentation_node: Any, segment_id: str, volume_node: Any) -> Patch | None:
    """Return the piece of the volume's grid that a segment fills, as `read_mask`; None when it is empty."""
    segment = require_segment(segmentation_node, segment_id)
    affine = grid_in_segmentation(volume_node, segmentation_node)
    return image_to_patch(labelmap_of(segment), segment.GetLabelValue(), affine)


def claimed(mask_kji: NDArray[Any], volume_node: Any, changed_box_kji: BoxKJI | None) -> Patch | None:
    """Return the piece that a mask sets inside the changed box; None when it sets nothing there.

    Raises:
        GeometryError: The mask has another size than the volume.
    """
    shape = _shape_kji(volume_node)
    if mask_kji.shape != shape:
        raise GeometryError(
            f"A mask of {shape} voxels (slices, rows, columns), the size of the volume, was wanted, but "
            f"it has {mask_kji.shape}. Predict it on this volume."
        )
    return patch_of_mask(mask_kji, changed_box_kji)


def merged(
    segmentation_node: Any,
    segment_id: str,
    patch: Patch | None,
    volume_node: Any,
    changed_box_kji: BoxKJI | None,
) -> Patch | None:
    """Return what a segment holds when the changed box is replaced by a piece, without writing it.

    Raises:
        VolumeError: No such segment, or a segmentation that is stored as surfaces.
    """
    require_segment(segmentation_node, segment_id)
    if changed_box_kji is None:
        return patch
    old = read_patch(segmentation_node, segment_id, volume_node)
    return union(without_box(old, grid_box(_shape_kji(volume_node), changed_box_kji)), patch)


def set_patch(segmentation_node: Any, segment_id: str, patch: Patch | None, affine: Array) -> None:
    """Replace a segment by a piece of the grid `affine`, (4, 4), from voxels to the segmentation's space."""
    import slicer

    segmentation = segmentation_node.GetSegmentation()
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    give_own_layer(segmentation, segment_id)
    if patch is None:
        logic.ClearSegment(segmentation_node, segment_id)
        _lay_on_grid(segmentation.GetSegment(segment_id), affine)
        return
    logic.SetBinaryLabelmapToSegment(
        patch_to_image(patch, affine), segmentation_node, segment_id, logic.MODE_REPLACE
    )
    segment = segmentation.GetSegment(segment_id)
    if logic.GetSegmentStatus(segment) == logic.NotStarted:
        logic.SetSegmentStatus(segment, logic.InProgress)


def give_own_layer(segmentation: Any, segment_id: str) -> None:
    """Move a segment out of a layer that it shares with other segments; no voxel changes."""
    sharing: list[str] = []
    segmentation.GetSegmentIDsSharingBinaryLabelmapRepresentation(segment_id, sharing, False)
    if sharing:
        segmentation.SeparateSegmentLabelmap(segment_id)


def grid_in_segmentation(volume_node: Any, segmentation_node: Any) -> Array:
    """Matrix from the voxels of a volume to the own space of a segmentation, (4, 4).

    Raises:
        GeometryError: A non-linear transform lies between the two.
        VolumeError: One of them is gone, or they stand in different scenes.
    """
    scenes = [node.GetScene() if node is not None else None for node in (volume_node, segmentation_node)]
    if scenes[0] is None or scenes[0] is not scenes[1]:
        raise VolumeError(
            "A volume and a segmentation of the same scene were wanted, but one of them was removed from it. "
            "Choose them again."
        )
    between = require_matrix(volume_node, segmentation_node, "Writing a mask of a volume into a segmentation")
    return between @ ijk_to_node_matrix(volume_node)


def require_segment(segmentation_node: Any, segment_id: str) -> Any:
    """Return a segment whose voxels can be written.

    Raises:
        VolumeError: No such node or segment, or the segmentation is stored as surfaces.
    """
    segment = _require(segmentation_node, segment_id)
    if segmentation_node.GetSegmentation().IsSourceRepresentationPolyData():
        raise VolumeError(
            "A segmentation of voxels was wanted, but this one is stored as surfaces. In the Segmentations "
            "module make 'Binary labelmap' its source representation, or choose another segmentation."
        )
    return segment


def labelmap_of(segment: Any) -> Any:
    """Return the oriented image that holds a segment's voxels; other segments may share it."""
    import slicer

    name = slicer.vtkSegmentationConverter.GetSegmentationBinaryLabelmapRepresentationName()
    return segment.GetRepresentation(name)


def reference_grid(segmentation_node: Any) -> Array | None:
    """Matrix (4, 4) from voxels of the reference geometry to the segmentation's space; None when unset."""
    import slicer

    converter = slicer.vtkSegmentationConverter
    name = converter.GetReferenceImageGeometryParameterName()
    text = segmentation_node.GetSegmentation().GetConversionParameter(name)
    image = slicer.vtkOrientedImageData()
    if not text or not converter.DeserializeImageGeometry(text, image, False):
        return None
    return image_matrix(image)


def _lay_on_grid(segment: Any, affine: Array) -> None:
    """Give an empty segment the grid of the others: merging layers would move these onto its own one."""
    image = labelmap_of(segment)
    if image is not None:
        image.SetImageToWorldMatrix(matrix_to_vtk(affine))


def _require(segmentation_node: Any, segment_id: str) -> Any:
    segmentation = segmentation_node.GetSegmentation() if segmentation_node is not None else None
    segment = segmentation.GetSegment(segment_id) if segmentation is not None else None
    if segment is None:
        raise VolumeError(
            "A segment to write into was wanted, but the chosen one is gone. Choose or add a segment."
        )
    return segment


def _shape_kji(volume_node: Any) -> tuple[int, int, int]:
    k, j, i = voxels_of_node(volume_node).shape[:3]
    return (k, j, i)
