"""Pictures as the networks of the SAM family want them, and masks back at the picture's size."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""SAM's mean and standard deviation of red, green and blue in 0..255."""


def normalise_and_pad(picture: NDArray[np.float32], size: int) -> Tensor:
    """Normalise a resized picture as SAM does and fill up to a square with zeros at the bottom and right.

    Args:
        picture: (rows, columns) grey or (rows, columns, 3) RGB in 0..255, no side longer than `size`.
        size: Side of the network input.

    Returns:
        (1, 3, size, size) float32.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32))
    colours = pixels.expand(3, *pixels.shape) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    rows, columns = colours.shape[1:]
    return F.pad((colours - mean) / std, (0, size - columns, 0, size - rows))[None]
