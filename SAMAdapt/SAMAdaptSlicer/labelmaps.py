"""Pieces of masks between NumPy arrays and Slicer's oriented images.

A grid here is unbounded: index (I, J, K) = (0, 0, 0) is the first voxel of the volume, a piece may start at a
negative index, and only the voxels of the piece exist in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from .transforms import matrix_to_numpy, matrix_to_vtk

Array = NDArray[np.float64]
BoxKJI = tuple[slice, slice, slice]
"""Start and stop along K, J and I, as `array[box]` takes them."""

_SAME_VOXEL = 0.01  # voxels; two lattices that agree so far share their voxels


@dataclass(frozen=True, eq=False)
class Patch:
    """A piece of a mask.

    Args:
        voxels: (K, J, I) uint8, 0 or 1.
        start_kji: Index of its first voxel on the grid.
    """

    voxels: NDArray[np.uint8]
    start_kji: tuple[int, int, int]

    @property
    def stop_kji(self) -> tuple[int, int, int]:
        """One past its last voxel."""
        k, j, i = (first + n for first, n in zip(self.start_kji, self.voxels.shape, strict=True))
        return (k, j, i)

    @property
    def box_kji(self) -> BoxKJI:
        """Where it lies, as slices."""
        k, j, i = (slice(*ends) for ends in zip(self.start_kji, self.stop_kji, strict=True))
        return (k, j, i)

    @property
    def extent_ijk(self) -> tuple[int, int, int, int, int, int]:
        """Where it lies, as VTK says it: first and last index along I, J and K."""
        (k0, j0, i0), (k1, j1, i1) = self.start_kji, self.stop_kji
        return (i0, i1 - 1, j0, j1 - 1, k0, k1 - 1)


def patch_of_mask(mask_kji: NDArray[Any], box_kji: BoxKJI | None = None) -> Patch | None:
    """Cut out the smallest piece that holds every voxel set inside `box_kji`; None when there is none.

    Args:
        mask_kji: A mask on the whole grid; every value other than 0 counts. Only the box is read.
        box_kji: Part of the grid; None for all of it.
    """
    shape = mask_kji.shape
    box = box_kji or (slice(None), slice(None), slice(None))
    offsets = [part.indices(n)[0] for part, n in zip(box, shape, strict=True)]
    piece = mask_kji[box]
    rows_kj: NDArray[np.bool_] = np.any(piece, axis=2)
    if not rows_kj.any():
        return None
    k0, k1 = _ends(np.any(rows_kj, axis=1))
    j0, j1 = _ends(np.any(rows_kj, axis=0))
    i0, i1 = _ends(np.any(piece[k0:k1, j0:j1], axis=(0, 1)))
    voxels = np.ascontiguousarray(piece[k0:k1, j0:j1, i0:i1] != 0).view(np.uint8)
    return Patch(voxels, (offsets[0] + k0, offsets[1] + j0, offsets[2] + i0))


def without_box(patch: Patch | None, box_kji: BoxKJI) -> Patch | None:
    """Return the piece with every voxel inside the box cleared, cut to what is left."""
    if patch is None:
        return None
    inside = tuple(
        slice(max(part.start - first, 0), max(part.stop - first, 0))
        for part, first in zip(box_kji, patch.start_kji, strict=True)
    )
    voxels = patch.voxels.copy()
    voxels[inside] = 0
    return tight(Patch(voxels, patch.start_kji))


def union(first: Patch | None, second: Patch | None) -> Patch | None:
    """Join two pieces into the smallest one that holds both."""
    if first is None or second is None:
        return first or second
    start = np.minimum(first.start_kji, second.start_kji)
    stop = np.maximum(first.stop_kji, second.stop_kji)
    voxels = np.zeros(stop - start, dtype=np.uint8)
    for patch in (first, second):
        voxels[_inside(patch.box_kji, start)] |= patch.voxels
    return Patch(voxels, (int(start[0]), int(start[1]), int(start[2])))


def within(patch: Patch | None, frame: Patch) -> NDArray[np.uint8]:
    """Return a piece as an array over the box of `frame`, 0 or 1; what lies outside the frame is left out."""
    voxels = np.zeros(frame.voxels.shape, dtype=np.uint8)
    if patch is not None:
        k, j, i = (a - b for a, b in zip(patch.start_kji, frame.start_kji, strict=True))
        paste(Patch(patch.voxels, (k, j, i)), voxels)
    return voxels


def tight(patch: Patch) -> Patch | None:
    """Cut a piece down to the voxels that are set; None when there is none."""
    found = patch_of_mask(patch.voxels)
    return None if found is None else _moved(found, patch.start_kji)


def paste(patch: Patch | None, target_kji: NDArray[Any]) -> None:
    """Set the voxels of a piece in an array of the whole grid; what lies outside the array is left out."""
    if patch is None:
        return
    start = np.clip(patch.start_kji, 0, target_kji.shape)
    stop = np.clip(patch.stop_kji, 0, target_kji.shape)
    if np.any(stop <= start):
        return
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    target_kji[box] |= patch.voxels[_inside(box, np.asarray(patch.start_kji))].astype(target_kji.dtype)


def grid_box(shape_kji: tuple[int, int, int], box_kji: BoxKJI | None) -> BoxKJI:
    """Spell out a box: None is the whole grid, open ends are its ends."""
    parts = box_kji or (slice(None), slice(None), slice(None))
    k, j, i = (slice(*part.indices(n)[:2]) for part, n in zip(parts, shape_kji, strict=True))
    return (k, j, i)


def patch_to_image(patch: Patch, affine_ijk_to_node: Array) -> Any:
    """Make a vtkOrientedImageData that holds only the piece; the voxels are copied."""
    import slicer

    image = slicer.vtkOrientedImageData()
    image.SetExtent(*patch.extent_ijk)
    image.SetImageToWorldMatrix(matrix_to_vtk(affine_ijk_to_node))
    image.GetPointData().SetScalars(numpy_to_vtk(patch.voxels.ravel(), deep=True))
    return image


def image_to_patch(image: Any, label_value: int, affine_ijk_to_node: Array) -> Patch | None:
    """Read one label of an oriented image onto a grid.

    Where both lattices are the same up to whole voxels the result is exact; otherwise every voxel of the grid
    takes the nearest one of the image.

    Args:
        image: vtkOrientedImageData of a segment, which may hold other segments too; None or empty is allowed.
        label_value: The segment's value in it.
        affine_ijk_to_node: The wanted grid, (4, 4), in the space of the image.
    """
    labels = image_to_array(image)
    found = patch_of_mask(labels == label_value) if labels.size else None
    if found is None:
        return None
    i0, _, j0, _, k0, _ = image.GetExtent()
    piece = _moved(found, (k0, j0, i0))
    grid_to_image = np.linalg.inv(image_matrix(image)) @ affine_ijk_to_node
    shift_ijk = _whole_shift(grid_to_image, piece)
    if shift_ijk is None:
        return _resampled(piece, grid_to_image)
    i, j, k = shift_ijk
    return _moved(piece, (-k, -j, -i))


def image_to_array(image: Any) -> NDArray[Any]:
    """View the voxels of an oriented image as (K, J, I); all sizes are 0 when it is empty or None."""
    scalars = image.GetPointData().GetScalars() if image is not None else None
    if scalars is None or scalars.GetNumberOfTuples() == 0:
        return np.zeros((0, 0, 0), dtype=np.uint8)
    columns, rows, slices = image.GetDimensions()
    voxels: NDArray[Any] = vtk_to_numpy(scalars).reshape(slices, rows, columns)
    return voxels


def image_matrix(image: Any) -> Array:
    """Matrix of an oriented image from its voxels to its space, (4, 4)."""
    import vtk

    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    return matrix_to_numpy(matrix)


def _whole_shift(grid_to_image: Array, piece: Patch) -> tuple[int, int, int] | None:
    """How far the image's indices are ahead of the grid's, when every voxel of the piece lies on the grid."""
    image_to_grid = np.linalg.inv(grid_to_image)
    corners = _corners_ijk(piece)
    shifts = corners - (corners @ image_to_grid[:3, :3].T + image_to_grid[:3, 3])
    whole = np.rint(shifts[0])
    if np.abs(shifts - whole).max() > _SAME_VOXEL:
        return None
    return (int(whole[0]), int(whole[1]), int(whole[2]))


def _resampled(piece: Patch, grid_to_image: Array) -> Patch | None:
    """Ask for every voxel of the grid near the piece which image voxel it lies in."""
    image_to_grid = np.linalg.inv(grid_to_image)
    reached = _corners_ijk(piece) @ image_to_grid[:3, :3].T + image_to_grid[:3, 3]
    low = np.floor(reached.min(axis=0)).astype(int)
    high = np.ceil(reached.max(axis=0)).astype(int) + 1
    i, j, k = (np.arange(a, b) for a, b in zip(low, high, strict=True))
    voxels = np.zeros((len(k), len(j), len(i)), dtype=np.uint8)
    base = np.asarray(piece.start_kji)[::-1]
    for n, slice_k in enumerate(k):  # slice by slice: a volume of index triples would not fit the memory
        plane = (
            grid_to_image[:3, 0] * i[None, :, None]
            + grid_to_image[:3, 1] * j[:, None, None]
            + grid_to_image[:3, 2] * slice_k
            + grid_to_image[:3, 3]
        )
        at = np.floor(plane + 0.5).astype(int) - base
        inside = np.all((at >= 0) & (at < piece.voxels.shape[::-1]), axis=-1)
        x, y, z = at[inside].T
        voxels[n][inside] = piece.voxels[z, y, x]
    return tight(Patch(voxels, (int(low[2]), int(low[1]), int(low[0]))))


def _corners_ijk(piece: Patch) -> Array:
    """The eight corners of a piece, at the outer faces of its voxels, (8, 3)."""
    first, last = (np.asarray(ends[::-1]) - 0.5 for ends in (piece.start_kji, piece.stop_kji))
    choices = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), axis=-1).reshape(-1, 3)
    return np.where(choices == 1, last, first)


def _moved(patch: Patch, by_kji: tuple[int, int, int]) -> Patch:
    k, j, i = (a + b for a, b in zip(patch.start_kji, by_kji, strict=True))
    return Patch(patch.voxels, (k, j, i))


def _inside(box: Any, start: NDArray[Any]) -> tuple[slice, ...]:
    return tuple(slice(int(p.start - s), int(p.stop - s)) for p, s in zip(box, start, strict=True))


def _ends(filled: NDArray[np.bool_]) -> tuple[int, int]:
    where = np.flatnonzero(filled)
    return int(where[0]), int(where[-1]) + 1
