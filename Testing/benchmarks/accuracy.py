"""Dice on the open evaluation data, all models in one run: a box, one click, five clicks.

2D: every structure of at least 50 pixels on its largest slice in the volumes, the scribble pictures and the
ultrasound pictures. The box is the truth's, each edge moved by up to 5 % of its side; the first click is at
the deepest point of the object, each further one in the largest error, the last mask fed back. In brackets:
without the sets that have no compact object or odd labels (OCTA500, STARE, SCD, OASIS, PanDental).

    python Testing/benchmarks/accuracy.py --output DIR [--model NAME[@SIZE][=FILE] ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from SAMAdaptLib.cards import find_card
from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.image_files import read_volume
from SAMAdaptLib.loading import checkpoint_path
from SAMAdaptLib.models import build_predictor
from SAMAdaptLib.models.predictor import SliceEmbedding, SlicePredictor
from SAMAdaptLib.prompts import PixelPrompts
from SAMAdaptLib.training.simulate import Mask, dice, first_click, jittered_box, next_click
from SAMAdaptLib.volume import default_window

DEFAULT_MODELS = ("mobile_sam.sa1b@512", "mobile_sam.sa1b@1024", "lite_medsam.medsam", "mobile_sam.samadapt")
LEAST_PIXELS = 50
BOX_JITTER = 0.05
CLICKS = 5
ODD_SETS = ("OCTA500", "STARE", "SCD", "OASIS", "PanDental")
COLUMNS = ("box", "click", "five")


@dataclass(frozen=True, eq=False)
class Case:
    """One structure on one picture; `picture_id` is shared by the structures of a picture."""

    dataset: str
    name: str
    picture_id: str
    picture: NDArray[np.uint8]
    truth: Mask


def list_cases(folder: Path) -> list[Case]:
    """List all cases of the evaluation folder in a fixed order."""
    cases: list[Case] = []
    for place in sorted(p for p in folder.iterdir() if (p / "info.json").is_file()):
        labels = [p for p in place.iterdir() if p.name in ("label.nii.gz", "label.nrrd")]
        cases += list(_volume_cases(place, labels[0]) if labels else _picture_cases(place))
    return cases


def _volume_cases(place: Path, label_file: Path) -> Iterator[Case]:
    image_file = place / label_file.name.replace("label", "image")
    modality = json.loads((place / "info.json").read_text())["modality"]
    volume = read_volume(image_file, modality)
    labels = read_volume(label_file).voxels
    window = default_window(volume)
    for value in np.unique(labels[labels > 0]):
        area = np.count_nonzero(labels == value, axis=(1, 2))
        k = int(area.argmax())
        if area[k] >= LEAST_PIXELS:
            plane = volume.geometry.plane("K", k)
            picture = window.apply(plane.extract(volume.voxels))
            truth = plane.extract(labels) == value
            yield Case(place.name, f"{value:g}", f"{place.name}/{k}", picture, truth)


def _picture_cases(place: Path) -> Iterator[Case]:
    for file in sorted(place.glob("*.npz")):
        with np.load(file) as content:
            yield Case(file.name.split("_")[0], file.stem, file.stem, content["image"], content["label"] > 0)
    for file in sorted(place.glob("*_mask.png")):
        picture = np.asarray(Image.open(file.with_name(file.name.replace("_mask", ""))).convert("L"))
        labels = np.asarray(Image.open(file))
        for value in np.unique(labels[labels > 0]):
            if np.count_nonzero(labels == value) >= LEAST_PIXELS:
                yield Case(
                    place.name, f"{file.stem}/{value}", f"{place.name}/{file.stem}", picture, labels == value
                )


def load_slices(spec: str) -> tuple[str, SlicePredictor]:
    """Load NAME, NAME@SIZE (another input size) or NAME=FILE (another file of that architecture)."""
    name, _, file = spec.partition("=")
    name, _, size = name.partition("@")
    card = find_card(name)
    path = Path(file) if file else checkpoint_path(card)
    if size:
        card = replace(card, options={**card.options, "input_size": int(size)})
    predictor: Any = build_predictor(card, path, None, torch.device("cpu"))
    return spec.partition("=")[0], predictor


def measure(
    predictor: SlicePredictor, cases: Sequence[Case], seed: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return one row per case, and the mean seconds of an encoding and a decoding."""
    rows: list[dict[str, Any]] = []
    timer = _Timer()
    embedding: SliceEmbedding | None = None
    last = ""
    for number, case in enumerate(cases):
        if embedding is None or case.picture_id != last:
            with timer("encode"):
                embedding = predictor.encode(case.picture)
            last = case.picture_id
        row: dict[str, Any] = {"dataset": case.dataset, "case": case.name, "pixels": int(case.truth.sum())}
        box = PixelPrompts.of(
            box_xyxy=jittered_box(case.truth, BOX_JITTER, np.random.default_rng([seed, number]))
        )
        with timer("decode"):
            row["box"] = dice(case.truth, predictor.decode(embedding, box).logits > 0)
        if "point" in predictor.card.prompts:
            row["click"], row["five"] = _clicked(predictor, embedding, case.truth)
        rows.append(row)
    return rows, timer.means()


def _clicked(predictor: SlicePredictor, embedding: SliceEmbedding, truth: Mask) -> tuple[float, float]:
    clicks = [first_click(truth)]
    previous = None
    found: list[float] = []
    for _ in range(CLICKS):
        prompts = PixelPrompts.of([c.xy for c in clicks], [int(c.positive) for c in clicks])
        answer = predictor.decode(embedding, prompts, previous)
        previous = answer.low_res
        found.append(dice(truth, answer.logits > 0))
        click = next_click(truth, answer.logits > 0)
        if click is None:
            break
        clicks.append(click)
    return found[0], found[-1]


class _Timer:
    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}
        self._name, self._start = "", 0.0

    def __call__(self, name: str) -> _Timer:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds.setdefault(self._name, []).append(time.perf_counter() - self._start)

    def means(self) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in self._seconds.items()}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return means over cases, over the compact ones, and by data set."""
    compact = [row for row in rows if row["dataset"] not in ODD_SETS]
    sets = sorted({row["dataset"] for row in rows})
    return {
        "all": _means(rows),
        "compact": _means(compact),
        "cases": len(rows),
        "compact_cases": len(compact),
        "by_set": {name: _means([row for row in rows if row["dataset"] == name]) for name in sets},
    }


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {c: float(np.mean([row[c] for row in rows])) for c in COLUMNS if rows and c in rows[0]}


def table(results: dict[str, Any]) -> str:
    """Return the markdown table of all models, then one of Dice by data set."""
    first = next(iter(results.values()))["summary"]
    lines = [
        f"Mean Dice over {first['cases']} cases (in brackets {first['compact_cases']} compact ones).",
        "",
        "| model | box | one click | five clicks | encode | decode |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        every, compact = result["summary"]["all"], result["summary"]["compact"]
        cells = [f"{every[c]:.3f} ({compact[c]:.3f})" if c in every else "-" for c in COLUMNS]
        times = [f"{1000 * result['seconds'][kind]:.0f} ms" for kind in ("encode", "decode")]
        lines.append("| " + " | ".join([name, *cells, *times]) + " |")
    lines += ["", "By data set, box / one click / five clicks:", "", "| set | " + " | ".join(results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for name in first["by_set"]:
        cells = []
        for result in results.values():
            means = result["summary"]["by_set"][name]
            cells.append(" / ".join(f"{means[c]:.2f}" if c in means else "-" for c in COLUMNS))
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def read_options(description: str | None) -> argparse.Namespace:
    """Read the command line that both accuracy benchmarks share, and set the number of threads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    data = Path(os.environ.get("SAMADAPT_DATA", beside)) / "eval"
    parser.add_argument("--data", type=Path, default=data, help="folder of the evaluation data")
    parser.add_argument("--model", action="append", help="NAME, NAME@SIZE or NAME=FILE; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="folder for the .json and .md")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def write_report(folder: Path, name: str, results: object, markdown: str) -> None:
    """Write `name`.json and `name`.md, and print the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(results, indent=1)), (".md", markdown)):
        with atomic_path(folder / f"{name}{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(markdown)


def main() -> None:
    options = read_options(__doc__)
    cases = list_cases(options.data)
    results: dict[str, Any] = {}
    for spec in options.model or DEFAULT_MODELS:
        name, predictor = load_slices(spec)
        rows, seconds = measure(predictor, cases, options.seed)
        results[name] = {
            "sha256": predictor.checkpoint_sha256,
            "seconds": seconds,
            "summary": summarise(rows),
            "rows": rows,
        }
        print(name, json.dumps(results[name]["summary"]["all"]), flush=True)
    write_report(options.output, "accuracy", results, table(results))


if __name__ == "__main__":
    main()
