"""Voxels that can be used, and the grey window of a network."""

from __future__ import annotations

import numpy as np
import pytest

from phantoms import IDENTITY, SHEARED
from SAMAdaptLib.errors import VolumeError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.volume import IntensityWindow, Volume, default_window

GRID = Geometry((2, 3, 4), IDENTITY)


def test_a_window_maps_its_ends_to_black_and_white_and_cuts_off() -> None:
    values = np.array([-500, -160, 40, 240, 900])
    assert IntensityWindow(-160, 240).apply(values).tolist() == [0, 0, 128, 255, 255]


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(VolumeError, match="above the lower"):
        IntensityWindow(5, 5)


@pytest.mark.parametrize(
    ("values", "modality", "expected"),
    [
        (np.linspace(-1000, 400, 24, dtype=np.float32), None, (-160, 240)),
        (np.linspace(0, 400, 24, dtype=np.int16), "CT", (-160, 240)),
        (np.arange(24, dtype=np.uint8), "US", (0, 255)),
        (np.zeros(24, dtype=np.int16), "MR", (0, 1)),
        (np.full(24, 7, dtype=np.int16), "MR", (6, 8)),
    ],
)
def test_the_default_window_follows_what_the_volume_is(
    values: np.ndarray, modality: str | None, expected: tuple[float, float]
) -> None:
    window = default_window(Volume(values.reshape(2, 3, 4), GRID, modality))
    assert (window.lower, window.upper) == expected


def test_the_window_of_mr_leaves_the_background_and_the_outliers_out() -> None:
    values = np.zeros(4000, dtype=np.float32)
    values[1000:] = np.linspace(100, 300, 3000)
    values[-1] = 1e6
    window = default_window(Volume(values.reshape(10, 20, 20), Geometry((10, 20, 20), IDENTITY), "MR"))
    assert window.lower == pytest.approx(101, abs=0.1)
    assert window.upper == pytest.approx(299, abs=0.1)


def test_the_content_hash_sees_voxels_type_and_place() -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    volume = Volume(voxels, GRID)
    moved = IDENTITY.copy()
    moved[0, 3] = 1
    others = [
        Volume(voxels + 1, GRID),
        Volume(voxels.astype(np.int32), GRID),
        Volume(voxels, Geometry((2, 3, 4), moved)),
        Volume(voxels, Geometry((2, 3, 4), IDENTITY, np.array([[0, 0, 0], [0, 0, 1.5]]))),
    ]
    assert volume.content_hash == Volume(np.asfortranarray(voxels), GRID).content_hash
    assert volume.content_hash not in {other.content_hash for other in others}


@pytest.mark.parametrize(
    ("voxels", "sentence"),
    [
        (np.zeros((2, 3, 5)), "were wanted, but came as"),
        (np.zeros((2, 3, 4, 2)), "choose one frame"),
        (np.zeros((2, 3, 4), dtype=complex), "real numbers"),
        (np.full((2, 3, 4), np.nan), "24 are NaN"),
    ],
)
def test_voxels_that_cannot_be_used_are_refused(voxels: np.ndarray, sentence: str) -> None:
    with pytest.raises(VolumeError, match=sentence):
        Volume(voxels, GRID)


def test_colour_is_told_from_grey() -> None:
    assert Volume(np.zeros((2, 3, 4, 3), np.uint8), GRID).is_colour
    assert not Volume(np.zeros((2, 3, 4)), Geometry((2, 3, 4), SHEARED)).is_colour
