"""Prompts in RAS mm and their place on slices."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phantoms import GRIDS, IDENTITY, oblique
from SAMAdaptLib.errors import PromptError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.prompts import (
    Box,
    MaskPrompt,
    PixelPrompts,
    Point,
    Prompt,
    Prompts,
    Scribble,
    prompts_from_json,
    prompts_to_json,
)

GRID = Geometry((10, 20, 30), np.diag([1.0, 1.0, 3.0, 1.0]))


def on_slices(*prompts: Prompt) -> dict[int, PixelPrompts]:
    return Prompts(prompts).on_slices(GRID, "K")


def test_a_point_lands_on_its_slice_in_radiological_pixels() -> None:
    found = on_slices(Point((5, 6, 9.4)))
    assert list(found) == [3]
    np.testing.assert_allclose(found[3].points_xy, [[29 - 5, 19 - 6]])
    assert found[3].labels.tolist() == [1]


def test_points_of_one_slice_come_together_in_order() -> None:
    found = on_slices(Point((5, 6, 9)), Point((7, 6, 9), positive=False), Point((1, 1, 0)))
    assert found[3].labels.tolist() == [1, 0]
    assert found[0].labels.tolist() == [1]
    rounds = Prompts((Point((5, 6, 9)), Point((7, 6, 9), positive=False))).rounds_on_slices(GRID, "K")
    assert [r.labels.tolist() for r in rounds[3]] == [[1], [1, 0]]


def test_a_flat_box_stays_on_its_slice_and_a_thick_one_goes_to_the_middle() -> None:
    flat, thick = Box.from_corners((2, 3, 9), (10, 12, 9)), Box.from_corners((2, 3, 6), (10, 12, 18))
    assert list(on_slices(flat)) == [3]
    np.testing.assert_allclose(on_slices(flat)[3].box_xyxy, [29 - 10, 19 - 12, 29 - 2, 19 - 3])
    assert list(on_slices(thick)) == [4]
    assert Prompts((flat,)).span(GRID, "K") is None
    assert Prompts((thick,)).span(GRID, "K") == range(2, 7)


def test_two_boxes_on_a_slice_become_the_box_around_both() -> None:
    found = on_slices(Box.from_corners((2, 3, 9), (6, 8, 9)), Box.from_corners((10, 3, 9), (14, 12, 9)))
    np.testing.assert_allclose(found[3].box_xyxy, [29 - 14, 19 - 12, 29 - 2, 19 - 3])


def test_a_box_is_cut_at_the_border_of_the_picture() -> None:
    found = on_slices(Box.from_corners((-50, 3, 9), (10, 90, 9)))
    np.testing.assert_allclose(found[3].box_xyxy, [19, -0.5, 29.5, 16])


def test_the_axis_is_that_of_the_flat_box_else_of_acquisition() -> None:
    assert Prompts((Box.from_corners((2, 3, 6), (2, 12, 18)),)).natural_axis(GRID) == "I"
    assert Prompts((Point((5, 6, 9)),)).natural_axis(GRID) == "K"


@pytest.mark.parametrize("name", GRIDS)
def test_a_box_drawn_on_an_oblique_slice_keeps_its_corners(name: str) -> None:
    grid = Geometry((6, 20, 30), GRIDS[name])
    low, high = np.array([4, 5, 2]), np.array([12, 15, 2])
    centre = grid.ijk_to_ras([(low + high) / 2])[0]
    size = (high - low) * np.asarray(grid.spacing_mm)
    found = Prompts((Box(centre, size, grid.directions),)).on_slices(grid, "K")
    corners = grid.plane("K", 2).ijk_to_xy([low, high])
    assert list(found) == [2]
    np.testing.assert_allclose(found[2].box_xyxy, [*corners.min(axis=0), *corners.max(axis=0)], atol=1e-4)


def test_a_scribble_gives_at_most_eight_points_on_each_slice_it_passes() -> None:
    stroke = [(x / 10, 5, 9) for x in range(200)] + [(4, 4, 12)]
    found = on_slices(Scribble(stroke, positive=False))
    assert {index: len(p.labels) for index, p in found.items()} == {3: 8, 4: 1}
    assert set(found[3].labels.tolist()) == {0}
    np.testing.assert_allclose(found[3].points_xy[[0, -1], 0], [29 - 0, 29 - 19.9], atol=1e-5)


def test_a_prompt_stays_put_when_the_volume_is_resampled() -> None:
    fine = Geometry((30, 40, 60), oblique((0.5, 0.5, 0.5)))
    coarse = Geometry((15, 20, 30), oblique((1.0, 1.0, 1.0)))
    point = Point(coarse.ijk_to_ras([[7, 8, 9]])[0])
    pixel = Prompts((point,)).on_slices(fine, "K")
    np.testing.assert_allclose(
        fine.plane("K", 18).xy_to_ras(pixel[18].points_xy), [point.point_ras], atol=1e-4
    )


@given(st.integers(0, 2**31), st.sampled_from([0.02, 0.3, 0.95, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_mask_survives_its_run_lengths_and_json(seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((4, 5, 6)) < density
    mask[seed % 4, seed % 5, seed % 6] = True
    prompt = MaskPrompt.from_array(mask)
    np.testing.assert_array_equal(prompt.to_array(), mask)
    assert prompts_from_json(json.loads(json.dumps(prompts_to_json(Prompts((prompt,)))))).items == (prompt,)


def test_all_kinds_come_back_from_json_and_can_be_compared() -> None:
    prompts = Prompts(
        (
            Point((1, 2, 3), positive=False),
            Box.from_corners((0, 0, 3), (5, 5, 3)),
            Scribble([(1, 2, 3), (4, 5, 6)]),
        )
    )
    again = prompts_from_json(json.loads(json.dumps(prompts_to_json(prompts))))
    assert again == prompts
    assert hash(again) == hash(prompts)
    assert prompts.kinds() == {"point", "box", "scribble"}


def test_a_box_may_be_written_by_its_corners() -> None:
    (box,) = prompts_from_json([{"kind": "box", "corners_ras": [[0, 0, 3], [4, 6, 3]]}])
    assert box == Box.from_corners((0, 0, 3), (4, 6, 3))


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (Point((99, 0, 0)), r"Prompt 1 \(point\) lies outside the volume, at RAS \(99.0, 0.0, 0.0\)"),
        (Box.from_corners((50, 50, 50), (60, 60, 60)), "outside the volume"),
        (Scribble([(1, 1, 1), (1, 1, 400)]), "outside the volume, at RAS"),
        (Box.from_corners((2, 3, 9), (2, 12, 9)), "some width and height"),
        (MaskPrompt.from_array(np.ones((2, 2, 2))), "mask of"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompt: Prompt, sentence: str) -> None:
    with pytest.raises(PromptError, match=sentence):
        on_slices(prompt)


@pytest.mark.parametrize(
    "entries",
    ["points", [{"kind": "circle"}], [{"kind": "point"}], [{"kind": "point", "point_ras": [1, 2]}], [3]],
)
def test_broken_entries_say_what_is_wanted(entries: object) -> None:
    with pytest.raises(PromptError):
        prompts_from_json(entries)


def test_positions_must_be_finite() -> None:
    with pytest.raises(PromptError, match="three finite numbers"):
        Point((np.nan, 0, 0))
    with pytest.raises(PromptError, match="empty"):
        MaskPrompt.from_array(np.zeros((2, 2, 2)))


def test_prompts_are_not_changed_by_adding_or_removing() -> None:
    one = Prompts((Point((1, 1, 1)),))
    two = one.with_added(Point((2, 2, 2)))
    assert (len(one), len(two), two.without(0).items) == (1, 2, (Point((2, 2, 2)),))
    assert Geometry((1, 1, 1), IDENTITY).shape_ijk == (1, 1, 1)
