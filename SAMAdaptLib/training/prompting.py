"""A growing set of prompts per structure, and the network's answer to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from SAMAdaptLib.models.mask_decoder import EVERY_MASK, SINGLE_MASK
from SAMAdaptLib.models.mobile_sam import MobileSam
from SAMAdaptLib.training.simulate import Click, Mask, next_click


@dataclass
class Conversation:
    """What was asked about one structure; truth and prompts are in pixels of the label frame.

    Attributes:
        truth: (size / 2, size / 2) mask.
        box_xyxy: The box, if one was drawn.
        clicks: Clicks in order.
    """

    truth: Mask
    box_xyxy: NDArray[np.float32] | None = None
    clicks: list[Click] = field(default_factory=list)

    def correct(self, logits: Tensor) -> None:
        """Add a click where the answer (h, w) is most wrong; a perfect one is clicked inside the object."""
        click = next_click(self.truth, (logits > 0).numpy())
        if click is None:
            ys, xs = np.nonzero(self.truth)
            click = Click((float(xs[len(xs) // 2]), float(ys[len(ys) // 2])), True)
        self.clicks.append(click)


def truths(talks: Sequence[Conversation]) -> Tensor:
    """Stack the truths as (B, 1, h, w) float32."""
    return torch.from_numpy(np.stack([talk.truth for talk in talks])).float()[:, None]


def ask(
    model: MobileSam,
    embeddings: Tensor,
    talks: Sequence[Conversation],
    *,
    every_mask: bool = False,
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Answer conversations that hold the same kinds of prompts (all or none with a box).

    Args:
        model: The network.
        embeddings: (B, 256, h, w), one per conversation.
        talks: B conversations.
        every_mask: Return the masks of all four tokens, not only the single-mask token.
        previous: (B, 1, 4h, 4w) logits of the last answer.

    Returns:
        Logits (B, M, 4h, 4w) and scores (B, M).
    """
    boxes = None
    if talks[0].box_xyxy is not None:
        boxes = _to_input(
            torch.from_numpy(np.stack([talk.box_xyxy for talk in talks if talk.box_xyxy is not None]))
        )
    points = labels = None
    if any(talk.clicks for talk in talks):
        points, labels = _points(talks)
    sparse, dense = model.prompt_encoder(points, labels, boxes, previous)
    selection = EVERY_MASK if every_mask else SINGLE_MASK
    logits, scores = model.mask_decoder(embeddings, model.prompt_encoder.dense_pe(), sparse, dense, selection)
    return logits, scores


def at_label_size(logits: Tensor, side: int) -> Tensor:
    """Bring logits (B, M, h, w) to the side of the labels."""
    return F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)


def _points(talks: Sequence[Conversation]) -> tuple[Tensor, Tensor]:
    longest = max(len(talk.clicks) for talk in talks)
    points = torch.zeros(len(talks), longest, 2)
    labels = torch.full((len(talks), longest), -1)
    for row, talk in enumerate(talks):
        for column, click in enumerate(talk.clicks):
            points[row, column] = torch.tensor(click.xy)
            labels[row, column] = int(click.positive)
    return _to_input(points), labels


def _to_input(xy: Tensor) -> Tensor:
    """Take pixels of the label frame, twice as large, to pixels of the network input."""
    return 2 * xy + 0.5
