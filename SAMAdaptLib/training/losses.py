"""What a mask should be: close to the truth, and honest about how close."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FOCAL_WEIGHT = 8.0
_SCORE_WEIGHT = 1.0


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return 8 x focal (gamma 2) + Dice loss of each mask; SAM weighs the focal loss 20, Dice counts here.

    Args:
        logits: (B, M, h, w).
        truth: (B, 1, h, w) in 0..1.

    Returns:
        (B, M).
    """
    truth = truth.expand_as(logits)
    probability = logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    wrong = probability + truth - 2 * probability * truth  # 1 - p of the true class
    focal = (wrong.square() * cross).mean((-2, -1))
    overlap = 2 * (probability * truth).sum((-2, -1))
    dice = 1 - (overlap + 1) / (probability.sum((-2, -1)) + truth.sum((-2, -1)) + 1)
    return _FOCAL_WEIGHT * focal + dice


def intersection_over_union(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the (B, M) overlap of thresholded masks with the truth."""
    predicted, wanted = logits > 0, truth.expand_as(logits) > 0.5
    union = (predicted | wanted).sum((-2, -1)).clamp(min=1)
    return (predicted & wanted).sum((-2, -1)) / union


def single_loss(logits: Tensor, scores: Tensor, truth: Tensor) -> Tensor:
    """Return the mean loss of one mask per prompt with its score: (B, 1, h, w), (B, 1), (B, 1, h, w)."""
    overlap = intersection_over_union(logits.detach(), truth)
    return mask_loss(logits, truth).mean() + _SCORE_WEIGHT * F.mse_loss(scores, overlap)


def ambiguous_loss(logits: Tensor, scores: Tensor, truth: Tensor) -> Tensor:
    """Return the loss of the best of several masks per prompt; every score must be honest."""
    overlap = intersection_over_union(logits.detach(), truth)
    return mask_loss(logits, truth).min(dim=1).values.mean() + _SCORE_WEIGHT * F.mse_loss(scores, overlap)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted cross entropy to the teacher's probabilities; (B, 1, h, w) twice and (B,)."""
    target = teacher_logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    floor = F.binary_cross_entropy_with_logits(teacher_logits, target, reduction="none")
    balance = 0.5 / target.mean((1, 2, 3)).clamp(0.02, 0.5)  # small objects would vanish in the mean
    return ((cross - floor).mean((1, 2, 3)) * balance * weights).mean()


def best_of(logits: Tensor, scores: Tensor) -> Tensor:
    """Return, per prompt, the mask with the highest score: (B, M, h, w), (B, M) -> (B, 1, h, w)."""
    rows = torch.arange(len(logits))
    return logits[rows, scores.argmax(dim=1)][:, None]
