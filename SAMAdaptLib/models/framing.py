"""How a picture becomes network input, and how masks come back to the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""SAM's mean and standard deviation of red, green and blue in 0..255."""

_SURE = 6.0
"""Logit of a voxel that the user says is inside: as sure as SAM is of its own masks."""


class Framing(Protocol):
    """What differs between models of one architecture in the way they see pictures."""

    size: int

    def to_input(self, picture: NDArray[np.uint8]) -> Tensor:
        """Map (rows, columns[, 3]) in 0..255 to the network input (1, 3, size, size)."""
        ...

    def to_input_xy(self, points_xy: NDArray[np.float32], shape_yx: tuple[int, int]) -> NDArray[np.float32]:
        """Map (N, 2) pixels of a picture to pixels of the network input."""
        ...

    def to_picture(self, low_res: Tensor, shape_yx: tuple[int, int]) -> Tensor:
        """Map logits (B, M, h, w) of the decoder to logits (B, M, rows, columns) of the picture."""
        ...

    def mask_to_low_res(self, mask: NDArray[np.bool_], low_res_yx: tuple[int, int]) -> Tensor:
        """Map a mask (rows, columns) of the picture to logits (1, 1, h, w) for the prompt encoder."""
        ...


class LongestSide:
    """SAM's way: the longest side fills the input, colours are standardised, the rest is zeros.

    Args:
        size: Side of the network input.
        mean: Of red, green and blue in 0..255.
        std: Of red, green and blue.
    """

    def __init__(
        self, size: int, mean: Sequence[float] = PIXEL_MEAN, std: Sequence[float] = PIXEL_STD
    ) -> None:
        """Remember the numbers."""
        self.size = size
        self._mean = torch.tensor(mean, device="cpu")[:, None, None]
        self._std = torch.tensor(std, device="cpu")[:, None, None]

    def to_input(self, picture: NDArray[np.uint8]) -> Tensor:
        """Map (rows, columns[, 3]) in 0..255 to the network input (1, 3, size, size)."""
        return self.filled_up(self.resize(picture))

    def filled_up(self, resized: NDArray[Any]) -> Tensor:
        """Normalise a picture that is resized already and fill up to (1, 3, size, size) with zeros."""
        colours = self._normalise(resized)
        rows, columns = colours.shape[-2:]
        return F.pad(colours, (0, self.size - columns, 0, self.size - rows))

    def resize(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize a picture with antialiasing so that its longest side fills the input."""
        rows, columns = self.inner_shape((picture.shape[0], picture.shape[1]))
        if picture.shape[:2] == (rows, columns):
            return picture
        image = Image.fromarray(np.ascontiguousarray(picture))
        return np.array(image.resize((columns, rows), Image.Resampling.BILINEAR))

    def inner_shape(self, shape_yx: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the network input that the picture fills."""
        scale = self.size / max(shape_yx)
        return max(1, int(shape_yx[0] * scale + 0.5)), max(1, int(shape_yx[1] * scale + 0.5))

    def to_input_xy(self, points_xy: NDArray[np.float32], shape_yx: tuple[int, int]) -> NDArray[np.float32]:
        """Map (N, 2) pixels of a picture to pixels of the network input."""
        rows, columns = self.inner_shape(shape_yx)
        scale_xy = np.array([columns / shape_yx[1], rows / shape_yx[0]])
        return (points_xy * scale_xy).astype(np.float32)

    def to_picture(self, low_res: Tensor, shape_yx: tuple[int, int]) -> Tensor:
        """Enlarge to the network input, cut the padding off, resize to the picture, all bilinearly."""
        return self.cut_to(low_res, self.inner_shape(shape_yx), shape_yx)

    def cut_to(self, low_res: Tensor, inner_yx: tuple[int, int], shape_yx: tuple[int, int]) -> Tensor:
        """As `to_picture`, for a picture that fills `inner_yx` of the network input."""
        rows, columns = inner_yx
        full = F.interpolate(low_res, (self.size, self.size), mode="bilinear", align_corners=False)
        return F.interpolate(full[..., :rows, :columns], shape_yx, mode="bilinear", align_corners=False)

    def mask_to_low_res(self, mask: NDArray[np.bool_], low_res_yx: tuple[int, int]) -> Tensor:
        """Shrink a mask to the decoder's grid; the padding is outside."""
        inner = as_picture(mask)[None, None]
        inner = F.interpolate(inner, self.inner_shape((mask.shape[0], mask.shape[1])), mode="bilinear")
        rows, columns = inner.shape[-2:]
        padded = F.pad(inner, (0, self.size - columns, 0, self.size - rows))
        return as_logits(F.adaptive_avg_pool2d(padded, low_res_yx))

    def _normalise(self, resized: NDArray[Any]) -> Tensor:
        return (as_colours(resized.astype(np.float32)) - self._mean) / self._std


class LongestSideMinMax(LongestSide):
    """LiteMedSAM's way: as SAM, but grey values are stretched to 0..1 and not standardised."""

    def _normalise(self, resized: NDArray[Any]) -> Tensor:
        return min_max(resized)


def min_max(picture: NDArray[np.uint8]) -> Tensor:
    """Stretch the values of a whole picture (rows, columns[, 3]) to 0..1 as (1, 3, rows, columns)."""
    values = picture.astype(np.float64)
    low, high = values.min(), values.max()
    return as_colours(((values - low) / max(high - low, 1e-8)).astype(np.float32))


def as_colours(values: NDArray[np.float32]) -> Tensor:
    """Turn (rows, columns[, 3]) into (1, 3, rows, columns); grey is repeated."""
    pixels = torch.from_numpy(np.ascontiguousarray(values))
    return pixels.expand(1, 3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]


def as_picture(mask: NDArray[np.bool_]) -> Tensor:
    """Turn a mask into (rows, columns) float32 of 0 and 1."""
    return torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32))


def as_logits(share: Tensor) -> Tensor:
    """Turn the share of each cell that a mask fills, 0 to 1, into logits for the prompt encoder."""
    return (2 * share - 1) * _SURE
