"""The branches of DB-SAM: a pyramid of convolutions, which look at the tokens and back, and their fusion.

See `db_sam` for paper, code and licence. Maps are (B, L, H, W, C): L of one size, as the pyramid orders them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .db_sam_attention import CrossBlock
from .layers import LayerNorm2d
from .sizes import Sizes


class ConvBlock(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, out, H / stride, W / stride)."""
        return F.relu(self.bn(self.conv(x)))


class Pyramid(nn.Module):
    """Convolutions on the picture at several sizes, each ending on the token grid.

    Args:
        embed_dim: Channels C of the maps.
        levels: n for the picture at 1 / 2^n of its size.
        widths: Channels after each of the three 3 x 3 convolutions.
        antialias: Whether the picture is resized with antialiasing.
    """

    def __init__(
        self, embed_dim: int, levels: Sequence[int], widths: Sequence[int], antialias: bool = False
    ) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.antialias = antialias
        for level in levels:
            branch = nn.Sequential(nn.Identity())  # in the place of the official resizing
            channels = 3
            for index, width in enumerate(widths):
                stride = 2 if index < 4 - level else 1
                branch.append(ConvBlock(channels, width, kernel=3, stride=stride))
                branch.append(ConvBlock(width, width, kernel=1, stride=1))
                channels = width
            last = nn.Conv2d(channels, embed_dim, kernel_size=1, bias=False)
            branch.append(nn.Sequential(OrderedDict(conv=last)))
            branch.append(LayerNorm2d(embed_dim))
            self.add_module(f"lcb{level}", branch)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, S, S) to maps (B, L, S / 16, S / 16, C)."""
        maps = []
        for level in self.levels:
            size = (x.shape[2] >> level, x.shape[3] >> level)
            small = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=self.antialias)
            maps.append(self.get_submodule(f"lcb{level}")(small).permute(0, 2, 3, 1))
        return torch.stack(maps, dim=1)


class SqueezeExcite(nn.Module):
    """Weigh channels by what the whole map holds."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, kernel_size=1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same."""
        gate = self.fc2(F.gelu(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * gate.sigmoid()


class ChannelAttention(nn.Module):
    """Depthwise convolution, weighing of the channels, pointwise convolution, with a residual."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.pre_norm = LayerNorm2d(embed_dim)
        self.conv_dw = nn.Conv2d(embed_dim, embed_dim, kernel_size=3, padding=1, groups=embed_dim, bias=False)
        self.se = SqueezeExcite(embed_dim, hidden)
        self.conv_pw = nn.Conv2d(embed_dim, embed_dim, kernel_size=1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same."""
        x = tokens.permute(0, 3, 1, 2)
        y = self.conv_pw(self.se(F.gelu(self.conv_dw(self.pre_norm(x)))))
        return tokens + y.permute(0, 2, 3, 1)


class Fusion(nn.Module, ABC):
    """Make one map of the branches, then an MLP with a residual."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.ffn = nn.Sequential(
            OrderedDict(fc1=nn.Linear(embed_dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, embed_dim))
        )

    def forward(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Fuse tokens (B, H, W, C) and maps (B, L, H, W, C), or one map (B, H, W, C)."""
        x = self.mixed(tokens, maps)
        y: Tensor = x + self.ffn(self.ffn_norm(x))
        return y

    @abstractmethod
    def mixed(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Weigh the branches and add them up."""


class SoftmaxFusion(Fusion):
    """Each pixel and channel of every branch gets a share.

    Args:
        embed_dim: Channels C.
        hidden: Width of the MLP.
        squeezed: Width of the bottlenecks.
        maps: Number of bottlenecks for maps; the official one has one more than there are maps.
    """

    def __init__(self, embed_dim: int, hidden: int, squeezed: int, maps: int) -> None:
        super().__init__(embed_dim, hidden)
        self.vit_fc = _bottleneck(embed_dim, squeezed)
        self.conv_fc = nn.ModuleList(_bottleneck(embed_dim, squeezed) for _ in range(maps))

    def mixed(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Fuse tokens (B, H, W, C) and maps (B, L, H, W, C)."""
        branches = [*maps.unbind(1), tokens]
        layers = [*self.conv_fc[: maps.shape[1]], self.vit_fc]
        scores = [layer(branch) for layer, branch in zip(layers, branches, strict=True)]
        shares = torch.stack(scores).softmax(dim=0)
        return (shares * torch.stack(branches)).sum(dim=0)


class SigmoidFusion(Fusion):
    """Each pixel and channel gets a share of the maps, the rest being of the tokens.

    The official DANE takes one number per pixel from the map, and one per channel from the mean of the
    tokens; DANE3 takes both per pixel and channel.

    Args:
        embed_dim: Channels C.
        hidden: Width of the MLP.
        squeezed: Width of the bottlenecks.
        per_pixel: Whether it is DANE3.
    """

    def __init__(self, embed_dim: int, hidden: int, squeezed: int, per_pixel: bool) -> None:
        super().__init__(embed_dim, hidden)
        self.per_pixel = per_pixel
        self.fc_spatial = (
            _bottleneck(embed_dim, squeezed)
            if per_pixel
            else nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, 1, bias=False))
        )
        self.fc_channel = _bottleneck(embed_dim, squeezed)

    def mixed(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Fuse tokens and one map, both (B, H, W, C)."""
        seen = tokens if self.per_pixel else tokens.mean(dim=(1, 2), keepdim=True)
        share = (self.fc_spatial(maps) + self.fc_channel(seen)).sigmoid()
        return maps * share + tokens * (1 - share)


class Branches(nn.Module, ABC):
    """What both adapters share: the pyramid, and the normalisation at the end.

    Args:
        embed_dim: Channels C.
        pyramid: Makes the maps.
        aggregation: Fuses the branches.
    """

    def __init__(self, embed_dim: int, pyramid: Pyramid, aggregation: Fusion) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(len(pyramid.levels), embed_dim))
        self.spatial_prior_module = pyramid
        self.aggregation = aggregation
        self.norm = nn.LayerNorm(embed_dim)

    @property
    @abstractmethod
    def stages(self) -> int:
        """Number of stages."""

    def maps(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, S, S) to maps (B, L, H, W, C)."""
        maps: Tensor = self.spatial_prior_module(x) + self.level_embed[:, None, None]
        return maps

    @abstractmethod
    def forward(self, stage: int, tokens: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Let tokens (B, H, W, C) and maps (B, L, H, W, C) look at each other."""

    def fused(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Make one map (B, H, W, C) of the branches."""
        y: Tensor = self.norm(self.aggregation(tokens, maps))
        return y


class FourBranches(Branches):
    """Tokens and maps look at all of tokens and maps, twice per stage."""

    def __init__(
        self,
        embed_dim: int,
        pyramid: Pyramid,
        aggregation: Fusion,
        blocks: tuple[nn.ModuleList, nn.ModuleList],
    ) -> None:
        super().__init__(embed_dim, pyramid, aggregation)
        self.self_attn_blocks, self.self_attn_blocks1 = blocks

    @classmethod
    def of(cls, sizes: Sizes, prefix: str, pyramid: Pyramid) -> FourBranches:
        """Build the adapter as large as that of a file."""
        squeezed, width = sizes.of(f"{prefix}aggregation.vit_fc.0.weight")
        hidden = sizes.of(f"{prefix}aggregation.ffn.fc1.weight")[0]
        fusion = SoftmaxFusion(width, hidden, squeezed, sizes.count(f"{prefix}aggregation.conv_fc."))
        levels = len(pyramid.levels) + 1
        first, second = (
            CrossBlock.stages(sizes, f"{prefix}{name}.", levels)
            for name in ("self_attn_blocks", "self_attn_blocks1")
        )
        return cls(width, pyramid, fusion, (first, second))

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.self_attn_blocks)

    def forward(self, stage: int, tokens: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Let tokens (B, H, W, C) and maps (B, L, H, W, C) look at each other."""
        every = torch.cat([tokens[:, None], maps], dim=1)
        for blocks in (self.self_attn_blocks, self.self_attn_blocks1):
            every = blocks[stage](every, every)
        return every[:, 0], every[:, 1:]


class TwoBranches(Branches):
    """Tokens look at the maps, and these at the tokens as they were; channel attention before or after.

    Args:
        embed_dim: Channels C.
        pyramid: Makes the maps.
        aggregation: Fuses the branches.
        blocks: Of the tokens and of the maps, one per stage.
        attention: Channel attentions, one per stage, or none.
        attends_first: Whether they stand before.
    """

    def __init__(
        self,
        embed_dim: int,
        pyramid: Pyramid,
        aggregation: Fusion,
        blocks: tuple[nn.ModuleList, nn.ModuleList],
        attention: nn.ModuleList,
        attends_first: bool,
    ) -> None:
        super().__init__(embed_dim, pyramid, aggregation)
        self.vit_cross_attn_blocks, self.conv_cross_attn_blocks = blocks
        self.attends_first = attends_first
        self.vit_conv_blocks = attention
        self.conv = nn.Conv2d(len(pyramid.levels) * embed_dim, embed_dim, kernel_size=1)

    @classmethod
    def of(cls, sizes: Sizes, prefix: str, pyramid: Pyramid, channel_attention: str) -> TwoBranches:
        """Build the adapter as large as that of a file; `channel_attention` is "before" or "after"."""
        squeezed, width = sizes.of(f"{prefix}aggregation.fc_channel.0.weight")
        per_pixel = sizes.has(f"{prefix}aggregation.fc_spatial.3.weight")
        hidden = sizes.of(f"{prefix}aggregation.ffn.fc1.weight")[0]
        fusion = SigmoidFusion(width, hidden, squeezed, per_pixel)
        blocks = (
            CrossBlock.stages(sizes, f"{prefix}vit_cross_attn_blocks.", len(pyramid.levels)),
            CrossBlock.stages(sizes, f"{prefix}conv_cross_attn_blocks.", 1),
        )
        attention = nn.ModuleList(
            ChannelAttention(width, sizes.of(f"{prefix}vit_conv_blocks.{index}.se.fc1.weight")[0])
            for index in range(sizes.count(f"{prefix}vit_conv_blocks."))
        )
        return cls(width, pyramid, fusion, blocks, attention, channel_attention == "before")

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.vit_cross_attn_blocks)

    def forward(self, stage: int, tokens: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Let tokens (B, H, W, C) and maps (B, L, H, W, C) look at each other."""
        attention = self.vit_conv_blocks[stage] if len(self.vit_conv_blocks) else nn.Identity()
        if self.attends_first:
            tokens = attention(tokens)
        given = tokens[:, None]
        tokens = self.vit_cross_attn_blocks[stage](given, maps)[:, 0]
        maps = self.conv_cross_attn_blocks[stage](maps, given)
        return (tokens if self.attends_first else attention(tokens)), maps

    def fused(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Make one map (B, H, W, C) of the branches."""
        stacked = maps.permute(0, 1, 4, 2, 3).flatten(1, 2)  # B, L * C, H, W
        return super().fused(tokens, self.conv(stacked).permute(0, 2, 3, 1))


def _bottleneck(embed_dim: int, squeezed: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(embed_dim, squeezed, bias=False),
        nn.SiLU(),
        nn.LayerNorm(squeezed),
        nn.Linear(squeezed, embed_dim, bias=False),
    )
