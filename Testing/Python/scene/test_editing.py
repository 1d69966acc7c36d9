"""The Segment Editor's rules decide what a prediction may change, and one undo stack holds everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slicer
from numpy.typing import NDArray

from SAMAdaptLib.errors import GeometryError
from SAMAdaptSlicer.editing import UNLIMITED_UNDO, SegmentWriter
from SAMAdaptSlicer.labelmaps import paste, patch_of_mask, patch_to_image
from SAMAdaptSlicer.segments import add_segment, new_segmentation, read_mask, write_mask

from .phantoms import GRIDS

SHAPE = (8, 9, 10)
GRID = GRIDS["sheared"]
NODE = slicer.vtkMRMLSegmentationNode
EDITOR = slicer.vtkMRMLSegmentEditorNode

MASKS = {
    "everywhere": NODE.EditAllowedEverywhere,
    "inside all segments": NODE.EditAllowedInsideAllSegments,
    "inside visible segments": NODE.EditAllowedInsideVisibleSegments,
    "outside all segments": NODE.EditAllowedOutsideAllSegments,
    "outside visible segments": NODE.EditAllowedOutsideVisibleSegments,
    "inside one segment": NODE.EditAllowedInsideSingleSegment,
}
OVERWRITE = {
    "overwrite all": EDITOR.OverwriteAllSegments,
    "overwrite visible": EDITOR.OverwriteVisibleSegments,
    "allow overlap": EDITOR.OverwriteNone,
}


def ball(k: int, j: int, i: int, radius: float) -> NDArray[np.bool_]:
    kk, jj, ii = np.indices(SHAPE)
    return np.asarray((kk - k) ** 2 + (jj - j) ** 2 + (ii - i) ** 2 <= radius**2)


class Bench:
    """A volume, the edited segment, a visible and a hidden neighbour, and an editor with its rules."""

    def __init__(self, scene: Any, add_volume: Any) -> None:
        self.voxels = np.random.default_rng(7).integers(0, 100, SHAPE).astype(np.int16)
        self.volume_node = add_volume(GRID, voxels=self.voxels)
        self.segmentation_node = new_segmentation(self.volume_node)
        self.edited, self.visible, self.hidden = (
            add_segment(self.segmentation_node, name) for name in ("edited", "visible", "hidden")
        )
        self.segmentation_node.GetDisplayNode().SetSegmentVisibility(self.hidden, False)
        self.editor_node = scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
        self.editor_node.SetOverwriteMode(EDITOR.OverwriteNone)
        self.editor_node.SetMaskSegmentID(self.visible)
        self.logic = slicer.vtkSlicerSegmentEditorLogic()
        self.logic.SetMRMLScene(scene)
        self.writer = SegmentWriter(self.logic, self.editor_node)

    def fill(self, **masks: NDArray[np.bool_]) -> None:
        for name, mask in masks.items():
            write_mask(self.segmentation_node, getattr(self, name), mask, self.volume_node)

    def write(self, mask: NDArray[np.bool_], box: Any = None) -> Any:
        return self.writer.write(self.segmentation_node, self.edited, mask, self.volume_node, box)

    def read(self, name: str) -> NDArray[np.bool_]:
        return read_mask(self.segmentation_node, getattr(self, name), self.volume_node)

    def state(self) -> dict[str, NDArray[np.bool_]]:
        return {name: self.read(name) for name in ("edited", "visible", "hidden")}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture
def bench(scene: Any, add_volume: Any) -> Bench:
    return Bench(scene, add_volume)


def editable(mode: str, old: dict[str, Any]) -> NDArray[np.bool_]:
    """Slicer's editable areas in plain words; the edited segment belongs to 'all' and to 'visible'."""
    seen = old["edited"] | old["visible"]
    areas = {
        "everywhere": np.ones(SHAPE, dtype=bool),
        "inside all segments": seen | old["hidden"],
        "inside visible segments": seen,
        "outside all segments": ~(old["visible"] | old["hidden"]),
        "outside visible segments": ~old["visible"],
        "inside one segment": old["visible"],
    }
    return areas[mode]


@pytest.mark.parametrize("mask_mode", MASKS)
@pytest.mark.parametrize("overwrite", OVERWRITE)
@pytest.mark.parametrize("intensity", [False, True])
@pytest.mark.parametrize("layers", ["overlapping", "shared layer"])
def test_rules(bench: Bench, mask_mode: str, overwrite: str, intensity: bool, layers: str) -> None:
    old = {"edited": ball(3, 3, 3, 2.5), "visible": ball(4, 5, 5, 3), "hidden": ball(3, 6, 3, 2.5)}
    if layers == "shared layer":
        old["visible"] &= ~old["edited"]
        old["hidden"] &= ~(old["edited"] | old["visible"])
    bench.fill(**old)
    if layers == "shared layer":
        bench.segmentation_node.GetSegmentation().CollapseBinaryLabelmaps(False)
    bench.editor_node.SetMaskMode(MASKS[mask_mode])
    bench.editor_node.SetOverwriteMode(OVERWRITE[overwrite])
    bench.editor_node.SetSourceVolumeIntensityMask(intensity)
    bench.editor_node.SetSourceVolumeIntensityMaskRange(25, 80)
    new = ball(4, 4, 4, 3)

    patch = bench.write(new)

    allowed = editable(mask_mode, old)
    if intensity:
        allowed = allowed & (bench.voxels >= 25) & (bench.voxels <= 80)
    expected = np.where(allowed, new, old["edited"])
    assert np.array_equal(bench.read("edited"), expected)
    reported = np.zeros(SHAPE, dtype=bool)
    paste(patch, reported)
    assert np.array_equal(reported, expected)
    for name in ("visible", "hidden"):
        loses = overwrite == "overwrite all" or (overwrite == "overwrite visible" and name == "visible")
        expected = old[name] & ~(new & allowed) if loses else old[name]
        assert np.array_equal(bench.read(name), expected), name

    assert bench.writer.undo_stack.undo()
    assert same(bench.state(), old)


@pytest.mark.parametrize("overwrite", OVERWRITE)
def test_box_of_a_correction_limits_what_neighbours_lose(bench: Bench, overwrite: str) -> None:
    old = {"edited": ball(3, 3, 3, 2.5), "visible": ball(4, 5, 5, 3), "hidden": ball(3, 6, 3, 2.5)}
    bench.fill(**old)
    bench.editor_node.SetOverwriteMode(OVERWRITE[overwrite])
    new = ball(4, 4, 4, 3)
    box = (slice(4, 5), slice(None), slice(None))
    bench.write(new, box)
    expected = old["edited"].copy()
    expected[box] = new[box]
    assert np.array_equal(bench.read("edited"), expected)
    taken = np.zeros(SHAPE, dtype=bool)
    taken[box] = new[box]
    for name in ("visible", "hidden"):
        loses = overwrite == "overwrite all" or (overwrite == "overwrite visible" and name == "visible")
        assert np.array_equal(bench.read(name), old[name] & ~taken if loses else old[name]), name
    assert np.any(old["visible"] & taken)
    assert np.any(old["visible"] & old["edited"] & ~taken)  # an overlap elsewhere is left alone


def test_writing_nothing_by_rules_erases_what_may_be_erased(bench: Bench) -> None:
    old = {"edited": ball(3, 3, 3, 2.5), "visible": ball(4, 5, 5, 3), "hidden": ball(3, 6, 3, 2.5)}
    bench.fill(**old)
    bench.editor_node.SetMaskMode(NODE.EditAllowedInsideSingleSegment)
    bench.write(np.zeros(SHAPE, dtype=bool))
    assert np.array_equal(bench.read("edited"), old["edited"] & ~old["visible"])
    assert np.array_equal(bench.read("visible"), old["visible"])


def test_fast_path_is_taken_where_no_rule_can_act(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(
        SegmentWriter,
        "_write_by_rules",
        lambda *arguments: called.append(True),
    )
    bench.fill(visible=ball(1, 1, 1, 1))
    bench.editor_node.SetOverwriteMode(EDITOR.OverwriteAllSegments)
    bench.write(ball(6, 6, 6, 1))  # no voxel of a neighbour in its box
    assert not called
    assert np.array_equal(bench.read("edited"), ball(6, 6, 6, 1))
    bench.fill(hidden=ball(1, 6, 1, 1))
    bench.editor_node.SetOverwriteMode(EDITOR.OverwriteVisibleSegments)
    bench.write(ball(1, 6, 1, 1))  # only a hidden one, which this mode leaves alone
    assert not called
    bench.write(ball(2, 2, 2, 1))
    assert called == [True]


def test_undo_and_redo_are_exact_and_shared_with_manual_edits(bench: Bench) -> None:
    bench.fill(visible=ball(4, 5, 5, 3))
    states = [bench.state()]
    bench.write(ball(3, 3, 3, 2))
    states.append(bench.state())
    brush = patch_of_mask(ball(5, 5, 5, 2))
    assert brush is not None
    bench.logic.SaveStateForUndo()  # what the Paint effect does
    bench.logic.ModifySegmentByLabelmap(
        bench.segmentation_node,
        bench.edited,
        patch_to_image(brush, GRID),
        bench.logic.ModificationModeAdd,
        False,
        False,
    )
    states.append(bench.state())
    assert np.array_equal(states[-1]["edited"], ball(3, 3, 3, 2) | ball(5, 5, 5, 2))
    bench.editor_node.SetOverwriteMode(EDITOR.OverwriteAllSegments)
    bench.write(ball(4, 4, 6, 2))
    states.append(bench.state())
    bench.write(np.zeros(SHAPE, dtype=bool))
    states.append(bench.state())

    undo = bench.writer.undo_stack
    for state in states[-2::-1]:
        assert undo.undo()
        assert same(bench.state(), state)
    assert not undo.undo()
    for state in states[1:]:
        assert undo.redo()
        assert same(bench.state(), state)
    assert not undo.redo()


def test_a_write_after_undo_drops_what_could_be_redone(bench: Bench) -> None:
    bench.write(ball(3, 3, 3, 2))
    bench.write(ball(4, 4, 4, 2))
    assert bench.writer.undo_stack.undo()
    bench.write(ball(5, 5, 5, 2))
    assert not bench.writer.undo_stack.redo()
    assert bench.writer.undo_stack.undo()
    assert np.array_equal(bench.read("edited"), ball(3, 3, 3, 2))


def test_more_steps_can_be_undone_than_slicer_keeps_by_default(bench: Bench) -> None:
    for index in range(25):
        bench.write(ball(index % 8, 4, 4, 1))
    assert bench.logic.GetMaximumNumberOfUndoStates() == UNLIMITED_UNDO
    steps = 0
    while bench.writer.undo_stack.undo():
        steps += 1
    assert steps == 25
    assert not bench.read("edited").any()


def test_refused_write_saves_no_state(bench: Bench, add_volume: Any) -> None:
    bench.fill(visible=ball(4, 5, 5, 3))
    other = add_volume(GRIDS["oblique"], SHAPE)
    bench.editor_node.SetMaskMode(NODE.EditAllowedOutsideAllSegments)
    old = bench.state()
    with pytest.raises(GeometryError, match="Specify geometry"):
        bench.writer.write(bench.segmentation_node, bench.edited, ball(3, 3, 3, 2), other)
    with pytest.raises(GeometryError):
        bench.write(np.ones((2, 2, 2), dtype=bool))
    assert same(bench.state(), old)
    assert not bench.writer.undo_stack.undo()


def test_neighbours_of_a_shared_layer_of_another_grid_keep_their_voxels(
    bench: Bench, add_volume: Any
) -> None:
    shape = (16, 18, 20)
    finer = add_volume(GRID @ np.diag([0.5, 0.5, 0.5, 1.0]), shape)
    mask = np.random.default_rng(4).random(shape) < 0.5
    mask[:10] = False
    first = np.zeros(shape, dtype=bool)
    first[2:4, 2:6, 2:6] = True
    segmentation_node = bench.segmentation_node
    write_mask(segmentation_node, bench.edited, first, finer)
    write_mask(segmentation_node, bench.hidden, mask, finer)
    segmentation_node.GetSegmentation().CollapseBinaryLabelmaps(False)
    bench.editor_node.SetMaskMode(NODE.EditAllowedOutsideAllSegments)
    bench.write(ball(1, 2, 2, 1.5))
    assert np.array_equal(bench.read("edited"), ball(1, 2, 2, 1.5))
    assert np.array_equal(read_mask(segmentation_node, bench.hidden, finer), mask)


def test_segment_of_another_grid_is_brought_to_the_volumes_grid_by_rules(
    bench: Bench, add_volume: Any
) -> None:
    shifted = GRID.copy()
    shifted[:3, 3] += GRID[:3, :3] @ [2.0, 1.0, 1.0]  # our (2, 1, 1) is its (0, 0, 0)
    neighbour_grid = add_volume(shifted, SHAPE)
    write_mask(bench.segmentation_node, bench.edited, ball(2, 2, 2, 2), neighbour_grid)
    assert np.array_equal(bench.read("edited"), ball(3, 3, 4, 2))
    bench.editor_node.SetMaskMode(NODE.EditAllowedInsideAllSegments)
    bench.write(ball(4, 3, 4, 2))
    assert np.array_equal(bench.read("edited"), ball(3, 3, 4, 2) & ball(4, 3, 4, 2))
