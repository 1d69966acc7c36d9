"""Dice of whole structures from one box on their largest slice, carried through the volume by a session.

The structures are those of `accuracy.py`: at least 50 pixels on their largest stored slice, in the volumes of
the open evaluation data; the box is the truth's on that slice, each edge moved by up to 5 % of its side.
"Own slices" counts only the slices that hold the structure, "all" also what was added beyond its ends.

    python Testing/benchmarks/accuracy_3d.py --output DIR [--model NAME[@SIZE][=FILE] ...]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from accuracy import BOX_JITTER, LEAST_PIXELS, load_slices, read_options, write_report

from SAMAdaptLib.geometry import SlicePlane
from SAMAdaptLib.image_files import read_volume
from SAMAdaptLib.models.predictor import SlicePredictor
from SAMAdaptLib.prompts import Box
from SAMAdaptLib.propagation import SliceBySlice
from SAMAdaptLib.session import Session
from SAMAdaptLib.training.simulate import Mask, dice, jittered_box
from SAMAdaptLib.volume import Volume

DEFAULT_MODELS = ("mobile_sam.sa1b@512", "mobile_sam.samadapt")


@dataclass(frozen=True, eq=False)
class Structure:
    """One label of a volume and the slice where it is largest."""

    value: float
    truth_kji: Mask
    largest_k: int


def structures_of(labels_kji: NDArray[Any]) -> Iterator[Structure]:
    for value in np.unique(labels_kji[labels_kji > 0]):
        truth = labels_kji == value
        area = np.count_nonzero(truth, axis=(1, 2))
        if area.max() >= LEAST_PIXELS:
            yield Structure(float(value), truth, int(area.argmax()))


def flat_box(plane: SlicePlane, box_xyxy: NDArray[np.float32]) -> Box:
    """Put a box of pixels into space, flat on its slice and along the picture's own axes."""
    corners_ras = plane.xy_to_ras(box_xyxy.reshape(2, 2))
    origin, along_x, along_y = plane.xy_to_ras([[0, 0], [1, 0], [0, 1]])
    steps = np.stack([along_x - origin, along_y - origin], axis=1)
    lengths = np.linalg.norm(steps, axis=0)
    x, y = (steps / lengths).T
    sides_mm = (box_xyxy[2:] - box_xyxy[:2]) * lengths
    directions = np.stack([x, y, np.cross(x, y)], axis=1)
    return Box(tuple(corners_ras.mean(axis=0)), (*sides_mm, 0.0), tuple(directions.ravel()))


def measure(predictor: SlicePredictor, places: list[Path], seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for place in places:
        modality = json.loads((place / "info.json").read_text()).get("modality")
        volume = read_volume(next(place.glob("image.n*")), modality)
        labels = read_volume(next(place.glob("label.n*"))).voxels
        lifted = SliceBySlice(predictor)
        for number, structure in enumerate(structures_of(labels)):
            rng = np.random.default_rng([seed, number])
            rows.append({"volume": place.name, **_measure_one(lifted, volume, structure, rng)})
    return rows


def _measure_one(
    lifted: SliceBySlice, volume: Volume, structure: Structure, rng: np.random.Generator
) -> dict[str, Any]:
    plane = volume.geometry.plane("K", structure.largest_k)
    picture_truth = plane.extract(structure.truth_kji)
    session = Session(volume, lifted, "K")
    start = time.perf_counter()
    session.add(flat_box(plane, jittered_box(picture_truth, BOX_JITTER, rng)))
    session.propagate()
    found = session.mask
    own = structure.truth_kji.any(axis=(1, 2))
    return {
        "structure": structure.value,
        "all": dice(structure.truth_kji, found),
        "own": dice(structure.truth_kji[own], found[own]),
        "largest": dice(structure.truth_kji[structure.largest_k], found[structure.largest_k]),
        "slices": int(own.sum()),
        "found_slices": int(found.any(axis=(1, 2)).sum()),
        "seconds": time.perf_counter() - start,
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the markdown table: mean Dice over structures, by volume and in all."""
    first = next(iter(results.values()))
    volumes = sorted({row["volume"] for row in first})
    lines = [
        f"3D Dice of {len(first)} structures from one box (own slices in brackets).",
        "",
        "| volume | " + " | ".join(results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for name in [*volumes, "all"]:
        cells = []
        for rows in results.values():
            mine = [row for row in rows if name in ("all", row["volume"])]
            every, own = (np.mean([row[key] for row in mine]) for key in ("all", "own"))
            cells.append(f"{every:.3f} ({own:.3f})")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = read_options(__doc__)
    places = sorted(file.parent for file in options.data.glob("*/label.n*"))
    results: dict[str, list[dict[str, Any]]] = {}
    for spec in options.model or DEFAULT_MODELS:
        name, predictor = load_slices(spec)
        results[name] = measure(predictor, places, options.seed)
        print(name, float(np.mean([row["all"] for row in results[name]])), flush=True)
    write_report(options.output, "accuracy_3d", results, table(results))


if __name__ == "__main__":
    main()
