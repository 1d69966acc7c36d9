"""DeSAM: SAM whose masks no longer depend on where the prompt lies, for automatic segmentation.

Paper: Gao et al., "DeSAM: Decoupled Segment Anything Model for Generalizable Medical Image Segmentation",
MICCAI 2024 (https://arxiv.org/abs/2306.00499).
Official code: https://github.com/yifangao112/DeSAM, commit f377da2, MIT. No weights are published.

What differs from SAM:
- The prompt-relevant IoU module is SAM's transformer, of which only the score and the image tokens are kept.
  SAM's upscaling and mask heads are in the files, and idle.
- The prompt-decoupled mask module, a U-Net decoder, makes one mask of these image tokens and of what the
  global blocks of the encoder (all but the last) saw, the deepest first.
- It normalises each map by itself, with the statistics of the picture at hand. Its channel gates look at
  the mean of a map so normalised, which is zero: they are always one half. They are computed all the same.

The official code works with ViT-H only, as its mask module takes 1280 channels whatever the encoder; here the
width follows the encoder, which changes nothing for ViT-H.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from SAMAdaptLib.errors import PromptError
from SAMAdaptLib.weights import load_into

from .mask_decoder import SINGLE_MASK, MaskDecoder
from .prompt_encoder import PromptEncoder
from .sam import Sam, vit_shape_of
from .vit import ImageEncoderViT, ViTShape, with_positions_for

GATE_REDUCTION = 16
INSTANCE_EPS = 1e-5
LEAK = 0.01
_LEVELS = 3


class DeSamEncoder(ImageEncoderViT):
    """SAM's encoder that also gives what its global blocks saw."""

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Map pictures (B, 3, H, W) to (B, C, h, w) of each global block but the last, then the embedding."""
        x = self.patch_embed(x) + self.pos_embed
        seen = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.shape.global_blocks[:-1]:
                seen.append(x.permute(0, 3, 1, 2))
        return [*seen, self.neck(x.permute(0, 3, 1, 2))]


class ConvOnly(nn.Module):
    """A convolution without bias, under the name that the files give it."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, out, H, W)."""
        y: Tensor = self.conv(x)
        return y


class Doubling(nn.Module):
    """A transposed convolution that doubles rows and columns, without bias."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, out, kernel_size=2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, out, 2H, 2W)."""
        y: Tensor = self.conv(x)
        return y


class Gate(nn.Module):
    """Weigh channels by what the whole map holds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // GATE_REDUCTION
        self.fc = nn.Sequential(
            nn.Linear(channels, inner, bias=False),
            nn.ReLU(),
            nn.Linear(inner, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two convolutions, a gate and a residual; `conv3` brings that to another width, else it is idle."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.widens = channels != out
        self.conv1 = ConvOnly(channels, out, 3)
        self.conv2 = ConvOnly(out, out, 3)
        self.conv3 = ConvOnly(channels, out, 1)
        self.se = Gate(out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, out, H, W)."""
        y = F.leaky_relu(_normed(self.conv1(x)), LEAK)
        y = self.se(_normed(self.conv2(y)))
        residual = _normed(self.conv3(x)) if self.widens else x
        return F.leaky_relu(y + residual, LEAK)


class ContextBlock(nn.Module):
    """Bring what an encoder block saw to the width and the grid of one level of the mask module."""

    def __init__(self, channels: int, out: int, doublings: int) -> None:
        super().__init__()
        self.block_init = ResidualBlock(channels, out)
        self.residual_block = nn.ModuleList(
            nn.Sequential(Doubling(out, out), ResidualBlock(out, out)) for _ in range(doublings)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, h, w) to (B, out, sh, sw), s = 2 ** doublings."""
        x = self.block_init(x)
        for block in self.residual_block:
            x = block(x)
        return x


class LocalizationBlock(nn.Module):
    """Double the map and join it with the context of its new level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.transp_conv = Doubling(channels, half)
        self.res_block = ResidualBlock(channels, half)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map (B, C, H, W), with the context (B, C / 2, 2H, 2W), to (B, C / 2, 2H, 2W)."""
        y: Tensor = self.res_block(torch.cat([self.transp_conv(x), context], dim=1))
        return y


class MaskModule(nn.Module):
    """The prompt-decoupled mask module.

    Args:
        features: Channels C of the encoder's blocks.
        embed_dim: Channels c of the image tokens.
    """

    def __init__(self, features: int, embed_dim: int) -> None:
        super().__init__()
        widths = [embed_dim // 2**level for level in range(_LEVELS)]
        self.conv_blocks_context = nn.ModuleList(
            ContextBlock(features, width, level) for level, width in enumerate(widths)
        )
        self.mask_embedding_fusion = ResidualBlock(2 * embed_dim, embed_dim)
        self.conv_blocks_localization = nn.ModuleList(LocalizationBlock(width) for width in widths[:-1])
        self.seg_outputs = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths[1:])

    def forward(self, features: Sequence[Tensor], tokens: Tensor) -> list[Tensor]:
        """Make masks of all levels.

        Args:
            features: (B, C, h, w) of each global block but the last, the first block first.
            tokens: (P, c, h, w), the image tokens of P prompts; B is P or 1.

        Returns:
            Logits (P, 1, sh, sw), the finest (s = 4) first.
        """
        context = [
            block(seen) for block, seen in zip(self.conv_blocks_context, reversed(features), strict=True)
        ]
        context = [each.expand(len(tokens), -1, -1, -1) for each in context]
        y = self.mask_embedding_fusion(torch.cat([tokens, context[0]], dim=1))
        masks = []
        for block, head, level in zip(
            self.conv_blocks_localization, self.seg_outputs, context[1:], strict=True
        ):
            y = block(y, level)
            masks.append(head(y))
        return masks[::-1]


class DeSamDecoder(MaskDecoder):
    """SAM's mask decoder, its masks made by `MaskModule`.

    Args:
        features: Channels of the encoder's blocks.
        embed_dim: Channels of the embeddings.
        mlp_dim: Hidden width of the transformer's MLPs.
        heads: Heads of the transformer.
        score_width: Hidden width of the score head.
    """

    def __init__(
        self, features: int, embed_dim: int = 256, mlp_dim: int = 2048, heads: int = 8, score_width: int = 256
    ) -> None:
        super().__init__(embed_dim, heads=heads, mlp_dim=mlp_dim, score_width=score_width)
        self.pimm = MaskModule(features, embed_dim)

    def forward(  # type: ignore[override]
        self,
        image_embedding: Sequence[Tensor],
        dense_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        masks: slice = SINGLE_MASK,
    ) -> tuple[Tensor, Tensor]:
        """Decode one mask for each of P prompts; see `MaskDecoder`.

        Args:
            image_embedding: What `DeSamEncoder` gave.
            dense_pe: (1, c, h, w).
            sparse: (P, N, c).
            dense: (P, c, h, w).
            masks: `SINGLE_MASK`.

        Returns:
            Mask logits (P, 1, 4h, 4w) and scores (P, 1).

        Raises:
            PromptError: More than one mask was asked for.
        """
        if masks != SINGLE_MASK:
            raise PromptError("DeSAM gives one mask, but several were asked for. Ask for one.")
        levels, scores = self.decode_levels(image_embedding, dense_pe, sparse, dense)
        return levels[0], scores

    def decode_levels(
        self, features: Sequence[Tensor], dense_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Decode the masks of all levels, as training looks at them: the finest first; and scores (P, 1)."""
        tokens, image = self.attended(features[-1], dense_pe, sparse, dense)
        scores = self.iou_prediction_head(tokens[:, 0])[:, SINGLE_MASK]
        return self.pimm(features[:-1], image), scores


class DeSam(Sam):
    """DeSAM put together.

    Args:
        shape: Of the encoder, with four global blocks.
        prompt_encoder: For other sizes than the published ones.
        mask_decoder: For other sizes than the published ones.
    """

    def __init__(
        self,
        shape: ViTShape,
        prompt_encoder: PromptEncoder | None = None,
        mask_decoder: DeSamDecoder | None = None,
    ) -> None:
        grid, size = (shape.grid, shape.grid), (shape.input_size, shape.input_size)
        super().__init__(
            DeSamEncoder(shape),
            prompt_encoder or PromptEncoder(shape.out_channels, grid, size),
            mask_decoder or DeSamDecoder(shape.embed_dim, shape.out_channels),
        )
        self.image_encoder: DeSamEncoder
        self.mask_decoder: DeSamDecoder


def load_desam(tensors: Mapping[str, Tensor], input_size: int = 1024) -> DeSam:
    """Build DeSAM for a file as the official training writes it, which is complete, and load it.

    Raises:
        WeightsError: The file is of another network.
    """
    shape = vit_shape_of(tensors, input_size)
    network = DeSam(shape)
    load_into(network, with_positions_for(tensors, shape, "image_encoder."), "DeSAM")
    return network.eval()


def _normed(x: Tensor) -> Tensor:
    return F.instance_norm(x, eps=INSTANCE_EPS)
