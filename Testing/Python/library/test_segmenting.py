"""The main job without a window: prompt file in; label map, DICOM-SEG, picture and record out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phantoms import IDENTITY, BrightObjects, ball
from SAMAdaptLib.dicom import read_segmentation, read_series
from SAMAdaptLib.dicom.phantom import write_torso_phantom
from SAMAdaptLib.errors import JobError, PromptError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.image_files import read_volume
from SAMAdaptLib.prompt_files import ObjectTask, prompt_file_text, read_prompt_file
from SAMAdaptLib.prompts import Box, Point, Prompts
from SAMAdaptLib.propagation import SliceBySlice
from SAMAdaptLib.results import write_results
from SAMAdaptLib.segmenting import Segmentation, replay_record, segment_objects
from SAMAdaptLib.volume import Volume

GRID = Geometry((12, 30, 60), IDENTITY)
FIRST = ball(GRID, np.array([14, 14, 5.5]), 6)
SECOND = ball(GRID, np.array([44, 14, 5.5]), 6)
TWO = [
    ObjectTask("left ball", Prompts((Point((14, 14, 5)),))),
    ObjectTask("right ball", Prompts((Point((44, 14, 5)),)), colour_rgb=(10, 20, 30)),
]


def two_balls() -> Volume:
    return Volume(np.where(FIRST | SECOND, 200, 20).astype(np.uint8), GRID, name="two balls")


def segmented(tasks: list[ObjectTask]) -> Segmentation:
    return segment_objects(two_balls(), SliceBySlice(BrightObjects()), tasks)


def test_objects_get_their_labels_in_order() -> None:
    labels = segmented(TWO).labels
    np.testing.assert_array_equal(labels, FIRST + 2 * SECOND)


def test_a_later_object_never_takes_voxels_of_a_finished_one() -> None:
    both = ObjectTask("both", Prompts((Box.from_corners((5, 5, 5), (55, 25, 5)),)))
    labels = segmented([TWO[0], both]).labels
    np.testing.assert_array_equal(labels, FIRST + 2 * SECOND)


def test_only_the_prompted_slice_without_propagation() -> None:
    task = ObjectTask("slice", Prompts((Point((14, 14, 5)),)), propagate=False)
    assert np.flatnonzero(segmented([task]).labels.any(axis=(1, 2))).tolist() == [5]


def test_results_of_an_image_file(tmp_path: Path) -> None:
    segmentation = segmented(TWO)
    written = write_results(tmp_path / "new" / "folder", segmentation)
    assert [file.name for file in written.files] == ["two-balls.seg.nrrd", "two-balls.png", "two-balls.json"]
    np.testing.assert_array_equal(read_volume(written.files[0]).voxels, segmentation.labels)
    record = json.loads(written.files[2].read_text())
    again = replay_record(record, two_balls(), SliceBySlice(BrightObjects()))
    np.testing.assert_array_equal(again, segmentation.labels)


def test_the_overview_shows_mask_and_prompts(tmp_path: Path) -> None:
    written = write_results(tmp_path, segmented(TWO))
    picture = np.asarray(Image.open(written.files[1]).convert("RGB")).astype(int)
    lime = (picture == (0, 255, 0)).all(axis=2)
    assert lime.any()  # the click
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    assert ((green - red > 20) & (green - blue > 10)).sum() > 500  # the shade of the first object


def test_a_dicom_series_gives_a_dicom_seg_that_reads_back(tmp_path: Path) -> None:
    write_torso_phantom(tmp_path / "ct", shape_kji=(6, 64, 64), spacing_ijk_mm=(6, 6, 40))
    series = read_series(tmp_path / "ct")
    k = 3
    point = series.volume.geometry.ijk_to_ras([[32, 32, k]])[0]
    reach = np.array([60, 60, 0])
    task = ObjectTask("liver", Prompts((Box.from_corners(point - reach, point + reach),)))
    segmentation = segment_objects(series.volume, SliceBySlice(BrightObjects()), [task])
    assert segmentation.labels.any()
    written = write_results(tmp_path / "out", segmentation, series)
    again = read_segmentation(written.files[-1], series)
    np.testing.assert_array_equal(again.labels() != 0, segmentation.labels != 0)
    assert again.segments[0].name == "liver"
    assert again.segments[0].terminology.type.meaning == "Liver"
    assert again.segments[0].algorithm_name == "SAMAdapt bright.test"
    assert again.segments[0].algorithm_type == "SEMIAUTOMATIC"


def test_a_prompt_file_comes_back_as_written(tmp_path: Path) -> None:
    tasks = [*TWO, ObjectTask("third", Prompts((Point((1, 1, 1)),)), propagate=False, slices=range(2, 5))]
    (tmp_path / "p.json").write_text(prompt_file_text(tasks))
    assert read_prompt_file(tmp_path / "p.json") == tasks


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"objects": []}',
        '{"objects": [3]}',
        '{"objects": [{"name": "a"}]}',
        '{"objects": [{"prompts": [], "slices": [1]}]}',
        '{"objects": [{"prompts": [], "slices": ["a", "b"]}]}',
        '{"objects": [{"prompts": [], "colour_rgb": [1, 2, 300]}]}',
    ],
)
def test_broken_prompt_files_say_what_is_wanted(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(JobError):
        read_prompt_file(tmp_path / "p.json")


def test_a_broken_prompt_names_its_object_and_file(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"objects": [{"prompts": [{"kind": "point", "point_ras": [1, 2]}]}]}')
    with pytest.raises(PromptError, match=r"Object 1 of p\.json"):
        read_prompt_file(tmp_path / "p.json")


def test_an_object_without_prompts_and_a_file_in_the_way_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="needs a prompt"):
        segmented([ObjectTask("nothing", Prompts())])
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(JobError, match="cannot be made"):
        write_results(tmp_path / "taken", segmented(TWO))
