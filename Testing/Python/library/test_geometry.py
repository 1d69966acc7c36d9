"""Space: index to patient and back, and slices as pictures."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from phantoms import ANISOTROPIC, GRIDS, IDENTITY, oblique
from SAMAdaptLib import geometry as geometry_module
from SAMAdaptLib.errors import GeometryError
from SAMAdaptLib.geometry import AXES, LPS_TO_RAS, Geometry

SHAPE = (4, 5, 6)


def numbered(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape)


def uneven() -> Geometry:
    origins = np.array([[0, 0, 0], [0, 1, 3], [0, 2, 8], [0, 2.5, 9.0]])
    affine = IDENTITY.copy()
    affine[:3, 2] = (origins[-1] - origins[0]) / 3
    return Geometry(SHAPE, affine, origins)


def test_the_convention_is_what_the_docstring_says() -> None:
    assert doctest.testmod(geometry_module).failed == 0


def test_an_index_is_a_voxel_centre_in_ras() -> None:
    grid = Geometry(SHAPE, ANISOTROPIC)
    np.testing.assert_allclose(
        grid.ijk_to_ras([[0, 0, 0], [5, 4, 3]]), [[-20, 11, 40], [-20 + 5 * 0.8, 11 + 4 * 0.7, 40 + 9]]
    )


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_maps_there_and_back(name: str) -> None:
    grid = Geometry(SHAPE, GRIDS[name])
    points = np.random.default_rng(0).uniform(-3, 9, size=(50, 3))
    np.testing.assert_allclose(grid.ras_to_ijk(grid.ijk_to_ras(points)), points, atol=1e-9)


def test_lps_is_turned_at_the_door() -> None:
    affine_lps = np.diag([0.5, 0.6, 2.0, 1.0])
    affine_lps[:3, 3] = (10, 20, 30)
    grid = Geometry.from_lps(SHAPE, affine_lps)
    np.testing.assert_allclose(grid.ijk_to_ras([[1, 1, 1]]), [[-10.5, -20.6, 32]])
    np.testing.assert_array_equal(LPS_TO_RAS @ LPS_TO_RAS, np.eye(4))


def test_spacing_directions_and_volume_of_an_oblique_grid() -> None:
    grid = Geometry(SHAPE, oblique((0.9, 1.1, 2.5)))
    np.testing.assert_allclose(grid.spacing_mm, (0.9, 1.1, 2.5))
    np.testing.assert_allclose(grid.directions.T @ grid.directions, np.eye(3), atol=1e-12)
    assert grid.voxel_volume_mm3 == pytest.approx(0.9 * 1.1 * 2.5)
    assert not grid.is_sheared
    assert Geometry(SHAPE, GRIDS["sheared"]).is_sheared


@pytest.mark.parametrize(
    ("spacing", "axis"), [((1, 1, 5), "K"), ((5, 1, 1), "I"), ((1, 4, 1), "J"), ((1, 1.2, 1), "K")]
)
def test_the_acquisition_axis_is_the_coarse_one(spacing: tuple[float, float, float], axis: str) -> None:
    assert Geometry(SHAPE, np.diag([*spacing, 1.0])).acquisition_axis == axis


def test_uneven_slices_keep_their_own_places() -> None:
    grid = uneven()
    np.testing.assert_allclose(grid.ijk_to_ras([[2, 1, 2]]), [[2, 1 + 2, 8]])
    np.testing.assert_allclose(grid.ijk_to_ras([[0, 0, 1.5]]), [[0, 1.5, 5.5]])
    points = np.random.default_rng(1).uniform(-2, 6, size=(50, 3))
    np.testing.assert_allclose(grid.ras_to_ijk(grid.ijk_to_ras(points)), points, atol=1e-9)
    assert not grid.is_regular


def test_slices_that_go_back_are_refused() -> None:
    origins = np.array([[0, 0, 0], [0, 0, 3], [0, 0, 2], [0, 0, 9.0]])
    with pytest.raises(GeometryError, match="one behind the other"):
        Geometry(SHAPE, IDENTITY, origins)


@pytest.mark.parametrize("grid", [Geometry(SHAPE, oblique()), uneven()])
def test_a_crop_keeps_every_voxel_where_it_was(grid: Geometry) -> None:
    part = grid.cropped((slice(1, 3), slice(2, 5), slice(3, 4)))
    assert part.shape_kji == (2, 3, 1)
    np.testing.assert_allclose(
        part.ijk_to_ras([[0, 0, 0], [0, 2, 1]]), grid.ijk_to_ras([[3, 2, 1], [3, 4, 2]]), atol=1e-12
    )


@pytest.mark.parametrize("grid", [Geometry(SHAPE, oblique()), uneven()])
def test_a_parent_transform_moves_every_voxel(grid: Geometry) -> None:
    transform = oblique((1.3, 0.8, 1.1))
    moved = grid.transformed(transform)
    points = [[0, 0, 0], [3, 2, 1], [5, 4, 3]]
    expected = grid.ijk_to_ras(points) @ transform[:3, :3].T + transform[:3, 3]
    np.testing.assert_allclose(moved.ijk_to_ras(points), expected, atol=1e-9)


def test_same_grid_sees_a_shift_and_an_uneven_slice() -> None:
    grid = Geometry(SHAPE, ANISOTROPIC)
    shifted = ANISOTROPIC.copy()
    shifted[0, 3] += 0.03
    assert grid.same_grid(Geometry(SHAPE, ANISOTROPIC))
    assert not grid.same_grid(Geometry(SHAPE, shifted))
    assert not grid.same_grid(Geometry((4, 5, 5), ANISOTROPIC))
    even = uneven().affine_ijk_to_ras
    assert not uneven().same_grid(Geometry(SHAPE, even))


def test_the_border_of_a_voxel_is_half_a_voxel_out() -> None:
    grid = Geometry(SHAPE, IDENTITY)
    inside = grid.contains_ijk([[-0.5, 0, 0], [5.49, 4.49, 3.49], [-0.51, 0, 0], [5.5, 0, 0]])
    assert inside.tolist() == [True, True, False, False]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", GRIDS)
def test_pixels_and_voxels_agree(name: str, axis: geometry_module.Axis) -> None:
    grid = Geometry(SHAPE, GRIDS[name])
    plane = grid.plane(axis, 2)
    picture = plane.extract(numbered())
    assert picture.shape == plane.shape_yx
    rows, columns = np.indices(picture.shape).reshape(2, -1)
    i, j, k = plane.xy_to_ijk(np.column_stack([columns, rows])).astype(int).T
    np.testing.assert_array_equal(numbered()[k, j, i], picture.ravel())
    np.testing.assert_allclose(plane.ras_to_xy(plane.xy_to_ras([[1.25, 2.5]])), [[1.25, 2.5]], atol=1e-9)


@pytest.mark.parametrize(
    ("axis", "x_ras", "y_ras"),
    [("K", (-1, 0, 0), (0, -1, 0)), ("J", (-1, 0, 0), (0, 0, -1)), ("I", (0, -1, 0), (0, 0, -1))],
)
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_pictures_are_radiological_however_voxels_are_stored(
    axis: geometry_module.Axis, x_ras: tuple[int, ...], y_ras: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    plane = Geometry(SHAPE, np.diag([*signs, 1.0])).plane(axis, 1)
    origin, along_x, along_y = plane.xy_to_ras([[0, 0], [1, 0], [0, 1]])
    np.testing.assert_allclose(along_x - origin, x_ras, atol=1e-12)
    np.testing.assert_allclose(along_y - origin, y_ras, atol=1e-12)


def test_a_flipped_and_turned_volume_gives_the_same_picture() -> None:
    grid = Geometry(SHAPE, np.diag([1.0, 1.0, 1.0, 1.0]))
    turned = numbered().transpose(0, 2, 1)[:, ::-1]  # columns become rows, and run the other way
    affine = np.array([[0, -1, 0, 5], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    other = Geometry(turned.shape, affine)
    np.testing.assert_array_equal(grid.plane("K", 1).extract(numbered()), other.plane("K", 1).extract(turned))


@pytest.mark.parametrize("name", GRIDS)
def test_insert_writes_one_slice_and_nothing_else(name: str) -> None:
    plane = Geometry(SHAPE, GRIDS[name]).plane("J", 3)
    voxels = numbered().copy()
    plane.insert(voxels, plane.extract(numbered()) + 1000)
    changed = voxels != numbered()
    assert changed[:, 3, :].all()
    assert changed.sum() == SHAPE[0] * SHAPE[2]
    np.testing.assert_array_equal(plane.extract(voxels), plane.extract(numbered()) + 1000)


@pytest.mark.parametrize(
    ("shape", "affine", "sentence"),
    [
        ((0, 5, 6), IDENTITY, "at least one slice"),
        (SHAPE, np.diag([1.0, 0, 1, 1]), "no inverse"),
        (SHAPE, np.full((4, 4), np.nan), "finite numbers"),
        (SHAPE, np.eye(3), "4 x 4"),
    ],
)
def test_impossible_grids_are_refused(shape: tuple[int, int, int], affine: np.ndarray, sentence: str) -> None:
    with pytest.raises(GeometryError, match=sentence):
        Geometry(shape, affine)


def test_a_slice_outside_is_refused_with_the_range() -> None:
    with pytest.raises(GeometryError, match="slices 0 to 3"):
        Geometry(SHAPE, IDENTITY).plane("K", 4)


def test_a_geometry_cannot_be_changed_from_outside() -> None:
    affine = IDENTITY.copy()
    grid = Geometry(SHAPE, affine)
    affine[0, 3] = 99
    assert grid.ijk_to_ras([[0, 0, 0]])[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        grid.affine_ijk_to_ras[0, 3] = 1
