"""The main job, from a DICOM study to a scene, a DICOM-SEG and a picture; run it with `run.py demo`.

The real CT of the shared data is used where it is there, else a synthetic torso whose truth is known.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from SAMAdaptLib.dicom import DicomSeries
    from SAMAdaptLib.segmenting import Segmentation

PROJECT = Path(__file__).resolve().parents[1]
PROMPTS = Path(__file__).parent / "Data" / "prompts"
REAL_SERIES = Path("dicom") / "ct_liver_crlm" / "image"
DICE_WANTED = 0.9


def main() -> int:
    sys.path[:0] = [str(PROJECT), str(PROJECT / "SAMAdapt")]
    from SAMAdaptLib.errors import SAMAdaptError

    parser = argparse.ArgumentParser(description="Segment three organs of a CT and write everything.")
    parser.add_argument("--output", type=Path, default=PROJECT / "output", help="folder for what is written")
    parser.add_argument(
        "--phantom", action="store_true", help="use the synthetic torso even with real data there"
    )
    parsed = parser.parse_args()
    try:
        return _run(parsed.output, parsed.phantom)
    except SAMAdaptError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def _run(output: Path, phantom: bool) -> int:
    from SAMAdaptLib.dicom import read_series
    from SAMAdaptLib.loading import load_model
    from SAMAdaptLib.prompt_files import read_prompt_file
    from SAMAdaptLib.results import write_results
    from SAMAdaptLib.segmenting import segment_objects

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        with _step("open the sample"):
            folder, prompts = _sample(Path(scratch), phantom)
            series = read_series(folder)
        tasks = read_prompt_file(prompts)
        with _step("load the default model"):
            predictor = load_model()
        with _step(f"segment {', '.join(task.name for task in tasks)}"):
            segmentation = segment_objects(series.volume, predictor, tasks)
        with _step("write label map, DICOM-SEG, picture and record"):
            written = write_results(output, segmentation, series)
        with _step("build the Slicer scene and save it"):
            scene_file = _save_scene(output, segmentation)
    for item in segmentation.objects:
        slices = np.flatnonzero((segmentation.labels == item.label).any(axis=(1, 2)))
        reach = f"slices {slices[0]} to {slices[-1]}" if slices.size else "no slice"
        print(f"  {item.task.name}: {reach}, {item.seconds:.1f} s")
    print("\nWritten:")
    for path in [*written.files, *([scene_file] if scene_file else [])]:
        print(f"  {path}")
    for remark in written.remarks:
        print(f"  ({remark})")
    result = _score(segmentation, series) if prompts.stem == "torso_phantom" else 0
    print("\nOn your own volume (positions in mm: right, anterior, superior):")
    print("  samadapt segment VOLUME --box R A S R A S --point R A S --output FOLDER")
    print("For research use, not a medical device.")
    return result


def _sample(scratch: Path, phantom: bool) -> tuple[Path, Path]:
    from SAMAdaptLib.dicom.phantom import write_torso_phantom

    shared = Path(os.environ.get("SAMADAPT_DATA") or PROJECT.parent / "shared" / "data")
    if (shared / REAL_SERIES).is_dir() and not phantom:
        return shared / REAL_SERIES, PROMPTS / "ct_liver_crlm.json"
    write_torso_phantom(scratch / "torso")
    return scratch / "torso", PROMPTS / "torso_phantom.json"


def _save_scene(output: Path, segmentation: Segmentation) -> Path | None:
    """Put volume, prompts and segments into a real scene, as the module does, and write it as .mrb."""
    try:
        import slicer  # noqa: F401
    except ImportError:
        print("  (no scene: slicer-core has no build for this machine)")
        return None
    from SAMAdaptLib.results import terminology_of
    from SAMAdaptSlicer.headless import boot
    from SAMAdaptSlicer.markups import add_prompt_nodes
    from SAMAdaptSlicer.segments import add_segment, new_segmentation, read_mask, write_mask

    headless = boot()
    volume_node = headless.add_volume_node(segmentation.volume)
    segmentation_node: Any = new_segmentation(volume_node, "SAMAdapt segmentation")
    for item in segmentation.objects:
        mask = segmentation.labels == item.label
        colour = np.asarray(item.task.colour_rgb) / 255
        segment_id = add_segment(segmentation_node, item.task.name, colour, terminology_of(item).to_slicer())
        write_mask(segmentation_node, segment_id, mask, volume_node)
        add_prompt_nodes(headless.scene, item.task.prompts, volume_node, segmentation_node, segment_id)
        if not np.array_equal(read_mask(segmentation_node, segment_id, volume_node), mask):
            raise RuntimeError(f"{item.task.name} came back from the scene changed.")
    path = output / "scene.mrb"
    headless.save_scene(path)
    return path


def _score(segmentation: Segmentation, series: DicomSeries) -> int:
    """Compare with the phantom's exact truth; 1 if an organ falls short."""
    from SAMAdaptLib.dicom.phantom import PHANTOM_ORGANS, torso_truth

    truth = torso_truth(series.volume.geometry)
    values = {organ.name: organ.label_value for organ in PHANTOM_ORGANS}
    print("\nAgainst the phantom's truth:")
    worst = 1.0
    for item in segmentation.objects:
        mask, known = segmentation.labels == item.label, truth == values[item.task.name]
        dice = 2 * np.count_nonzero(mask & known) / max(1, np.count_nonzero(mask) + np.count_nonzero(known))
        worst = min(worst, dice)
        print(f"  {item.task.name}: Dice {dice:.3f}")
    if worst < DICE_WANTED:
        print(f"At least {DICE_WANTED} was wanted for every organ.", file=sys.stderr)
    return int(worst < DICE_WANTED)


@contextmanager
def _step(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"{time.perf_counter() - started:7.1f} s  {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
