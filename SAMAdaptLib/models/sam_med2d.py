"""SAM-Med2D: SAM's ViT-B at 256 pixels, trained on medical pictures in rounds of prompts.

Paper: Cheng et al., "SAM-Med2D", arXiv 2023 (https://arxiv.org/abs/2308.16184).
Official code: https://github.com/OpenGVLab/SAM-Med2D, commit bfd2b93, Apache-2.0.

What differs from SAM:
- An adapter beside the MLP of every block. The variant without it (FT-SAM) has SAM's own keys.
- The picture is standardised, then resized to the square by taking the nearest pixel, whatever its shape.
- A mask prompt is a probability, not a logit: what is fed back goes through a sigmoid first.
- The best scored of three masks is taken for every prompt, not for a single click only.
- Training and demo read colour pictures in the order blue, green, red, and standardise them with the numbers
  of red, green, blue. The published weights saw it that way, so it is done here too; grey is not affected.
- The file holds the optimizer as an object: see `SAMAdaptLib.tensor_reader`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.prompts import PixelPrompts
from SAMAdaptLib.weights import copy_into, read_checkpoint

from .framing import PIXEL_MEAN, PIXEL_STD, as_colours, as_logits, as_picture
from .mask_decoder import THREE_MASKS, MaskDecoder
from .prompt_encoder import PromptEncoder
from .sam import Sam, SamSlicePredictor, vit_shape_of
from .vit import ImageEncoderViT, ViTShape, blocks_of

ADAPTER_RATIO = 0.25
"""Width of the published adapters' gates over that of the tokens."""
_OFFICIAL_PLACE = ".Adapter."
_PLACE = ".beside_mlp."


class GatedAdapter(nn.Module):
    """Weigh the channels by what the whole picture holds, then look at the neighbourhood at half resolution.

    Args:
        embed_dim: Channels C of the tokens.
        ratio: Width of the gate over C.
    """

    def __init__(self, embed_dim: int, ratio: float = ADAPTER_RATIO) -> None:
        super().__init__()
        inner = int(embed_dim * ratio)
        self.norm = nn.LayerNorm(embed_dim)
        self.channel = nn.Sequential(
            nn.Linear(embed_dim, inner, bias=False),
            nn.ReLU(),
            nn.Linear(inner, embed_dim, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(embed_dim, embed_dim, kernel_size=3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(embed_dim, embed_dim, kernel_size=4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, H, W, C), H and W even, to what is added beside the MLP."""
        gate = self.channel(x.mean(dim=(1, 2)))  # B, C
        gated = x * gate[:, None, None]
        spatial = self.spatial(gated.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y: Tensor = self.norm(x + spatial)
        return y


class SamMed2d(Sam):
    """SAM with an adapter beside every MLP of the encoder, or without.

    Args:
        shape: Of the encoder; published at an input size of 256.
        adapter_ratio: See `GatedAdapter`; 0 for an encoder without adapters.
        prompt_encoder: For other sizes than the published ones.
        mask_decoder: For other sizes than the published ones.
    """

    def __init__(
        self,
        shape: ViTShape,
        adapter_ratio: float = ADAPTER_RATIO,
        prompt_encoder: PromptEncoder | None = None,
        mask_decoder: MaskDecoder | None = None,
    ) -> None:
        grid, size = (shape.grid, shape.grid), (shape.input_size, shape.input_size)
        encoder = ImageEncoderViT(shape)
        if adapter_ratio:
            for block in blocks_of(encoder):
                block.beside_mlp = GatedAdapter(shape.embed_dim, adapter_ratio)
        super().__init__(
            encoder,
            prompt_encoder or PromptEncoder(shape.out_channels, grid, size),
            mask_decoder or MaskDecoder(shape.out_channels),
        )
        self.image_encoder: ImageEncoderViT
        self.has_adapters = adapter_ratio > 0


def published_tensors(network: SamMed2d) -> dict[str, Tensor]:
    """Return what a SAM-Med2D file holds, by its official names, as the network's own tensors."""
    return {name.replace(_PLACE, _OFFICIAL_PLACE): tensor for name, tensor in network.state_dict().items()}


def load_into_sam_med2d(network: SamMed2d, tensors: Mapping[str, Tensor]) -> SamMed2d:
    """Load a published file; a network without adapters leaves those of the file out.

    Raises:
        WeightsError: The file is of another network or another size.
    """
    left_out = [] if network.has_adapters else [name for name in tensors if _OFFICIAL_PLACE in name]
    copy_into(published_tensors(network), tensors, "SAM-Med2D", ignore=left_out)
    return network.eval()


def load_sam_med2d(tensors: Mapping[str, Tensor], input_size: int = 256, adapters: bool = True) -> SamMed2d:
    """Build SAM-Med2D for a published file and load it.

    Args:
        tensors: Names and values of the file.
        input_size: Side of the network input, as trained: nothing is resized.
        adapters: Whether the encoder has adapters; if not, those of the file are not used.

    Raises:
        WeightsError: The file is of another network or another size.
    """
    network = SamMed2d(vit_shape_of(tensors, input_size), ADAPTER_RATIO if adapters else 0)
    return load_into_sam_med2d(network, tensors)


class NearestPixels:
    """SAM-Med2D's way: the nearest pixel, the whole square, masks as probabilities.

    Args:
        size: Side of the network input.
        mean: Of the channels in the order of the network, 0..255.
        std: Of the channels.
        reverse_colours: Whether the network takes blue, green, red.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = PIXEL_MEAN,
        std: Sequence[float] = PIXEL_STD,
        reverse_colours: bool = True,
    ) -> None:
        """Remember the numbers."""
        self.size = size
        self._mean = torch.tensor(mean, device="cpu")[:, None, None]
        self._std = torch.tensor(std, device="cpu")[:, None, None]
        self._reverse = reverse_colours

    def to_input(self, picture: NDArray[np.uint8]) -> Tensor:
        """Map (rows, columns[, 3]) in 0..255 to the network input (1, 3, size, size)."""
        rows, columns = (_nearest(self.size, n) for n in picture.shape[:2])
        colours = as_colours(picture[rows][:, columns].astype(np.float32))
        if self._reverse:
            colours = colours.flip(1)
        return (colours - self._mean) / self._std

    def to_input_xy(self, points_xy: NDArray[np.float32], shape_yx: tuple[int, int]) -> NDArray[np.float32]:
        """Map (N, 2) pixels of a picture to pixels of the network input."""
        return (points_xy * (self.size / np.array(shape_yx[::-1]))).astype(np.float32)

    def to_picture(self, low_res: Tensor, shape_yx: tuple[int, int]) -> Tensor:
        """Enlarge to the network input, then resize to the picture, both bilinearly."""
        full = F.interpolate(low_res, (self.size, self.size), mode="bilinear", align_corners=False)
        return F.interpolate(full, shape_yx, mode="bilinear", align_corners=False)

    def mask_to_low_res(self, mask: NDArray[np.bool_], low_res_yx: tuple[int, int]) -> Tensor:
        """Shrink a mask to the decoder's grid, as logits."""
        share = F.interpolate(as_picture(mask)[None, None], low_res_yx, mode="bilinear", antialias=True)
        return as_logits(share)


class SamMed2dSlicePredictor(SamSlicePredictor):
    """SAM's predictor with three masks for every prompt and probabilities as mask prompts."""

    def _candidates(self, prompts: PixelPrompts, mask: Tensor | None) -> slice:
        return THREE_MASKS

    def _mask_input(
        self, prompts: PixelPrompts, previous: NDArray[np.float32] | None, shape_yx: tuple[int, int]
    ) -> Tensor | None:
        logits = super()._mask_input(prompts, previous, shape_yx)
        return None if logits is None else logits.sigmoid()


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> SamMed2dSlicePredictor:
    """Build SAM-Med2D of a card; see `SAMAdaptLib.models.build_predictor`.

    The card's options may hold `input_size` and `adapters`.
    """
    file = read_checkpoint(checkpoint)
    size = card.options.get("input_size", 256)
    network = load_sam_med2d(file.tensors, size, card.options.get("adapters", True))
    return SamMed2dSlicePredictor(network, card, file.sha256, NearestPixels(size), device)


def _nearest(wanted: int, given: int) -> NDArray[np.intp]:
    """Index of the pixel that stands at each of the wanted places; the rounding is that of OpenCV."""
    step = 1.0 / (wanted / given)
    return np.minimum(np.floor(np.arange(wanted) * step), given - 1).astype(np.intp)
