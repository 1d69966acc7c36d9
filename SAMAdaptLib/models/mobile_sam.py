"""MobileSAM and LiteMedSAM: TinyViT under SAM's prompt encoder and mask decoder.

Papers: Zhang et al., "Faster Segment Anything", 2023 (https://arxiv.org/abs/2306.14289);
Ma et al., "Segment anything in medical images", Nature Communications 2024 (LiteMedSAM: its small variant).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.prompts import PixelPrompts
from SAMAdaptLib.weights import load_into, read_checkpoint

from .framing import LongestSide, LongestSideMinMax
from .mask_decoder import SINGLE_MASK, MaskDecoder
from .prompt_encoder import PromptEncoder
from .sam import SamSlicePredictor
from .tiny_vit import UNUSED_KEYS, TinyViT, TinyViTConfig


class MobileSam(nn.Module):
    """The three parts under their official names.

    Args:
        input_size: Side of the square network input in pixels, a multiple of the encoder's stride.
        encoder: Sizes of the encoder; None for the published ones.
    """

    def __init__(self, input_size: int = 1024, encoder: TinyViTConfig | None = None) -> None:
        super().__init__()
        encoder = encoder or TinyViTConfig()
        grid = input_size // encoder.stride
        self.image_encoder = TinyViT(encoder)
        self.prompt_encoder = PromptEncoder(encoder.out_channels, (grid, grid), (input_size, input_size))
        self.mask_decoder = MaskDecoder(encoder.out_channels)


def load_mobile_sam(tensors: Mapping[str, Tensor], input_size: int = 1024, lite: bool = False) -> MobileSam:
    """Build the network for a checkpoint with the official keys and load it.

    Args:
        tensors: Names and values of the checkpoint.
        input_size: Side of the network input; the weights serve any multiple of 16.
        lite: LiteMedSAM, whose patch embedding keeps the resolution.

    Raises:
        WeightsError: The checkpoint is of another network.
    """
    network = MobileSam(input_size, TinyViTConfig(pointwise_patches=lite))
    load_into(network, tensors, "LiteMedSAM" if lite else "MobileSAM", ignore=UNUSED_KEYS)
    return network.eval()


class FirstClickSlicePredictor(SamSlicePredictor):
    """For weights whose single mask was trained with one click: it is taken, not the best of three."""

    def _candidates(self, prompts: PixelPrompts, mask: Tensor | None) -> slice:
        return SINGLE_MASK


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> SamSlicePredictor:
    """Build MobileSAM or LiteMedSAM of a card; see `SAMAdaptLib.models.build_predictor`."""
    file = read_checkpoint(checkpoint)
    lite = bool(card.options.get("lite", False))
    size = int(card.options.get("input_size", 256 if lite else 1024))
    network = load_mobile_sam(file.tensors, size, lite)
    network.image_encoder.fold_batch_norms()
    framing = LongestSideMinMax(size) if lite else LongestSide(size)
    single = card.options.get("first_click") == "single"
    predictor = FirstClickSlicePredictor if single else SamSlicePredictor
    return predictor(network, card, file.sha256, framing, device)
