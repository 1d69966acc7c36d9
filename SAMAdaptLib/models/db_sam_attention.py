"""Deformable attention between maps of one size, as DB-SAM uses it.

See `db_sam` for paper, code and licence. Deformable attention: Zhu et al., "Deformable DETR", ICLR 2021
(https://arxiv.org/abs/2010.04159). Maps are (B, L, H, W, C): L of one size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sizes import Sizes

POINTS = 4
"""Samples that a query takes of each map and head."""


class DeformableAttention(nn.Module):
    """Each query looks at a few places of each map, which it chooses around its own place.

    Args:
        embed_dim: Channels C.
        heads: Number of heads.
        levels: Number of maps that are looked at.
    """

    def __init__(self, embed_dim: int, heads: int, levels: int) -> None:
        super().__init__()
        self.heads, self.levels = heads, levels
        self.sampling_offsets = nn.Linear(embed_dim, heads * levels * POINTS * 2)
        self.attention_weights = nn.Linear(embed_dim, heads * levels * POINTS)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, queries: Tensor, values: Tensor) -> Tensor:
        """Let every pixel of `queries` (B, Q, H, W, C) look at `values` (B, L, H, W, C)."""
        heads = self.value_proj(values).unflatten(-1, (self.heads, -1))
        heads = heads.permute(1, 0, 4, 5, 2, 3).flatten(1, 2)  # L, B * heads, c, H, W
        # One map of queries at a time, so that the samples of all are never held together.
        attended = [self._attend(query, heads) for query in queries.unbind(1)]
        y: Tensor = self.output_proj(torch.stack(attended, dim=1))
        return y

    def _attend(self, query: Tensor, values: Tensor) -> Tensor:
        """Look from (B, H, W, C) at (L, B * heads, c, H, W)."""
        batch, rows, columns, _ = query.shape
        by_head = (self.heads, self.levels, POINTS)
        offsets = self.sampling_offsets(query).unflatten(-1, (*by_head, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, by_head[1:])  # B, H, W, heads, L, points
        places_xy = _cells_xy(rows, columns, query)[:, :, None, None, None] + offsets / offsets.new_tensor(
            [columns, rows]
        )
        places_xy = places_xy.permute(4, 0, 3, 1, 2, 5, 6).flatten(1, 2)  # L, B * heads, H, W, points, 2
        weights = weights.permute(4, 0, 3, 1, 2, 5).flatten(1, 2).flatten(2, 3)  # L, B * heads, HW, points
        total = query.new_zeros(())
        for value, places, weight in zip(values, 2 * places_xy - 1, weights, strict=True):
            samples = F.grid_sample(value, places.flatten(1, 2), align_corners=False)  # .., c, HW, points
            total = total + (samples * weight[:, None]).sum(-1)
        return (
            total.unflatten(0, (batch, self.heads))
            .flatten(1, 2)
            .unflatten(-1, (rows, columns))
            .permute(0, 2, 3, 1)
        )


class DepthwiseConv(nn.Module):
    """A 3 x 3 convolution of each channel of each map by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, L, H, W, C) to the same."""
        flat = maps.flatten(0, 1).permute(0, 3, 1, 2)
        y: Tensor = self.dwconv(flat)
        return y.permute(0, 2, 3, 1).unflatten(0, maps.shape[:2])


class MixingMLP(nn.Module):
    """An MLP that sees the neighbourhood of each pixel; reconstructed, see `db_sam`."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, embed_dim)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, L, H, W, C) to the same."""
        y: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(maps))))
        return y


class CrossBlock(nn.Module):
    """Maps look at maps, then an MLP; both with a residual.

    Args:
        embed_dim: Channels C.
        heads: Heads of the attention.
        levels: Number of maps that are looked at.
        hidden: Width of the MLP.
    """

    def __init__(self, embed_dim: int, heads: int, levels: int, hidden: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(embed_dim)
        self.value_norm = nn.LayerNorm(embed_dim)
        self.attn = DeformableAttention(embed_dim, heads, levels)
        self.ffn_pre_norm = nn.LayerNorm(embed_dim)
        self.mlp = MixingMLP(embed_dim, hidden)

    def forward(self, queries: Tensor, values: Tensor) -> Tensor:
        """Update queries (B, Q, H, W, C) by values (B, L, H, W, C)."""
        x = queries + self.attn(self.query_norm(queries), self.value_norm(values))
        y: Tensor = x + self.mlp(self.ffn_pre_norm(x))
        return y

    @classmethod
    def stages(cls, sizes: Sizes, prefix: str, levels: int) -> nn.ModuleList:
        """Build the blocks of all stages under a name, as large as those of a file."""
        blocks = nn.ModuleList()
        for index in range(sizes.count(prefix)):
            rows, width = sizes.of(f"{prefix}{index}.attn.attention_weights.weight")
            hidden = sizes.of(f"{prefix}{index}.mlp.fc1.weight")[0]
            blocks.append(cls(width, rows // (levels * POINTS), levels, hidden))
        return blocks


def _cells_xy(rows: int, columns: int, like: Tensor) -> Tensor:
    """Middles of the cells of a grid, 0 to 1, as (rows, columns, 2)."""
    y = (torch.arange(rows, device=like.device, dtype=like.dtype) + 0.5) / rows
    x = (torch.arange(columns, device=like.device, dtype=like.dtype) + 0.5) / columns
    return torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1)
