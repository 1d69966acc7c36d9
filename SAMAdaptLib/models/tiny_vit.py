"""TinyViT, the image encoder of MobileSAM and LiteMedSAM, at any input size.

Four stages at strides 4, 8, 16 and 16: inverted bottlenecks first, then attention in windows with a
learned bias per head and offset. Nothing in it is tied to one input size, so a 512 x 512 picture gives a
32 x 32 grid with the weights that were trained at 1024. Module names are those of the published files.

Papers: Wu et al., TinyViT, ECCV 2022; Zhang et al., Faster Segment Anything (MobileSAM), 2023;
Ma et al., LiteMedSAM (CVPR 2024 "Segment Anything in Medical Images on Laptop" baseline).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from SAMAdaptLib.models.layers import LayerNorm2d

UNUSED_KEYS = (
    "image_encoder.norm_head.weight",
    "image_encoder.norm_head.bias",
    "image_encoder.head.weight",
    "image_encoder.head.bias",
)
"""Entries of MobileSAM's file that belong to its pretraining as a classifier; no mask depends on them."""


@dataclass(frozen=True)
class TinyViTConfig:
    """Sizes of a TinyViT encoder; the defaults are the published 5 M variant.

    Attributes:
        widths: Channels of the four stages.
        depths: Blocks of the four stages.
        heads: Attention heads of the four stages; the first stage has no attention.
        windows: Side of the attention window of the four stages, in grid cells.
        out_channels: Channels of the embedding.
        pointwise_patches: LiteMedSAM's patch embedding, two 1 x 1 convolutions that keep the resolution
            (a 256 x 256 picture gives a 64 x 64 grid), instead of two strided 3 x 3 ones.
    """

    widths: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int, int] = (2, 4, 5, 10)
    windows: tuple[int, int, int, int] = (7, 7, 14, 7)
    out_channels: int = 256
    pointwise_patches: bool = False

    @property
    def stride(self) -> int:
        """Input pixels per grid cell."""
        return 4 if self.pointwise_patches else 16


class ConvNorm(nn.Module):
    """Convolution without bias, then batch normalisation (`c`, `bn`), which `fold` merges into one."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise (B, Ci, H, W) to (B, Co, H/s, W/s)."""
        result: Tensor = self.bn(self.c(x))
        return result

    @torch.no_grad()
    def fold(self) -> None:
        """Merge the running statistics into the convolution; afterwards the keys are no longer official."""
        if not isinstance(self.bn, nn.BatchNorm2d):
            return
        norm, conv = self.bn, self.c
        if norm.running_mean is None or norm.running_var is None:
            return
        gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
        conv.weight.mul_(gain.reshape(-1, 1, 1, 1))
        conv.bias = nn.Parameter(norm.bias - norm.running_mean * gain)
        self.bn = nn.Identity()


class PatchEmbed(nn.Module):
    """First two convolutions; `seq` holds a GELU between them."""

    def __init__(self, width: int, pointwise: bool) -> None:
        super().__init__()
        kernel, stride = (1, 1) if pointwise else (3, 2)
        self.seq = nn.Sequential(
            ConvNorm(3, width // 2, kernel, stride), nn.GELU(), ConvNorm(width // 2, width, kernel, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, C, H/4, W/4), or (B, C, H, W) if pointwise."""
        result: Tensor = self.seq(x)
        return result


class InvertedBottleneck(nn.Module):
    """Widen by 4, mix 3 x 3 per channel, narrow, add (MBConv)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, 4 * width, 1)
        self.conv2 = ConvNorm(4 * width, 4 * width, 3, groups=4 * width)
        self.conv3 = ConvNorm(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (B, C, H, W)."""
        y = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(y))


class PatchMerging(nn.Module):
    """Change the width and, with stride 2, halve the grid."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, 1)
        self.conv2 = ConvNorm(outputs, outputs, 3, stride, groups=outputs)
        self.conv3 = ConvNorm(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Ci, H, W) to (B, Co, H/s, W/s)."""
        result: Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return result


def window_offsets(side: int) -> Tensor:
    """Return (side², side²) indices |dy| * side + |dx| of the offset between two cells of a window."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y[None]).abs() * side + (x[:, None] - x[None]).abs()


class WindowAttention(nn.Module):
    """Multi-head attention inside one window, with a bias per head and absolute offset."""

    offsets: Tensor  # (side², side²)

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        self.register_buffer("offsets", window_offsets(side), persistent=False)
        self._gathered: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside windows (W, side², C)."""
        windows, cells, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(windows, cells, self.heads, -1)  # each head holds q, k, v
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)  # W,heads,N,d
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias())
        result: Tensor = self.proj(y.transpose(1, 2).reshape(windows, cells, width))
        return result

    def bias(self) -> Tensor:
        """Return the (heads, N, N) bias; without gradients it is gathered once per state of the weights."""
        table = self.attention_biases
        if torch.is_grad_enabled() and table.requires_grad:
            return table[:, self.offsets]
        state = (table.data_ptr(), 0 if table.is_inference() else table._version)
        if self._gathered is None or self._gathered[0] != state:
            self._gathered = (state, table[:, self.offsets].detach())
        return self._gathered[1]


class Mlp(nn.Module):
    """Layer norm, widen by 4, GELU, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        result: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return result


def split_windows(x: Tensor, side: int) -> Tensor:
    """Cut B,H,W,C into (B * windows), side², C, zero-padded at the bottom and right."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    x = x.reshape(batch, rows, side, columns, side, channels).transpose(2, 3)
    return x.reshape(-1, side * side, channels)


def join_windows(x: Tensor, side: int, height: int, width: int) -> Tensor:
    """Undo `split_windows`: (B * windows), side², C -> B,H,W,C."""
    rows, columns = -(-height // side), -(-width // side)
    x = x.reshape(-1, rows, columns, side, side, x.shape[-1]).transpose(2, 3)
    return x.reshape(-1, rows * side, columns * side, x.shape[-1])[:, :height, :width]


class AttentionBlock(nn.Module):
    """Window attention, a 3 x 3 convolution per channel, then the MLP."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.attn = WindowAttention(width, heads, side)
        self.local_conv = ConvNorm(width, width, 3, groups=width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend and mix (B, C, H, W)."""
        height, width = x.shape[-2:]
        x = x.permute(0, 2, 3, 1)  # B,H,W,C
        x = x + join_windows(self.attn(split_windows(x, self.side)), self.side, height, width)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (x + self.mlp(x)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of one resolution and, but for the last stage, the way down to the next."""

    def __init__(self, blocks: list[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks on (B, C, H, W), then the way down."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(nn.Module):
    """The encoder: B,3,H,W -> B,256,H/16,W/16 (H/4 with pointwise patches)."""

    def __init__(self, config: TinyViTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TinyViTConfig()
        widths = config.widths
        self.patch_embed = PatchEmbed(widths[0], config.pointwise_patches)
        self.layers = nn.ModuleList([_stage(config, index) for index in range(4)])
        self.neck = nn.Sequential(
            nn.Conv2d(widths[3], config.out_channels, 1, bias=False),
            LayerNorm2d(config.out_channels),
            nn.Conv2d(config.out_channels, config.out_channels, 3, padding=1, bias=False),
            LayerNorm2d(config.out_channels),
        )

    def lower(self, x: Tensor) -> Tensor:
        """Run all but the last stage and the neck: B,3,H,W -> B,320,H/16,W/16.

        H and W must be multiples of the stride. Training caches this map while the lower part is frozen.
        """
        x = self.patch_embed(x)
        for layer in self.layers[:3]:
            x = layer(x)
        return x

    def upper(self, x: Tensor) -> Tensor:
        """Run the last stage and the neck on what `lower` gave: B,320,h,w -> B,256,h,w."""
        result: Tensor = self.neck(self.layers[3](x))
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W) as (B, 256, H/16, W/16)."""
        return self.upper(self.lower(x))

    def fold_batch_norms(self) -> TinyViT:
        """Merge every batch norm into its convolution, for inference only: same output, fewer passes."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self


def _stage(config: TinyViTConfig, index: int) -> Stage:
    width, depth = config.widths[index], config.depths[index]
    if index == 0:
        blocks: list[nn.Module] = [InvertedBottleneck(width) for _ in range(depth)]
    else:
        head, side = config.heads[index], config.windows[index]
        blocks = [AttentionBlock(width, head, side) for _ in range(depth)]
    if index == 3:
        return Stage(blocks, None)
    return Stage(blocks, PatchMerging(width, config.widths[index + 1], 1 if index == 2 else 2))
