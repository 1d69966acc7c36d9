"""SAM 2 as a model of single pictures: Hiera under a mask decoder that sees finer features.

Paper: Ravi et al., "SAM 2: Segment Anything in Images and Videos", ICLR 2025 (https://arxiv.org/abs/2408.00714).
Official code: https://github.com/facebookresearch/sam2, commit 2b90b9f, Apache-2.0; its weights too.

What differs from SAM: the encoder gives three levels; the two finer ones, made narrow by convolutions that
belong to the mask decoder, are added while it enlarges the mask. "No memory" is a vector on top of the
embedding. A box is two points, and there is always a point that is none, also beside a box. One more token
asks whether there is an object at all; on pictures nobody reads its answer, yet the other tokens see it.
Scores go through a sigmoid. A single mask that changes its area with the threshold gives way to the best
scored of the three. Pictures fill the square whatever their shape.

The parts of the checkpoint that serve videos (memory, object pointers, the head of the object token) are not
built and not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.prompts import PixelPrompts
from SAMAdaptLib.weights import load_into, read_checkpoint

from .framing import PIXEL_MEAN, PIXEL_STD, as_colours, as_logits, as_picture
from .hiera import HIERA_TINY, HieraEncoder, HieraShape, hiera_shape_of
from .layers import MLP
from .mask_decoder import EVERY_MASK, SINGLE_MASK, THREE_MASKS, MaskDecoder
from .predictor import SliceEmbedding, SlicePrediction
from .prompt_encoder import PromptEncoder
from .sam import SamSlicePredictor
from .sizes import Sizes

Features = tuple[Tensor, Tensor, Tensor]
"""Embedding (B, C, h, w) and what the decoder adds at (B, C/4, 2h, 2w) and (B, C/8, 4h, 4w)."""

STRIDE = 16
"""Pixels of the network input per cell of the embedding."""
_CORNERS = (2, 3)
"""Labels of the corners of a box."""
_STABILITY_OFFSET = 0.05
_STABLE = 0.98
_FED_BACK = 32.0
"""Logits that are fed back are kept within this."""
VIDEO_KEYS = (
    "memory_attention.",
    "memory_encoder.",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_obj_ptr",
    "no_obj_embed_spatial",
    "mask_downsample.",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
    "sam_mask_decoder.pred_obj_score_head.",
)
"""How the keys of Meta's checkpoints begin that have no effect on single pictures."""


@dataclass(frozen=True)
class Sam2Sizes:
    """Sizes of the network.

    Args:
        trunk: Of the image encoder.
        embed_dim: Channels C of the embedding.
        mask_channels: Width of the prompt encoder's mask branch.
        mlp_dim: Hidden width of the MLPs of the decoder's transformer.
        score_width: Hidden width of the score head.
    """

    trunk: HieraShape = HIERA_TINY
    embed_dim: int = 256
    mask_channels: int = 16
    mlp_dim: int = 2048
    score_width: int = 256


class Sam2PromptEncoder(PromptEncoder):
    """SAM's prompt encoder, to which a box is two points before the others."""

    def forward(
        self,
        points_xy: Tensor | None = None,
        labels: Tensor | None = None,
        boxes_xyxy: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts as `PromptEncoder` does."""
        if boxes_xyxy is None:
            return super().forward(points_xy, labels, None, masks)
        corners_xy = boxes_xyxy.reshape(-1, 2, 2)
        kinds = torch.tensor(_CORNERS, device=corners_xy.device).expand(len(corners_xy), -1)
        if points_xy is not None and labels is not None:
            corners_xy = torch.cat([corners_xy, points_xy], dim=1)
            kinds = torch.cat([kinds, labels], dim=1)
        return super().forward(corners_xy, kinds, None, masks)


class Sam2MaskDecoder(MaskDecoder):
    """SAM's mask decoder with finer features; takes `Features` instead of an embedding.

    Args:
        embed_dim: Channels C.
        mlp_dim: Hidden width of the transformer's MLPs.
        score_width: Hidden width of the score head.
    """

    def __init__(self, embed_dim: int = 256, mlp_dim: int = 2048, score_width: int = 256) -> None:
        super().__init__(embed_dim, mlp_dim=mlp_dim, score_width=score_width)
        for layer in self.transformer.layers:
            layer.mlp = MLP([embed_dim, mlp_dim, embed_dim])  # SAM's own, under the names of SAM 2
        self.obj_score_token = nn.Embedding(1, embed_dim)
        self.conv_s0 = nn.Conv2d(embed_dim, embed_dim // 8, kernel_size=1)
        self.conv_s1 = nn.Conv2d(embed_dim, embed_dim // 4, kernel_size=1)

    def forward(  # type: ignore[override]
        self, features: Features, dense_pe: Tensor, sparse: Tensor, dense: Tensor, masks: slice = EVERY_MASK
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            features: From `Sam2`.
            dense_pe: (1, C, h, w).
            sparse: (B, N, C).
            dense: (B, C, h, w).
            masks: Which of the masks to return; for the single one the best of the three may come.

        Returns:
            Mask logits (B, masks, 4h, 4w) and scores (B, masks), 0 to 1.
        """
        embedding, half, fine = features
        objectness = self.obj_score_token.weight.expand(sparse.shape[0], -1, -1)
        tokens, image = self.attended(embedding, dense_pe, torch.cat([objectness, sparse], dim=1), dense)
        enlarge, norm, activation, enlarge_again, last = self.output_upscaling
        upscaled = activation(norm(enlarge(image) + half))
        upscaled = last(enlarge_again(upscaled) + fine)  # B, C/8, 4h, 4w
        filters = torch.stack(
            [mlp(tokens[:, 1 + index]) for index, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1
        )
        logits = torch.einsum("btc,bchw->bthw", filters, upscaled)
        scores = self.iou_prediction_head(tokens[:, 0]).sigmoid()
        if masks == SINGLE_MASK:
            return _steady(logits, scores)
        return logits[:, masks], scores[:, masks]


def _steady(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Take the single mask (B, 1, H, W), or the best of the three where its area hangs on the threshold."""
    single = logits[:, 0].flatten(1)
    inner = (single > _STABILITY_OFFSET).sum(1).float()
    outer = (single > -_STABILITY_OFFSET).sum(1).float()
    stable = torch.where(outer > 0, inner / outer, 1.0) >= _STABLE
    best = 1 + scores[:, THREE_MASKS].argmax(dim=1)
    chosen = torch.where(stable, 0, best)
    rows = torch.arange(len(chosen), device=chosen.device)
    return logits[rows, chosen][:, None], scores[rows, chosen][:, None]


class Sam2(nn.Module):
    """The image part of SAM 2 under Meta's names; called, it maps a picture to `Features`.

    Args:
        sizes: Of the network.
        input_size: Side of the square network input in pixels.
    """

    def __init__(self, sizes: Sam2Sizes | None = None, input_size: int = 1024) -> None:
        super().__init__()
        sizes = sizes or Sam2Sizes()
        grid = input_size // STRIDE
        self.image_encoder = HieraEncoder(sizes.trunk, sizes.embed_dim)
        self.sam_prompt_encoder = Sam2PromptEncoder(
            sizes.embed_dim, (grid, grid), (input_size, input_size), sizes.mask_channels
        )
        self.sam_mask_decoder = Sam2MaskDecoder(sizes.embed_dim, sizes.mlp_dim, sizes.score_width)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, sizes.embed_dim))

    def forward(self, x: Tensor) -> Features:
        """Encode (B, 3, H, W)."""
        fine, half, coarse = self.image_encoder(x)
        embedding = coarse + self.no_mem_embed[0, 0, :, None, None]
        return embedding, self.sam_mask_decoder.conv_s1(half), self.sam_mask_decoder.conv_s0(fine)


@dataclass(frozen=True)
class _Parts:
    """SAM 2 as a `PromptableNetwork`."""

    image_encoder: nn.Module
    prompt_encoder: PromptEncoder
    mask_decoder: nn.Module


class Squared:
    """SAM 2's way: the picture fills the square whatever its shape, colours are standardised.

    Args:
        size: Side of the network input.
    """

    def __init__(self, size: int) -> None:
        """Remember the size."""
        self.size = size
        self._mean = torch.tensor(PIXEL_MEAN, device="cpu")[:, None, None]
        self._std = torch.tensor(PIXEL_STD, device="cpu")[:, None, None]

    def to_input(self, picture: NDArray[np.uint8]) -> Tensor:
        """Map (rows, columns[, 3]) in 0..255 to the network input (1, 3, size, size), antialiased."""
        colours = as_colours(picture.astype(np.float32))
        if picture.shape[:2] != (self.size, self.size):
            colours = _resized(colours, (self.size, self.size), antialias=True)
        return (colours - self._mean) / self._std

    def to_input_xy(self, points_xy: NDArray[np.float32], shape_yx: tuple[int, int]) -> NDArray[np.float32]:
        """Map (N, 2) pixels of a picture to pixels of the network input."""
        return (points_xy / np.array(shape_yx[::-1], dtype=np.float32) * self.size).astype(np.float32)

    def to_picture(self, low_res: Tensor, shape_yx: tuple[int, int]) -> Tensor:
        """Resize logits (B, M, h, w) to the picture in one step."""
        return _resized(low_res, shape_yx)

    def mask_to_low_res(self, mask: NDArray[np.bool_], low_res_yx: tuple[int, int]) -> Tensor:
        """Map a mask (rows, columns) to logits (1, 1, h, w)."""
        return as_logits(_resized(as_picture(mask)[None, None], low_res_yx, antialias=True))


class Sam2SlicePredictor(SamSlicePredictor):
    """SAM's predictor with SAM 2's limit to the logits that are fed back."""

    def decode(
        self, embedding: SliceEmbedding, prompts: PixelPrompts, previous: NDArray[np.float32] | None = None
    ) -> SlicePrediction:
        """Segment what the prompts point at; see `SamSlicePredictor`."""
        found = super().decode(embedding, prompts, previous)
        return replace(found, low_res=found.low_res.clip(-_FED_BACK, _FED_BACK))


def sizes_of(tensors: Mapping[str, Tensor], trunk: Mapping[str, Any] | None = None) -> Sam2Sizes:
    """Read the sizes of the network off a checkpoint.

    Args:
        tensors: By Meta's names.
        trunk: What the file cannot say about an unpublished trunk; see `hiera_shape_of`.

    Raises:
        WeightsError: The checkpoint is of another network.
    """
    sizes = Sizes(tensors, "SAM 2")
    decoder = "sam_mask_decoder."
    return Sam2Sizes(
        trunk=hiera_shape_of(tensors, "image_encoder.trunk.", trunk or {}),
        embed_dim=sizes.of("no_mem_embed")[-1],
        mask_channels=sizes.of("sam_prompt_encoder.mask_downscaling.3.weight")[0],
        mlp_dim=sizes.of(f"{decoder}transformer.layers.0.mlp.layers.0.weight")[0],
        score_width=sizes.of(f"{decoder}iou_prediction_head.layers.0.weight")[0],
    )


def load_sam2(
    tensors: Mapping[str, Tensor], input_size: int = 1024, trunk: Mapping[str, Any] | None = None
) -> Sam2:
    """Build the image part for a checkpoint with Meta's keys, of all of SAM 2 or of this part, and load it.

    Args:
        tensors: By Meta's names.
        input_size: Side of the network input, a multiple of 32.
        trunk: As `sizes_of`.

    Raises:
        WeightsError: The checkpoint is of another network.
    """
    network = Sam2(sizes_of(tensors, trunk), input_size)
    load_into(network, tensors, "SAM 2", ignore=[name for name in tensors if name.startswith(VIDEO_KEYS)])
    return network.eval()


def predictor_of(
    network: Sam2, card: ModelCard, checkpoint_sha256: str, device: torch.device | None = None
) -> Sam2SlicePredictor:
    """Return the predictor of a network."""
    network.eval().requires_grad_(False)
    parts = _Parts(network, network.sam_prompt_encoder, network.sam_mask_decoder)
    framing = Squared(network.sam_prompt_encoder.input_size[0])
    return Sam2SlicePredictor(parts, card, checkpoint_sha256, framing, device)


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> Sam2SlicePredictor:
    """Build SAM 2 of a card; see `SAMAdaptLib.models.build_predictor`."""
    file = read_checkpoint(checkpoint)
    network = load_sam2(file.tensors, card.options.get("input_size", 1024), card.options.get("trunk"))
    return predictor_of(network, card, file.sha256, device)


def _resized(values: Tensor, shape_yx: tuple[int, int], antialias: bool = False) -> Tensor:
    return F.interpolate(values, shape_yx, mode="bilinear", align_corners=False, antialias=antialias)
