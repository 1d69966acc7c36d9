"""A picture of a result: prompts and mask on three planes, and the confidence of every slice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.geometry import AXES, Axis, SlicePlane
from SAMAdaptLib.prompts import PixelPrompts
from SAMAdaptLib.segmenting import Segmentation, SegmentedObject

_ROW_INCHES = 3.4
_MOST_ROWS = 8
_REVIEW_BELOW = 0.7  # a slice the model is less sure of is worth a look


def write_overview(path: str | os.PathLike[str], segmentation: Segmentation) -> None:
    """Write a PNG with one row for each of the first eight objects.

    Args:
        path: Where.
        segmentation: From `segment_objects`.
    """
    objects = segmentation.objects[:_MOST_ROWS]
    rows = max(1, len(objects))
    figure = Figure(figsize=(13.5, _ROW_INCHES * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for row, item in enumerate(objects):
        _draw_row(figure, rows, row, item, segmentation)
    figure.suptitle(f"{segmentation.predictor.card.title} — research use only", fontsize=10)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=100)


def _draw_row(figure: Any, rows: int, row: int, item: SegmentedObject, segmentation: Segmentation) -> None:
    session = item.session
    axis = session.axis
    others: list[Axis] = [other for other in reversed(AXES) if other != axis]
    mask = segmentation.labels == item.label
    prompted = session.prompts.on_slices(segmentation.volume.geometry, axis)
    centre = _centre_ijk(mask)
    for column, shown in enumerate([axis, *others]):
        index = int(centre[AXES.index(shown)])
        if shown == axis and prompted:
            index = min(prompted, key=lambda known: abs(known - index))
        axes = figure.add_subplot(rows, 4, 4 * row + column + 1)
        plane = segmentation.volume.geometry.plane(shown, index)
        _draw_plane(axes, plane, segmentation, mask, item)
        if shown == axis and index in prompted:
            _draw_prompts(axes, prompted[index])
        axes.set_title(f"{item.task.name}: slice {index} across {shown}", fontsize=9)
    _draw_confidence(figure.add_subplot(rows, 4, 4 * row + 4), item, set(prompted))


def _draw_plane(
    axes: Any, plane: SlicePlane, segmentation: Segmentation, mask: NDArray[np.bool_], item: SegmentedObject
) -> None:
    picture = plane.extract(segmentation.volume.voxels)
    if not segmentation.volume.is_colour:
        picture = item.session.window.apply(picture)
    x_mm, y_mm = plane.spacing_xy_mm
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, aspect=y_mm / x_mm, interpolation="nearest")
    inside = plane.extract(mask)
    colour = np.asarray(item.task.colour_rgb) / 255
    shade = np.zeros((*inside.shape, 4))
    shade[inside] = [*colour, 0.35]
    axes.imshow(shade, aspect=y_mm / x_mm, interpolation="nearest")
    if inside.any() and not inside.all() and min(inside.shape) > 1:
        axes.contour(inside, levels=[0.5], colors=[colour], linewidths=1.2)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_prompts(axes: Any, prompts: PixelPrompts) -> None:
    for label, colour, marker in ((1, "lime", "+"), (0, "red", "x")):
        points = prompts.points_xy[prompts.labels == label]
        axes.plot(points[:, 0], points[:, 1], marker, color=colour, markersize=9, markeredgewidth=2)
    if prompts.box_xyxy is not None:
        x0, y0, x1, y1 = prompts.box_xyxy
        axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="yellow", linewidth=1.2)


def _draw_confidence(axes: Any, item: SegmentedObject, prompted: set[int]) -> None:
    confidence = item.session.confidence
    slices = np.asarray(list(confidence), dtype=int)
    values = np.asarray(list(confidence.values()))
    axes.plot(slices, values, color="black", linewidth=1)
    unsure = values < _REVIEW_BELOW
    axes.plot(slices[~unsure], values[~unsure], ".", color="tab:green", label="sure")
    axes.plot(slices[unsure], values[unsure], ".", color="tab:orange", label="look at it")
    given = [index for index in sorted(prompted) if index in confidence]
    axes.plot(
        given, [confidence[index] for index in given], "o", mfc="none", color="tab:blue", label="prompted"
    )
    axes.set_ylim(0, 1.05)
    axes.set_xlabel(f"slice across {item.session.axis}", fontsize=8)
    axes.set_title("expected overlap (IoU) per slice", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, loc="lower center", ncols=3)


def _centre_ijk(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Slice of the largest area along each axis, (I, J, K); the middle of an empty mask."""
    if not mask.any():
        return np.asarray(mask.shape[::-1]) // 2
    areas = [mask.sum(axis=tuple(n for n in range(3) if n != kept)) for kept in (2, 1, 0)]
    return np.asarray([int(area.argmax()) for area in areas])
