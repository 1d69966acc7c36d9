"""What the user points at: points, boxes, scribbles and masks, in RAS mm, and their place on a slice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import PromptError
from .geometry import AXES, Axis, Geometry

Triple = tuple[float, float, float]
_IDENTITY: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
_FLAT_SLICES = 1.5  # a box thinner than this many slices was drawn on one slice
_SCRIBBLE_POINTS = 8  # per slice; more points of one stroke add time and no information to a SAM


@dataclass(frozen=True)
class Point:
    """A click: `positive` belongs to the object, negative does not."""

    point_ras: Triple
    positive: bool = True

    def __post_init__(self) -> None:
        """Take any three numbers, so that arrays may be given."""
        object.__setattr__(self, "point_ras", _triple(self.point_ras))


@dataclass(frozen=True)
class Box:
    """A box around the object, with edges along its own directions.

    Args:
        centre_ras: Middle in RAS mm.
        size_mm: Edge lengths; 0 across the slice for a box drawn on one slice.
        directions: The three unit edge vectors in RAS, as columns of a 3x3 matrix, row by row.
    """

    centre_ras: Triple
    size_mm: Triple
    directions: tuple[float, ...] = _IDENTITY

    def __post_init__(self) -> None:
        """Take arrays, refuse what has no direction."""
        object.__setattr__(self, "centre_ras", _triple(self.centre_ras))
        object.__setattr__(self, "size_mm", tuple(abs(v) for v in _triple(self.size_mm)))
        object.__setattr__(self, "directions", tuple(float(v) for v in np.ravel(self.directions)))
        if len(self.directions) != 9 or abs(np.linalg.det(self._matrix)) < 1e-6:
            raise PromptError(
                "A box needs three edge directions that span space, but its directions do not. Draw the "
                "box again."
            )

    @classmethod
    def from_corners(cls, corner_ras: ArrayLike, opposite_ras: ArrayLike) -> Box:
        """Build a box along R, A and S from two opposite corners in RAS mm."""
        a, b = np.asarray(_triple(corner_ras)), np.asarray(_triple(opposite_ras))
        return cls(tuple((a + b) / 2), tuple(np.abs(b - a)))

    @property
    def _matrix(self) -> NDArray[np.float64]:
        return np.asarray(self.directions).reshape(3, 3)

    def corners_ras(self) -> NDArray[np.float64]:
        """The eight corners in RAS mm, (8, 3)."""
        signs = np.stack(np.meshgrid([-0.5, 0.5], [-0.5, 0.5], [-0.5, 0.5], indexing="ij"), axis=-1).reshape(
            -1, 3
        )
        return np.asarray(self.centre_ras) + signs * np.asarray(self.size_mm) @ self._matrix.T

    def bounds_ijk(self, geometry: Geometry) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Smallest and largest index (I, J, K) over the corners: the box as the voxels see it."""
        corners = geometry.ras_to_ijk(self.corners_ras())
        return corners.min(axis=0), corners.max(axis=0)


@dataclass(frozen=True)
class Scribble:
    """A stroke through (`positive`) or beside (negative) the object: RAS points in drawing order."""

    points_ras: tuple[Triple, ...]
    positive: bool = True

    def __post_init__(self) -> None:
        """Take an (N, 3) array, refuse an empty stroke."""
        points = tuple(_triple(p) for p in self.points_ras)
        if not points:
            raise PromptError("A scribble needs at least one point, but none came. Draw the stroke again.")
        object.__setattr__(self, "points_ras", points)


@dataclass(frozen=True)
class MaskPrompt:
    """A segment used as prompt: voxels of the volume, as run lengths inside their bounding box.

    Args:
        shape_kji: Size of the volume.
        start_kji: First voxel of the bounding box.
        size_kji: Size of the bounding box.
        runs: Lengths of alternating runs of 0 and 1 over the box in (K, J, I) order, starting with 0.
    """

    shape_kji: tuple[int, int, int]
    start_kji: tuple[int, int, int]
    size_kji: tuple[int, int, int]
    runs: tuple[int, ...]

    @classmethod
    def from_array(cls, mask_kji: NDArray[Any]) -> MaskPrompt:
        """Encode a mask (K, J, I); every value other than 0 counts.

        Raises:
            PromptError: The mask is empty.
        """
        filled = np.asarray(mask_kji) != 0
        where = [np.flatnonzero(filled.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
        if where[0].size == 0:
            raise PromptError(
                "A segment used as prompt must hold voxels, but it is empty. Paint something first."
            )
        start = tuple(int(index[0]) for index in where)
        size = tuple(int(index[-1]) + 1 - first for index, first in zip(where, start, strict=True))
        box = tuple(slice(first, first + n) for first, n in zip(start, size, strict=True))
        flat = np.concatenate([[False], filled[box].ravel(), [True]])
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        edges = edges[edges < flat.size - 2]
        runs = np.diff(np.concatenate([[0], edges, [flat.size - 2]]))
        k, j, i = filled.shape
        return cls(
            (k, j, i), (start[0], start[1], start[2]), (size[0], size[1], size[2]), tuple(map(int, runs))
        )

    def to_array(self) -> NDArray[np.bool_]:
        """Return the mask (K, J, I)."""
        mask = np.zeros(self.shape_kji, dtype=bool)
        values = np.arange(len(self.runs)) % 2 == 1
        box = tuple(slice(first, first + n) for first, n in zip(self.start_kji, self.size_kji, strict=True))
        mask[box] = np.repeat(values, self.runs).reshape(self.size_kji)
        return mask


Prompt = Point | Box | Scribble | MaskPrompt
_KINDS: dict[str, type[Any]] = {"point": Point, "box": Box, "scribble": Scribble, "mask": MaskPrompt}


@dataclass(frozen=True, eq=False)
class PixelPrompts:
    """Prompts on one slice, in pixels of its picture.

    Args:
        points_xy: (N, 2) float32 as (X, Y); an integer is a pixel centre.
        labels: (N,) int64, 1 inside the object, 0 outside.
        box_xyxy: (4,) float32 or None; edges of the box in the same pixels.
        mask: (rows, columns) bool or None.
    """

    points_xy: NDArray[np.float32]
    labels: NDArray[np.int64]
    box_xyxy: NDArray[np.float32] | None = None
    mask: NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls,
        points_xy: ArrayLike = (),
        labels: ArrayLike = (),
        box_xyxy: ArrayLike | None = None,
        mask: NDArray[Any] | None = None,
    ) -> PixelPrompts:
        """Build from anything that NumPy takes."""
        return cls(
            np.asarray(points_xy, dtype=np.float32).reshape(-1, 2),
            np.asarray(labels, dtype=np.int64).reshape(-1),
            None if box_xyxy is None else np.asarray(box_xyxy, dtype=np.float32).reshape(4),
            None if mask is None else np.asarray(mask, dtype=bool),
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing was pointed at."""
        return len(self.labels) == 0 and self.box_xyxy is None and self.mask is None


@dataclass(frozen=True)
class Prompts:
    """All prompts of one object, in the order in which they were given; immutable and hashable."""

    items: tuple[Prompt, ...] = ()

    def __iter__(self) -> Iterator[Prompt]:
        """Iterate in the order in which they were given."""
        return iter(self.items)

    def __len__(self) -> int:
        """Count the prompts."""
        return len(self.items)

    def with_added(self, *prompts: Prompt) -> Prompts:
        """Return a copy with more prompts at the end."""
        return Prompts(self.items + prompts)

    def without(self, index: int) -> Prompts:
        """Return a copy without the prompt at `index`."""
        return Prompts(self.items[:index] + self.items[index + 1 :])

    def kinds(self) -> set[str]:
        """Names of the kinds used: "point", "box", "scribble", "mask"."""
        return {name for name, kind in _KINDS.items() for item in self.items if isinstance(item, kind)}

    def check(self, geometry: Geometry) -> None:
        """Refuse a prompt that lies outside the grid, or a mask of another size.

        Raises:
            PromptError: Names the prompt and where the volume lies.
        """
        for number, prompt in enumerate(self.items, start=1):
            _check(prompt, number, geometry)

    def natural_axis(self, geometry: Geometry) -> Axis:
        """Axis across the slices that were prompted: that of a flat box, else the acquisition axis."""
        for prompt in self.items:
            if isinstance(prompt, Box):
                lower, upper = prompt.bounds_ijk(geometry)
                thin = int(np.argmin(upper - lower))
                if (upper - lower)[thin] < _FLAT_SLICES:
                    return AXES[thin]
        return geometry.acquisition_axis

    def span(self, geometry: Geometry, axis: Axis) -> range | None:
        """Slices that the thick boxes reach over: the object is inside them. None without a thick box."""
        spans = [
            _slices_of(prompt, geometry, axis)
            for prompt in self.items
            if isinstance(prompt, Box) and _thickness(prompt, geometry, axis) >= _FLAT_SLICES
        ]
        return range(min(s.start for s in spans), max(s.stop for s in spans)) if spans else None

    def on_slices(self, geometry: Geometry, axis: Axis) -> dict[int, PixelPrompts]:
        """Project onto the slices across `axis`: every prompt goes to the slice it lies on.

        A thick box goes to its middle slice (`span` tells how far it reaches), a scribble to each slice it
        passes, a mask to each slice it fills. Two boxes on one slice become the box around both.

        Raises:
            PromptError: A prompt lies outside the volume, or a box has no area on its slice.
        """
        return {index: rounds[-1] for index, rounds in self.rounds_on_slices(geometry, axis).items()}

    def rounds_on_slices(self, geometry: Geometry, axis: Axis) -> dict[int, list[PixelPrompts]]:
        """Project as `on_slices`, keeping the order: each round holds the prompts of its slice up to then."""
        self.check(geometry)
        rounds: dict[int, list[PixelPrompts]] = {}
        for prompt in self.items:
            for index, pixels in _project(prompt, geometry, axis):
                earlier = rounds.setdefault(index, [])
                earlier.append(_joined(earlier[-1], pixels) if earlier else pixels)
        return rounds


def prompts_to_json(prompts: Prompts) -> list[dict[str, Any]]:
    """Return plain lists and numbers, to be written as JSON."""
    names = {kind: name for name, kind in _KINDS.items()}
    return [{"kind": names[type(prompt)], **vars(prompt)} for prompt in prompts]


def prompts_from_json(entries: Any) -> Prompts:
    """Read what `prompts_to_json` wrote; a box may also be given by two corners.

    Raises:
        PromptError: An entry that is not a prompt, with its number and what it should hold.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise PromptError(
            'Prompts must be a list of entries such as {"kind": "point", "point_ras": [0, 0, 0]}.'
        )
    return Prompts(tuple(_prompt_from_json(entry, number) for number, entry in enumerate(entries, start=1)))


def _prompt_from_json(entry: Any, number: int) -> Prompt:
    if not isinstance(entry, dict) or entry.get("kind") not in _KINDS:
        raise PromptError(
            f"Prompt {number} must name its kind ({', '.join(_KINDS)}), but is {str(entry)[:80]}. "
            'Write for example {"kind": "point", "point_ras": [10, 20, 30], "positive": true}.'
        )
    values = {key: _tuples(value) for key, value in entry.items() if key != "kind"}
    try:
        if "corners_ras" in values:
            return Box.from_corners(*values["corners_ras"])
        prompt: Prompt = _KINDS[entry["kind"]](**values)
    except (TypeError, ValueError) as error:
        wanted = ", ".join(_KINDS[entry["kind"]].__dataclass_fields__)
        raise PromptError(
            f"Prompt {number} ({entry['kind']}) should hold {wanted}, but holds "
            f"{', '.join(values) or 'nothing'}. "
            "Correct the entry."
        ) from error
    return prompt


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list | tuple) else value


def _triple(values: ArrayLike) -> Triple:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (3,) or not np.isfinite(array).all():
        raise PromptError(
            f"A position needs three finite numbers (R, A, S in mm), but came as "
            f"{np.asarray(values).tolist()}. "
            "Place the prompt again."
        )
    return (float(array[0]), float(array[1]), float(array[2]))


def _check(prompt: Prompt, number: int, geometry: Geometry) -> None:
    if isinstance(prompt, MaskPrompt):
        if prompt.shape_kji != geometry.shape_kji:
            raise PromptError(
                f"Prompt {number} is a mask of {prompt.shape_kji} voxels, but the volume has "
                f"{geometry.shape_kji}. "
                "Resample the segment to the volume first."
            )
        return
    if isinstance(prompt, Box):
        lower, upper = prompt.bounds_ijk(geometry)
        inside = bool(np.all(upper >= -0.5) and np.all(lower < np.asarray(geometry.shape_ijk) - 0.5))
        where = prompt.centre_ras
    else:
        points = [prompt.point_ras] if isinstance(prompt, Point) else list(prompt.points_ras)
        contained = geometry.contains_ijk(geometry.ras_to_ijk(points))
        inside = bool(contained.all())
        where = points[int(np.argmin(contained))]
    if not inside:
        corners = geometry.ijk_to_ras(geometry.corners_ijk())
        reach = "; ".join(
            f"{name} {low:.1f} to {high:.1f}"
            for name, low, high in zip("RAS", corners.min(axis=0), corners.max(axis=0), strict=True)
        )
        position = ", ".join(f"{v:.1f}" for v in where)
        raise PromptError(
            f"Prompt {number} ({type(prompt).__name__.lower()}) lies outside the volume, at RAS "
            f"({position}) mm; "
            f"the volume reaches over {reach} mm. Place it on the image."
        )


def _thickness(box: Box, geometry: Geometry, axis: Axis) -> float:
    lower, upper = box.bounds_ijk(geometry)
    return float((upper - lower)[AXES.index(axis)])


def _slices_of(box: Box, geometry: Geometry, axis: Axis) -> range:
    lower, upper = (bound[AXES.index(axis)] for bound in box.bounds_ijk(geometry))
    last = geometry.shape_ijk[AXES.index(axis)] - 1
    return range(
        int(np.clip(np.ceil(lower - 1e-6), 0, last)), int(np.clip(np.floor(upper + 1e-6), 0, last)) + 1
    )


def _project(prompt: Prompt, geometry: Geometry, axis: Axis) -> Iterable[tuple[int, PixelPrompts]]:
    if isinstance(prompt, MaskPrompt):
        mask = prompt.to_array()
        across = tuple(n for n in range(3) if n != 2 - AXES.index(axis))
        for filled in np.flatnonzero(mask.any(axis=across)).tolist():
            yield filled, PixelPrompts.of(mask=geometry.plane(axis, filled).extract(mask))
    elif isinstance(prompt, Box):
        yield _box_on_slice(prompt, geometry, axis)
    else:
        points = (
            [prompt.point_ras] if isinstance(prompt, Point) else _spread(prompt.points_ras, geometry, axis)
        )
        label = int(prompt.positive)
        for index, group in _by_slice(geometry.ras_to_ijk(points), geometry, axis).items():
            xy = geometry.plane(axis, index).ijk_to_xy(group)
            yield index, PixelPrompts.of(xy, [label] * len(xy))


def _box_on_slice(box: Box, geometry: Geometry, axis: Axis) -> tuple[int, PixelPrompts]:
    lower, upper = box.bounds_ijk(geometry)
    count = geometry.shape_ijk[AXES.index(axis)]
    index = int(np.clip(np.rint((lower + upper)[AXES.index(axis)] / 2), 0, count - 1))
    plane = geometry.plane(axis, index)
    corners = plane.ijk_to_xy([lower, upper])
    rows, columns = plane.shape_yx
    limits = np.asarray([columns - 0.5, rows - 0.5])
    x0, y0 = np.clip(corners.min(axis=0), -0.5, limits)
    x1, y1 = np.clip(corners.max(axis=0), -0.5, limits)
    if min(x1 - x0, y1 - y0) < 0.5:
        raise PromptError(
            f"A box needs some width and height, but is {x1 - x0:.1f} by {y1 - y0:.1f} pixels on slice "
            f"{index}. "
            "Draw it around the object."
        )
    return index, PixelPrompts.of(box_xyxy=[x0, y0, x1, y1])


def _by_slice(
    points_ijk: NDArray[np.float64], geometry: Geometry, axis: Axis
) -> dict[int, NDArray[np.float64]]:
    column = AXES.index(axis)
    last = geometry.shape_ijk[column] - 1
    indices = np.clip(np.rint(points_ijk[:, column]), 0, last).astype(int)
    return {int(index): points_ijk[indices == index] for index in dict.fromkeys(indices.tolist())}


def _spread(points_ras: tuple[Triple, ...], geometry: Geometry, axis: Axis) -> list[Triple]:
    """Take evenly spaced points of a stroke, at most `_SCRIBBLE_POINTS` on each slice that it passes."""
    points = np.asarray(points_ras)
    column = AXES.index(axis)
    indices = np.rint(geometry.ras_to_ijk(points)[:, column])
    chosen: list[Triple] = []
    for index in dict.fromkeys(indices.tolist()):
        members = np.flatnonzero(indices == index)
        picked = members[np.unique(np.linspace(0, len(members) - 1, _SCRIBBLE_POINTS).round().astype(int))]
        chosen.extend(points_ras[int(n)] for n in picked)
    return chosen


def _joined(first: PixelPrompts, second: PixelPrompts) -> PixelPrompts:
    box = first.box_xyxy if second.box_xyxy is None else second.box_xyxy
    if first.box_xyxy is not None and second.box_xyxy is not None:
        box = np.concatenate(
            [
                np.minimum(first.box_xyxy[:2], second.box_xyxy[:2]),
                np.maximum(first.box_xyxy[2:], second.box_xyxy[2:]),
            ]
        )
    mask = first.mask if second.mask is None else second.mask
    if first.mask is not None and second.mask is not None:
        mask = first.mask | second.mask
    return replace(
        first,
        points_xy=np.concatenate([first.points_xy, second.points_xy]),
        labels=np.concatenate([first.labels, second.labels]),
        box_xyxy=box,
        mask=mask,
    )
