"""Hiera: SAM 2's image encoder, a vision transformer that halves its grid from stage to stage.

Papers: Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", ICML 2023
(https://arxiv.org/abs/2306.00989); Bolya et al., "Window Attention is Not All You Need", ICLR 2024
(https://arxiv.org/abs/2311.05613) for the positions; Ravi et al., "SAM 2", ICLR 2025
(https://arxiv.org/abs/2408.00714) for the neck.
Official code: https://github.com/facebookresearch/sam2, commit 2b90b9f, Apache-2.0.

The first block of a later stage pools its queries 2x2, so that its output has a quarter of the tokens; its
windows are still those of the stage before. Positions are the sum of a coarse map, resized to the grid, and
a window that is repeated over it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from SAMAdaptLib.errors import WeightsError

from .layers import MLP
from .sizes import Sizes

PATCH = 4
"""Pixels between the patches of the trunk, which are 7 wide."""
TOP_DOWN_LEVELS = (2, 3)
"""Levels of the neck, counted from the finest, that take in the level above them."""
_EPS = 1e-6


@dataclass(frozen=True)
class HieraShape:
    """Sizes of a trunk.

    Args:
        embed_dim: Channels of the first stage; each later stage has twice as many.
        heads: Of the first stage; each later stage has twice as many.
        stages: Blocks of each stage.
        global_blocks: Blocks without windows.
        windows: Side of the windows of each stage, in tokens.
        positions: Side of the coarse map of positions.
        mlp_ratio: Hidden width of the MLPs per channel.
    """

    embed_dim: int
    heads: int
    stages: tuple[int, ...]
    global_blocks: tuple[int, ...]
    windows: tuple[int, ...] = (8, 4, 14, 7)
    positions: int = 7
    mlp_ratio: float = 4.0

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """Index of the last block of each stage."""
        return tuple(end - 1 for end in accumulate(self.stages))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.stages)))


HIERA_TINY = HieraShape(96, 1, (1, 2, 7, 2), (5, 7, 9))
HIERA_SMALL = HieraShape(96, 1, (1, 2, 11, 2), (7, 10, 13))
HIERA_BASE_PLUS = HieraShape(112, 2, (2, 3, 16, 3), (12, 16, 20), positions=14)
HIERA_LARGE = HieraShape(144, 2, (2, 6, 36, 4), (23, 33, 43), (8, 4, 16, 8))
PUBLISHED = (HIERA_TINY, HIERA_SMALL, HIERA_BASE_PLUS, HIERA_LARGE)


def hiera_shape_of(tensors: Mapping[str, Tensor], prefix: str, given: Mapping[str, Any]) -> HieraShape:
    """Return the sizes of the trunk of a checkpoint.

    Heads, windows and blocks without windows leave no trace in a file: they are those of the published trunk
    of the same width and stages, or are given.

    Args:
        tensors: Of the checkpoint.
        prefix: Of the trunk's keys.
        given: `heads`, `windows`, `global_blocks`; only of a trunk that is not a published one.

    Raises:
        WeightsError: There is no trunk, or one that is neither published nor described.
    """
    sizes = Sizes(tensors, "SAM 2")
    width, positions = sizes.of(f"{prefix}pos_embed")[1:3]
    depth = sizes.count(f"{prefix}blocks.")
    begins = [0, *sizes.numbers(re.escape(prefix) + r"blocks\.(\d+)\.proj\.weight$"), depth]
    stages = tuple(end - begin for begin, end in pairwise(begins))
    if given:
        return HieraShape(
            embed_dim=width,
            heads=given["heads"],
            stages=stages,
            global_blocks=tuple(given["global_blocks"]),
            windows=tuple(given["windows"]),
            positions=positions,
            mlp_ratio=sizes.of(f"{prefix}blocks.0.mlp.layers.0.weight")[0] / width,
        )
    for shape in PUBLISHED:
        if (shape.embed_dim, shape.stages, shape.positions) == (width, stages, positions):
            return shape
    raise WeightsError(
        "A SAM 2 checkpoint with a tiny, small, base-plus or large encoder was wanted, but the file holds "
        f"one of {width} channels and {stages} blocks per stage. Choose the file that the model's card names."
    )


class Attention(nn.Module):
    """Multi-head attention whose queries may be pooled 2x2.

    Args:
        dim: Channels that come.
        dim_out: Channels that go.
        heads: Number of heads.
        pooled: Whether the queries are pooled.
    """

    def __init__(self, dim: int, dim_out: int, heads: int, pooled: bool) -> None:
        super().__init__()
        self.heads = heads
        self.pooled = pooled
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, dim) to (B, h, w, dim_out), or half of each side when pooled."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = pool(q) if self.pooled else q
        side_yx = q.shape[1:3]
        q, k, v = (part.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        projected: Tensor = self.proj(attended.unflatten(1, side_yx))
        return projected


class Block(nn.Module):
    """Attention in windows, then an MLP.

    Args:
        dim: Channels that come.
        dim_out: Channels that go; more of them in the first block of a stage, which pools.
        heads: Number of heads.
        window: Side of the windows of the tokens that come; 0 for none.
        mlp_ratio: Hidden width of the MLP per channel.
    """

    def __init__(self, dim: int, dim_out: int, heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.begins_stage = dim != dim_out
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, dim_out, heads, self.begins_stage)
        self.norm2 = nn.LayerNorm(dim_out, eps=_EPS)
        self.mlp = MLP([dim_out, int(dim_out * mlp_ratio), dim_out], activation=F.gelu)
        if self.begins_stage:
            self.proj = nn.Linear(dim, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, dim) to (B, h', w', dim_out)."""
        normed = self.norm1(x)
        shortcut = pool(self.proj(normed)) if self.begins_stage else x
        x = shortcut + self._attended(normed, (shortcut.shape[1], shortcut.shape[2]))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y

    def _attended(self, x: Tensor, out_yx: tuple[int, int]) -> Tensor:
        if not self.window:
            whole: Tensor = self.attn(x)
            return whole
        windows, count_yx = into_windows(x, self.window)
        return out_of_windows(self.attn(windows), count_yx, out_yx)


class PatchEmbed(nn.Module):
    """Overlapping patches, 7 pixels wide and 4 apart, as tokens (B, h, w, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, kernel_size=7, stride=PATCH, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, H / 4, W / 4, C)."""
        patches: Tensor = self.proj(x)
        return patches.permute(0, 2, 3, 1)


class Hiera(nn.Module):
    """The trunk.

    Args:
        shape: Its sizes.
    """

    def __init__(self, shape: HieraShape) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embed = PatchEmbed(shape.embed_dim)
        coarse, fine = shape.positions, shape.windows[0]
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.embed_dim, coarse, coarse))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, shape.embed_dim, fine, fine))
        self.blocks = nn.ModuleList(_blocks(shape))

    def positions(self, grid_yx: tuple[int, int]) -> Tensor:
        """Positions of a grid, (1, h, w, C); its sides are multiples of the first window."""
        coarse = F.interpolate(self.pos_embed, grid_yx, mode="bicubic")
        window = self.pos_embed_window
        side = window.shape[-1]
        repeated = window.tile(1, 1, grid_yx[0] // side, grid_yx[1] // side)
        return (coarse + repeated).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to the last feature (B, C, h, w) of each stage, the finest first."""
        x = self.patch_embed(x)
        x = x + self.positions((x.shape[1], x.shape[2]))
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.shape.stage_ends:
                features.append(x.permute(0, 3, 1, 2))
        return features


class FpnNeck(nn.Module):
    """Brings the features of all stages to one width; coarse levels flow into some finer ones.

    Args:
        out_channels: That width.
        in_channels: Of the stages, the finest first.
    """

    def __init__(self, out_channels: int, in_channels: tuple[int, ...]) -> None:
        super().__init__()
        # The official names: each convolution has a container of its own, the coarsest level comes first.
        self.convs = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(channels, out_channels, kernel_size=1)})
            for channels in reversed(in_channels)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Map the features of the stages to as many of one width, the finest first."""
        levels: list[Tensor] = []
        above: Tensor | None = None
        for level, lateral in zip(reversed(range(len(features))), self.convs, strict=True):
            here: Tensor = lateral.get_submodule("conv")(features[level])
            if level in TOP_DOWN_LEVELS and above is not None:
                here = here + F.interpolate(above, scale_factor=2.0, mode="nearest")
            levels.insert(0, here)
            above = here
        return levels


class HieraEncoder(nn.Module):
    """Trunk and neck; the coarsest level of the neck is only there to flow into the next one.

    Args:
        shape: Of the trunk.
        out_channels: Of the neck.
    """

    def __init__(self, shape: HieraShape, out_channels: int) -> None:
        super().__init__()
        self.trunk = Hiera(shape)
        self.neck = FpnNeck(out_channels, shape.widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to features of strides 4, 8 and 16."""
        levels: list[Tensor] = self.neck(self.trunk(x))
        return levels[:-1]


def pool(x: Tensor) -> Tensor:
    """Take the largest of each 2x2 tokens of (B, h, w, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).permute(0, 2, 3, 1)


def into_windows(x: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut (B, h, w, C), filled up with zeros, into windows (B * rows * columns, side, side, C)."""
    h, w = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # B, rows, side, columns, side, C
    return x.transpose(2, 3).flatten(0, 2), (x.shape[1], x.shape[3])


def out_of_windows(windows: Tensor, count_yx: tuple[int, int], out_yx: tuple[int, int]) -> Tensor:
    """Put windows (B * rows * columns, side, side, C) back and cut what was filled up off: (B, h, w, C)."""
    x = windows.unflatten(0, (-1, *count_yx)).transpose(2, 3)  # B, rows, side, columns, side, C
    return x.flatten(3, 4).flatten(1, 2)[:, : out_yx[0], : out_yx[1]]


def _blocks(shape: HieraShape) -> list[Block]:
    blocks: list[Block] = []
    for stage, (count, width) in enumerate(zip(shape.stages, shape.widths, strict=True)):
        for position in range(count):
            begins = stage > 0 and position == 0
            index = len(blocks)
            window = 0 if index in shape.global_blocks else shape.windows[stage - begins]
            incoming = width // 2 if begins else width
            blocks.append(Block(incoming, width, shape.heads * 2**stage, window, shape.mlp_ratio))
    return blocks
