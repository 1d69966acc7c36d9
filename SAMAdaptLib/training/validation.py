"""How good the weights are on patients held back: Dice for a box, one click and five clicks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from SAMAdaptLib.models.mobile_sam import MobileSam
from SAMAdaptLib.training.cache import VALIDATION, FeatureCache
from SAMAdaptLib.training.losses import best_of
from SAMAdaptLib.training.prompting import Conversation, ask, at_label_size
from SAMAdaptLib.training.simulate import Mask, dice, first_click, jittered_box

_LEAST_PIXELS = 50
_MOST_PER_PICTURE = 3
_BATCH = 8
_BOX_JITTER = 0.05
CLICKS = 5


@dataclass(frozen=True)
class Case:
    """One structure on one cached picture."""

    row: int
    dataset: str
    truth: Mask


@dataclass(frozen=True)
class Scores:
    """Mean Dice over data sets, each counting the same.

    Attributes:
        box: From one box.
        click: From one click, the best-scored of the three ambiguity masks.
        click_single: From one click, the single-mask token.
        five: After five clicks.
        by_set: The first, second and fourth by data set.
    """

    box: float
    click: float
    click_single: float
    five: float
    by_set: dict[str, tuple[float, float, float]]

    @property
    def mean(self) -> float:
        """Mean of box, one click and five clicks: what checkpoints are chosen by."""
        return (self.box + self.click + self.five) / 3


def list_cases(cache: FeatureCache) -> list[Case]:
    """List the largest structures of every held-back picture."""
    cases = []
    for dataset, rows in cache.rows(VALIDATION).items():
        for row in rows:
            labels = np.asarray(cache.labels[row])
            sizes = np.bincount(labels.ravel(), minlength=2)
            sizes[0] = 0
            for value in np.argsort(sizes)[::-1][:_MOST_PER_PICTURE]:
                if sizes[value] >= _LEAST_PIXELS:
                    cases.append(Case(row, dataset, labels == value))
    return cases


@torch.inference_mode()
def validate(model: MobileSam, cache: FeatureCache, cases: Sequence[Case], seed: int) -> Scores:
    """Measure Dice on all cases; the same seed draws the same boxes."""
    model.eval()
    results: dict[str, list[tuple[float, ...]]] = {}
    for start in range(0, len(cases), _BATCH):
        batch = cases[start : start + _BATCH]
        rows = sorted({case.row for case in batch})
        encoded = model.image_encoder.upper(cache.features(rows))
        embeddings = encoded[[rows.index(case.row) for case in batch]]
        rng = np.random.default_rng([seed, start])
        columns = (_box_dice(model, embeddings, batch, rng), *_click_dice(model, embeddings, batch))
        for case, *values in zip(batch, *columns, strict=True):
            results.setdefault(case.dataset, []).append(tuple(values))
    means = {name: np.mean(values, axis=0) for name, values in results.items()}
    box, click, single, five = np.mean(list(means.values()), axis=0)
    by_set = {name: (float(m[0]), float(m[1]), float(m[3])) for name, m in means.items()}
    return Scores(float(box), float(click), float(single), float(five), by_set)


def _box_dice(
    model: MobileSam, embeddings: Tensor, batch: Sequence[Case], rng: np.random.Generator
) -> list[float]:
    talks = [Conversation(case.truth, jittered_box(case.truth, _BOX_JITTER, rng)) for case in batch]
    return _dices(ask(model, embeddings, talks)[0], batch)


def _click_dice(
    model: MobileSam, embeddings: Tensor, batch: Sequence[Case]
) -> tuple[list[float], list[float], list[float]]:
    talks = [Conversation(case.truth, clicks=[first_click(case.truth)]) for case in batch]
    every, scores = ask(model, embeddings, talks, every_mask=True)
    answer = best_of(every[:, 1:], scores[:, 1:])
    first, single = _dices(answer, batch), _dices(every[:, :1], batch)
    for _ in range(CLICKS - 1):
        for talk, logits in zip(talks, at_label_size(answer, batch[0].truth.shape[0])[:, 0], strict=True):
            talk.correct(logits)
        answer = ask(model, embeddings, talks, previous=answer)[0]
    return first, single, _dices(answer, batch)


def _dices(logits: Tensor, batch: Sequence[Case]) -> list[float]:
    masks = at_label_size(logits, batch[0].truth.shape[0])[:, 0] > 0
    return [dice(case.truth, mask.numpy()) for case, mask in zip(batch, masks, strict=True)]
