"""MedSAM: SAM's ViT-B trained on medical images with boxes, with its own way in and out.

Paper: Ma et al., "Segment anything in medical images", Nature Communications 2024
(https://doi.org/10.1038/s41467-024-44824-z).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from skimage.transform import resize
from torch import Tensor

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.weights import read_checkpoint

from .framing import as_logits, as_picture, min_max
from .sam import SamSlicePredictor, load_sam


class Stretched:
    """MedSAM's way: the picture fills the square whatever its shape, and probabilities are interpolated.

    Args:
        size: Side of the network input.
    """

    def __init__(self, size: int) -> None:
        """Remember the size."""
        self.size = size

    def to_input(self, picture: NDArray[np.uint8]) -> Tensor:
        """Map (rows, columns[, 3]) in 0..255 to the network input (1, 3, size, size) in 0..1."""
        return min_max(self.resize(picture))

    def resize(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize with cubic splines and antialiasing to (size, size, 3), fractions cut off."""
        colours = np.repeat(picture[:, :, None], 3, axis=2) if picture.ndim == 2 else picture
        shape = (self.size, self.size, 3)
        # Three channels even for grey: the cut makes the last bit of the spline visible, and the published
        # model saw what the spline over three channels gives.
        stretched = resize(colours, shape, order=3, preserve_range=True, anti_aliasing=True)
        return np.asarray(stretched, dtype=np.float64).astype(np.uint8)

    def to_input_xy(self, points_xy: NDArray[np.float32], shape_yx: tuple[int, int]) -> NDArray[np.float32]:
        """Map (N, 2) pixels of a picture to pixels of the network input."""
        return (points_xy / np.array(shape_yx[::-1]) * self.size).astype(np.float32)

    def to_picture(self, low_res: Tensor, shape_yx: tuple[int, int]) -> Tensor:
        """Interpolate the probabilities, not the logits, and give the result as logits."""
        return torch.logit(self.to_probability(low_res, shape_yx), eps=1e-6)

    def to_probability(self, low_res: Tensor, shape_yx: tuple[int, int]) -> Tensor:
        """Map logits (B, M, h, w) to probabilities (B, M, rows, columns); above 0.5 is inside."""
        return F.interpolate(torch.sigmoid(low_res), shape_yx, mode="bilinear", align_corners=False)

    def mask_to_low_res(self, mask: NDArray[np.bool_], low_res_yx: tuple[int, int]) -> Tensor:
        """Shrink a mask to the decoder's grid."""
        share = F.interpolate(as_picture(mask)[None, None], low_res_yx, mode="bilinear", antialias=True)
        return as_logits(share)


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> SamSlicePredictor:
    """Build MedSAM of a card; see `SAMAdaptLib.models.build_predictor`."""
    file = read_checkpoint(checkpoint)
    size = card.options.get("input_size", 1024)
    return SamSlicePredictor(load_sam(file.tensors, size), card, file.sha256, Stretched(size), device)
