"""The one seam: what the rest of the library knows of a model.

A two-dimensional network is a `SlicePredictor`: pictures and pixels, no patients. Everything above speaks
to a `VolumePredictor`; `propagation.SliceBySlice` makes one of a `SlicePredictor`, and networks that see
neighbouring slices are volume predictors by nature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.geometry import Axis
from SAMAdaptLib.prompts import PixelPrompts, Prompts
from SAMAdaptLib.volume import IntensityWindow, Volume


@dataclass(frozen=True, eq=False)
class SliceEmbedding:
    """What the image encoder made of one picture; opaque to everyone but the predictor that made it.

    Args:
        features: Tensors on the model's device, kept so that each further prompt costs a decoding only.
        picture_shape_yx: Rows and columns of the picture.
    """

    features: Any
    picture_shape_yx: tuple[int, int]


@dataclass(frozen=True, eq=False)
class SlicePrediction:
    """One object on one picture.

    Args:
        logits: (rows, columns) float32 at the picture's size; above 0 is inside.
        score: The network's own estimate of the overlap (IoU) with the object, about 0 to 1.
        low_res: (1, h, w) float32 logits at the decoder's size, to be fed back with the next prompt.
    """

    logits: NDArray[np.float32]
    score: float
    low_res: NDArray[np.float32]


class SlicePredictor(Protocol):
    """A promptable 2-D network."""

    card: ModelCard
    checkpoint_sha256: str

    def encode(self, picture: NDArray[np.uint8]) -> SliceEmbedding:
        """Encode a picture: (rows, columns) grey or (rows, columns, 3) RGB, 0 to 255, the window applied."""
        ...

    def decode(
        self, embedding: SliceEmbedding, prompts: PixelPrompts, previous: NDArray[np.float32] | None = None
    ) -> SlicePrediction:
        """Segment the object that the prompts point at.

        Args:
            embedding: From `encode` of this predictor.
            prompts: In pixels of the picture; `prompts.mask` may stand for `previous`.
            previous: `low_res` of an earlier prediction on this picture, to be corrected.

        Raises:
            PromptError: The network does not take such prompts; the message says which it takes.
        """
        ...


@dataclass(frozen=True, eq=False)
class SliceMask:
    """The result on one slice.

    Args:
        index: Slice across the axis the predictor was opened with.
        labels: (rows, columns) uint8 in the orientation of `SlicePlane`; 0 is background, 1 the object, or
            class numbers of the card for automatic models.
        confidence: Estimated overlap with the truth, 0 to 1.
    """

    index: int
    labels: NDArray[np.uint8]
    confidence: float


class VolumePredictor(Protocol):
    """Everything a session knows of a model."""

    card: ModelCard
    checkpoint_sha256: str

    def set_volume(self, volume: Volume, axis: Axis, window: IntensityWindow) -> None:
        """Take a volume, the axis across its slices and the window that the network sees."""
        ...

    def predict(self, prompts: Prompts, slices: range | None = None) -> Iterator[SliceMask]:
        """Segment slice by slice; whoever stops iterating has cancelled and keeps what came.

        Args:
            prompts: All prompts of one object; empty for a model that segments by itself.
            slices: Slices to propagate over; None for those that hold a prompt (all of them for a model
                that segments by itself).

        Yields:
            Results in the order in which they are ready; a slice may come again when it was improved.

        Raises:
            PromptError: Prompts that the model does not take or that lie outside the volume.
        """
        ...
