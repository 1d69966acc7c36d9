"""Cleaning masks by what a user would call noise: parts and holes, measured in mm."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .geometry import Geometry


def without_specks(
    mask_yx: NDArray[Any], keep_xy: NDArray[np.float64], smallest_share: float = 0.1
) -> NDArray[np.bool_]:
    """Remove small parts of a mask on one slice.

    Args:
        mask_yx: (rows, columns), anything but 0 is inside.
        keep_xy: (N, 2) points as (X, Y) whose part stays, however small.
        smallest_share: Parts below this share of the largest part's area go.

    Returns:
        (rows, columns) bool.
    """
    parts, count = ndimage.label(mask_yx)
    if count < 2:
        return np.asarray(mask_yx, dtype=bool)
    areas = np.bincount(parts.ravel())
    areas[0] = 0
    stays = areas >= smallest_share * areas.max()
    stays[0] = False
    rows, columns = mask_yx.shape
    x, y = (np.rint(np.asarray(keep_xy, dtype=np.float64).reshape(-1, 2)).astype(int)).T
    inside = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
    pointed = parts[y[inside], x[inside]]
    stays[pointed[pointed > 0]] = True
    return np.asarray(stays[parts])


def without_small_parts(mask_kji: NDArray[Any], geometry: Geometry, smallest_mm3: float) -> NDArray[np.bool_]:
    """Remove parts of a mask (K, J, I) whose volume is below `smallest_mm3`; neighbours share a face."""
    parts, count = ndimage.label(mask_kji)
    if count == 0:
        return np.zeros(mask_kji.shape, dtype=bool)
    stays = np.bincount(parts.ravel()) * geometry.voxel_volume_mm3 >= smallest_mm3
    stays[0] = False
    return np.asarray(stays[parts])


def innermost_xy(mask_yx: NDArray[Any]) -> tuple[float, float]:
    """Return the pixel (X, Y) of a mask (rows, columns), not empty, that lies farthest from its border."""
    depth = ndimage.distance_transform_edt(np.pad(np.asarray(mask_yx, dtype=bool), 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(x), float(y)
