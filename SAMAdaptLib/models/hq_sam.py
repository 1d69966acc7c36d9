"""HQ-SAM: SAM with one more output token that draws finer borders from early and late features.

Paper: Ke et al., "Segment Anything in High Quality", NeurIPS 2023 (https://arxiv.org/abs/2306.01567).
Official code: https://github.com/SysCV/sam-hq, commit fb181f8, Apache-2.0; its weights too.

What differs from SAM: the image encoder also gives what its first global-attention block made of the
picture. That early feature and the embedding, both brought to the mask's grid, make the HQ feature. The HQ
token stands behind SAM's mask tokens in the decoder; its mask, read from the HQ feature, is added to SAM's.
With three candidate masks the decoder itself takes the best scored one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.models.layers import MLP, LayerNorm2d
from SAMAdaptLib.models.mask_decoder import EVERY_MASK, MaskDecoder
from SAMAdaptLib.models.prompt_encoder import PromptEncoder
from SAMAdaptLib.models.sam import Sam, SamSlicePredictor, vit_shape_of
from SAMAdaptLib.models.vit import VIT_B, ImageEncoderViT, ViTShape, with_positions_for
from SAMAdaptLib.weights import load_into, read_checkpoint

Features = tuple[Tensor, Tensor]
"""Embedding (B, C, h, w) and early feature (B, h, w, D)."""


class HqImageEncoder(ImageEncoderViT):
    """SAM's image encoder that also gives an early feature."""

    def forward(self, x: Tensor) -> Features:  # type: ignore[override]
        """Map (B, 3, H, W) to the embedding and to the first global block's output."""
        early: Tensor | None = None
        x = self.patch_embed(x) + self.pos_embed
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == min(self.shape.global_blocks):
                early = x
        assert early is not None
        return self.neck(x.permute(0, 3, 1, 2)), early


class HqMaskDecoder(MaskDecoder):
    """SAM's mask decoder with the HQ token; takes `Features` instead of an embedding.

    Args:
        vit_dim: Channels D of the early feature.
        embed_dim: Channels C of the embedding.
        hq_only: Give the HQ token's mask alone, without SAM's.
        sizes: As `MaskDecoder`.
    """

    def __init__(self, vit_dim: int, embed_dim: int = 256, hq_only: bool = False, **sizes: Any) -> None:
        super().__init__(embed_dim, **sizes)
        quarter, eighth = embed_dim // 4, embed_dim // 8
        self.hq_only = hq_only
        self.hf_token = nn.Embedding(1, embed_dim)
        self.hf_mlp = MLP([embed_dim, embed_dim, embed_dim, eighth])
        self.compress_vit_feat = _enlarged(vit_dim, embed_dim, eighth)
        self.embedding_encoder = _enlarged(embed_dim, quarter, eighth)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(eighth, quarter, kernel_size=3, padding=1),
            LayerNorm2d(quarter),
            nn.GELU(),
            nn.Conv2d(quarter, eighth, kernel_size=3, padding=1),
        )

    def forward(  # type: ignore[override]
        self, features: Features, dense_pe: Tensor, sparse: Tensor, dense: Tensor, masks: slice = EVERY_MASK
    ) -> tuple[Tensor, Tensor]:
        """Decode; of several candidate masks the best scored is taken.

        Args:
            features: From `HqImageEncoder`.
            dense_pe: (1, C, h, w).
            sparse: (B, N, C).
            dense: (B, C, h, w).
            masks: SAM's candidates.

        Returns:
            Mask logits (B, 1, 4h, 4w) and SAM's score of the candidate taken (B, 1).
        """
        embedding, early = features
        hq_feature = self.embedding_encoder(embedding) + self.compress_vit_feat(early.permute(0, 3, 1, 2))
        own = self.hf_token.weight.expand(sparse.shape[0], -1, -1)
        tokens, image = self.attended(embedding, dense_pe, torch.cat([own, sparse], dim=1), dense)
        upscaled = self.output_upscaling(image)  # B, C/8, 4h, 4w
        count = self.mask_tokens.num_embeddings

        scores = self.iou_prediction_head(tokens[:, 0])[:, masks]
        score, best = scores.max(dim=1, keepdim=True)
        filters = torch.stack(
            [self.output_hypernetworks_mlps[t](tokens[:, 1 + t]) for t in range(count)[masks]], dim=1
        )
        chosen = filters[torch.arange(len(filters)), best[:, 0]]
        hq_mask = _read(self.hf_mlp(tokens[:, 1 + count]), self.embedding_maskfeature(upscaled) + hq_feature)
        return (hq_mask if self.hq_only else hq_mask + _read(chosen, upscaled)), score


def _read(filters: Tensor, feature: Tensor) -> Tensor:
    """Read a mask (B, 1, H, W) out of a feature (B, c, H, W) with filters (B, c)."""
    return torch.einsum("bc,bchw->bhw", filters, feature)[:, None]


def _enlarged(channels: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(channels, hidden, kernel_size=2, stride=2),
        LayerNorm2d(hidden),
        nn.GELU(),
        nn.ConvTranspose2d(hidden, out, kernel_size=2, stride=2),
    )


def build_hq_sam(shape: ViTShape = VIT_B) -> Sam:
    """Build HQ-SAM with a ViT encoder, its weights not yet loaded."""
    grid, size = (shape.grid, shape.grid), (shape.input_size, shape.input_size)
    return Sam(
        HqImageEncoder(shape),
        PromptEncoder(shape.out_channels, grid, size),
        HqMaskDecoder(shape.embed_dim, shape.out_channels),
    )


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> SamSlicePredictor:
    """Build HQ-SAM of a card; see `SAMAdaptLib.models.build_predictor`."""
    file = read_checkpoint(checkpoint)
    shape = vit_shape_of(file.tensors, card.options.get("input_size", 1024))
    network = build_hq_sam(shape)
    load_into(network, with_positions_for(file.tensors, shape, "image_encoder."), "HQ-SAM")
    return SamSlicePredictor(network, card, file.sha256, device=device)
