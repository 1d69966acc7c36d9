"""A stack of slices to a Geometry: exact positions, RAS, tilt and uneven spacing kept."""

from __future__ import annotations

import numpy as np

from SAMAdaptLib.geometry import LPS_TO_RAS, Geometry

from .slices import Array
from .stacking import Stack

REGULAR_WITHIN_MM = 0.01
"""Positions that agree this well with equal steps count as regular; it is the rounding in headers."""

_TILT_DEGREES = 0.05


def geometry_of(stack: Stack, shape_ji: tuple[int, int]) -> Geometry:
    """Place the voxels of a stack.

    A tilted gantry gives a sheared affine, whose third column is the step between slices and not the normal.
    Slices that do not lie on equal steps keep their own positions (`Geometry.slice_origins_ras`).

    Args:
        stack: Slices with k ascending.
        shape_ji: Rows and columns.
    """
    positions = stack.positions_lps
    affine = np.eye(4)
    affine[:3, 0] = stack.directions_lps[0] * stack.spacing_ji_mm[1]
    affine[:3, 1] = stack.directions_lps[1] * stack.spacing_ji_mm[0]
    affine[:3, 2] = step_lps(stack)
    affine[:3, 3] = positions[0]
    expected = positions[0] + np.outer(np.arange(len(positions)), affine[:3, 2])
    shape = (len(positions), *shape_ji)
    if np.linalg.norm(positions - expected, axis=1).max() <= REGULAR_WITHIN_MM:
        return Geometry.from_lps(shape, affine)
    return Geometry(shape, LPS_TO_RAS @ affine, positions @ LPS_TO_RAS[:3, :3])


def step_lps(stack: Stack) -> Array:
    """Return the mean step from slice to slice (3,); for one slice the normal times its thickness."""
    positions = stack.positions_lps
    if len(positions) > 1:
        return np.asarray((positions[-1] - positions[0]) / (len(positions) - 1), dtype=np.float64)
    return stack.directions_lps[2] * (stack.slices[0].thickness_mm or 1.0)


def tilt_degrees(stack: Stack) -> float:
    """Return the angle between the slice normal and the way from slice to slice; 0 for a straight stack."""
    step = step_lps(stack)
    sideways = step - (step @ stack.directions_lps[2]) * stack.directions_lps[2]
    angle = float(np.degrees(np.arctan2(np.linalg.norm(sideways), step @ stack.directions_lps[2])))
    return angle if angle > _TILT_DEGREES else 0.0
