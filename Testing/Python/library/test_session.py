"""One object from prompts to mask: propagation, undo, record and replay."""

from __future__ import annotations

import json

import numpy as np
import pytest

from phantoms import GRIDS, IDENTITY, BrightObjects, ball, ball_volume
from SAMAdaptLib.errors import JobError, PromptError, VolumeError
from SAMAdaptLib.geometry import AXES, Axis, Geometry
from SAMAdaptLib.models.predictor import SliceMask
from SAMAdaptLib.prompts import Box, MaskPrompt, Point, Prompts
from SAMAdaptLib.propagation import ChainRule, SliceBySlice
from SAMAdaptLib.session import Session, record_to_text
from SAMAdaptLib.volume import IntensityWindow, Volume


def session_on(volume: Volume, axis: Axis | None = "K") -> Session:
    return Session(volume, SliceBySlice(BrightObjects()), axis)


def centre_click(volume: Volume) -> Point:
    return Point(volume.geometry.centre_ras)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", GRIDS)
def test_a_click_and_propagation_give_the_ball_on_every_grid_and_plane(name: str, axis: Axis) -> None:
    volume, truth = ball_volume(GRIDS[name], (16, 30, 34), radius_mm=8.0)
    session = session_on(volume, axis)
    session.add(centre_click(volume))
    session.propagate()
    agreement = 2 * (session.mask & truth).sum() / (session.mask.sum() + truth.sum())
    assert agreement > 0.97  # square pixels for the network cost a border voxel here and there


def test_a_click_alone_segments_its_slice_exactly() -> None:
    volume, truth = ball_volume()
    session = session_on(volume)
    changed = session.add(Point((17, 14, 4)))
    expected = np.zeros_like(truth)
    expected[4] = truth[4]
    np.testing.assert_array_equal(session.mask, expected)
    assert changed is not None
    assert expected[changed].sum() == expected.sum()
    assert changed[0] == slice(4, 5)
    assert session.confidence == {4: 0.9}


def test_flips_of_the_storage_do_not_change_the_result() -> None:
    volume, _ = ball_volume(IDENTITY, (12, 30, 36))
    flipped_affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    flipped_affine[:3, 3] = (35, 29, 0)
    flipped = Volume(volume.voxels[:, ::-1, ::-1], Geometry((12, 30, 36), flipped_affine))
    masks = []
    for each in (volume, flipped):
        session = session_on(each)
        session.add(Point((17, 14, 4)))
        masks.append(session.mask)
    np.testing.assert_array_equal(masks[0], masks[1][:, ::-1, ::-1])


def test_propagation_stops_where_the_object_ends_and_keeps_to_its_range() -> None:
    volume, truth = ball_volume()
    session = session_on(volume)
    session.add(Point((17, 14, 5)))
    session.propagate(range(5, 9))
    filled = np.flatnonzero(session.mask.any(axis=(1, 2)))
    assert filled.tolist() == [5, 6, 7, 8]
    np.testing.assert_array_equal(session.mask[5:9], truth[5:9])


def test_a_thick_box_limits_propagation_to_its_reach() -> None:
    volume, _ = ball_volume()
    session = session_on(volume)
    session.add(Box.from_corners((5, 5, 3), (30, 25, 7)))
    session.propagate()
    assert np.flatnonzero(session.mask.any(axis=(1, 2))).tolist() == [3, 4, 5, 6, 7]


def test_another_object_far_away_is_left_alone() -> None:
    geometry = Geometry((12, 30, 60), IDENTITY)
    first, second = ball(geometry, np.array([14, 14, 5.5]), 6), ball(geometry, np.array([44, 14, 5.5]), 6)
    volume = Volume(np.where(first | second, 200, 20).astype(np.uint8), geometry)
    session = session_on(volume)
    session.add(Point((14, 14, 5)))
    session.propagate()
    np.testing.assert_array_equal(session.mask, first)


def test_a_negative_click_corrects_with_the_earlier_logits_fed_back() -> None:
    geometry = Geometry((3, 20, 40), IDENTITY)
    bright = np.zeros((3, 20, 40), np.uint8)
    bright[:, 5:10, 5:10] = bright[:, 5:10, 20:25] = 200
    network = BrightObjects()
    session = Session(Volume(bright, geometry), SliceBySlice(network), "K")
    session.add(Box.from_corners((3, 3, 1), (30, 12, 1)))
    assert session.mask.sum() == 50
    session.add(Point((22, 7, 1), positive=False))
    assert session.mask[1, 5:10, 5:10].all()
    assert session.mask.sum() == 25
    assert network.previous[0] is None
    np.testing.assert_array_equal(network.previous[1], np.full((1, 4, 4), 1))


def test_a_slice_is_encoded_once_and_a_round_decoded_once() -> None:
    volume, _ = ball_volume()
    network = BrightObjects()
    session = Session(volume, SliceBySlice(network), "K")
    for x in (15, 16, 17, 18):
        session.add(Point((x, 14, 4)))
    assert (network.encoded, network.decoded) == (1, 4)
    session.undo()
    session.redo()
    assert (network.encoded, network.decoded) == (1, 4)


def test_undo_and_redo_go_through_every_state_and_a_new_prompt_drops_the_redone() -> None:
    volume, _ = ball_volume()
    session = session_on(volume)
    masks, prompts = [session.mask], [session.prompts]
    steps = [lambda: session.add(Point((17, 14, 4))), session.propagate, lambda: session.remove(0)]
    steps += [lambda: session.add(Point((17, 14, 6)))]
    for step in steps:
        step()
        masks.append(session.mask)
        prompts.append(session.prompts)
    for number in range(len(steps) - 1, -1, -1):
        changed = session.undo()
        np.testing.assert_array_equal(session.mask, masks[number])
        assert session.prompts == prompts[number]
        outside = masks[number] != masks[number + 1]
        if changed is None:
            assert not outside.any()
        else:
            outside[changed] = False
            assert not outside.any()
    assert session.undo() is None
    assert not session.can_undo
    for number in range(1, len(steps) + 1):
        session.redo()
        np.testing.assert_array_equal(session.mask, masks[number])
    session.undo()
    session.add(Point((18, 14, 5)))
    assert not session.can_redo


def test_removing_a_prompt_gives_the_mask_it_had_without_it() -> None:
    volume, _ = ball_volume()
    session = session_on(volume)
    session.add(Point((17, 14, 4)))
    alone = session.mask
    session.add(Point((17, 14, 6)))
    session.remove(1)
    np.testing.assert_array_equal(session.mask, alone)
    with pytest.raises(PromptError, match="there are 1"):
        session.remove(7)


def test_cancelling_keeps_what_came_and_the_record_says_so() -> None:
    volume, _ = ball_volume()
    session = session_on(volume)
    session.add(Point((17, 14, 4)))
    seen: list[int] = []

    def stop_after_three(result: SliceMask) -> bool:
        seen.append(result.index)
        return len(seen) < 3

    session.propagate(on_slice=stop_after_three)
    assert sorted(seen) == np.flatnonzero(session.mask.any(axis=(1, 2))).tolist()
    again = Session.replay(json.loads(record_to_text(session.record())), volume, session.predictor)
    np.testing.assert_array_equal(again.mask, session.mask)


def test_propagating_again_empties_slices_that_are_not_reached_any_more() -> None:
    volume, _ = ball_volume()
    session = session_on(volume)
    session.add(Point((17, 14, 5)))
    session.propagate()
    session.predictor._rule = ChainRule(lowest_score=0.95)  # type: ignore[attr-defined]
    session.propagate()
    assert np.flatnonzero(session.mask.any(axis=(1, 2))).tolist() == [5]


def test_a_painted_slice_is_taken_as_it_is_and_not_overwritten() -> None:
    volume, truth = ball_volume()
    painted = np.zeros_like(truth)
    painted[5, 10:14, 12:20] = True
    session = session_on(volume)
    session.add(MaskPrompt.from_array(painted), Point((17, 14, 3)))
    session.propagate()
    np.testing.assert_array_equal(session.mask[5], painted[5])
    np.testing.assert_array_equal(session.mask[3], truth[3])


def test_a_record_replays_to_the_same_mask_on_another_session() -> None:
    volume, _ = ball_volume(GRIDS["oblique"], (10, 24, 26), radius_mm=8)
    session = session_on(volume, None)
    session.add(centre_click(volume))
    session.propagate(range(2, 8))
    session.undo()
    session.propagate(range(1, 9))
    record = json.loads(record_to_text(session.record()))
    again = Session.replay(record, volume, SliceBySlice(BrightObjects()))
    np.testing.assert_array_equal(again.mask, session.mask)
    assert [action["action"] for action in record["actions"]] == ["add", "propagate"]
    assert record["checkpoint_sha256"] == "0" * 64


def test_a_record_of_something_else_is_refused() -> None:
    volume, _ = ball_volume()
    session = session_on(volume)
    session.add(Point((17, 14, 4)))
    record = session.record()
    other = Volume(volume.voxels + 1, volume.geometry)
    with pytest.raises(JobError, match="made with volume"):
        Session.replay(record, other, session.predictor)
    with pytest.raises(JobError, match="made with checkpoint"):
        Session.replay(record, volume, SliceBySlice(BrightObjects(checkpoint_sha256="1" * 64)))
    with pytest.raises(JobError, match="format"):
        Session.replay({"format": "other"}, volume, session.predictor)


def test_a_refused_prompt_changes_nothing() -> None:
    volume, _ = ball_volume()
    session = session_on(volume)
    session.add(Point((17, 14, 4)))
    before = session.mask
    with pytest.raises(PromptError, match="outside the volume"):
        session.add(Point((500, 0, 0)))
    np.testing.assert_array_equal(session.mask, before)
    assert len(session.prompts) == 1


def test_ranges_outside_the_volume_and_missing_prompts_are_refused() -> None:
    volume, _ = ball_volume()
    session = session_on(volume)
    with pytest.raises(PromptError, match="needs a prompt"):
        session.propagate()
    session.add(Point((17, 14, 4)))
    with pytest.raises(PromptError, match="Slices between 0 and 11"):
        session.propagate(range(0, 40))


def test_a_single_slice_volume_works() -> None:
    volume, truth = ball_volume(IDENTITY, (1, 30, 36))
    session = session_on(volume, None)
    session.add(centre_click(volume))
    session.propagate()
    np.testing.assert_array_equal(session.mask, truth)


def test_thick_slices_reach_the_network_with_square_pixels() -> None:
    geometry = Geometry((10, 30, 40), np.diag([1.0, 1.0, 4.0, 1.0]))
    volume = Volume(np.zeros((10, 30, 40), np.uint8), geometry)
    shapes = []

    class Looks(BrightObjects):
        def encode(self, picture: np.ndarray) -> object:
            shapes.append(picture.shape)
            return super().encode(picture)

    Session(volume, SliceBySlice(Looks()), "J").add(Point((20, 15, 18)))
    assert shapes == [(40, 40)]


def test_the_window_is_what_the_network_sees() -> None:
    volume, _ = ball_volume()
    seen = []

    class Looks(BrightObjects):
        def encode(self, picture: np.ndarray) -> object:
            seen.append(np.unique(picture).tolist())
            return super().encode(picture)

    Session(volume, SliceBySlice(Looks()), "K", IntensityWindow(100, 300)).add(Point((17, 14, 4)))
    assert seen == [[0, 128]]


def test_a_predictor_without_volume_says_so() -> None:
    with pytest.raises(VolumeError, match="must be set"):
        next(SliceBySlice(BrightObjects()).predict(Prompts()))


def test_the_next_object_of_a_volume_finds_its_slices_encoded() -> None:
    volume, _ = ball_volume()
    network = BrightObjects()
    predictor = SliceBySlice(network)
    for x in (15, 19):
        Session(volume, predictor, "K").add(Point((x, 14, 4)))
    assert (network.encoded, network.decoded) == (1, 2)
    Session(volume, predictor, "K", IntensityWindow(0, 300)).add(Point((15, 14, 4)))
    assert network.encoded == 2


def test_propagation_stops_when_what_is_found_looks_like_something_else() -> None:
    geometry = Geometry((9, 30, 36), IDENTITY)
    voxels = np.full((9, 30, 36), 20, np.uint8)
    voxels[:, 8:20, 10:26] = 150
    voxels[6:, 8:20, 10:26] = 250  # another organ begins where the first ends
    session = session_on(Volume(voxels, geometry))
    session.add(Point((17, 14, 3)))
    session.propagate()
    assert np.flatnonzero(session.mask.any(axis=(1, 2))).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_range_away_from_the_prompt_is_reached_and_nothing_else_is_written() -> None:
    volume, truth = ball_volume()
    session = session_on(volume)
    session.add(Point((17, 14, 3)))
    session.propagate(range(6, 9))
    assert np.flatnonzero(session.mask.any(axis=(1, 2))).tolist() == [3, 6, 7, 8]
    np.testing.assert_array_equal(session.mask[6:9], truth[6:9])
