"""Frames in time as a volume: pictures of a folder or a video, through every step to the written masks."""

from __future__ import annotations

import builtins
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from goldens import arrays, ma_sam_of
from phantoms import CARD, BrightObjects
from SAMAdaptLib import frames as frames_file
from SAMAdaptLib import loading
from SAMAdaptLib.cards import ModelCard, Source, cards_that_take_colour, find_card
from SAMAdaptLib.cli import main
from SAMAdaptLib.cli.segment import open_volume
from SAMAdaptLib.dicom.phantom import write_torso_phantom
from SAMAdaptLib.errors import JobError, VolumeError
from SAMAdaptLib.frames import holds_frames, read_frames
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.image_files import read_volume
from SAMAdaptLib.models.framing import LongestSide
from SAMAdaptLib.models.ma_sam import MaSam, MaSamVolumePredictor
from SAMAdaptLib.models.mobile_sam import MobileSam
from SAMAdaptLib.models.sam import SamSlicePredictor
from SAMAdaptLib.models.slice_stacks import FileAxes, SliceStacks
from SAMAdaptLib.postprocess import without_specks
from SAMAdaptLib.prompt_files import ObjectTask
from SAMAdaptLib.prompts import Box, PixelPrompts, Point, Prompts
from SAMAdaptLib.propagation import SliceBySlice
from SAMAdaptLib.results import write_results
from SAMAdaptLib.segmenting import replay_record, segment_objects
from SAMAdaptLib.session import Session
from SAMAdaptLib.volume import IntensityWindow, Volume

ROWS, COLUMNS = 20, 28


@pytest.fixture
def pictures() -> np.ndarray:
    """Twelve frames without any symmetry: a flip, a swap of axes or of colours, or another order shows."""
    return np.random.default_rng(0).integers(0, 256, (12, ROWS, COLUMNS, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path, pictures: np.ndarray) -> Path:
    """The frames as frame0.png to frame11.png, which the alphabet would sort 0, 1, 10, 11, 2, ..."""
    (tmp_path / "film").mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "film" / f"frame{index}.png")
    return tmp_path / "film"


def save(folder: Path, name: str, values: np.ndarray, **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(values).save(folder / name, **options)


def test_every_frame_is_shown_as_it_is_stored(folder: Path, pictures: np.ndarray) -> None:
    volume = read_frames(folder)
    assert volume.voxels.dtype == np.uint8
    assert volume.voxels.shape == (12, ROWS, COLUMNS, 3)
    assert (volume.name, volume.modality) == ("film", None)
    assert volume.geometry.spacing_mm == (1, 1, 1)
    for index, picture in enumerate(pictures):
        np.testing.assert_array_equal(volume.geometry.plane("K", index).extract(volume.voxels), picture)


def test_a_pixel_lies_where_the_help_says(folder: Path) -> None:
    grid = read_frames(folder).geometry
    np.testing.assert_array_equal(grid.plane("K", 5).xy_to_ras([[3, 7]]), [[-3, -7, 5]])
    np.testing.assert_array_equal(grid.plane("K", 5).ras_to_xy([[-3, -7, 5]]), [[3, 7]])
    assert grid.acquisition_axis == "K"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"every": 5}, [0, 5, 10]),
        ({"first": 9}, [9, 10, 11]),
        ({"last": 2}, [0, 1, 2]),
        ({"first": 2, "last": 8, "every": 3}, [2, 5, 8]),
        ({"first": 10, "last": 99}, [10, 11]),
    ],
)
def test_a_part_of_the_frames(
    folder: Path, pictures: np.ndarray, choice: dict[str, int], expected: list[int]
) -> None:
    np.testing.assert_array_equal(read_frames(folder, **choice).voxels, pictures[expected])


@pytest.mark.parametrize("choice", [{"every": 0}, {"first": -1}, {"first": 4, "last": 3}])
def test_a_senseless_choice_is_refused(folder: Path, choice: dict[str, int]) -> None:
    with pytest.raises(VolumeError, match="counted from 0"):
        read_frames(folder, **choice)


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".TIFF", ".PNG"])
def test_lossless_formats_keep_every_value(tmp_path: Path, pictures: np.ndarray, suffix: str) -> None:
    save(tmp_path / "a", f"1{suffix}", pictures[0])
    np.testing.assert_array_equal(read_frames(tmp_path / "a").voxels[0], pictures[0])


def test_jpeg_is_read_as_pillow_decodes_it(tmp_path: Path) -> None:
    smooth = np.stack(np.broadcast_arrays(*np.ogrid[0:200:20j, 0:100:28j], 50), axis=2).astype(np.uint8)
    save(tmp_path / "a", "1.jpg", smooth, quality=95)
    difference = read_frames(tmp_path / "a").voxels[0].astype(int) - smooth
    assert np.abs(difference).max() < 12


def test_grey_palettes_and_transparency_become_three_colours(tmp_path: Path, pictures: np.ndarray) -> None:
    grey, alpha = pictures[0][..., 0], pictures[1][..., :1]
    save(tmp_path / "a", "1.png", grey)
    save(tmp_path / "a", "2.png", np.concatenate([pictures[2], alpha], axis=2))
    save(tmp_path / "a", "3.png", np.dstack([grey, alpha[..., 0]]))
    palette = Image.fromarray(grey // 64)
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    palette.save(tmp_path / "a" / "4.png", transparency=b"\x00\x80\xff\x10")
    Image.fromarray(grey > 99).save(tmp_path / "a" / "5.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        voxels = read_frames(tmp_path / "a").voxels
    in_three = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(voxels[0], in_three)
    np.testing.assert_array_equal(voxels[1], pictures[2])
    np.testing.assert_array_equal(voxels[2], in_three)
    np.testing.assert_array_equal(voxels[3], (in_three // 64) * 30 + np.array([10, 20, 30]))
    np.testing.assert_array_equal(voxels[4], (in_three > 99) * 255)


def test_a_note_about_turning_the_camera_changes_nothing(tmp_path: Path, pictures: np.ndarray) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by a quarter
    save(tmp_path / "a", "1.png", pictures[0], exif=turned)
    np.testing.assert_array_equal(read_frames(tmp_path / "a").voxels[0], pictures[0])


def test_what_is_no_picture_is_passed_over(folder: Path) -> None:
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "._frame1.png").write_bytes(b"x")
    (folder / "labels").mkdir()
    save(folder / "labels", "frame0.png", np.zeros((3, 3), np.uint8))
    assert len(read_frames(folder).voxels) == 12


@pytest.mark.parametrize("odd", [0, 7])
def test_the_frame_of_another_size_is_named(folder: Path, odd: int) -> None:
    save(folder, f"frame{odd}.png", np.zeros((ROWS, COLUMNS + 1, 3), np.uint8))
    with pytest.raises(VolumeError, match=rf"frame{odd}\.png has 29 x 20 pixels and most others 28 x 20"):
        read_frames(folder)
    assert len(read_frames(folder, first=8).voxels) == 4, "frames that were not chosen do not matter"


def test_more_than_eight_bits_and_several_pages_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "deep", "1.png", np.full((4, 5), 1000, np.uint16))
    with pytest.raises(VolumeError, match=r"8 bits, but 1\.png holds 1 of mode I;16"):
        read_frames(tmp_path / "deep")
    page = Image.fromarray(np.zeros((4, 5), np.uint8))
    (tmp_path / "pages").mkdir()
    page.save(tmp_path / "pages" / "1.tif", save_all=True, append_images=[page])
    with pytest.raises(VolumeError, match=r"one grey or RGB picture of 8 bits, but 1\.tif holds 2"):
        read_frames(tmp_path / "pages")


def test_damaged_pictures_and_nothing_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "frame3.png").read_bytes()
    for content in (b"", b"GIF89a not a PNG", whole[: len(whole) // 2]):
        (folder / "frame3.png").write_bytes(content)
        with pytest.raises(VolumeError, match=r"^frame3\.png cannot be read as a picture"):
            read_frames(folder)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(VolumeError, match=path.name):
            read_frames(path)
    with pytest.raises(VolumeError, match="no frame of those chosen"):
        read_frames(folder, first=12)


def test_memory_is_bounded_before_a_pixel_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = ROWS * COLUMNS * 3
    assert len(read_frames(folder, most_bytes=12 * frame).voxels) == 12
    monkeypatch.setattr(frames_file, "_colours_of", lambda file: pytest.fail("read"))
    with pytest.raises(VolumeError, match=r"Choose a part \(first, last\), fewer \(every\)"):
        read_frames(folder, most_bytes=12 * frame - 1)


class TestVideo:
    @pytest.fixture
    def write(self, tmp_path: Path, pictures: np.ndarray) -> Callable[..., Path]:
        av = pytest.importorskip("av", reason="videos are read with PyAV, which is not installed")
        pytest.importorskip("imageio.v3", reason="videos are read with imageio, which is not installed")

        def write(name: str, codec: str, pixels: str, frames: np.ndarray = pictures) -> Path:
            with av.open(str(tmp_path / name), "w") as container:
                stream = container.add_stream(codec, rate=5)
                stream.height, stream.width = frames.shape[1:3]
                stream.pix_fmt = pixels
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
            return tmp_path / name

        return write

    @pytest.mark.parametrize(
        ("name", "codec", "pixels"), [("a.mov", "png", "rgb24"), ("a.MKV", "ffv1", "bgr0")]
    )
    def test_lossless_videos_keep_every_value(
        self, write: Callable[..., Path], pictures: np.ndarray, name: str, codec: str, pixels: str
    ) -> None:
        path = write(name, codec, pixels)
        assert holds_frames(path)
        volume = read_frames(path)
        assert volume.name == "a"
        for index, picture in enumerate(pictures):
            np.testing.assert_array_equal(volume.geometry.plane("K", index).extract(volume.voxels), picture)
        np.testing.assert_array_equal(read_frames(path, first=1, last=8, every=3).voxels, pictures[[1, 4, 7]])

    def test_a_usual_video_is_read_in_order(self, write: Callable[..., Path]) -> None:
        levels = np.arange(20, 240, 20)
        frames = np.broadcast_to(levels[:, None, None, None], (11, 32, 48, 3)).astype(np.uint8)
        volume = read_frames(write("a.mp4", "mpeg4", "yuv420p", frames))
        np.testing.assert_allclose(volume.voxels.mean(axis=(1, 2, 3)), levels, atol=4)

    @pytest.mark.parametrize(
        ("name", "codec", "pixels"), [("a.mov", "png", "rgb24"), ("a.mkv", "ffv1", "bgr0")]
    )
    def test_memory_is_bounded(self, write: Callable[..., Path], name: str, codec: str, pixels: str) -> None:
        """The second container does not say how many frames it has."""
        path = write(name, codec, pixels)
        with pytest.raises(VolumeError, match="are held at once"):
            read_frames(path, most_bytes=6 * ROWS * COLUMNS * 3)
        assert len(read_frames(path, every=2, most_bytes=6 * ROWS * COLUMNS * 3).voxels) == 6

    def test_damaged_videos_are_one_sentence(self, write: Callable[..., Path], tmp_path: Path) -> None:
        whole = write("a.mp4", "mpeg4", "yuv420p").read_bytes()
        for content in (b"", b"not a video", whole[:3000]):
            (tmp_path / "b.mp4").write_bytes(content)
            with pytest.raises(VolumeError, match=r"^b\.mp4 cannot be read as a video"):
                read_frames(tmp_path / "b.mp4")

    def test_it_is_segmented_from_the_command_line(
        self, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading, "load_model", lambda *_, **__: SliceBySlice(Bright()))
        voxels, truth = moving_square()
        path = write("film.mov", "png", "rgb24", voxels)
        arguments = [str(path), "--frames", "2:7", "--every", "2"]
        out = tmp_path / "out"
        click = ["--point", "-9", "-8", "1", "--name", "tool", "--output", str(out)]
        assert main(["segment", *arguments, *click]) == 0
        np.testing.assert_array_equal(read_volume(out / "film.seg.nrrd").voxels, truth[2:8:2])
        again = tmp_path / "again.nrrd"
        assert main(["replay", str(out / "film.json"), *arguments, "--output", str(again)]) == 0
        np.testing.assert_array_equal(read_volume(again).voxels, truth[2:8:2])


def test_a_video_without_its_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_as_ever = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == "av":
            raise ImportError(name)
        return import_as_ever(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(VolumeError, match=r"not installed\. Run `pip install av imageio`"):
        read_frames(tmp_path / "a.mp4")


class TestOpening:
    def test_folders_of_pictures_and_videos_are_frames(self, folder: Path, pictures: np.ndarray) -> None:
        volume, series = open_volume(folder, frames=range(3, 9), every=2)
        assert series is None
        np.testing.assert_array_equal(volume.voxels, pictures[[3, 5, 7]])
        assert open_volume(folder)[0].voxels.shape[0] == 12
        with pytest.raises(VolumeError, match=r"there is no film\.mp4"):
            open_volume(folder.parent / "film.mp4")

    def test_pictures_beside_dicom_are_no_frames(self, tmp_path: Path) -> None:
        write_torso_phantom(tmp_path / "study" / "ct", shape_kji=(3, 16, 16), spacing_ijk_mm=(20, 20, 40))
        save(tmp_path / "study", "preview.png", np.zeros((4, 4), np.uint8))
        volume, series = open_volume(tmp_path / "study")
        assert series is not None
        assert not volume.is_colour
        with pytest.raises(JobError, match="study is neither"):
            open_volume(tmp_path / "study", every=2)

    def test_one_picture_is_an_image_file_as_before(self, folder: Path) -> None:
        assert open_volume(folder / "frame1.png")[0].geometry.shape_kji == (1, ROWS, COLUMNS)
        assert not holds_frames(folder / "frame1.png")

    def test_the_command_line_refuses_in_one_sentence(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for extra, sentence in (
            (["--frames", "a:b"], "Frames should be two whole numbers"),
            (["--frames", "5:2"], "counted from 0"),
            (["--every", "0"], "counted from 0"),
            (["--frames", "70:80"], "no frame of those chosen"),
        ):
            assert main(["segment", str(folder), "--point", "-9", "-8", "1", *extra]) == 2
            error = capsys.readouterr().err
            assert error.startswith("samadapt: ")
            assert sentence in error

    def test_the_help_tells_of_frames(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["segment", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "pixel X, Y of frame K lies at -X -Y K" in text
        assert "--frames FIRST:LAST" in text
        assert "--every N" in text


class Bright(BrightObjects):
    """Sees the red of a frame only, and that it got colours and not greys."""

    def encode(self, picture: np.ndarray) -> Any:
        assert picture.shape[2:] == (3,)
        return super().encode(np.ascontiguousarray(picture[..., 0]))


def moving_square() -> tuple[np.ndarray, np.ndarray]:
    """A red square that moves to the right and down over ten green frames, and its pixels."""
    truth = np.zeros((10, ROWS, COLUMNS), dtype=bool)
    for k in range(10):
        truth[k, 4 + k // 2 : 12 + k // 2, 5 + k // 2 : 14 + k // 2] = True
    voxels = np.zeros((*truth.shape, 3), np.uint8)
    voxels[..., 1] = 230
    voxels[truth] = (250, 40, 60)
    return voxels, truth


class TestSegmenting:
    @pytest.fixture
    def film(self, tmp_path: Path) -> Path:
        for index, picture in enumerate(moving_square()[0]):
            save(tmp_path / "film", f"f{index}.png", picture)
        return tmp_path / "film"

    def test_a_session_follows_the_object_through_time(self, film: Path) -> None:
        session = Session(read_frames(film), SliceBySlice(Bright()))
        session.add(Point((-9, -8, 3)))
        session.propagate()
        np.testing.assert_array_equal(session.mask, moving_square()[1])
        assert session.axis == "K"

    def test_a_real_network_sees_the_colours(self, film: Path) -> None:
        torch.manual_seed(4)
        network = SamSlicePredictor(MobileSam(64), CARD, "", LongestSide(64))
        session = Session(read_frames(film), SliceBySlice(network))
        session.add(Box.from_corners((-5, -5, 3), (-15, -14, 3)))
        frame = moving_square()[0][3]
        seen = network.encode(frame)
        expected = network.decode(seen, PixelPrompts.of(box_xyxy=[5, 5, 15, 14]))
        whole = without_specks(expected.logits > 0, np.empty((0, 2)))
        np.testing.assert_array_equal(session.mask[3], whole)
        assert 0 < whole.mean() < 1
        other = network.encode(np.ascontiguousarray(frame[..., ::-1]))
        assert np.abs(np.asarray(seen.features) - np.asarray(other.features)).max() > 1e-3

    def test_everything_is_written_and_made_again(self, film: Path, tmp_path: Path) -> None:
        _, truth = moving_square()
        volume = read_frames(film)
        task = ObjectTask("tool", Prompts((Point((-9, -8, 3)),)))
        segmentation = segment_objects(volume, SliceBySlice(Bright()), [task])
        written = write_results(tmp_path / "out", segmentation)
        assert [file.name for file in written.files] == ["film.seg.nrrd", "film.png", "film.json"]
        again = read_volume(written.files[0])
        np.testing.assert_array_equal(again.voxels, truth)
        assert again.geometry.same_grid(volume.geometry)
        overview = np.asarray(Image.open(written.files[1]).convert("RGB")).astype(int)
        green = (np.abs(overview - (0, 230, 0)) < 3).all(axis=2)
        assert green.sum() > 2000, "the frames are shown in their colours"
        record = json.loads(written.files[2].read_text())
        labels = replay_record(record, read_frames(film), SliceBySlice(Bright()))
        np.testing.assert_array_equal(labels, truth)


def stretched(stack: np.ndarray) -> np.ndarray:
    return (stack - stack.min()) / (stack.max() - stack.min())


def stacks_of(voxels: np.ndarray, size: int, codes: str = "RAS", takes_colour: bool = True) -> SliceStacks:
    volume = Volume(voxels, Geometry(voxels.shape[:3], np.diag([-1.0, -1, 1, 1])))
    return SliceStacks(volume, "K", IntensityWindow(100, 101), size, 3, FileAxes(codes), takes_colour)


class TestStacks:
    """Networks of neighbouring slices see neighbouring frames, in colour where they were trained on it."""

    @pytest.fixture
    def voxels(self) -> np.ndarray:
        return np.random.default_rng(1).integers(30, 200, (5, 4, 4, 3)).astype(np.uint8)

    def test_the_three_colours_are_stretched_together_without_a_window(self, voxels: np.ndarray) -> None:
        shown = stacks_of(voxels, 4).stack(2)
        assert shown.shape == (3, 3, 4, 4)
        assert shown.dtype == np.float32
        np.testing.assert_allclose(shown, stretched(np.moveaxis(voxels[1:4] / 255, -1, 1)), atol=1e-6)
        first = stacks_of(voxels, 4).stack(0)
        np.testing.assert_allclose(first, stretched(np.moveaxis(voxels[[0, 0, 1]], -1, 1)), atol=1e-6)
        assert not stacks_of(np.full_like(voxels, 7), 4).stack(2).any()

    @pytest.mark.parametrize(
        ("codes", "flips"), [("LAS", (1, 1, -1)), ("RPS", (1, -1, 1)), ("RAI", (-1, 1, 1))]
    )
    def test_the_card_says_which_way(
        self, voxels: np.ndarray, codes: str, flips: tuple[int, int, int]
    ) -> None:
        time, rows, columns = flips
        expected = stretched(np.moveaxis(voxels[1:4], -1, 1))[::time, :, ::rows, ::columns]
        np.testing.assert_allclose(stacks_of(voxels, 4, codes).stack(2), expected, atol=1e-6)

    def test_colours_are_resized_each_by_itself(self, voxels: np.ndarray) -> None:
        voxels = np.broadcast_to(np.arange(5)[:, None] * np.array([40, 20, 10]), (3, 3, 5, 3)).astype(
            np.uint8
        )
        shown = stacks_of(voxels, 9).stack(1)
        assert shown.shape == (3, 3, 9, 9)
        for channel, end in enumerate((1, 0.5, 0.25)):
            np.testing.assert_allclose(shown[1, channel, 4], np.linspace(0, end, 9), atol=0.05)

    def test_a_network_of_grey_stacks_names_those_that_take_colour(self, voxels: np.ndarray) -> None:
        with pytest.raises(VolumeError, match=r"takes grey volumes.* colour: .*mobile_sam\.sa1b, ") as caught:
            stacks_of(voxels, 4, takes_colour=False)
        assert "ma_sam" not in str(caught.value)
        predictor = MaSamVolumePredictor(ma_sam_of("ma_sam"), MA_SAM_CARD, "", torch.device("cpu"))
        with pytest.raises(VolumeError, match="takes grey volumes"):
            predictor.set_volume(stacks_of(voxels, 4).volume, "K", IntensityWindow(0, 255))


MA_SAM_CARD = ModelCard("ma_sam.frames", "MA-SAM", "ma_sam", Source("manual"), "", dimensions=3)
COLOUR_CARD = replace(MA_SAM_CARD, options={"colour": True})


@pytest.fixture(scope="module")
def network() -> MaSam:
    return ma_sam_of("ma_sam")


class TestMaSam:
    def test_three_equal_colours_give_the_official_numbers(self, network: MaSam) -> None:
        recorded = arrays("ma_sam")
        grey = torch.from_numpy(recorded["input_bdhw"])
        colours = grey[:, :, None].repeat(1, 1, 3, 1, 1)
        with torch.inference_mode():
            np.testing.assert_allclose(network(colours)[0], recorded["low_res_logits"], atol=1e-4)
            colours[:, :, 2] = 0
            assert np.abs(network(colours)[0].numpy() - recorded["low_res_logits"]).max() > 1e-2

    def test_a_series_of_frames_is_segmented_and_written(self, network: MaSam, tmp_path: Path) -> None:
        frames = np.random.default_rng(2).integers(0, 256, (3, 60, 80, 3)).astype(np.uint8)
        for index, frame in enumerate(frames):
            save(tmp_path / "film", f"{index}.png", frame)
        volume = read_frames(tmp_path / "film")
        predictor = MaSamVolumePredictor(network, COLOUR_CARD, "", torch.device("cpu"))
        segmentation = segment_objects(volume, predictor, [])
        stack = SliceStacks(volume, "K", IntensityWindow(0, 1), 80, 5, FileAxes(), True)
        sums = np.zeros((7, network.mask_decoder.mask_tokens.num_embeddings, 80, 80))
        for centre in range(3):
            with torch.inference_mode():
                logits, _ = network(torch.from_numpy(stack.stack(centre))[None])
            sums[centre : centre + 5] += logits.softmax(dim=1).numpy()
        for index in range(3):
            expected = stack.to_picture(sums[index + 2], index).argmax(axis=0)
            np.testing.assert_array_equal(segmentation.labels[index], expected)
        assert segmentation.labels.any()
        written = write_results(tmp_path / "out", segmentation)
        np.testing.assert_array_equal(read_volume(written.files[0]).voxels, segmentation.labels)


def test_the_list_knows_who_takes_colour() -> None:
    able = cards_that_take_colour()
    assert {"mobile_sam.sa1b", "medsam_vit_b.medsam", "dapsam_vit_b.fundus"} <= set(able)
    assert not {"ma_sam_vit_h.btcv", "samed_vit_b.synapse", "med_sa_vit_b_3d.own"} & set(able)
    assert CARD.takes_colour
    assert not find_card("dapsam_vit_b.prostate").takes_colour
