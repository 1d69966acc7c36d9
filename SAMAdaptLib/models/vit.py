"""SAM's image encoder: a vision transformer with windowed attention and decomposed relative positions.

Papers: Kirillov et al., "Segment Anything", ICCV 2023 (https://arxiv.org/abs/2304.02643); Li et al.,
"Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022 (https://arxiv.org/abs/2203.16527).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LayerNorm2d

_SCORES_AT_ONCE = 1 << 22  # 16 MB of attention scores: larger costs memory, smaller costs time


@dataclass(frozen=True)
class ViTShape:
    """The numbers of an encoder; the defaults are common to SAM's three sizes.

    Args:
        embed_dim: Channels C.
        depth: Number of blocks.
        heads: Heads of every attention.
        global_blocks: Blocks that attend to the whole image; the others see windows.
        input_size: Rows and columns of the network input.
        patch_size: Side of a token in pixels.
        window: Side of a window in tokens.
        mlp_ratio: Hidden width of the MLPs over C.
        out_channels: Channels of the embedding.
        relative_positions: Whether attention knows relative positions.
        qkv_bias: Whether queries, keys and values have a bias.
    """

    embed_dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    input_size: int = 1024
    patch_size: int = 16
    window: int = 14
    mlp_ratio: float = 4.0
    out_channels: int = 256
    relative_positions: bool = True
    qkv_bias: bool = True

    @property
    def grid(self) -> int:
        """Rows and columns of tokens."""
        return self.input_size // self.patch_size


VIT_B = ViTShape(embed_dim=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11))
VIT_L = ViTShape(embed_dim=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23))
VIT_H = ViTShape(embed_dim=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31))


class Attention(nn.Module):
    """Attention over a grid of tokens, in windows or over the whole grid.

    Args:
        shape: Sizes of the encoder.
        extent: Side of a window, or of the whole grid, in tokens.
    """

    def __init__(self, shape: ViTShape, extent: int) -> None:
        super().__init__()
        embed_dim, heads = shape.embed_dim, shape.heads
        self.heads = heads
        self.extent = extent
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=shape.qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None
        if shape.relative_positions:
            table = torch.zeros(2 * extent - 1, embed_dim // heads)
            self.rel_pos_h, self.rel_pos_w = nn.Parameter(table), nn.Parameter(table.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window of tokens (B, H, W, C)."""
        rows, columns, n = x.shape[1], x.shape[2], self.extent
        qkv = self._padded_qkv(x)  # B, H', W', 3C: multiples of the window
        qkv = qkv.unflatten(1, (-1, n)).unflatten(3, (-1, n)).unflatten(5, (3, self.heads, -1))
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # 3, B, down, across, heads, n, n, c
        windows = qkv.shape[1:4]
        attended = self._attend(*qkv.flatten(1, 3).unbind(0))  # windows, heads, n, n, c
        attended = attended.unflatten(0, windows).permute(0, 1, 4, 2, 5, 3, 6)
        merged = attended.flatten(5, 6).flatten(3, 4).flatten(1, 2)  # B, H', W', C
        y: Tensor = self.proj(merged[:, :rows, :columns])
        return y

    def _padded_qkv(self, x: Tensor) -> Tensor:
        """Project the tokens, and fill up with the projection of the zero tokens that SAM pads with."""
        batch, rows, columns, channels = x.shape
        down, across = -rows % self.extent, -columns % self.extent
        qkv: Tensor = self.qkv(x)
        if not (down or across):
            return qkv
        padding = self.qkv(x.new_zeros(channels))
        padded = padding.expand(batch, rows + down, columns + across, -1).clone()
        padded[:, :rows, :columns] = qkv
        return padded

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in (B, heads, n, n, c), some query rows at a time, so that the scores stay small."""
        if self.rel_pos_h is None or self.rel_pos_w is None:
            flat = F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3))
            return flat.unflatten(2, q.shape[2:4])
        by_row = torch.einsum("bmhwc,hkc->bmhwk", q, _relative(self.rel_pos_h, self.extent))
        by_column = torch.einsum("bmhwc,wkc->bmhwk", q, _relative(self.rel_pos_w, self.extent))
        keys, values = k.flatten(2, 3), v.flatten(2, 3)
        scores_per_row = q.shape[0] * q.shape[1] * self.extent**3
        step = max(1, _SCORES_AT_ONCE // scores_per_row)
        parts = []
        for start in range(0, self.extent, step):
            some = slice(start, start + step)
            bias = by_row[:, :, some, :, :, None] + by_column[:, :, some, :, None, :]
            bias = bias.flatten(4, 5).flatten(2, 3)  # B, heads, queries, keys
            part = F.scaled_dot_product_attention(q[:, :, some].flatten(2, 3), keys, values, attn_mask=bias)
            parts.append(part.unflatten(2, (-1, self.extent)))
        return torch.cat(parts, dim=2)


class MLPBlock(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embed_dim, hidden)
        self.lin2 = nn.Linear(hidden, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        y: Tensor = self.lin2(F.gelu(self.lin1(x)))
        return y


class Block(nn.Module):
    """Attention and MLP, with three places where an adapter may stand.

    `before_attention` and `after_attention` take and give (B, H, W, C), residual included. `beside_mlp` takes
    what the MLP takes, (B, H, W, C) after the second normalisation, and what else the block is called with;
    it is added to what the MLP gives. The fourth place of the published adapters, an increment of queries
    and values, is `attn.qkv` itself: see `add_to_qkv`.
    """

    def __init__(self, shape: ViTShape, index: int) -> None:
        super().__init__()
        width = shape.embed_dim
        extent = shape.grid if index in shape.global_blocks else shape.window
        self.before_attention: nn.Module = nn.Identity()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(shape, extent)
        self.after_attention: nn.Module = nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLPBlock(width, int(width * shape.mlp_ratio))
        self.beside_mlp: nn.Module | None = None

    def forward(self, x: Tensor, *shared: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C).

        Args:
            x: Tokens.
            shared: What the adapters of all blocks share; only `beside_mlp` takes it.
        """
        x = self.before_attention(x)
        x = x + self.attn(self.norm1(x))
        x = self.after_attention(x)
        normed = self.norm2(x)
        y: Tensor = x + self.mlp(normed)
        return y if self.beside_mlp is None else y + self.beside_mlp(normed, *shared)


class PatchEmbed(nn.Module):
    """Cut the picture into patches and make a token of each."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, h, w, C)."""
        tokens: Tensor = self.proj(x)
        return tokens.permute(0, 2, 3, 1)


class ImageEncoderViT(nn.Module):
    """SAM's image encoder.

    Args:
        shape: Its numbers, as `VIT_B` or a copy with another `input_size`.
    """

    def __init__(self, shape: ViTShape = VIT_B) -> None:
        super().__init__()
        self.shape = shape
        self.input_size = (shape.input_size, shape.input_size)
        width, out = shape.embed_dim, shape.out_channels
        self.patch_embed = PatchEmbed(shape.patch_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.grid, shape.grid, width))
        self.blocks = nn.ModuleList(Block(shape, index) for index in range(shape.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(width, out, kernel_size=1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch of pictures (B, 3, H, W) to embeddings (B, out_channels, h, w)."""
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        embedding: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return embedding


def blocks_of(encoder: ImageEncoderViT) -> list[Block]:
    """Return the blocks of an encoder, where adapters may be put."""
    return [block for block in encoder.blocks if isinstance(block, Block)]


def add_to_qkv(attention: Attention, query: Tensor, value: Tensor) -> None:
    """Fold linear increments, y -> query @ y and y -> value @ y, into the projections of queries and values.

    Args:
        attention: Changed in place.
        query: (C, C).
        value: (C, C).
    """
    weight = attention.qkv.weight
    width = query.shape[0]
    with torch.no_grad():
        weight[:width] += query
        weight[2 * width :] += value


def with_positions_for(tensors: Mapping[str, Tensor], shape: ViTShape, prefix: str) -> dict[str, Tensor]:
    """Resize positions of a checkpoint that was made at another input size, bilinearly.

    Args:
        tensors: A checkpoint.
        shape: What the encoder to be loaded looks like.
        prefix: Of the encoder's keys in the checkpoint, such as "image_encoder.".

    Returns:
        The checkpoint with `pos_embed` and the relative positions of the global blocks for `shape.grid`.
    """
    resized = dict(tensors)
    key = f"{prefix}pos_embed"
    if key in resized:
        tokens = resized[key].float().permute(0, 3, 1, 2)
        size = (shape.grid, shape.grid)
        resized[key] = F.interpolate(tokens, size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    for index in shape.global_blocks:
        for name in ("rel_pos_h", "rel_pos_w"):
            key = f"{prefix}blocks.{index}.attn.{name}"
            if key in resized:
                table = resized[key].float().T.unsqueeze(0)  # 1, c, distances
                length = 2 * shape.grid - 1
                resized[key] = F.interpolate(table, length, mode="linear", align_corners=False)[0].T
    return resized


def _relative(table: Tensor, n: int) -> Tensor:
    """Spread a table over distances (2n - 1, c) to (queries, keys, c)."""
    position = torch.arange(n, device=table.device)
    return table[position[:, None] - position[None, :] + n - 1]
