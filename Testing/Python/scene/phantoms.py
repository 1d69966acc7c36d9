"""Analytic truth for the scene ring: grids, transforms and an ellipsoid in RAS mm, all in plain NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rotation(degrees_r: float, degrees_a: float, degrees_s: float) -> Array:
    a, b, c = np.radians([degrees_r, degrees_a, degrees_s])
    about_r = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_a = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_s = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_s @ about_a @ about_r


def affine(
    directions: Array, spacing: tuple[float, float, float], origin: tuple[float, float, float]
) -> Array:
    matrix = np.eye(4)
    matrix[:3, :3] = directions * np.asarray(spacing)
    matrix[:3, 3] = origin
    return matrix


_SHEAR = np.array([[1, 0, 0.0], [0, 1, 0.35], [0, 0, 1]])

GRIDS: dict[str, Array] = {
    "identity": np.eye(4),
    "anisotropic": affine(np.eye(3), (0.7, 0.9, 3.0), (-20, 31, -7)),
    "oblique": affine(rotation(15, -25, 40), (0.8, 0.8, 1.5), (5, -60, 120)),
    "flipped": affine(np.diag([-1.0, -1.0, -1.0]), (1.1, 0.6, 2.0), (30, 30, 30)),
    "left-handed oblique": affine(
        rotation(-60, 10, 5) @ np.diag([1.0, 1.0, -1.0]), (0.5, 1.3, 2.5), (1, 2, 3)
    ),
    "sheared": affine(_SHEAR, (0.9, 0.9, 2.2), (-4, 8, 15)),
    "permuted": affine(np.array([[0, 0, 1.0], [-1, 0, 0], [0, 1, 0]]), (0.9, 1.4, 0.8), (9, 9, 9)),
}

_RIGID = affine(rotation(30, 5, -70), (1, 1, 1), (12, -9, 33))
_STRETCH = affine(rotation(0, 45, 10), (1.4, 0.75, 1.1), (-3, 14, 2))

TRANSFORMS: dict[str, tuple[Array, ...]] = {
    "none": (),
    "rigid": (_RIGID,),
    "stretched": (_STRETCH,),
    "nested": (_RIGID, _STRETCH),
}
"""Matrices to the world, outermost first."""


def composed(matrices: tuple[Array, ...]) -> Array:
    matrix = np.eye(4)
    for factor in matrices:
        matrix = matrix @ factor
    return matrix


def apply(matrix: Array, points: Array) -> Array:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def voxel_centres_ras(shape_kji: tuple[int, int, int], ijk_to_ras: Array) -> Array:
    """World positions of all voxels, (K, J, I, 3)."""
    k, j, i = np.indices(shape_kji)
    return apply(ijk_to_ras, np.stack([i, j, k], axis=-1).astype(np.float64))


def inside_ellipsoid(points_ras: Array, centre_ras: Array, axes_ras: Array) -> NDArray[np.bool_]:
    """Columns of `axes_ras` are the half axes: inside are coordinates in them of norm at most 1."""
    local = (points_ras - centre_ras) @ np.linalg.inv(axes_ras).T
    return np.sum(local**2, axis=-1) <= 1.0


def ellipsoid(shape_kji: tuple[int, int, int], ijk_to_ras: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """An ellipsoid off the middle of the grid: centre, half axes (columns), voxels (K, J, I)."""
    sizes = np.asarray(shape_kji[::-1], dtype=np.float64)
    centre = apply(ijk_to_ras, (sizes - 1) * np.array([0.55, 0.45, 0.5]))
    axes = ijk_to_ras[:3, :3] @ rotation(20, 10, 0) @ np.diag(sizes * np.array([0.36, 0.3, 0.33]))
    return centre, axes, inside_ellipsoid(voxel_centres_ras(shape_kji, ijk_to_ras), centre, axes)
