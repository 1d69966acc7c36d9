"""What the frozen part of the encoder makes of every training picture, kept on disk in half precision."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.models.framing import LongestSide
from SAMAdaptLib.models.mobile_sam import MobileSam
from SAMAdaptLib.training.augment import Framed, frame_augmented, frame_plain
from SAMAdaptLib.training.config import TrainingConfig
from SAMAdaptLib.training.pictures import (
    PictureSource,
    choose_sources,
    largest_slices,
    load_picture,
    read_index,
    split_by_patient,
)

TRAIN = "train"
VALIDATION = "validation"
_FLUSH_EVERY = 20


@dataclass(frozen=True)
class Record:
    """One cached picture; `make` gives it in the network's frame."""

    dataset: str
    split: str
    name: str
    make: Callable[[], Framed]


class FeatureCache:
    """Memory maps of one row per record; made once, resumed after a kill, read at random.

    Attributes:
        lower: (N, 320, h, w) float16, output of `TinyViT.lower`.
        embedding: (N, 256, h, w) float16, the base's embedding.
        labels: (N, size / 2, size / 2) uint8 class numbers.
        extent: (N, 2) rows and columns of the picture inside the square input.
    """

    def __init__(
        self, folder: Path, records: Sequence[Record], identity: str, shapes: dict[str, Any]
    ) -> None:
        self.records = list(records)
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {"identity": identity, "records": [[r.dataset, r.split, r.name] for r in records]}
        marker = folder / "contents.json"
        fresh = not marker.is_file() or json.loads(marker.read_text()) != wanted
        arrays = {
            name: np.lib.format.open_memmap(
                folder / f"{name}.npy",
                mode="w+" if fresh else "r+",
                dtype=dtype,
                shape=(len(self.records), *shape),
            )
            for name, (dtype, shape) in {**shapes, "extent": ("int32", (2,)), "done": ("uint8", ())}.items()
        }
        if fresh:
            with atomic_path(marker) as temporary:
                temporary.write_text(json.dumps(wanted))
        self.lower: NDArray[np.float16] = arrays["lower"]
        self.embedding: NDArray[np.float16] = arrays["embedding"]
        self.labels: NDArray[np.uint8] = arrays["labels"]
        self.extent: NDArray[np.int32] = arrays["extent"]
        self._done: NDArray[np.uint8] = arrays["done"]

    def rows(self, split: str) -> dict[str, list[int]]:
        """Return the row numbers of a split by data set."""
        rows: dict[str, list[int]] = {}
        for row, record in enumerate(self.records):
            if record.split == split:
                rows.setdefault(record.dataset, []).append(row)
        return rows

    @torch.inference_mode()
    def fill(self, model: MobileSam, size: int, report: Callable[[str], None]) -> None:
        """Encode the records that are not there yet."""
        encoder = copy.deepcopy(model.image_encoder).eval().fold_batch_norms()
        missing = np.flatnonzero(self._done == 0)
        framing = LongestSide(size)
        for count, row in enumerate(missing):
            framed = self.records[row].make()
            lower = encoder.lower(
                framing.filled_up(framed.picture).contiguous(memory_format=torch.channels_last)
            )
            self.lower[row] = lower[0].numpy()
            self.embedding[row] = encoder.upper(lower)[0].numpy()
            self.labels[row] = framed.labels
            self.extent[row] = framed.picture.shape
            self._done[row] = 1
            if count % _FLUSH_EVERY == 0:
                report(f"encoded {count + 1} of {len(missing)} pictures")

    def features(self, rows: Sequence[int]) -> Tensor:
        """Return the lower features of some rows as float32."""
        return torch.from_numpy(self.lower[list(rows)].astype(np.float32))

    def base_embeddings(self, rows: Sequence[int]) -> Tensor:
        """Return the base's embeddings of some rows as float32."""
        return torch.from_numpy(self.embedding[list(rows)].astype(np.float32))


def build_cache(
    config: TrainingConfig, model: MobileSam, base_sha256: str, report: Callable[[str], None]
) -> FeatureCache:
    """Open the cache that the training file asks for and encode what is missing."""
    records = list_records(config)
    size, encoder = config.input_size, model.image_encoder.config
    grid = size // encoder.stride
    identity = hashlib.sha256(f"{base_sha256} {size} {config.seed} 1".encode()).hexdigest()
    shapes = {
        "lower": ("float16", (encoder.widths[3], grid, grid)),
        "embedding": ("float16", (encoder.out_channels, grid, grid)),
        "labels": ("uint8", (size // 2, size // 2)),
    }
    cache = FeatureCache(config.cache, records, identity, shapes)
    cache.fill(model, size, report)
    return cache


def list_records(config: TrainingConfig) -> list[Record]:
    """List every picture of the run: the held-back patients plain, the others plain once and then changed."""
    train, held = split_by_patient(read_index(config.data), config.validation_share, config.seed)
    records: list[Record] = []
    for dataset, items in held.items():
        for source in choose_sources(items, config.validation_pictures):
            records.append(_record(config, dataset, VALIDATION, source, 0))
    for folder in config.validation:
        for number, labelled in enumerate(largest_slices(folder)):
            make = _plain(labelled, config.input_size)
            records.append(Record(folder.name, VALIDATION, str(number), make))
    longest = max(config.records_per_set, config.pictures_per_set)
    for turn in range(longest):
        for dataset, items in train.items():
            sources = choose_sources(items, config.pictures_per_set)
            if turn < max(config.records_per_set, len(sources)):
                repeat, position = divmod(turn, len(sources))
                records.append(_record(config, dataset, TRAIN, sources[position], repeat))
    return records


def _plain(labelled: Any, size: int) -> Callable[[], Framed]:
    return lambda: frame_plain(labelled, size)


def _record(config: TrainingConfig, dataset: str, split: str, source: PictureSource, turn: int) -> Record:
    name = f"{source.item.image.name}/{source.draw}/{turn}"

    def make() -> Framed:
        key = hashlib.sha256(f"{config.seed}/{dataset}/{name}".encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(key, "little"))
        labelled = load_picture(source, rng)
        if turn == 0:
            return frame_plain(labelled, config.input_size)
        return frame_augmented(labelled, config.input_size, rng)

    return Record(dataset, split, name, make)
