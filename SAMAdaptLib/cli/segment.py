"""`samadapt segment` and `samadapt replay`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from SAMAdaptLib.dicom import DicomSeries, read_series
from SAMAdaptLib.errors import JobError, PromptError
from SAMAdaptLib.frames import holds_frames, read_frames
from SAMAdaptLib.geometry import AXES
from SAMAdaptLib.image_files import read_volume, write_volume
from SAMAdaptLib.prompt_files import ObjectTask, read_prompt_file
from SAMAdaptLib.prompts import Box, Point, Prompt, Prompts
from SAMAdaptLib.volume import CT_WINDOWS, IntensityWindow, Volume


def add_commands(commands: Any) -> None:
    """Add both commands to the parser."""
    parser = commands.add_parser(
        "segment",
        help="segment objects of a volume and write them",
        description="Segment the objects that prompts point at. Positions are RAS mm. The pictures of a "
        "folder without DICOM (PNG, JPEG, BMP, TIFF, in the order of the numbers in their names) or the "
        "frames of a video (needs PyAV) are the slices of a volume of 1 x 1 x 1 mm: pixel X, Y of frame K "
        "lies at -X -Y K.",
    )
    parser.add_argument(
        "volume",
        type=Path,
        help="NIfTI, NRRD or MHA file, folder with a DICOM series or with pictures, or a video",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("samadapt-output"), help="folder for what is written"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON with one or more objects")
    parser.add_argument(
        "--box", nargs=6, type=float, action="append", default=[], metavar="MM", help="two corners"
    )
    parser.add_argument(
        "--point", nargs=3, type=float, action="append", default=[], metavar="MM", help="inside"
    )
    parser.add_argument(
        "--not-point", nargs=3, type=float, action="append", default=[], metavar="MM", help="outside"
    )
    parser.add_argument("--name", default="object", help="what the segment is called")
    parser.add_argument("--series", help="which DICOM series, by number or UID, where a folder holds several")
    parser.add_argument("--allow-gaps", action="store_true", help="read a DICOM series with missing slices")
    parser.add_argument(
        "--axis", choices=AXES, help="axis across the slices; else that of the box or acquisition"
    )
    parser.add_argument("--window", help=f"grey values seen: LOWER,UPPER or one of {', '.join(CT_WINDOWS)}")
    parser.add_argument("--slices", metavar="FIRST:LAST", help="slices to propagate over, both included")
    parser.add_argument("--no-propagate", action="store_true", help="segment the prompted slices only")
    _add_frame_options(parser)
    _add_model_options(parser)
    parser.set_defaults(run=_segment)

    replay = commands.add_parser("replay", help="make the masks of a record again and write them")
    replay.add_argument("record", type=Path, help="the .json file that was written with a segmentation")
    replay.add_argument("volume", type=Path, help="the volume it was made on")
    replay.add_argument(
        "--output", type=Path, required=True, help="file for the label map (.nrrd, .nii.gz, .mha)"
    )
    replay.add_argument("--series", help="which DICOM series, by number or UID")
    _add_frame_options(replay)
    _add_model_options(replay)
    replay.set_defaults(run=_replay)


def _add_frame_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--frames", metavar="FIRST:LAST", help="part of a video or folder of pictures, from 0, both included"
    )
    parser.add_argument(
        "--every", type=int, metavar="N", help="one frame of N; slices count those that were taken"
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name of a model (see `samadapt models list`); else the default one")
    parser.add_argument("--checkpoint", type=Path, help="file to use instead of the model's own")
    parser.add_argument("--device", help="cpu, cuda or mps; else the fastest one present")


def open_volume(
    path: Path,
    series: str | None = None,
    allow_gaps: bool = False,
    frames: range | None = None,
    every: int | None = None,
) -> tuple[Volume, DicomSeries | None]:
    """Read an image file or frames, or a DICOM file or folder with what a DICOM-SEG must refer to.

    Args:
        path: File or folder.
        series: Of a folder with several DICOM series, its number or UID.
        allow_gaps: Read a DICOM series with missing slices.
        frames: Part of a video or of a folder of pictures; None for all.
        every: Take one frame of so many; None for each.
    """
    if _is_series_of_frames(path):
        first, last = (0, None) if frames is None else (frames.start, frames.stop - 1)
        return read_frames(path, every=1 if every is None else every, first=first, last=last), None
    if frames is not None or every is not None:
        raise JobError(
            f"Frames can be chosen of a video or a folder of pictures, but {path.name} is neither. Leave out "
            "--frames and --every."
        )
    if path.is_dir() or _is_dicom_file(path):
        chosen = int(series) if series is not None and series.isdigit() else series
        found = read_series(path, chosen, allow_gaps=allow_gaps)
        return found.volume, found
    return read_volume(path), None


def _segment(parsed: argparse.Namespace) -> int:
    from SAMAdaptLib.loading import load_model
    from SAMAdaptLib.results import write_results
    from SAMAdaptLib.segmenting import segment_objects

    tasks = _tasks(parsed)
    clock = _Clock()
    volume, series = open_volume(
        parsed.volume,
        parsed.series,
        parsed.allow_gaps,
        _numbers(parsed.frames, "Frames"),
        parsed.every,
    )
    clock.step(f"read {' x '.join(map(str, volume.geometry.shape_ijk))} voxels")
    predictor = load_model(parsed.model, device=parsed.device, checkpoint=parsed.checkpoint)
    if not tasks and not predictor.card.is_automatic:
        raise PromptError(
            f"{predictor.card.title} needs to be shown the object, but no prompt came. Give --box, --point "
            "or --prompts."
        )
    clock.step(f"loaded {predictor.card.title}")
    segmentation = segment_objects(volume, predictor, tasks, axis=parsed.axis, window=_window(parsed.window))
    clock.step(f"segmented {len(segmentation.objects)} objects")
    written = write_results(parsed.output, segmentation, series)
    clock.step(f"wrote {len(written.files)} files to {parsed.output}")
    for item in segmentation.objects:
        millilitres = (
            np.count_nonzero(segmentation.labels == item.label) * volume.geometry.voxel_volume_mm3 / 1000
        )
        print(f"  {item.task.name}: {millilitres:.1f} ml on {len(item.session.confidence)} slices")
    for line in [*(file.name for file in written.files), *written.remarks]:
        print(f"  {line}")
    return 0


def _replay(parsed: argparse.Namespace) -> int:
    from SAMAdaptLib.loading import load_model
    from SAMAdaptLib.segmenting import replay_record

    try:
        record = json.loads(parsed.record.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JobError(
            f"A record (JSON) was wanted, but {parsed.record.name} cannot be read as one."
        ) from error
    volume, _ = open_volume(
        parsed.volume, parsed.series, frames=_numbers(parsed.frames, "Frames"), every=parsed.every
    )
    labels = replay_record(
        record, volume, load_model(parsed.model, device=parsed.device, checkpoint=parsed.checkpoint)
    )
    write_volume(parsed.output, labels, volume.geometry)
    print(f"wrote {parsed.output}: {np.count_nonzero(labels)} voxels")
    return 0


def _tasks(parsed: argparse.Namespace) -> list[ObjectTask]:
    tasks = read_prompt_file(parsed.prompts) if parsed.prompts else []
    given: list[Prompt] = [Box.from_corners(values[:3], values[3:]) for values in parsed.box]
    given += [Point((r, a, s)) for r, a, s in parsed.point]
    given += [Point((r, a, s), positive=False) for r, a, s in parsed.not_point]
    if given:
        tasks.append(
            ObjectTask(
                parsed.name,
                Prompts(tuple(given)),
                propagate=not parsed.no_propagate,
                slices=_numbers(parsed.slices, "Slices"),
            )
        )
    return tasks


def _numbers(text: str | None, what: str) -> range | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit()):
        raise JobError(f"{what} should be two whole numbers such as 10:40, but came as '{text}'.")
    return range(int(first), int(last) + 1)


def _window(text: str | None) -> IntensityWindow | None:
    if text is None:
        return None
    if text in CT_WINDOWS:
        return IntensityWindow(*CT_WINDOWS[text])
    try:
        lower, upper = (float(part) for part in text.split(","))
    except ValueError as error:
        raise JobError(
            f"A window should be two numbers such as -160,240 or one of {', '.join(CT_WINDOWS)}, but came "
            f"as '{text}'."
        ) from error
    return IntensityWindow(lower, upper)


def _is_series_of_frames(path: Path) -> bool:
    """Pictures that lie beside DICOM files, such as previews, are not what is meant."""
    return holds_frames(path) and not any(_is_dicom_file(file) for file in path.rglob("*"))


def _is_dicom_file(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


class _Clock:
    """Prints each step with the time it took."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def step(self, what: str) -> None:
        now = time.perf_counter()
        print(f"{now - self._last:7.1f} s  {what}", flush=True)
        self._last = now
