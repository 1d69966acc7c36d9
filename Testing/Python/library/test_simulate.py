from __future__ import annotations

import numpy as np
import pytest

from SAMAdaptLib.training.simulate import (
    Click,
    box_of,
    dice,
    first_click,
    jittered_box,
    next_click,
    random_click,
)


def block(rows: slice, columns: slice, shape: tuple[int, int] = (20, 30)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return mask


def test_first_click_is_the_deepest_point_as_x_y() -> None:
    assert first_click(block(slice(2, 7), slice(10, 15))) == Click((12.0, 4.0), True)


def test_border_of_the_picture_counts_as_outside() -> None:
    assert first_click(block(slice(0, 20), slice(0, 5))).xy[0] == 2.0


def test_first_click_prefers_the_thick_part() -> None:
    mask = block(slice(9, 10), slice(0, 30)) | block(slice(4, 15), slice(18, 29))
    assert first_click(mask) == Click((23.0, 9.0), True)


def test_random_click_is_inside_and_off_the_rim() -> None:
    mask = block(slice(3, 16), slice(4, 25))
    rng = np.random.default_rng(0)
    clicks = {random_click(mask, rng).xy for _ in range(200)}
    assert len(clicks) > 50
    # 7 deep in the middle: 30 % are 2.1 pixels, so the two outermost rows are never clicked.
    assert min(y for _, y in clicks) == 5
    assert max(x for x, _ in clicks) == 22


def test_random_click_hits_a_single_pixel() -> None:
    assert random_click(block(slice(5, 6), slice(7, 8)), np.random.default_rng(1)).xy == (7.0, 5.0)


def test_next_click_goes_to_the_largest_missed_part() -> None:
    truth = block(slice(2, 11), slice(2, 29))
    predicted = truth.copy()
    predicted[2:11, 2:11] = False
    predicted[2:5, 20:23] = False
    assert next_click(truth, predicted) == Click((6.0, 6.0), True)


def test_next_click_is_negative_on_what_was_added() -> None:
    truth = block(slice(2, 6), slice(2, 6))
    predicted = truth | block(slice(10, 15), slice(20, 25))
    assert next_click(truth, predicted) == Click((22.0, 12.0), False)


def test_touching_missed_and_added_parts_are_two_errors() -> None:
    truth = block(slice(0, 5), slice(0, 10))
    predicted = block(slice(5, 10), slice(0, 7))
    click = next_click(truth, predicted)
    assert click is not None
    assert click.positive
    assert click.xy[1] == 2.0


def test_no_click_where_nothing_is_wrong() -> None:
    truth = block(slice(0, 5), slice(0, 5))
    assert next_click(truth, truth) is None


def test_box_is_tight() -> None:
    assert box_of(block(slice(3, 8), slice(10, 21))).tolist() == [10, 3, 20, 7]


def test_jitter_is_a_share_of_the_side_and_stays_in_the_picture() -> None:
    mask = block(slice(5, 15), slice(0, 30))
    rng = np.random.default_rng(5)
    boxes = np.array([jittered_box(mask, 0.1, rng) for _ in range(300)])
    assert boxes[:, 1].min() == pytest.approx(4, abs=0.1)
    assert boxes[:, 1].max() == pytest.approx(6, abs=0.1)
    assert boxes[:, 3].max() == pytest.approx(15, abs=0.1)
    assert boxes[:, 0].min() == 0
    assert boxes[:, 0].max() == pytest.approx(3, abs=0.2)
    assert boxes[:, 2].max() == 29
    assert jittered_box(mask, 0.0, rng).tolist() == box_of(mask).tolist()


def test_jittered_box_of_a_line_keeps_its_order() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        x0, y0, x1, y1 = jittered_box(block(slice(4, 5), slice(4, 5)), 0.9, rng)
        assert x0 <= x1
        assert y0 <= y1


def test_dice() -> None:
    a, b = block(slice(0, 4), slice(0, 4)), block(slice(0, 4), slice(2, 6))
    assert dice(a, b) == 0.5
    assert dice(a, ~a) == 0.0
    assert dice(a & ~a, b & ~b) == 1.0
