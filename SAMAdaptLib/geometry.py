"""Where voxels lie: index to patient space and back, and the slices of a grid.

Conventions of the whole library (said once, here):

- Voxel arrays are (K, J, I) = (slice, row, column); index triples are (I, J, K), as in an affine.
- An integer index is a voxel centre: voxel 0 reaches from -0.5 to 0.5.
- World is **RAS in millimetres** (right, anterior, superior positive). LPS exists only at the doors.
- A picture of a slice is (rows, columns); its points are (X, Y) = (column, row).

>>> geometry = Geometry((10, 20, 30), np.diag([0.5, 0.5, 2.0, 1.0]))
>>> geometry.ijk_to_ras([[2, 4, 1]]).tolist()
[[1.0, 2.0, 2.0]]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import GeometryError

Axis = Literal["I", "J", "K"]
AXES: tuple[Axis, Axis, Axis] = ("I", "J", "K")
Array = NDArray[np.float64]

LPS_TO_RAS: Array = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Flips the first two world axes; its own inverse."""

_SHEAR_TOLERANCE = 1e-4  # cosine between axes; scanners round direction cosines to about 1e-6


@dataclass(frozen=True, eq=False)
class Geometry:
    """A voxel grid in patient space, without its voxels.

    Args:
        shape_kji: Number of slices, rows, columns; each at least 1.
        affine_ijk_to_ras: 4x4, maps (I, J, K, 1) to RAS mm. May be oblique, flipped, anisotropic or sheared.
        slice_origins_ras: For slices at uneven positions only: the RAS position of voxel (0, 0, k) of every
            slice, (K, 3). Rows and columns then follow `affine_ijk_to_ras`; column three is the mean step.

    Raises:
        GeometryError: A size below 1, a matrix that is not finite or cannot be inverted, slices that go back.
    """

    shape_kji: tuple[int, int, int]
    affine_ijk_to_ras: Array
    slice_origins_ras: Array | None = field(default=None)

    def __post_init__(self) -> None:
        """Copy and check the arrays, so that a Geometry never changes and never lies."""
        shape = tuple(int(n) for n in self.shape_kji)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(
                f"A volume needs at least one slice, row and column, but its size is {shape} (slices, "
                "rows, columns). "
                "Load a volume that holds voxels."
            )
        affine = _read_only(self.affine_ijk_to_ras, (4, 4), "The matrix from voxels to patient space")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise GeometryError(
                "The matrix from voxels to patient space has no inverse (an axis of zero length). "
                "Correct the spacing and directions of the volume."
            )
        object.__setattr__(self, "shape_kji", shape)
        object.__setattr__(self, "affine_ijk_to_ras", affine)
        if self.slice_origins_ras is not None:
            origins = _read_only(self.slice_origins_ras, (shape[0], 3), "The list of slice positions")
            object.__setattr__(self, "slice_origins_ras", origins)
            if shape[0] > 1 and np.any(np.diff(self._slice_depths_mm) <= 0):
                raise GeometryError(
                    "The slices must lie one behind the other, but two of them share a position or go back. "
                    "Sort the slices by position and remove repeated ones."
                )

    @classmethod
    def from_lps(cls, shape_kji: tuple[int, int, int], affine_ijk_to_lps: ArrayLike) -> Geometry:
        """Build from an affine whose world is LPS mm (DICOM, ITK)."""
        return cls(shape_kji, LPS_TO_RAS @ np.asarray(affine_ijk_to_lps, dtype=np.float64))

    @property
    def shape_ijk(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        k, j, i = self.shape_kji
        return (i, j, k)

    @cached_property
    def affine_ras_to_ijk(self) -> Array:
        """The inverse of the affine; for uneven slices only the regular approximation."""
        return np.asarray(np.linalg.inv(self.affine_ijk_to_ras), dtype=np.float64)

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along I, J and K."""
        i, j, k = np.linalg.norm(self.affine_ijk_to_ras[:3, :3], axis=0)
        return (float(i), float(j), float(k))

    @cached_property
    def directions(self) -> Array:
        """Unit vectors of I, J and K in RAS, as columns of a 3x3 matrix."""
        return self.affine_ijk_to_ras[:3, :3] / np.asarray(self.spacing_mm)

    @property
    def is_regular(self) -> bool:
        """Whether one affine says where every voxel lies."""
        return self.slice_origins_ras is None

    @property
    def is_sheared(self) -> bool:
        """Whether two axes are not at right angles (gantry tilt)."""
        cosines = self.directions.T @ self.directions - np.eye(3)
        return bool(np.abs(cosines).max() > _SHEAR_TOLERANCE)

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel; for uneven slices that of the mean slice distance."""
        return float(abs(np.linalg.det(self.affine_ijk_to_ras[:3, :3])))

    @property
    def centre_ras(self) -> Array:
        """Middle of the grid in RAS mm, (3,)."""
        return self.ijk_to_ras([(np.asarray(self.shape_ijk) - 1) / 2])[0]

    @property
    def acquisition_axis(self) -> Axis:
        """Axis across the slices as they were scanned: the one with the coarsest spacing, K where none is.

        A spacing counts as coarser only beyond 1.5 times both others, since nearly isotropic volumes are
        looked at along K.
        """
        spacing = np.asarray(self.spacing_mm)
        coarsest = int(np.argmax(spacing))
        return AXES[coarsest] if spacing[coarsest] > 1.5 * np.sort(spacing)[1] else "K"

    def ijk_to_ras(self, points_ijk: ArrayLike) -> Array:
        """Map index points (N, 3), fractions allowed, to RAS mm (N, 3)."""
        points = _points(points_ijk)
        if self.slice_origins_ras is None:
            return points @ self.affine_ijk_to_ras[:3, :3].T + self.affine_ijk_to_ras[:3, 3]
        in_plane = points[:, :2] @ self.affine_ijk_to_ras[:3, :2].T
        return in_plane + self._origins_at(points[:, 2])

    def ras_to_ijk(self, points_ras: ArrayLike) -> Array:
        """Map RAS mm (N, 3) to fractional index points (N, 3); points outside the grid are extrapolated."""
        points = _points(points_ras)
        if self.slice_origins_ras is None:
            return points @ self.affine_ras_to_ijk[:3, :3].T + self.affine_ras_to_ijk[:3, 3]
        slices_k = self._slice_at_depth(points @ self._normal_ras)
        in_plane = points - self._origins_at(slices_k)
        ij = in_plane @ np.linalg.pinv(self.affine_ijk_to_ras[:3, :2]).T
        return np.column_stack([ij, slices_k])

    def contains_ijk(self, points_ijk: ArrayLike) -> NDArray[np.bool_]:
        """Tell for each index point (N, 3) whether it lies inside a voxel of the grid."""
        points = _points(points_ijk)
        upper = np.asarray(self.shape_ijk) - 0.5
        return np.all((points >= -0.5) & (points < upper), axis=1)

    def transformed(self, matrix_ras: ArrayLike) -> Geometry:
        """Return the grid after a 4x4 transform of the world (a parent transform in a scene)."""
        matrix = np.asarray(matrix_ras, dtype=np.float64)
        origins = self.slice_origins_ras
        if origins is not None:
            origins = origins @ matrix[:3, :3].T + matrix[:3, 3]
        return Geometry(self.shape_kji, matrix @ self.affine_ijk_to_ras, origins)

    def cropped(self, box_kji: tuple[slice, slice, slice]) -> Geometry:
        """Return the grid of `voxels[box_kji]`; steps other than 1 are not meant."""
        starts_kji = [part.indices(n)[0] for part, n in zip(box_kji, self.shape_kji, strict=True)]
        stops_kji = [part.indices(n)[1] for part, n in zip(box_kji, self.shape_kji, strict=True)]
        affine = self.affine_ijk_to_ras.copy()
        affine[:3, 3] = self.ijk_to_ras([starts_kji[::-1]])[0]
        origins = self.slice_origins_ras
        if origins is not None:
            shift_ras = affine[:3, :2] @ np.asarray(starts_kji[:0:-1], dtype=np.float64)
            origins = origins[starts_kji[0] : stops_kji[0]] + shift_ras
        shape = tuple(stop - start for start, stop in zip(starts_kji, stops_kji, strict=True))
        return Geometry((shape[0], shape[1], shape[2]), affine, origins)

    def same_grid(self, other: Geometry, tolerance_mm: float = 0.02) -> bool:
        """Whether both have the same size and every voxel centre agrees within `tolerance_mm`."""
        if self.shape_kji != other.shape_kji:
            return False
        corners = self.corners_ijk()
        if not (self.is_regular and other.is_regular):
            slices_k = np.arange(self.shape_kji[0], dtype=np.float64)
            corners = np.concatenate([np.insert(corners[:4, :2], 2, k, axis=1) for k in slices_k])
        distance = np.linalg.norm(self.ijk_to_ras(corners) - other.ijk_to_ras(corners), axis=1)
        return bool(distance.max() <= tolerance_mm)

    def corners_ijk(self) -> Array:
        """Centres of the eight corner voxels, (8, 3); the first four lie on slice 0."""
        i, j, k = (np.asarray([0, n - 1], dtype=np.float64) for n in self.shape_ijk)
        kk, jj, ii = np.meshgrid(k, j, i, indexing="ij")
        return np.column_stack([ii.ravel(), jj.ravel(), kk.ravel()])

    def plane(self, axis: Axis, index: int) -> SlicePlane:
        """Return the slice `index` across `axis`.

        Raises:
            GeometryError: The axis is not I, J or K, or the index is not a slice of the grid.
        """
        if axis not in AXES:
            raise GeometryError(
                f"A slice lies across axis I, J or K, but '{axis}' was asked for. Choose one of them."
            )
        count = self.shape_ijk[AXES.index(axis)]
        if not 0 <= index < count:
            raise GeometryError(
                f"Slice {index} across {axis} was asked for, but the volume has slices 0 to {count - 1}. "
                "Choose a slice inside the volume."
            )
        return SlicePlane(self, axis, int(index))

    @cached_property
    def _normal_ras(self) -> Array:
        normal = np.cross(self.affine_ijk_to_ras[:3, 0], self.affine_ijk_to_ras[:3, 1])
        normal /= np.linalg.norm(normal)
        return normal if normal @ self.affine_ijk_to_ras[:3, 2] > 0 else -normal

    @cached_property
    def _slice_depths_mm(self) -> Array:
        assert self.slice_origins_ras is not None
        return self.slice_origins_ras @ self._normal_ras

    def _origins_at(self, slices_k: Array) -> Array:
        """Position of voxel (0, 0, k) for fractional k: straight between slices, by the mean step outside."""
        assert self.slice_origins_ras is not None
        last = self.shape_kji[0] - 1
        inside = np.clip(slices_k, 0, last)
        ks = np.arange(last + 1)
        origins = np.column_stack([np.interp(inside, ks, self.slice_origins_ras[:, c]) for c in range(3)])
        return origins + np.outer(slices_k - inside, self.affine_ijk_to_ras[:3, 2])

    def _slice_at_depth(self, depths_mm: Array) -> Array:
        """Fractional slice at a depth along the normal; inverse of `_origins_at` in that direction."""
        known = self._slice_depths_mm
        step_mm = float(self.affine_ijk_to_ras[:3, 2] @ self._normal_ras)
        inside = np.interp(depths_mm, known, np.arange(len(known)))
        below = np.minimum(depths_mm - known[0], 0) / step_mm
        above = np.maximum(depths_mm - known[-1], 0) / step_mm
        return np.asarray(inside + below + above, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class SlicePlane:
    """One slice of a grid, seen as a picture in radiological orientation.

    X runs to the patient's left (to posterior on sagittal slices), Y to posterior (to inferior on coronal and
    sagittal slices), whatever way the voxels are stored: a volume that was flipped or had its axes swapped
    gives the same picture, so a network sees what it was trained on.
    """

    geometry: Geometry
    axis: Axis
    index: int

    @cached_property
    def _layout(self) -> tuple[int, int, int, int]:
        """Index axes shown as X and Y (0 = I, 1 = J, 2 = K), and whether each runs on (+1) or back (-1)."""
        first, second = (n for n in range(3) if AXES[n] != self.axis)
        directions = self.geometry.directions
        normal = np.cross(directions[:, first], directions[:, second])
        x_wanted, y_wanted = _RADIOLOGICAL[int(np.argmax(np.abs(normal)))]

        def fit(x: int, y: int) -> float:
            return float(abs(directions[:, x] @ x_wanted) + abs(directions[:, y] @ y_wanted))

        x_axis, y_axis = (first, second) if fit(first, second) >= fit(second, first) else (second, first)
        x_sign = -1 if directions[:, x_axis] @ x_wanted < 0 else 1
        y_sign = -1 if directions[:, y_axis] @ y_wanted < 0 else 1
        return x_axis, y_axis, x_sign, y_sign

    @property
    def shape_yx(self) -> tuple[int, int]:
        """Rows and columns of the picture."""
        x_axis, y_axis, _, _ = self._layout
        return self.geometry.shape_ijk[y_axis], self.geometry.shape_ijk[x_axis]

    @property
    def spacing_xy_mm(self) -> tuple[float, float]:
        """Pixel distances of the picture along X and Y."""
        x_axis, y_axis, _, _ = self._layout
        return self.geometry.spacing_mm[x_axis], self.geometry.spacing_mm[y_axis]

    def extract(self, voxels_kji: NDArray[Any]) -> NDArray[Any]:
        """Return the picture of this slice as a view: (K, J, I[, C]) -> (rows, columns[, C])."""
        x_axis, y_axis, x_sign, y_sign = self._layout
        picture = self._cut(voxels_kji)
        if y_axis < x_axis:  # the faster of the two stored axes is shown as Y
            picture = picture.swapaxes(0, 1)
        return picture[::y_sign, ::x_sign]

    def insert(self, voxels_kji: NDArray[Any], picture: NDArray[Any]) -> None:
        """Write a picture (rows, columns) into this slice of a (K, J, I) array, in place."""
        self.extract(voxels_kji)[...] = picture

    def ijk_to_xy(self, points_ijk: ArrayLike) -> Array:
        """Drop index points (N, 3) onto the picture: (N, 2) as (X, Y); the distance to the slice is lost."""
        points = _points(points_ijk)
        x_axis, y_axis, x_sign, y_sign = self._layout
        rows, columns = self.shape_yx
        x = points[:, x_axis] if x_sign > 0 else columns - 1 - points[:, x_axis]
        y = points[:, y_axis] if y_sign > 0 else rows - 1 - points[:, y_axis]
        return np.column_stack([x, y])

    def xy_to_ijk(self, points_xy: ArrayLike) -> Array:
        """Lift picture points (N, 2) to index points (N, 3) on this slice."""
        points = np.asarray(points_xy, dtype=np.float64).reshape(-1, 2)
        x_axis, y_axis, x_sign, y_sign = self._layout
        rows, columns = self.shape_yx
        lifted = np.full((len(points), 3), float(self.index))
        lifted[:, x_axis] = points[:, 0] if x_sign > 0 else columns - 1 - points[:, 0]
        lifted[:, y_axis] = points[:, 1] if y_sign > 0 else rows - 1 - points[:, 1]
        return lifted

    def ras_to_xy(self, points_ras: ArrayLike) -> Array:
        """Map RAS mm (N, 3) to picture points (N, 2)."""
        return self.ijk_to_xy(self.geometry.ras_to_ijk(points_ras))

    def xy_to_ras(self, points_xy: ArrayLike) -> Array:
        """Map picture points (N, 2) to RAS mm (N, 3) on this slice."""
        return self.geometry.ijk_to_ras(self.xy_to_ijk(points_xy))

    def _cut(self, voxels_kji: NDArray[Any]) -> NDArray[Any]:
        where: list[Any] = [slice(None)] * 3
        where[2 - AXES.index(self.axis)] = self.index
        return voxels_kji[tuple(where)]


_RADIOLOGICAL: dict[int, tuple[Array, Array]] = {
    0: (np.array([0.0, -1.0, 0.0]), np.array([0.0, 0.0, -1.0])),  # sagittal: X posterior, Y inferior
    1: (np.array([-1.0, 0.0, 0.0]), np.array([0.0, 0.0, -1.0])),  # coronal: X left, Y inferior
    2: (np.array([-1.0, 0.0, 0.0]), np.array([0.0, -1.0, 0.0])),  # axial: X left, Y posterior
}
"""Wanted RAS directions of X and Y by the axis (R, A, S) that the slice normal is nearest to."""


def _points(points: ArrayLike) -> Array:
    return np.asarray(points, dtype=np.float64).reshape(-1, 3)


def _read_only(values: ArrayLike, shape: tuple[int, ...], what: str) -> Array:
    array = np.array(values, dtype=np.float64)
    if array.shape != shape or not np.all(np.isfinite(array)):
        raise GeometryError(
            f"{what} must hold {' x '.join(map(str, shape))} finite numbers, but holds {array.shape} "
            "or numbers that are not finite. Check the header of the volume."
        )
    array.setflags(write=False)
    return array
