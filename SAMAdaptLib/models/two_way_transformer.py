"""The transformer of SAM's mask decoder: tokens look at the image and the image looks back.

Paper: Kirillov et al., "Segment Anything", ICCV 2023, appendix A (https://arxiv.org/abs/2304.02643).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention whose heads may together be narrower than the embedding.

    Args:
        embed_dim: Channels C of queries, keys and values.
        heads: Number of heads.
        downsample: The heads share C / downsample channels.
    """

    def __init__(self, embed_dim: int, heads: int, downsample: int = 1) -> None:
        super().__init__()
        inner = embed_dim // downsample
        self.heads = heads
        self.q_proj = nn.Linear(embed_dim, inner)
        self.k_proj = nn.Linear(embed_dim, inner)
        self.v_proj = nn.Linear(embed_dim, inner)
        self.out_proj = nn.Linear(inner, embed_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from (B, N, C) to (B, M, C); a batch of 1 serves every other."""
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # B, heads, N, c
        attended = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return projected


class MLPBlock(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, embed_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embed_dim, mlp_dim)
        self.lin2 = nn.Linear(mlp_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        y: Tensor = self.lin2(F.relu(self.lin1(x)))
        return y


class TwoWayBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP of the tokens, image to tokens.

    Args:
        embed_dim: Channels C.
        heads: Heads of every attention.
        mlp_dim: Hidden width of the MLP.
        first: The first block starts from bare tokens: its self-attention has neither positions nor residual.
    """

    def __init__(self, embed_dim: int, heads: int, mlp_dim: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(embed_dim, heads)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.cross_attn_token_to_image = Attention(embed_dim, heads, downsample=2)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = MLPBlock(embed_dim, mlp_dim)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.cross_attn_image_to_token = Attention(embed_dim, heads, downsample=2)
        self.norm4 = nn.LayerNorm(embed_dim)

    def forward(
        self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update tokens (B, N, C) and image (B, hw, C)."""
        tokens = self.norm1(self.among_themselves(tokens, token_pe))
        tokens = self.norm2(
            tokens + self.cross_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        )
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(
            image + self.cross_attn_image_to_token(image + image_pe, tokens + token_pe, tokens)
        )
        return tokens, image

    def among_themselves(self, tokens: Tensor, token_pe: Tensor) -> Tensor:
        """Let the tokens (B, N, C) attend to each other, residual included."""
        if self.first:
            bare: Tensor = self.self_attn(tokens, tokens, tokens)
            return bare
        placed = tokens + token_pe
        return tokens + self.self_attn(placed, placed, tokens)


class TwoWayTransformer(nn.Module):
    """Blocks in which tokens and image attend to each other, and a last look of the tokens at the image.

    Args:
        embed_dim: Channels C.
        depth: Number of blocks.
        heads: Heads of every attention.
        mlp_dim: Hidden width of the MLPs.
    """

    def __init__(self, embed_dim: int = 256, depth: int = 2, heads: int = 8, mlp_dim: int = 2048) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayBlock(embed_dim, heads, mlp_dim, first=i == 0) for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(embed_dim, heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(embed_dim)

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run the blocks; the given tokens serve as their own positions throughout.

        Args:
            image: (B, hw, C).
            image_pe: (1, hw, C).
            tokens: (B, N, C).

        Returns:
            Tokens (B, N, C) and image (B, hw, C).
        """
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        attended = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + attended), image
