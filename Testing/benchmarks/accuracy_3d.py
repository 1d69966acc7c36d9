"""Dice of whole structures from one box on the largest slice, propagated; all models in one run.

Every structure of at least 50 pixels on its largest slice in the volumes of the open evaluation data, with
the same box for every model (each edge moved by up to 5 % of its side). "own slices" counts only the
slices where the structure really is, so the difference to "all slices" is what leaks past its ends.

    python Testing/benchmarks/accuracy_3d.py --output DIR [--model NAME[@SIZE][=FILE] ...] [--data DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import BOX_JITTER, LEAST_PIXELS, load_slices
from numpy.typing import NDArray

from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.image_files import read_volume
from SAMAdaptLib.prompts import Box
from SAMAdaptLib.propagation import SliceBySlice
from SAMAdaptLib.session import Session
from SAMAdaptLib.training.simulate import dice, jittered_box
from SAMAdaptLib.volume import Volume

DEFAULT_MODELS = ("mobile_sam.sa1b@512", "mobile_sam.samadapt")


@dataclass(frozen=True, eq=False)
class Structure:
    """One labelled structure of a volume, with the slice and the box that prompt it."""

    dataset: str
    value: int
    volume: Volume
    truth: NDArray[np.bool_]
    slice_k: int
    box: Box


def list_structures(folder: Path, seed: int) -> Iterator[Structure]:
    """List the structures of the evaluation volumes in a fixed order."""
    number = 0
    for place in sorted(p for p in folder.iterdir() if (p / "info.json").is_file()):
        for label_file in (p for p in sorted(place.iterdir()) if p.name in ("label.nii.gz", "label.nrrd")):
            modality = json.loads((place / "info.json").read_text())["modality"]
            volume = read_volume(place / label_file.name.replace("label", "image"), modality)
            labels = read_volume(label_file).voxels
            for value in np.unique(labels[labels > 0]).astype(int).tolist():
                truth = labels == value
                slice_k = int(truth.sum(axis=(1, 2)).argmax())
                if np.count_nonzero(truth[slice_k]) >= LEAST_PIXELS:
                    box = _box_on(volume, truth, slice_k, np.random.default_rng([seed, number]))
                    yield Structure(place.name, value, volume, truth, slice_k, box)
                    number += 1


def _box_on(volume: Volume, truth: NDArray[np.bool_], slice_k: int, rng: np.random.Generator) -> Box:
    plane = volume.geometry.plane("K", slice_k)
    corners_xy = np.asarray(jittered_box(plane.extract(truth), BOX_JITTER, rng)).reshape(2, 2)
    corners_ijk = plane.xy_to_ijk(corners_xy)
    centre = volume.geometry.ijk_to_ras([corners_ijk.mean(axis=0)])[0]
    size = np.abs(corners_ijk[1] - corners_ijk[0]) * np.asarray(volume.geometry.spacing_mm)
    return Box(tuple(centre), tuple(size), tuple(volume.geometry.directions.ravel()))


def measure(spec: str, structures: list[Structure]) -> dict[str, Any]:
    """Return one row per structure, and the mean seconds of a structure."""
    _, slices = load_slices(spec)
    predictor = SliceBySlice(slices)
    rows = []
    for item in structures:
        started = time.perf_counter()
        session = Session(item.volume, predictor, "K")
        session.add(item.box)
        session.propagate()
        seconds = time.perf_counter() - started
        mask = session.mask
        own = item.truth.any(axis=(1, 2))
        filled = np.flatnonzero(mask.any(axis=(1, 2)))
        known = np.flatnonzero(own)
        rows.append(
            {
                "dataset": item.dataset,
                "structure": item.value,
                "dice": dice(item.truth, mask),
                "dice_own_slices": dice(item.truth[own], mask[own]),
                "dice_prompted_slice": dice(item.truth[item.slice_k], mask[item.slice_k]),
                "false_slices": int(np.sum((filled < known[0]) | (filled > known[-1]))),
                "missed_slices": len(set(known.tolist()) - set(filled.tolist())),
                "slices": len(known),
                "seconds": seconds,
            }
        )
    return {"sha256": slices.checkpoint_sha256, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """Return a markdown table: means over structures, then by volume."""
    datasets = sorted({row["dataset"] for row in next(iter(results.values()))["rows"]})
    count = len(next(iter(results.values()))["rows"])
    lines = [
        f"One box on the largest slice of {count} structures, propagated; mean Dice.",
        "",
        "| model | all slices | own slices | prompted slice | " + " | ".join(datasets) + " |",
        "|---" * (4 + len(datasets)) + "|",
    ]
    for name, result in results.items():
        rows = result["rows"]
        columns = ("dice", "dice_own_slices", "dice_prompted_slice")
        cells = [f"{np.mean([row[c] for row in rows]):.3f}" for c in columns]
        cells += [f"{np.mean([r['dice'] for r in rows if r['dataset'] == d]):.2f}" for d in datasets]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    data = Path(os.environ.get("SAMADAPT_DATA", beside)) / "eval"
    parser.add_argument("--data", type=Path, default=data, help="folder of the evaluation data")
    parser.add_argument("--model", action="append", help="NAME, NAME@SIZE or NAME=FILE; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="folder for accuracy_3d.json and .md")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    structures = list(list_structures(options.data, options.seed))
    results = {}
    for spec in options.model or DEFAULT_MODELS:
        results[spec.partition("=")[0]] = measure(spec, structures)
        print(table(results), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    files = {"accuracy_3d.json": json.dumps(results, indent=1), "accuracy_3d.md": table(results)}
    for file, text in files.items():
        with atomic_path(options.output / file) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
