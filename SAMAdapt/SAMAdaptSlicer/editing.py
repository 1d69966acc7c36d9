"""Writing by the Segment Editor's rules: editable area, intensity range, overwriting, and its undo.

The rules are those set in a vtkMRMLSegmentEditorNode, the node behind the editor's controls. Where none of
them can have an effect, the fast path of `segments` is taken.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from SAMAdaptLib.errors import GeometryError

from .labelmaps import (
    BoxKJI,
    Patch,
    grid_box,
    image_matrix,
    image_to_array,
    image_to_patch,
    patch_to_image,
    tight,
    union,
    within,
)
from .segments import (
    claimed,
    give_own_layer,
    grid_in_segmentation,
    labelmap_of,
    merged,
    read_patch,
    reference_grid,
    set_patch,
)
from .volumes import voxels_of_node

UNLIMITED_UNDO = 1_000_000
"""Number of states that the editor may keep; states share the voxels that did not change."""

_SAME_MATRIX = 1e-4  # Slicer's own limit for two images to have the same voxels


class UndoStack(Protocol):
    """What writing needs of an undo stack: the editor's logic has it, its widget keeps its own."""

    def save_state(self) -> None:
        """Remember the segmentation as it is, before it is changed."""

    def undo(self) -> bool:
        """Bring back the state before; False when there is none."""

    def redo(self) -> bool:
        """Bring back the state that `undo` left; False when there is none."""


class EditorUndo:
    """The undo stack of a vtkSlicerSegmentEditorLogic, shared with everything that edits through it.

    Args:
        editor_logic: The logic; its segment editor node and segmentation must be set.
        maximum_states: How many states it may keep.
    """

    def __init__(self, editor_logic: Any, maximum_states: int = UNLIMITED_UNDO) -> None:
        self._logic = editor_logic
        self._logic.SetMaximumNumberOfUndoStates(maximum_states)

    def save_state(self) -> None:
        """Remember the segmentation as it is, before it is changed."""
        self._logic.SaveStateForUndo()

    def undo(self) -> bool:
        """Bring back the state before; False when there is none."""
        possible = bool(self._logic.CanUndo())
        if possible:
            self._logic.Undo()
        return possible

    def redo(self) -> bool:
        """Bring back the state that `undo` left; False when there is none."""
        possible = bool(self._logic.CanRedo())
        if possible:
            self._logic.Redo()
        return possible


class SegmentWriter:
    """Writes masks into segments of one segmentation by the editor's rules.

    Args:
        editor_logic: A vtkSlicerSegmentEditorLogic.
        editor_node: The vtkMRMLSegmentEditorNode whose rules hold. Segmentation, source volume and selected
            segment of this node are set to what is written.
        undo: Where states are saved; None for the stack of `editor_logic`.
    """

    def __init__(self, editor_logic: Any, editor_node: Any, undo: UndoStack | None = None) -> None:
        self._logic = editor_logic
        self._node = editor_node
        if editor_logic.GetSegmentEditorNode() is not editor_node:
            editor_logic.SetSegmentEditorNode(editor_node)
        self.undo_stack: UndoStack = undo if undo is not None else EditorUndo(editor_logic)

    def write(
        self,
        segmentation_node: Any,
        segment_id: str,
        mask_kji: NDArray[Any],
        volume_node: Any,
        changed_box_kji: BoxKJI | None = None,
    ) -> Patch | None:
        """Make a segment hold a mask where the rules let it, after saving a state for undo.

        Arguments and errors are those of `segments.write_mask`. Voxels outside the editable area or the
        intensity range keep what they held. Other segments lose the voxels only in an overwrite mode that
        says so.

        Returns:
            The piece of the grid that was given to Slicer, None when the segment is empty now.

        Raises:
            GeometryError: Also when a rule applies and the segmentation's reference is another grid.
        """
        affine = grid_in_segmentation(volume_node, segmentation_node)
        piece = claimed(mask_kji, volume_node, changed_box_kji)
        wanted = merged(segmentation_node, segment_id, piece, volume_node, changed_box_kji)
        self.select(segmentation_node, segment_id, volume_node)
        ruled = self._is_masked() or self._overwrites(segmentation_node, segment_id, piece, affine)
        if ruled:
            _require_reference(segmentation_node, affine)
        self.undo_stack.save_state()
        if not ruled:
            set_patch(segmentation_node, segment_id, wanted, affine)
            return wanted
        return self._write_by_rules(segmentation_node, segment_id, piece, wanted, volume_node, affine)

    def select(self, segmentation_node: Any, segment_id: str, volume_node: Any) -> None:
        """Make the editor edit this segment; a change of segmentation empties the undo stack."""
        self._node.SetAndObserveSegmentationNode(segmentation_node)
        self._node.SetAndObserveSourceVolumeNode(volume_node)
        self._node.SetSelectedSegmentID(segment_id)

    def _write_by_rules(
        self,
        segmentation_node: Any,
        segment_id: str,
        piece: Patch | None,
        wanted: Patch | None,
        volume_node: Any,
        affine: Any,
    ) -> Patch | None:
        """Erase what may be erased, then let the editor add what may be added and take it from the others.

        The editor's own "set" is one step, but there a voxel outside the editable area, which the segment
        already held, is taken from every other segment too.
        """
        old = read_patch(segmentation_node, segment_id, volume_node)
        both = union(old, wanted)
        if both is None:
            return None
        before, after = within(old, both), within(wanted, both)
        editable = self._editable(segmentation_node, segment_id, both, volume_node, affine)
        kept = tight(Patch(before & (after | ~editable), both.start_kji))
        _bring_to_grid(segmentation_node, segment_id, kept, affine)
        if np.any(before & ~after & editable):
            set_patch(segmentation_node, segment_id, kept, affine)
        added = tight(Patch(within(piece, both) & editable, both.start_kji))
        if added is not None:
            image = patch_to_image(added, affine)
            mode = self._logic.ModificationModeAdd
            self._logic.ModifySegmentByLabelmap(segmentation_node, segment_id, image, mode, False, False)
        return union(kept, added)

    def _editable(
        self, segmentation_node: Any, segment_id: str, patch: Patch, volume_node: Any, affine: Any
    ) -> NDArray[np.uint8]:
        """Where the rules allow a change, 0 or 255, over the box of a piece."""
        import slicer

        allowed = np.full(patch.voxels.shape, 255, dtype=np.uint8)
        if self._node.GetMaskMode() != slicer.vtkMRMLSegmentationNode.EditAllowedEverywhere:
            forbidden = slicer.vtkOrientedImageData()
            segmentation_node.GenerateEditMask(
                forbidden,
                self._node.GetMaskMode(),
                patch_to_image(patch, affine),
                segment_id,
                self._node.GetMaskSegmentID() or "",
            )
            allowed[image_to_array(forbidden) != 0] = 0
        if self._node.GetSourceVolumeIntensityMask():
            lower, upper = self._node.GetSourceVolumeIntensityMaskRange()
            allowed[~_in_range(voxels_of_node(volume_node), patch, lower, upper)] = 0
        return allowed

    def _is_masked(self) -> bool:
        import slicer

        everywhere = slicer.vtkMRMLSegmentationNode.EditAllowedEverywhere
        return bool(self._node.GetMaskMode() != everywhere or self._node.GetSourceVolumeIntensityMask())

    def _overwrites(self, segmentation_node: Any, segment_id: str, piece: Patch | None, affine: Any) -> bool:
        """Tell whether the overwrite mode makes another segment lose voxels to this piece."""
        mode = self._node.GetOverwriteMode()
        if piece is None or mode == self._node.OverwriteNone:
            return False
        segmentation = segmentation_node.GetSegmentation()
        display = segmentation_node.GetDisplayNode()
        only_visible = mode == self._node.OverwriteVisibleSegments
        for other_id in segmentation.GetSegmentIDs():
            if other_id == segment_id or (
                only_visible and (display is None or not display.GetSegmentVisibility(other_id))
            ):
                continue
            other = segmentation.GetSegment(other_id)
            held = image_to_patch(labelmap_of(other), other.GetLabelValue(), affine)
            if held is not None and _boxes_meet(held, piece):
                return True
        return False


def _boxes_meet(first: Patch, second: Patch) -> bool:
    starts = np.maximum(first.start_kji, second.start_kji)
    return bool(np.all(starts < np.minimum(first.stop_kji, second.stop_kji)))


def _in_range(voxels: NDArray[Any], patch: Patch, lower: float, upper: float) -> NDArray[np.bool_]:
    """Where the volume lies in an intensity range, over the box of a piece; never outside of it."""
    k, j, i = (slice(max(part.start, 0), max(part.stop, 0)) for part in patch.box_kji)
    box = grid_box(voxels.shape[:3], (k, j, i))
    grey = voxels[box] if voxels.ndim == 3 else voxels[box][..., 0]
    inside = Patch(
        ((grey >= lower) & (grey <= upper)).view(np.uint8), (box[0].start, box[1].start, box[2].start)
    )
    found: NDArray[np.bool_] = within(inside, patch) != 0
    return found


def _bring_to_grid(segmentation_node: Any, segment_id: str, kept: Patch | None, affine: Any) -> None:
    """Rewrite a segment that has voxels of another grid: the editor would merge ours into those."""
    segmentation = segmentation_node.GetSegmentation()
    image = labelmap_of(segmentation.GetSegment(segment_id))
    if np.abs(image_matrix(image) - affine).max() > _SAME_MATRIX:
        set_patch(segmentation_node, segment_id, kept, affine)
    else:
        give_own_layer(segmentation, segment_id)


def _require_reference(segmentation_node: Any, affine: Any) -> None:
    reference = reference_grid(segmentation_node)
    if reference is not None and np.abs(reference - affine).max() > _SAME_MATRIX:
        raise GeometryError(
            "Masking and overwriting need a segmentation whose geometry is that of the volume, but its "
            "geometry comes from another one. Set it by 'Specify geometry' in the Segment Editor, or allow "
            "overlap and editing everywhere."
        )
