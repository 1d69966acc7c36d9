"""Which pictures and structures a step asks about; decided by seed and step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from SAMAdaptLib.models.mobile_sam import MobileSam
from SAMAdaptLib.training.cache import TRAIN, FeatureCache
from SAMAdaptLib.training.config import TrainingConfig
from SAMAdaptLib.training.losses import best_of
from SAMAdaptLib.training.pictures import structures
from SAMAdaptLib.training.prompting import Conversation, ask, at_label_size
from SAMAdaptLib.training.simulate import Click, Mask

_TRIES = 50
_THING_SCORE = 0.8
_THING_AREA = (0.002, 0.4)


@dataclass(frozen=True)
class Batch:
    """Pictures of a step and the structures asked about.

    Attributes:
        rows: Cache rows of the pictures.
        owner: For each structure the position of its picture in `rows`.
        truths: The masks asked about, in the label frame.
    """

    rows: list[int]
    owner: list[int]
    truths: list[Mask]


class Sampler:
    """Draws sets evenly, then a picture of the set, then structures of the picture."""

    def __init__(self, config: TrainingConfig, cache: FeatureCache) -> None:
        self.config = config
        self.cache = cache
        self._sets = list(cache.rows(TRAIN).values())

    def draw(self, rng: np.random.Generator) -> Batch:
        """Draw the pictures and structures of one step."""
        rows: list[int] = []
        owner: list[int] = []
        masks: list[Mask] = []
        for _ in range(self.config.pictures_per_step):
            row, found = self._draw_picture(rng)
            chosen = rng.choice(
                len(found), self.config.prompts_per_picture, len(found) < self.config.prompts_per_picture
            )
            owner += [len(rows)] * len(chosen)
            masks += [found[k] for k in chosen]
            rows.append(row)
        return Batch(rows, owner, masks)

    def _draw_picture(self, rng: np.random.Generator) -> tuple[int, list[Mask]]:
        for _ in range(_TRIES):
            rows = self._sets[rng.integers(len(self._sets))]
            row = rows[rng.integers(len(rows))]
            found = structures(np.asarray(self.cache.labels[row]))
            if found:
                return row, found
        raise RuntimeError("the cached pictures hold no labelled structure")


@torch.no_grad()
def replace_by_things(
    batch: Batch, teacher: MobileSam, cache: FeatureCache, share: float, rng: np.random.Generator
) -> Batch:
    """Put, for a share of the structures, what the base finds at a random point in their place.

    So the adapted model keeps answering for whatever is pointed at, not only for the organs of its labels.
    """
    picked = [k for k in range(len(batch.owner)) if rng.random() < share]
    if not picked:
        return batch
    side = batch.truths[0].shape[0]
    talks = [
        Conversation(
            batch.truths[k], clicks=[_point_in_picture(cache.extent[batch.rows[batch.owner[k]]], rng)]
        )
        for k in picked
    ]
    embeddings = cache.base_embeddings([batch.rows[batch.owner[k]] for k in picked])
    logits, scores = ask(teacher, embeddings, talks, every_mask=True)
    best = at_label_size(best_of(logits[:, 1:], scores[:, 1:]), side)[:, 0] > 0
    masks = list(batch.truths)
    for k, thing, score in zip(picked, best.numpy(), scores[:, 1:].max(dim=1).values, strict=True):
        if float(score) > _THING_SCORE and _THING_AREA[0] < thing.mean() < _THING_AREA[1]:
            masks[k] = thing
    return Batch(batch.rows, batch.owner, masks)


def _point_in_picture(extent: Sequence[int], rng: np.random.Generator) -> Click:
    rows, columns = (int(n) // 2 for n in extent)
    return Click((float(rng.integers(columns)), float(rng.integers(rows))), True)
