"""Prompts as markups that can be seen, dragged and saved with the scene, and back.

A fiducial node holds clicks (an attribute of the node says whether positive or negative), a region of
interest is a box, a line or curve is a scribble. Positions are those of the world, whatever transforms the
nodes stand under. Points that are being placed or were skipped do not count.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from vtk.util.numpy_support import vtk_to_numpy

from SAMAdaptLib.errors import PromptError
from SAMAdaptLib.prompts import Box, MaskPrompt, Point, Prompt, Prompts, Scribble

from .ownership import is_ours, mark_as_ours
from .transforms import matrix_to_numpy, matrix_to_vtk, world_to_node

SIGN_ATTRIBUTE = "SAMAdapt.sign"
VOLUME_ROLE = "SAMAdapt.volume"
SEGMENTATION_ROLE = "SAMAdapt.segmentation"
SEGMENT_ATTRIBUTE = "SAMAdapt.segment"
ORDER_ATTRIBUTE = "SAMAdapt.order"

_POSITIVE_RGB = (0.2, 0.8, 0.2)
_NEGATIVE_RGB = (0.9, 0.2, 0.2)
_BOX_RGB = (0.95, 0.75, 0.1)
_STROKE_STEP_MM = 1.0
_RIGHT_ANGLE = 1e-4  # cosine
_STROKE_ATTRIBUTE = "SAMAdapt.stroke"  # the control points are the stroke itself, not the corners of a curve
_CLASSES: dict[type[Any], str] = {
    Point: "vtkMRMLMarkupsFiducialNode",
    Box: "vtkMRMLMarkupsROINode",
    Scribble: "vtkMRMLMarkupsCurveNode",
}


def prompts_from_node(markups_node: Any) -> Prompts:
    """Read one markups node.

    Args:
        markups_node: Fiducials, ROI, line, open or closed curve; ours or the user's.

    Returns:
        One Point for every defined fiducial, or one Box, or one Scribble; nothing for a node without points.

    Raises:
        PromptError: A markup of another kind.
    """
    if markups_node.IsA("vtkMRMLMarkupsFiducialNode"):
        positive = is_positive(markups_node)
        return Prompts(tuple(Point(tuple(p), positive) for p in defined_points_ras(markups_node)))
    if markups_node.IsA("vtkMRMLMarkupsROINode"):
        return Prompts((_box(markups_node),) if len(defined_points_ras(markups_node)) else ())
    if markups_node.IsA("vtkMRMLMarkupsLineNode") or markups_node.IsA("vtkMRMLMarkupsCurveNode"):
        stroke = _stroke_ras(markups_node)
        scribble = (Scribble(tuple(map(tuple, stroke)), is_positive(markups_node)),) if len(stroke) else ()
        return Prompts(scribble)
    raise PromptError(
        f"A prompt is a point list, a region of interest, a line or a curve, but this is a "
        f"{markups_node.GetMarkupType() or 'markup'} of another kind. Use one of those."
    )


def prompts_from_nodes(markups_nodes: Iterable[Any]) -> Prompts:
    """Read several markups nodes in the order in which they are given."""
    return Prompts(tuple(prompt for node in markups_nodes for prompt in prompts_from_node(node)))


def prompt_nodes(scene: Any, segmentation_node: Any = None, segment_id: str | None = None) -> list[Any]:
    """Find the prompt nodes that SAMAdapt made, in the order in which they were made.

    Args:
        scene: Where to look.
        segmentation_node: Only those for this segmentation; None for any.
        segment_id: Only those for this segment; None for any.
    """
    nodes = scene.GetNodesByClass("vtkMRMLMarkupsNode")
    nodes.UnRegister(None)
    found = [
        node
        for node in (nodes.GetItemAsObject(n) for n in range(nodes.GetNumberOfItems()))
        if is_ours(node)
        and (segmentation_node is None or node.GetNodeReference(SEGMENTATION_ROLE) is segmentation_node)
        and (segment_id is None or node.GetAttribute(SEGMENT_ATTRIBUTE) == segment_id)
    ]
    return sorted(found, key=_order)


def add_prompt_nodes(
    scene: Any, prompts: Prompts, volume_node: Any = None, segmentation_node: Any = None, segment_id: str = ""
) -> list[Any]:
    """Show prompts as markups nodes of ours; neighbouring clicks of the same sign share a node.

    Args:
        scene: Where to.
        prompts: Points, boxes and scribbles in RAS mm of the world; masks have no markup and are left out.
        volume_node: The volume they were placed on; remembered in the scene.
        segmentation_node: The segmentation they make; remembered in the scene.
        segment_id: The segment they make; remembered in the scene.

    Returns:
        The new nodes, in order; `prompts_from_nodes` gives the same prompts back.
    """
    nodes: list[Any] = []
    for prompt in prompts:
        if isinstance(prompt, Point) and nodes and _takes(nodes[-1], prompt):
            add_point(nodes[-1], prompt.point_ras)
            continue
        node = _new_node(scene, prompt)
        if node is None:
            continue
        _remember(node, volume_node, segmentation_node, segment_id)
        set_prompt(node, prompt)
        nodes.append(node)
    return nodes


def set_prompt(markups_node: Any, prompt: Prompt) -> None:
    """Replace what a markups node holds by one prompt, under whatever transform the node stands.

    Raises:
        PromptError: The node is of another kind than the prompt.
    """
    kind = _class_of(prompt)
    if isinstance(prompt, MaskPrompt) or kind is None or not markups_node.IsA(kind):
        raise PromptError(
            f"A {type(prompt).__name__.lower()} prompt cannot be shown by a {markups_node.GetMarkupType()}. "
            "Make a markup of the right kind for it."
        )
    if isinstance(prompt, Box):
        _set_box(markups_node, prompt)
        return
    markups_node.RemoveAllControlPoints()
    for point_ras in prompt.points_ras if isinstance(prompt, Scribble) else [prompt.point_ras]:
        add_point(markups_node, point_ras)


def add_point(markups_node: Any, point_ras: ArrayLike) -> int:
    """Add a control point at RAS mm of the world and return its index."""
    return int(markups_node.AddControlPointWorld(*(float(value) for value in np.ravel(point_ras))))


def defined_points_ras(markups_node: Any) -> NDArray[np.float64]:
    """Positions of the defined control points in RAS mm of the world, (N, 3)."""
    points = []
    for index in range(markups_node.GetNumberOfControlPoints()):
        if markups_node.GetNthControlPointPositionStatus(index) == markups_node.PositionDefined:
            position = [0.0, 0.0, 0.0]
            markups_node.GetNthControlPointPositionWorld(index, position)
            points.append(position)
    return np.array(points, dtype=np.float64).reshape(-1, 3)


def is_positive(markups_node: Any) -> bool:
    """Whether a node marks the object; a node without the attribute, such as a user's own, does."""
    return bool(markups_node.GetAttribute(SIGN_ATTRIBUTE) != "negative")


def set_positive(markups_node: Any, positive: bool) -> None:
    """Say on a node whether it marks the object or what is not the object."""
    markups_node.SetAttribute(SIGN_ATTRIBUTE, "positive" if positive else "negative")


def _box(roi_node: Any) -> Box:
    """The box as the views show it: under a transform that shears, Slicer keeps its angles right."""
    matrix = matrix_to_numpy(roi_node.GetObjectToWorldMatrix())
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    size = np.abs(roi_node.GetSize()) * lengths
    return Box(tuple(matrix[:3, 3]), tuple(size), tuple((matrix[:3, :3] / lengths).ravel()))


def _set_box(roi_node: Any, box: Box) -> None:
    directions = np.asarray(box.directions).reshape(3, 3)
    if np.abs(directions.T @ directions - np.eye(3)).max() > _RIGHT_ANGLE:
        raise PromptError(
            "A region of interest has right angles, but this box is sheared. Draw a box around it instead."
        )
    centre = np.asarray(box.centre_ras)
    ends = world_to_node(roi_node, np.vstack([centre, centre + directions.T]))
    edges = (ends[1:] - ends[0]).T
    lengths = np.linalg.norm(edges, axis=0)
    matrix = np.eye(4)
    matrix[:3, :3] = edges / lengths
    matrix[:3, 3] = ends[0]
    roi_node.SetAndObserveObjectToNodeMatrix(matrix_to_vtk(matrix))
    roi_node.SetSize(*(np.asarray(box.size_mm) * lengths))


def _stroke_ras(node: Any) -> NDArray[np.float64]:
    """Points along a line or curve in RAS mm; those of a stroke that we wrote are its control points."""
    control = defined_points_ras(node)
    if len(control) < 2 or node.GetAttribute(_STROKE_ATTRIBUTE) is not None:
        return control
    if node.IsA("vtkMRMLMarkupsLineNode"):
        return _dense(control)
    points = node.GetCurvePointsWorld()
    drawn = points is not None and points.GetNumberOfPoints() > 1
    return _dense(np.array(vtk_to_numpy(points.GetData()), dtype=np.float64) if drawn else control)


def _dense(points_ras: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add points on the straight pieces of a path, so that none is longer than `_STROKE_STEP_MM`."""
    pieces = [
        np.linspace(a, b, max(int(np.ceil(np.linalg.norm(b - a) / _STROKE_STEP_MM)), 1), endpoint=False)
        for a, b in itertools.pairwise(points_ras)
    ]
    return np.concatenate([*pieces, points_ras[-1:]])


def _class_of(prompt: Prompt) -> str | None:
    for kind, name in _CLASSES.items():
        if isinstance(prompt, kind):
            return name
    return None


def _takes(node: Any, point: Point) -> bool:
    return bool(node.IsA(_CLASSES[Point]) and is_positive(node) == point.positive)


def _new_node(scene: Any, prompt: Prompt) -> Any:
    kind = _class_of(prompt)
    if kind is None:
        return None
    node = scene.AddNewNodeByClass(kind, type(prompt).__name__)
    mark_as_ours(node)
    node.CreateDefaultDisplayNodes()
    positive = getattr(prompt, "positive", True)
    set_positive(node, positive)
    node.GetDisplayNode().SetSelectedColor(
        *(_BOX_RGB if isinstance(prompt, Box) else _POSITIVE_RGB if positive else _NEGATIVE_RGB)
    )
    node.GetDisplayNode().SetPointLabelsVisibility(False)
    if isinstance(prompt, Scribble):
        node.SetCurveTypeToLinear()
        node.SetAttribute(_STROKE_ATTRIBUTE, "points")
    return node


def _remember(node: Any, volume_node: Any, segmentation_node: Any, segment_id: str) -> None:
    for role, target in ((VOLUME_ROLE, volume_node), (SEGMENTATION_ROLE, segmentation_node)):
        if target is not None:
            node.SetNodeReferenceID(role, target.GetID())
    if segment_id:
        node.SetAttribute(SEGMENT_ATTRIBUTE, segment_id)
    others = prompt_nodes(node.GetScene())
    node.SetAttribute(ORDER_ATTRIBUTE, str(1 + max(_order(other) for other in others)))


def _order(node: Any) -> int:
    return int(node.GetAttribute(ORDER_ATTRIBUTE) or 0)
