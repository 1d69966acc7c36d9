from __future__ import annotations

import numpy as np
import pytest

from SAMAdaptLib.errors import CardError, VolumeError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models.slice_stacks import FileAxes, SliceStacks
from SAMAdaptLib.volume import IntensityWindow, Volume

WINDOW = IntensityWindow(0, 1000)
# A patient as K, J, I whose I runs to the left, J to posterior, K up: a stack of radiological pictures.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def stacks(
    voxels: np.ndarray, affine: np.ndarray = LPS_TO_RAS, depth: int = 3, codes: str = "RAS", size: int = 0
) -> SliceStacks:
    volume = Volume(voxels, Geometry(voxels.shape[:3], affine), "CT")
    return SliceStacks(volume, "K", WINDOW, size or voxels.shape[1], depth, FileAxes(codes))


@pytest.fixture
def voxels() -> np.ndarray:
    return np.random.default_rng(0).permutation(5 * 4 * 4).reshape(5, 4, 4).astype(np.int16)


def stretched(stack: np.ndarray) -> np.ndarray:
    return (stack - stack.min()) / (stack.max() - stack.min())


def test_a_stack_is_stretched_as_a_whole(voxels: np.ndarray) -> None:
    np.testing.assert_allclose(stacks(voxels).stack(2), stretched(voxels[1:4]), atol=1e-6)


def test_values_outside_the_window_are_cut_first(voxels: np.ndarray) -> None:
    loud = voxels.copy()
    loud[2, 0, 0], loud[2, 0, 1] = 9000, -9000
    expected = stretched(np.clip(loud[1:4], 0, 1000))
    np.testing.assert_allclose(stacks(loud).stack(2), expected, atol=1e-6)


def test_the_ends_of_the_volume_are_repeated(voxels: np.ndarray) -> None:
    np.testing.assert_allclose(stacks(voxels).stack(0), stretched(voxels[[0, 0, 1]]), atol=1e-6)
    np.testing.assert_allclose(
        stacks(voxels, depth=5).stack(3), stretched(voxels[[1, 2, 3, 4, 4]]), atol=1e-6
    )


def test_a_constant_volume_gives_zeros() -> None:
    assert not stacks(np.full((3, 4, 4), 7, dtype=np.int16)).stack(1).any()


@pytest.mark.parametrize(
    ("codes", "row_step", "column_step", "slice_step"),
    [("RAS", 1, 1, 1), ("LAS", 1, -1, 1), ("RPS", -1, 1, 1), ("LPS", -1, -1, 1), ("RAI", 1, 1, -1)],
)
def test_the_network_sees_the_patient_the_way_it_was_trained(
    voxels: np.ndarray, codes: str, row_step: int, column_step: int, slice_step: int
) -> None:
    """The official code shows element [x, y] of a file's array at column Nx-1-x of row Ny-1-y."""
    shown = stacks(voxels, codes=codes).stack(2)
    np.testing.assert_allclose(
        shown, stretched(voxels[1:4])[::slice_step, ::row_step, ::column_step], atol=1e-6
    )
    # The same from first principles: the array that the official code would have read from such a file.
    directions = {"R": 1, "L": -1, "A": 1, "P": -1, "S": 1, "I": -1}
    x, y, z = (directions[code] for code in codes)
    file_xyz = voxels.transpose(2, 1, 0)[::-x, ::-y, ::z]
    official = file_xyz[::-1, ::-1].transpose(2, 1, 0)[1:4]
    np.testing.assert_allclose(shown, stretched(official), atol=1e-6)


@pytest.mark.parametrize("flips", [(-1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, -1, -1)])
def test_storage_order_changes_nothing(voxels: np.ndarray, flips: tuple[int, int, int]) -> None:
    i, j, k = flips
    affine = LPS_TO_RAS @ np.diag([i, j, k, 1.0])
    flipped = stacks(np.ascontiguousarray(voxels[::k, ::j, ::i]), affine)
    centre = 1 if k > 0 else 3
    np.testing.assert_allclose(flipped.stack(centre), stacks(voxels).stack(1))


@pytest.mark.parametrize("codes", ["RAS", "LAS", "RPS", "LPI"])
def test_results_and_boxes_follow_the_picture(voxels: np.ndarray, codes: str) -> None:
    cut = stacks(voxels, codes=codes)
    shown = cut.stack(2)[1][None]
    np.testing.assert_allclose(cut.to_picture(shown, 2)[0], stretched(voxels[1:4])[1], atol=1e-6)
    box = np.array([0, 1, 1, 3], dtype=np.float32)
    x0, y0, x1, y1 = cut.box_to_input(box, 2).astype(int)
    inside = shown[0, y0 : y1 + 1, x0 : x1 + 1]
    assert set(inside.ravel().tolist()) == set(
        stretched(voxels[1:4])[1, 1:4, 0:2].astype(np.float32).ravel().tolist()
    )


def test_other_sizes_are_resized_corner_to_corner_and_back() -> None:
    ramp = np.broadcast_to(np.arange(5.0) * 100, (3, 3, 5)).astype(np.int16)
    cut = stacks(ramp, size=9)
    shown = cut.stack(1)
    assert shown.shape == (3, 9, 9)
    np.testing.assert_allclose(shown[1, 4], np.linspace(0, 1, 9), atol=0.05)
    np.testing.assert_allclose(cut.to_picture(shown[:1], 1)[0, 1], np.linspace(0, 1, 5), atol=0.05)
    np.testing.assert_allclose(cut.box_to_input(np.float32([0, 0, 4, 2]), 1), [0, 0, 8, 8])


def test_each_slice_is_the_mean_over_the_stacks_that_hold_it(voxels: np.ndarray) -> None:
    cut = stacks(voxels, depth=3)

    def predict(centre: int) -> np.ndarray:  # says where in the stack and in which stack it was
        return np.array([[[[100 * centre + position]]] for position in range(3)], dtype=np.float32)

    results = {
        index: (float(mean.squeeze()), count) for index, mean, count in cut.ensemble(range(5), predict)
    }
    assert results == {
        0: ((1 + 100) / 2, 2),
        1: ((2 + 101 + 200) / 3, 3),
        2: ((102 + 201 + 300) / 3, 3),
        3: ((202 + 301 + 400) / 3, 3),
        4: ((302 + 401) / 2, 2),
    }
    part = {
        index: (float(mean.squeeze()), count) for index, mean, count in cut.ensemble(range(1, 3), predict)
    }
    assert part == {index: results[index] for index in (1, 2)}


@pytest.mark.parametrize("codes", ["RAS", "RAI"])
def test_slices_are_given_out_as_soon_as_they_are_done(voxels: np.ndarray, codes: str) -> None:
    cut = stacks(np.zeros((9, 4, 4), dtype=np.int16), depth=5, codes=codes)
    asked: list[int] = []

    def predict(centre: int) -> np.ndarray:
        asked.append(centre)
        return np.zeros((5, 2, 4, 4), dtype=np.float32)

    behind = [asked[-1] - index for index, _, _ in cut.ensemble(range(9), predict)]
    assert behind == [2] * 7 + [1, 0], "the sums of more than five slices are never held"


def test_a_stack_of_one_slice_volume_works() -> None:
    voxels = np.arange(16, dtype=np.int16).reshape(1, 4, 4)
    np.testing.assert_allclose(
        stacks(voxels, depth=5).stack(0), stretched(voxels).repeat(5, axis=0), atol=1e-6
    )


def test_colour_and_unknown_axes_are_refused() -> None:
    with pytest.raises(VolumeError, match="takes grey volumes"):
        stacks(np.zeros((3, 4, 4, 3), dtype=np.uint8))
    for codes in ("RA", "ARS", "ras", ""):
        with pytest.raises(CardError, match="three letters"):
            FileAxes(codes)
