"""The command line as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phantoms import ball_volume
from SAMAdaptLib import loading
from SAMAdaptLib.cli import main
from SAMAdaptLib.image_files import read_volume, write_volume
from SAMAdaptLib.models.predictor import VolumePredictor
from SAMAdaptLib.propagation import SliceBySlice


@pytest.fixture
def ball_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A volume on disk, and a network whose answer is known in place of a downloaded one."""
    from phantoms import BrightObjects

    def bright(*_: object, **__: object) -> VolumePredictor:
        return SliceBySlice(BrightObjects())

    monkeypatch.setattr(loading, "load_model", bright)
    volume, _ = ball_volume()
    write_volume(tmp_path / "ball.nrrd", volume.voxels, volume.geometry)
    return tmp_path / "ball.nrrd"


def test_segment_writes_everything_and_replay_makes_the_same_mask(
    ball_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, truth = ball_volume()
    out = tmp_path / "out"
    arguments = [
        "segment",
        str(ball_file),
        "--point",
        "17",
        "14",
        "5",
        "--name",
        "ball",
        "--output",
        str(out),
    ]
    assert main(arguments) == 0
    np.testing.assert_array_equal(read_volume(out / "ball.seg.nrrd").voxels, truth)
    assert {path.suffix for path in out.iterdir()} == {".nrrd", ".png", ".json"}
    assert f"ball: {truth.sum() / 1000:.1f} ml" in capsys.readouterr().out
    again = tmp_path / "again.nrrd"
    assert main(["replay", str(out / "ball.json"), str(ball_file), "--output", str(again)]) == 0
    np.testing.assert_array_equal(read_volume(again).voxels, truth)


def test_a_negative_coordinate_is_a_number_and_not_an_option(ball_file: Path, tmp_path: Path) -> None:
    arguments = ["segment", str(ball_file), "--point", "-17", "14", "5", "--output", str(tmp_path / "o")]
    assert main(arguments) == 2  # outside, and said so, instead of argparse's usage


def test_slices_window_and_box_reach_the_session(ball_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["segment", str(ball_file), "--box", "5", "5", "5", "30", "25", "5", "--slices", "4:6"]
    assert main([*arguments, "--window", "0,255", "--axis", "K", "--output", str(out)]) == 0
    filled = read_volume(out / "ball.seg.nrrd").voxels.any(axis=(1, 2))
    assert np.flatnonzero(filled).tolist() == [4, 5, 6]
    record = json.loads((out / "ball.json").read_text())
    assert record["objects"][0]["session"]["window"] == [0, 255]


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ([], "no prompt came"),
        (["--point", "900", "0", "0"], "outside the volume"),
        (["--point", "17", "14", "5", "--slices", "a:b"], "two whole numbers"),
        (["--point", "17", "14", "5", "--slices", "3:400"], "Slices between"),
        (["--point", "17", "14", "5", "--window", "wide"], "A window should be"),
        (["--point", "17", "14", "5", "--window", "9,1"], "upper end"),
        (["--prompts", "missing.json"], "prompt file"),
        (["--box", "5", "5", "5", "5", "25", "5"], "some width and height"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    ball_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], sentence: str
) -> None:
    out = tmp_path / "out"
    assert main(["segment", str(ball_file), "--output", str(out), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("samadapt: ")
    assert sentence in error
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "missing.nii.gz", "--point", "1", "2", "3"],
        ["replay", "missing.json", "missing.nii.gz", "--output", "o.nrrd"],
        ["models", "show", "unknown.model"],
        ["models", "download", "medsam_vit_b.medsam"],
        ["models", "remove", "mobile_sam.sa1b"],
        ["models", "add", "missing.pt", "--card", "mobile_sam.sa1b"],
        ["verify", "missing"],
    ],
)
def test_every_command_fails_the_same_way(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("samadapt: ")


def test_models_that_are_not_here_say_how_to_get_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    volume, _ = ball_volume()
    write_volume(tmp_path / "ball.nrrd", volume.voxels, volume.geometry)
    arguments = ["segment", str(tmp_path / "ball.nrrd"), "--point", "17", "14", "5", "--model"]
    assert main([*arguments, "mobile_sam.sa1b"]) == 2
    assert "samadapt models download mobile_sam.sa1b" in capsys.readouterr().err


def test_the_list_names_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    assert "sam_vit_h.sa1b" in capsys.readouterr().out
