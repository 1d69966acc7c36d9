"""DB-SAM (experimental): a convolution branch beside SAM's encoder, each looking at the other at four stages.

Paper: Qin et al., "DB-SAM: Delving into High Quality Universal Medical Image Segmentation", MICCAI 2024
(https://arxiv.org/abs/2410.04172).
Official code: https://github.com/AlfredQin/DB-SAM, commit d15cd33, no licence stated (it holds files of SAM
and of Deformable DETR under Apache-2.0). No weights are published.

The published code lacks modules. Two are reconstructed from what calls them: the mixing MLP after an
attention (linear, depthwise 3 x 3 on each map, GELU, linear) and the reference points (middles of the cells).
Names and maths of these may differ from the authors' own; the rest is theirs.

What differs from SAM:
- The encoder has an adapter with a pyramid of convolutions on the picture at a half to a sixteenth of its
  size, all brought to the token grid. After each stage of blocks, maps look at each other by deformable
  attention.
- Four branches ("db_sam_plus"): tokens and all four maps look at all, and are fused by a softmax.
- Two branches (nearest to the paper): tokens look at the maps and these at the tokens of before, with channel
  attention before or after that. They are fused by a sigmoid.
- The blocks of the encoder normalise with an epsilon of 1e-5, where SAM has 1e-6.
- How the pyramid resizes depends on the version of torchvision: without antialiasing before 0.17 (which the
  official README installs), with it since.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.errors import CardError, PromptError
from SAMAdaptLib.weights import copy_into, read_checkpoint

from .db_sam_adapter import FourBranches, Pyramid, TwoBranches
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .sam import Sam, SamSlicePredictor
from .sizes import DECODER_HEADS, Sizes
from .vit import ImageEncoderViT, ViTShape, blocks_of

_BLOCK_EPS = 1e-5
_BOX_MARGIN = 9
"""Pixels that the official evaluation adds on each side of a box, on pictures of 256 pixels."""
_ADAPTER = "image_encoder.adapter."


class DbSamEncoder(ImageEncoderViT):
    """SAM's encoder in stages, with a branching adapter after each.

    Args:
        shape: Sizes of the encoder.
        adapter: Branches and how they are fused.
        stages: First and last block of each stage; None to share them out evenly.
    """

    def __init__(
        self,
        shape: ViTShape,
        adapter: FourBranches | TwoBranches,
        stages: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        super().__init__(shape)
        self.adapter = adapter
        length = shape.depth // adapter.stages
        self.stages = stages or tuple(
            (index * length, (index + 1) * length - 1) for index in range(adapter.stages)
        )
        for block in blocks_of(self):
            block.norm1.eps = block.norm2.eps = _BLOCK_EPS

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, S, S) to embeddings (B, out_channels, h, w)."""
        maps = self.adapter.maps(x)  # B, levels, h, w, C
        tokens = self.patch_embed(x) + self.pos_embed
        blocks = blocks_of(self)
        for index, (first, last) in enumerate(self.stages):
            for block in blocks[first : last + 1]:
                tokens = block(tokens)
            tokens, maps = self.adapter(index, tokens, maps)
        embedding: Tensor = self.neck(self.adapter.fused(tokens, maps).permute(0, 3, 1, 2))
        return embedding


class DbSam(Sam):
    """SAM with a branching encoder."""

    def __init__(
        self, image_encoder: DbSamEncoder, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder
    ) -> None:
        super().__init__(image_encoder, prompt_encoder, mask_decoder)
        self.image_encoder: DbSamEncoder


def build_db_sam(
    tensors: Mapping[str, Tensor],
    *,
    decoder_heads: int = DECODER_HEADS,
    antialias: bool = False,
    channel_attention: str = "before",
    stages: tuple[tuple[int, int], ...] | None = None,
) -> DbSam:
    """Build the network whose sizes those of the tensors are, its weights not yet loaded.

    Args:
        tensors: By official names.
        decoder_heads: Heads of the decoder, which no tensor tells.
        antialias: Whether the pyramid resizes with antialiasing.
        channel_attention: "before" or "after" the branches look at each other; of two branches only.
        stages: See `DbSamEncoder`.

    Raises:
        WeightsError: The file is of another network.
    """
    sizes = Sizes(tensors, "DB-SAM")
    shape = sizes.vit("image_encoder.")
    levels = sizes.numbers(rf"{_ADAPTER}spatial_prior_module\.lcb(\d+)\.")
    widths = tuple(
        sizes.of(f"{_ADAPTER}spatial_prior_module.lcb{levels[0] if levels else 1}.{index}.conv.weight")[0]
        for index in (1, 3, 5)
    )
    pyramid = Pyramid(shape.embed_dim, levels, widths, antialias)
    if sizes.count(f"{_ADAPTER}self_attn_blocks."):
        adapter: FourBranches | TwoBranches = FourBranches.of(sizes, _ADAPTER, pyramid)
    else:
        adapter = TwoBranches.of(sizes, _ADAPTER, pyramid, channel_attention)
    return DbSam(
        DbSamEncoder(shape, adapter, stages),
        sizes.prompt_encoder("prompt_encoder.", shape),
        sizes.mask_decoder("mask_decoder.", decoder_heads),
    )


def load_into_db_sam(network: DbSam, tensors: Mapping[str, Tensor]) -> DbSam:
    """Load a file that was made for the network.

    Raises:
        WeightsError: The file is of another network or another size.
    """
    copy_into(network.state_dict(), tensors, "DB-SAM")
    return network.eval()


def official_box(
    mask: NDArray[np.bool_], inner_yx: tuple[int, int], widened: bool = False
) -> NDArray[np.int64]:
    """Return the box (x0, y0, x1, y1) that the official evaluation gives for a mask (rows, columns).

    The last row and column are those that the object still fills; pixels of the network input, cut to
    integers.

    Args:
        mask: Truth.
        inner_yx: Rows and columns of the network input that the picture fills.
        widened: Whether 9 pixels are added on each side first, as in the official test.

    Raises:
        PromptError: The mask is empty.
    """
    ys, xs = np.nonzero(mask)
    if len(ys) == 0:
        raise PromptError("A box around a mask was wanted, but the mask is empty. Draw the object first.")
    rows, columns = mask.shape
    corners_xy = np.array([[xs.min(), ys.min()], [xs.max(), ys.max()]])
    if widened:
        corners_xy = np.clip(corners_xy + np.array([[-_BOX_MARGIN], [_BOX_MARGIN]]), 0, [columns, rows])
    scale_xy = np.array([inner_yx[1] / columns, inner_yx[0] / rows])
    return (corners_xy * scale_xy).reshape(4).astype(np.int64)


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> SamSlicePredictor:
    """Build DB-SAM of a card; see `SAMAdaptLib.models.build_predictor`.

    The card's options may hold `antialias` and `channel_attention`, see `build_db_sam`.
    """
    file = read_checkpoint(checkpoint)
    place = card.options.get("channel_attention", "before")
    if place not in ("before", "after"):
        raise CardError(
            f"The option channel_attention of {card.name} is before or after, but came as '{place}'. Correct "
            "the card."
        )
    network = build_db_sam(
        file.tensors, antialias=card.options.get("antialias", False), channel_attention=place
    )
    return SamSlicePredictor(load_into_db_sam(network, file.tensors), card, file.sha256, device=device)
