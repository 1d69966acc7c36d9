"""SAM's mask decoder: image embedding and prompt embeddings become masks and scores.

Paper: Kirillov et al., "Segment Anything", ICCV 2023 (https://arxiv.org/abs/2304.02643).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .layers import MLP, LayerNorm2d
from .two_way_transformer import TwoWayTransformer

SINGLE_MASK = slice(0, 1)
"""SAM's mask for prompts that mean one thing: a box, several points."""
THREE_MASKS = slice(1, None)
"""SAM's masks for an ambiguous prompt: whole, part, subpart."""
EVERY_MASK = slice(None)
"""One mask per token: the classes of the automatic models."""


class MaskDecoder(nn.Module):
    """Predict one mask and one score per mask token.

    SAM upsamples its grid twice and has four tokens; MA-SAM upsamples four times and has one token per class.

    Args:
        embed_dim: Channels C of the embeddings.
        mask_tokens: Number of masks T; the hypernetwork of each is its own.
        depth: Blocks of the transformer.
        heads: Heads of the transformer.
        mlp_dim: Hidden width of the transformer's MLPs.
        upscale_divisors: Each entry doubles the grid and leaves C divided by it channels.
        score_width: Hidden width of the score head.
        score_depth: Layers of the score head.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        mask_tokens: int = 4,
        depth: int = 2,
        heads: int = 8,
        mlp_dim: int = 2048,
        upscale_divisors: Sequence[int] = (4, 8),
        score_width: int = 256,
        score_depth: int = 3,
    ) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(embed_dim, depth, heads, mlp_dim)
        self.iou_token = nn.Embedding(1, embed_dim)
        self.mask_tokens = nn.Embedding(mask_tokens, embed_dim)
        widths = [embed_dim, *(embed_dim // divisor for divisor in upscale_divisors)]
        self.output_upscaling = _upscaling(widths)
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP([embed_dim, embed_dim, embed_dim, widths[-1]]) for _ in range(mask_tokens)
        )
        self.iou_prediction_head = MLP([embed_dim, *[score_width] * (score_depth - 1), mask_tokens])

    def forward(
        self,
        image_embedding: Tensor,
        dense_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        masks: slice = EVERY_MASK,
    ) -> tuple[Tensor, Tensor]:
        """Decode; of embeddings and prompts either may be a batch of 1 that serves every other.

        Args:
            image_embedding: (B, C, h, w).
            dense_pe: (1, C, h, w), from the prompt encoder.
            sparse: (B, N, C).
            dense: (B, C, h, w).
            masks: Which of the T masks to return.

        Returns:
            Mask logits (B, masks, sh, sw), s = 4 for SAM, and scores (B, masks): the expected IoU.
        """
        tokens, image = self.attended(image_embedding, dense_pe, sparse, dense)
        upscaled = self.output_upscaling(image)  # B, c, sh, sw
        mask_tokens = tokens[:, 1 : 1 + self.mask_tokens.num_embeddings]
        chosen = range(self.mask_tokens.num_embeddings)[masks]
        filters = torch.stack([self.output_hypernetworks_mlps[t](mask_tokens[:, t]) for t in chosen], dim=1)
        logits = torch.einsum("btc,bchw->bthw", filters, upscaled)
        scores = self.iou_prediction_head(tokens[:, 0])[:, masks]
        return logits, scores

    def attended(
        self, image_embedding: Tensor, dense_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Let tokens and image attend to each other.

        Returns:
            Tokens (B, 1 + T + N, C), the score's first, and image (B, C, h, w).
        """
        source = image_embedding + dense
        h, w = source.shape[-2:]
        batch = max(source.shape[0], sparse.shape[0])
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(batch, -1, -1), sparse.expand(batch, -1, -1)], dim=1)
        image, pe = (x.flatten(2).transpose(1, 2) for x in (source, dense_pe))  # B, hw, C
        tokens, image = self.transformer(image, pe, tokens)
        return tokens, image.transpose(1, 2).unflatten(2, (h, w))


def _upscaling(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.ConvTranspose2d(n, m, kernel_size=2, stride=2), LayerNorm2d(m), nn.GELU()]
    del layers[-2]  # no normalisation before the last activation
    return nn.Sequential(*layers)
