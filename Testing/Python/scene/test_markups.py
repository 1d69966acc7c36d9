"""Prompts stand in the scene as markups and come back the same, under any transform and after a reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vtk

from SAMAdaptLib.errors import PromptError
from SAMAdaptLib.prompts import Box, MaskPrompt, Point, Prompt, Prompts, Scribble
from SAMAdaptSlicer.markups import (
    SEGMENT_ATTRIBUTE,
    SEGMENTATION_ROLE,
    VOLUME_ROLE,
    add_point,
    add_prompt_nodes,
    defined_points_ras,
    is_positive,
    prompt_nodes,
    prompts_from_node,
    prompts_from_nodes,
    set_positive,
    set_prompt,
)
from SAMAdaptSlicer.ownership import is_ours, mark_as_ours, remove_ours
from SAMAdaptSlicer.segments import add_segment, new_segmentation
from SAMAdaptSlicer.transforms import matrix_to_vtk, world_to_node

from .phantoms import GRIDS, TRANSFORMS, Array, affine, apply, composed, rotation

TILTED = tuple(rotation(20, -35, 50).ravel())
STROKE = Scribble(((0.0, 1, 2), (3.5, 1, 2), (4, 7, -2), (4, 8, -2)), positive=False)
FLAT_BOX = Box((10, -20, 30), (25, 40, 0))
TILTED_BOX = Box((-4, 5, 6), (11, 7, 19), TILTED)
PROMPTS = Prompts(
    (
        Point((1, 2, 3)),
        Point((4, 5, 6)),
        Point((7, 8, 9), positive=False),
        Point((-1, -2, -3)),
        FLAT_BOX,
        STROKE,
        TILTED_BOX,
    )
)
NODES = ["Fiducial", "Fiducial", "Fiducial", "ROI", "Curve", "ROI"]  # neighbours of one sign share a node


def sorted_corners(box: Box) -> Array:
    corners = box.corners_ras().round(7)
    return corners[np.lexsort(corners.T)]


def assert_same(found: Prompts, wanted: Prompts) -> None:
    assert [type(item) for item in found] == [type(item) for item in wanted]
    for a, b in zip(found, wanted, strict=True):
        if isinstance(a, Box) and isinstance(b, Box):
            np.testing.assert_allclose(sorted_corners(a), sorted_corners(b), atol=1e-5)
        elif isinstance(a, Point) and isinstance(b, Point):
            assert a.positive == b.positive
            np.testing.assert_allclose(a.point_ras, b.point_ras, atol=1e-5)
        elif isinstance(a, Scribble) and isinstance(b, Scribble):
            assert a.positive == b.positive
            np.testing.assert_allclose(a.points_ras, b.points_ras, atol=1e-5)


def under(node: Any, name: str, add_transform: Any) -> Array:
    parent = None
    for matrix in TRANSFORMS[name]:
        parent = add_transform(matrix, parent)
    node.SetAndObserveTransformNodeID(parent.GetID() if parent is not None else None)
    return composed(TRANSFORMS[name])


def test_round_trip(scene: Any) -> None:
    nodes = add_prompt_nodes(scene, PROMPTS)
    assert [node.GetMarkupType() for node in nodes] == NODES
    assert_same(prompts_from_nodes(nodes), PROMPTS)
    assert prompts_from_nodes(nodes).items[:6] == PROMPTS.items[:6]  # to the last bit, but for a turned box


@pytest.mark.parametrize("above", TRANSFORMS)
@pytest.mark.parametrize(
    "prompt", [PROMPTS.items[0], STROKE, FLAT_BOX, TILTED_BOX], ids=lambda p: type(p).__name__
)
def test_prompt_is_put_at_its_world_position_under_a_transform(
    scene: Any, add_transform: Any, above: str, prompt: Prompt
) -> None:
    (node,) = add_prompt_nodes(
        scene, Prompts((Box((0, 0, 0), (1, 1, 1)) if isinstance(prompt, Box) else prompt,))
    )
    to_world = under(node, above, add_transform)
    set_prompt(node, prompt)
    assert_same(prompts_from_node(node), Prompts((prompt,)))
    if isinstance(prompt, Point):
        stored = [0.0, 0.0, 0.0]
        node.GetNthControlPointPosition(0, stored)
        np.testing.assert_allclose(apply(to_world, np.array(stored)), prompt.point_ras, atol=1e-9)


@pytest.mark.parametrize("above", TRANSFORMS)
def test_points_of_a_moved_node_are_read_in_the_world(scene: Any, add_transform: Any, above: str) -> None:
    nodes = add_prompt_nodes(scene, Prompts((Point((1, 2, 3)), Point((-4, 5, 6)), STROKE)))
    for node in nodes:
        to_world = under(node, above, add_transform)
    moved = apply(to_world, np.array([[1.0, 2, 3], [-4, 5, 6]]))
    points, stroke = prompts_from_node(nodes[0]), prompts_from_node(nodes[1]).items[0]
    np.testing.assert_allclose([p.point_ras for p in points if isinstance(p, Point)], moved, atol=1e-9)
    assert isinstance(stroke, Scribble)
    np.testing.assert_allclose(stroke.points_ras, apply(to_world, np.array(STROKE.points_ras)), atol=1e-9)


def test_region_turned_by_its_own_and_its_parents_matrix(scene: Any, add_transform: Any) -> None:
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    own = affine(rotation(30, 10, -20), (1, 1, 1), (5, 6, 7))
    roi.SetSize(10, 20, 30)
    roi.SetAndObserveObjectToNodeMatrix(matrix_to_vtk(own))
    to_world = under(roi, "rigid", add_transform)
    box = prompts_from_node(roi).items[0]
    assert isinstance(box, Box)
    signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(-1, 3)
    corners = apply(to_world @ own, signs * np.array([5.0, 10, 15]))
    expected = corners.round(7)[np.lexsort(corners.round(7).T)]
    np.testing.assert_allclose(sorted_corners(box), expected, atol=1e-6)


def test_points_being_placed_do_not_count(scene: Any) -> None:
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
    for position in ((1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0)):
        add_point(node, position)
    node.UnsetNthControlPointPosition(0)
    node.SetNthControlPointPositionMissing(2)
    node.SetNthControlPointPositionWorld(3, 9, 9, 9, node.PositionPreview)
    assert prompts_from_node(node) == Prompts((Point((2, 0, 0)),))
    for kind in ("Fiducial", "ROI", "Line", "Curve", "ClosedCurve"):
        assert len(prompts_from_node(scene.AddNewNodeByClass(f"vtkMRMLMarkups{kind}Node"))) == 0


def test_users_own_markups_are_prompts_too(scene: Any) -> None:
    line = scene.AddNewNodeByClass("vtkMRMLMarkupsLineNode")
    add_point(line, (0, 0, 0))
    add_point(line, (0, 0, 10))
    stroke = prompts_from_node(line).items[0]
    assert isinstance(stroke, Scribble)
    assert stroke.positive
    np.testing.assert_allclose(stroke.points_ras, [(0, 0, z) for z in range(11)])
    set_positive(line, False)
    assert prompts_from_node(line).items[0] == Scribble(stroke.points_ras, positive=False)


def test_closed_curve_comes_back_to_its_start(scene: Any) -> None:
    curve = scene.AddNewNodeByClass("vtkMRMLMarkupsClosedCurveNode")
    curve.SetCurveTypeToLinear()
    for corner in ((0, 0, 5), (20, 0, 5), (20, 20, 5), (0, 20, 5)):
        add_point(curve, corner)
    stroke = prompts_from_node(curve).items[0]
    assert isinstance(stroke, Scribble)
    points = np.array(stroke.points_ras)
    np.testing.assert_allclose(points[0], points[-1], atol=1e-9)
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    assert steps.max() <= 1.0 + 1e-9
    np.testing.assert_allclose(steps.sum(), 80, atol=1e-6)
    on_edge = np.isclose(points[:, :2], 0) | np.isclose(points[:, :2], 20)
    assert on_edge.any(axis=1).all()


def test_prompts_survive_the_scene_file(
    headless: Any, add_volume: Any, add_transform: Any, tmp_path: Path
) -> None:
    volume_node = add_volume(GRIDS["oblique"])
    segmentation_node = new_segmentation(volume_node)
    segment_id = add_segment(segmentation_node, "organ")
    nodes = add_prompt_nodes(headless.scene, PROMPTS, volume_node, segmentation_node, segment_id)
    parent = add_transform(TRANSFORMS["rigid"][0])
    for node in nodes:
        node.SetAndObserveTransformNodeID(parent.GetID())
    wanted = prompts_from_nodes(nodes)
    add_prompt_nodes(headless.scene, Prompts((Point((0, 0, 0)),)), volume_node, segmentation_node, "other")
    headless.scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "somebody else's")
    headless.save_scene(tmp_path / "study.mrb")
    headless.clear()
    assert prompt_nodes(headless.scene) == []
    headless.load_scene(tmp_path / "study.mrb")

    segmentation_node = headless.scene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    volume_node = headless.scene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
    assert is_ours(segmentation_node)
    assert segmentation_node.GetSegmentation().GetSegment(segment_id).GetName() == "organ"
    restored = prompt_nodes(headless.scene, segmentation_node, segment_id)
    assert [node.GetMarkupType() for node in restored] == NODES
    assert len(prompt_nodes(headless.scene)) == len(NODES) + 1
    for node in restored:
        assert node.GetNodeReference(VOLUME_ROLE) is volume_node
        assert node.GetNodeReference(SEGMENTATION_ROLE) is segmentation_node
        assert node.GetAttribute(SEGMENT_ATTRIBUTE) == segment_id
    assert_same(prompts_from_nodes(restored), wanted)


def test_two_scenes_merged_keep_their_prompts_apart(headless: Any, add_volume: Any, tmp_path: Path) -> None:
    """Node IDs change when a scene is added to another; references follow, names would not."""
    volume_node = add_volume(GRIDS["oblique"])
    first = new_segmentation(volume_node)
    segment_id = add_segment(first, "organ")
    add_prompt_nodes(headless.scene, Prompts((Point((1, 2, 3)),)), volume_node, first, segment_id)
    headless.save_scene(tmp_path / "study.mrb")
    assert headless.scene.ReadFromMRB(str(tmp_path / "study.mrb"), False)
    nodes = headless.scene.GetNodesByClass("vtkMRMLSegmentationNode")
    segmentations = [nodes.GetItemAsObject(n) for n in range(nodes.GetNumberOfItems())]
    assert len(segmentations) == 2
    found = [prompt_nodes(headless.scene, node, segment_id) for node in segmentations]
    assert [len(part) for part in found] == [1, 1]
    assert found[0][0] is not found[1][0]


def test_masks_have_no_markup(scene: Any) -> None:
    mask = MaskPrompt.from_array(np.ones((2, 2, 2)))
    assert add_prompt_nodes(scene, Prompts((mask,))) == []


def test_wrong_kinds_are_refused(scene: Any) -> None:
    angle = scene.AddNewNodeByClass("vtkMRMLMarkupsAngleNode")
    with pytest.raises(PromptError, match="Angle"):
        prompts_from_node(angle)
    (node,) = add_prompt_nodes(scene, Prompts((Point((0, 0, 0)),)))
    with pytest.raises(PromptError, match=r"box prompt cannot be shown by a Fiducial"):
        set_prompt(node, FLAT_BOX)
    (roi,) = add_prompt_nodes(scene, Prompts((FLAT_BOX,)))
    with pytest.raises(PromptError, match="sheared"):
        set_prompt(roi, Box((0, 0, 0), (1, 1, 1), (1, 0.5, 0, 0, 1, 0, 0, 0, 1)))
    assert_same(prompts_from_node(roi), Prompts((FLAT_BOX,)))


def test_points_under_a_warp_are_read_where_they_are_seen(scene: Any) -> None:
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
    warp = scene.AddNewNodeByClass("vtkMRMLTransformNode")
    spline = vtk.vtkThinPlateSplineTransform()
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    for corner in np.ndindex(2, 2, 2):
        position = 50.0 * np.array(corner)
        source.InsertNextPoint(*position)
        target.InsertNextPoint(*np.add(position, [3.0 * corner[0] * corner[1], 0, 1]))
    spline.SetSourceLandmarks(source)
    spline.SetTargetLandmarks(target)
    spline.SetBasisToR()
    warp.SetAndObserveTransformToParent(spline)
    node.SetAndObserveTransformNodeID(warp.GetID())
    add_point(node, (20, 25, 30))
    np.testing.assert_allclose(defined_points_ras(node), [[20, 25, 30]], atol=1e-3)
    stored = [0.0, 0.0, 0.0]
    node.GetNthControlPointPosition(0, stored)
    np.testing.assert_allclose(world_to_node(node, [[20, 25, 30]])[0], stored, atol=1e-3)
    assert abs(stored[2] - 30) > 0.5


def test_only_our_nodes_are_removed(scene: Any) -> None:
    (ours,) = add_prompt_nodes(scene, Prompts((Point((0, 0, 0), positive=False),)))
    assert not is_positive(ours)
    theirs = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", ours.GetName())
    assert not remove_ours(theirs)
    assert scene.GetNodeByID(theirs.GetID()) is theirs
    assert remove_ours(ours)
    assert not remove_ours(ours)  # gone already
    assert not remove_ours(None)
    assert prompt_nodes(scene) == []
    adopted = scene.AddNewNodeByClass("vtkMRMLTextNode")
    mark_as_ours(adopted)
    assert remove_ours(adopted)


def test_prompts_outlive_their_volume_and_segmentation(scene: Any, add_volume: Any) -> None:
    volume_node = add_volume()
    segmentation_node = new_segmentation(volume_node)
    segment_id = add_segment(segmentation_node, "a")
    add_prompt_nodes(scene, Prompts((Point((1, 2, 3)),)), volume_node, segmentation_node, segment_id)
    scene.RemoveNode(segmentation_node)
    scene.RemoveNode(volume_node)
    assert prompt_nodes(scene, segmentation_node, segment_id) == []
    (node,) = prompt_nodes(scene)
    assert node.GetNodeReference(VOLUME_ROLE) is None
    assert prompts_from_node(node) == Prompts((Point((1, 2, 3)),))
