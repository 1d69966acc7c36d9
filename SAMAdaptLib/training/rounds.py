"""One training step: a box, a click, and a later correction for every structure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from SAMAdaptLib.models.mobile_sam import MobileSam
from SAMAdaptLib.training.batches import Batch
from SAMAdaptLib.training.cache import FeatureCache
from SAMAdaptLib.training.config import TrainingConfig
from SAMAdaptLib.training.losses import (
    ambiguous_loss,
    best_of,
    distillation_loss,
    intersection_over_union,
    single_loss,
)
from SAMAdaptLib.training.prompting import Conversation, ask, at_label_size, truths
from SAMAdaptLib.training.simulate import Click, Mask, first_click, jittered_box, random_click


@dataclass
class StepContext:
    """What all rounds of one step share."""

    config: TrainingConfig
    model: MobileSam
    teacher: MobileSam
    cache: FeatureCache
    batch: Batch
    rng: np.random.Generator


def step_loss(step: StepContext) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of one step and its parts for the log."""
    batch, side = step.batch, step.batch.truths[0].shape[0]
    features = step.cache.features(batch.rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=step.config.bfloat16):
        encoded = step.model.image_encoder.upper(features)
    embeddings = encoded.float()[batch.owner]
    target = truths([Conversation(mask) for mask in batch.truths])

    boxed = [
        Conversation(m, jittered_box(m, step.rng.uniform(0, step.config.box_jitter), step.rng))
        for m in batch.truths
    ]
    box_logits, box_scores = ask(step.model, embeddings, boxed)
    box = single_loss(at_label_size(box_logits, side), box_scores, target)
    keep = step.config.box_distillation * _kept_box(step, boxed, box_logits, target, side)

    clicked = [Conversation(m, clicks=[_start(m, step.rng)]) for m in batch.truths]
    every, scores = ask(step.model, embeddings, clicked, every_mask=True)
    big = at_label_size(every, side)
    click = ambiguous_loss(big[:, 1:], scores[:, 1:], target) + single_loss(big[:, :1], scores[:, :1], target)

    from_box = step.rng.random() < 0.35
    talks = boxed if from_box else clicked
    answer = box_logits if from_box else best_of(every[:, 1:], scores[:, 1:])
    later = _later_round(step, embeddings, talks, answer.detach(), target)
    parts = {"box": box, "click": click, "later": later, "keep": keep}
    return torch.stack(list(parts.values())).sum(), {
        name: float(value.detach()) for name, value in parts.items()
    }


def _start(mask: Mask, rng: np.random.Generator) -> Click:
    return first_click(mask) if rng.random() < 0.5 else random_click(mask, rng)


def _kept_box(
    step: StepContext, talks: list[Conversation], logits: Tensor, target: Tensor, side: int
) -> Tensor:
    """Stay with the base's answer to a box as far as that answer is right."""
    with torch.no_grad():
        rows = [step.batch.rows[k] for k in step.batch.owner]
        old = ask(step.teacher, step.cache.base_embeddings(rows), talks)[0]
        trust = intersection_over_union(at_label_size(old, side), target)[:, 0]
    return distillation_loss(logits, old, trust)


def _later_round(
    step: StepContext, embeddings: Tensor, talks: list[Conversation], answer: Tensor, target: Tensor
) -> Tensor:
    """Correct a random number of times and learn from the last correction."""
    side = target.shape[-1]
    last = int(step.rng.integers(1, step.config.later_clicks))
    for turn in range(1, last + 1):
        for talk, logits in zip(talks, at_label_size(answer, side)[:, 0], strict=True):
            talk.correct(logits)
        if turn < last:
            with torch.no_grad():
                answer = ask(step.model, embeddings, talks, previous=answer)[0]
    logits, scores = ask(step.model, embeddings, talks, previous=answer)
    return single_loss(at_label_size(logits, side), scores, target)
