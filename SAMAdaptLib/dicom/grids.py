"""Masks on the grid of the series: checked, moved there from another grid, numbered without holes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from SAMAdaptLib.geometry import Geometry

from .segments import Segment

Masks = NDArray[Any] | Sequence[NDArray[Any]]
"""A label map (K, J, I), or one boolean mask (K, J, I) per segment where segments may overlap."""


@dataclass(frozen=True, eq=False)
class NumberedMasks:
    """Segments that hold voxels, numbered 1..n, ready to be written.

    Attributes:
        segments: Those that are written, in the order of their numbers.
        pixels: (K, J, I) uint8 or uint16 with the numbers, or (K, J, I, n) uint8 where segments overlap.
        voxel_counts: Voxels of every written segment.
        dropped: Names of segments without a voxel.
    """

    segments: tuple[Segment, ...]
    pixels: NDArray[Any]
    voxel_counts: tuple[int, ...]
    dropped: tuple[str, ...]


def is_label_map(masks: Masks) -> bool:
    """Whether the masks came as one label map."""
    return isinstance(masks, np.ndarray)


def values_in(labels: NDArray[Any]) -> dict[int, int]:
    """Count the voxels of every label but 0; slice by slice, since counting casts to 64 bits."""
    counts = np.zeros(int(labels.max(initial=0)) + 1, dtype=np.int64)
    for picture in labels:
        found = np.bincount(picture.reshape(-1).astype(np.intp, copy=False))
        counts[: len(found)] += found
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts) if value}


def moved_to_grid(mask: NDArray[Any], geometry: Geometry, wanted: Geometry) -> NDArray[Any]:
    """Sample a mask at the voxel centres of another grid, nearest voxel, 0 outside.

    Exact where both grids have the same voxels in another order (flipped or permuted axes).
    """
    moved = np.zeros(wanted.shape_kji, dtype=mask.dtype)
    rows, columns = np.indices(wanted.shape_kji[1:])
    for k in range(wanted.shape_kji[0]):
        points_ijk = np.column_stack([columns.ravel(), rows.ravel(), np.full(rows.size, k)])
        source_ijk = geometry.ras_to_ijk(wanted.ijk_to_ras(points_ijk))
        inside = geometry.contains_ijk(source_ijk)
        i, j, slice_k = np.rint(source_ijk[inside]).astype(np.intp).T
        moved[k].reshape(-1)[inside] = mask[slice_k, j, i]
    return moved


def same_voxels(geometry: Geometry, wanted: Geometry) -> bool:
    """Whether every voxel centre of `wanted` is one of `geometry`, within 0.02 of a voxel."""
    if geometry.same_grid(wanted):
        return True
    centres_ijk = np.array([[0, 0, k] for k in range(wanted.shape_kji[0])], dtype=np.float64)
    points_ijk = np.concatenate([wanted.corners_ijk(), centres_ijk])
    source_ijk = geometry.ras_to_ijk(wanted.ijk_to_ras(points_ijk))
    on_centres = np.abs(source_ijk - np.rint(source_ijk)).max() <= 0.02
    same_size = sorted(geometry.shape_kji) == sorted(wanted.shape_kji)
    return bool(on_centres and same_size and geometry.contains_ijk(source_ijk).all())


def numbered(masks: Masks, segments: Sequence[Segment]) -> NumberedMasks:
    """Leave out segments without voxels and number the others 1..n in the order of the list."""
    if isinstance(masks, np.ndarray):
        return _numbered_labels(masks, segments)
    counts = [int(np.count_nonzero(mask)) for mask in masks]
    kept = [n for n, count in enumerate(counts) if count]
    return NumberedMasks(
        segments=tuple(segments[n] for n in kept),
        pixels=_combined([masks[n] for n in kept]),
        voxel_counts=tuple(counts[n] for n in kept),
        dropped=tuple(segments[n].name for n, count in enumerate(counts) if not count),
    )


def _numbered_labels(labels: NDArray[Any], segments: Sequence[Segment]) -> NumberedMasks:
    counts = values_in(labels)
    kept = [segment for segment in segments if counts.get(segment.label_value)]
    table = np.zeros(int(max(counts, default=0)) + 1, dtype=_label_type(len(kept)))
    for number, segment in enumerate(kept, start=1):
        table[segment.label_value] = number
    return NumberedMasks(
        segments=tuple(kept),
        pixels=np.stack([table[picture] for picture in labels]),
        voxel_counts=tuple(counts[segment.label_value] for segment in kept),
        dropped=tuple(segment.name for segment in segments if not counts.get(segment.label_value)),
    )


def _combined(masks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One label map where no voxel is claimed twice, which is far smaller; else one channel per mask."""
    if any(overlap_in(masks, k) for k in range(len(masks[0]) if masks else 0)):
        return np.moveaxis(np.stack([mask.astype(bool) for mask in masks]), 0, -1).astype(np.uint8)
    labels = np.zeros(masks[0].shape if masks else (0, 0, 0), dtype=_label_type(len(masks)))
    for number, mask in enumerate(masks, start=1):
        labels[mask.astype(bool)] = number
    return labels


def overlap_in(masks: Sequence[NDArray[Any]], k: int) -> bool:
    """Whether two masks claim the same voxel of slice k."""
    claimed = np.zeros(masks[0].shape[1:], dtype=bool)
    for mask in masks:
        picture = mask[k].astype(bool)
        if np.any(claimed & picture):
            return True
        claimed |= picture
    return False


def _label_type(count: int) -> type[np.uint8 | np.uint16]:
    return np.uint8 if count <= 255 else np.uint16
