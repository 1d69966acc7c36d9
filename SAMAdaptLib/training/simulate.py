"""A patient, exact user: where one would click and draw, given the truth.

The same rules make prompts in training and in the benchmarks, so that both measure one thing. All points
are in pixels of the mask they came from, (X, Y), an integer being the middle of a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Click:
    """One click; `positive` says that the object should be there."""

    xy: tuple[float, float]
    positive: bool


def depth(mask: Mask) -> NDArray[np.float64]:
    """Return each pixel's distance to the outside of the mask; the picture's border counts as outside."""
    result: NDArray[np.float64] = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return result


def first_click(mask: Mask) -> Click:
    """Click at the deepest point of the object (the first in reading order among equals)."""
    y, x = np.unravel_index(int(depth(mask).argmax()), mask.shape)
    return Click((float(x), float(y)), True)


def random_click(mask: Mask, rng: np.random.Generator) -> Click:
    """Click anywhere inside, but not on the rim: at least 30 % as deep as the deepest point of the object."""
    inside = depth(mask)
    ys, xs = np.nonzero(inside >= max(0.3 * inside.max(), 1.0))
    k = int(rng.integers(len(xs)))
    return Click((float(xs[k]), float(ys[k])), True)


def next_click(truth: Mask, predicted: Mask) -> Click | None:
    """Click at the deepest point of the largest connected error, or give None where there is none."""
    wrong = truth != predicted
    if not wrong.any():
        return None
    # A missed and a wrongly added region that touch are two errors.
    parts = ndimage.label(truth & wrong)[0].astype(np.int64)
    added = ndimage.label(predicted & wrong)[0]
    parts = np.where(added > 0, added + parts.max(), parts)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    worst = parts == sizes.argmax()
    xy = first_click(worst).xy
    return Click(xy, bool(truth[int(xy[1]), int(xy[0])]))


def box_of(mask: Mask) -> NDArray[np.float32]:
    """Return the tight box (x0, y0, x1, y1) of the middles of the outermost pixels."""
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max(), ys.max()], np.float32)


def jittered_box(mask: Mask, share: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the tight box with each edge moved by up to `share` of the box's side, inside the picture."""
    x0, y0, x1, y1 = box_of(mask)
    sides = np.array([x1 - x0, y1 - y0, x1 - x0, y1 - y0]) + 1
    moved = np.array([x0, y0, x1, y1]) + rng.uniform(-share, share, 4) * sides
    rows, columns = mask.shape
    limits = np.array([columns, rows, columns, rows]) - 1
    clipped = np.clip(moved, 0, limits)
    return np.concatenate(
        [np.minimum(clipped[:2], clipped[2:]), np.maximum(clipped[:2], clipped[2:])]
    ).astype(np.float32)


def dice(truth: Mask, predicted: Mask) -> float:
    """Return the Dice overlap; two empty masks agree."""
    total = int(np.count_nonzero(truth)) + int(np.count_nonzero(predicted))
    return 2.0 * int(np.count_nonzero(truth & predicted)) / total if total else 1.0
