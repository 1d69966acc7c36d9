"""Medical SAM Adapter (Med-SA): SAM with bottleneck adapters, for pictures and for chunks of slices.

Paper: Wu et al., "Medical SAM Adapter: Adapting Segment Anything Model for Medical Image Segmentation", 2023
(https://arxiv.org/abs/2304.12620).
Official code: https://github.com/SuperMedIntel/Medical-SAM-Adapter, commit 0add836, GPL-3.0. This file was
written from a description of the mathematics; nothing was taken over from that code.

What differs from SAM:
- Every block has three adapters: after attention, beside the MLP at half weight, and for depth.
- Windows are cut before the first normalisation: what fills them up is the bias of `norm1`, not zero.
- Positions are those of a 64 x 64 grid and are resized bicubically; here once, when they are loaded.
- In the decoder all self-attention has a residual, and the second block adds the positions to its tokens for
  good (EfficientSAM's transformer). Its MLPs have names of their own, so SAM's never reached them: a Med-SA
  network is not SAM plus adapters, and files of adapters alone, as in the Medical-Adapter-Zoo, lack a decoder
  that was trained with them. They are refused.
- Relative positions are called `rel_h`, `rel_w` since the end of January 2024, so SAM's are not loaded by the
  official code and stay zero; what a file holds is used. See `Dialect` for what older files look like.

The depth branch (3-D) runs a block's own attention over the slices of a chunk, laid out as a small grid, at
each place of a window. A defect that trained weights depend on: in blocks with windows the chunks are counted
through slices and windows together, windows fastest, so that they do not follow depth there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.weights import copy_into

from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .sam import Sam, vit_shape_of
from .two_way_transformer import TwoWayBlock
from .vit import Attention, Block, ImageEncoderViT, ViTShape

ADAPTER_RATIO = 0.25
"""Width of the published adapters over that of the tokens."""
MLP_ADAPTER_SCALE = 0.5
PATCH = 16
_POSITIONS = "image_encoder.pos_embed"
_ADAPTERS = {
    ".space_adapter.": ".Space_Adapter.",
    ".mlp_adapter.": ".MLP_Adapter.",
    ".depth_adapter.": ".Depth_Adapter.",
    ".down.": ".D_fc1.",
    ".up.": ".D_fc2.",
}


@dataclass(frozen=True)
class Dialect:
    """How the official code of a time names and computes things; read off a file's keys.

    | until | relative positions | decoder |
    |---|---|---|
    | 2024-01-02 | `rel_pos_h` | SAM's, `lin1`, `lin2` |
    | 2024-01-06 | `rel_pos_h` | EfficientSAM's, `layers.0.0`, `fc` |
    | 2024-01-28 | none | EfficientSAM's |
    | today | `rel_h` | EfficientSAM's |

    Args:
        positions: Start of the tables' names, "rel_" or "rel_pos_"; empty if there are none.
        residual_decoder: Whether the decoder is EfficientSAM's.
    """

    positions: str = "rel_"
    residual_decoder: bool = True

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Dialect:
        """Recognise the dialect of a file."""
        found = [start for start in ("rel_", "rel_pos_") if any(f"attn.{start}h" in key for key in tensors)]
        return cls(found[0] if found else "", any(".mlp.layers.0.0." in key for key in tensors))

    def official(self, name: str) -> str:
        """Return what a tensor of the network is called in files."""
        if name.startswith("mask_decoder.transformer.") and self.residual_decoder:
            return name.replace(".mlp.lin1.", ".mlp.layers.0.0.").replace(".mlp.lin2.", ".mlp.fc.")
        if name.startswith("image_encoder.blocks."):
            name = name.replace(".attn.rel_pos_", f".attn.{self.positions}")
            for own, official in _ADAPTERS.items():
                name = name.replace(own, official)
        return name


class BottleneckAdapter(nn.Module):
    """Two linear layers with an exact GELU between them.

    Args:
        embed_dim: Channels C.
        ratio: Width between the layers over C.
        residual: Whether it adds what it was given.
    """

    def __init__(self, embed_dim: int, ratio: float = ADAPTER_RATIO, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        inner = int(embed_dim * ratio)
        self.down = nn.Linear(embed_dim, inner)
        self.up = nn.Linear(inner, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        y: Tensor = self.up(F.gelu(self.down(x)))
        return x + y if self.residual else y


@dataclass(frozen=True)
class Depth:
    """How a network of slices looks along depth.

    Args:
        chunk: Slices that are seen together; None for all that come in a batch, windows counted as slices.
    """

    chunk: int | None


class MedSaBlock(Block):
    """SAM's block with its three adapters.

    It has its own `forward`, because windows are cut before the normalisation, and because the depth branch
    looks at windows.

    Args:
        shape: Of the encoder.
        index: Number of the block.
        ratio: Width of the adapters over C.
        depth: None for a network of pictures, whose depth adapter is there, but idle.
    """

    def __init__(self, shape: ViTShape, index: int, ratio: float, depth: Depth | None) -> None:
        super().__init__(shape, index)
        self.depth = depth
        self.space_adapter = BottleneckAdapter(shape.embed_dim, ratio, residual=True)
        self.mlp_adapter = BottleneckAdapter(shape.embed_dim, ratio)
        self.depth_adapter = BottleneckAdapter(shape.embed_dim, ratio)

    def forward(self, x: Tensor, *shared: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C); nothing is shared between blocks."""
        windows = _windows(x, self.attn.extent)
        y = self.space_adapter(self.attn(self.norm1(windows)))
        if self.depth is not None:
            y = y + self._through_depth(windows, self.depth.chunk or len(windows))
        x = x + _merged(y, x.shape)
        normed = self.norm2(x)
        grown: Tensor = x + self.mlp(normed) + MLP_ADAPTER_SCALE * self.mlp_adapter(normed)
        return grown

    def _through_depth(self, windows: Tensor, chunk: int) -> Tensor:
        """Attend along the batch of windows (N, h, w, C), in chunks, at each place by itself."""
        _, h, w, _ = windows.shape
        columns = windows.unflatten(0, (-1, chunk)).permute(0, 2, 3, 1, 4)  # groups, h, w, chunk, C
        grids = columns.flatten(0, 2).unflatten(1, depth_grid(chunk))
        seen: Tensor = self.depth_adapter(attend_on_grid(self.attn, self.norm1(grids)))
        return seen.flatten(1, 2).unflatten(0, (-1, h, w)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def depth_grid(slices: int) -> tuple[int, int]:
    """Lay slices out as rows and columns, the squarest that the official search finds.

    It starts from a grid that is not square, so 4 slices become 1 x 4 and 9 become 1 x 9. For a single slice
    it would never end.
    """
    if slices < 2:
        return 1, slices
    rows = math.isqrt(slices)
    columns = rows + 1
    while rows * columns != slices:
        if rows * columns < slices:
            columns += 1
        else:
            rows -= 1
    return rows, columns


def attend_on_grid(attention: Attention, x: Tensor) -> Tensor:
    """Attend over grids (N, h, w, C) of any shape; the relative positions are resized for it, linearly."""
    _, h, w, _ = x.shape
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind(0)
    bias: Tensor | None = None
    if attention.rel_pos_h is not None and attention.rel_pos_w is not None:
        by_row = torch.einsum("nmhwc,hkc->nmhwk", q, _relative(attention.rel_pos_h, h))
        by_column = torch.einsum("nmhwc,wkc->nmhwk", q, _relative(attention.rel_pos_w, w))
        bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(4, 5).flatten(2, 3)
    q, k, v = (each.flatten(2, 3) for each in (q, k, v))  # N, heads, hw, c
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    y: Tensor = attention.proj(attended.transpose(1, 2).flatten(2).unflatten(1, (h, w)))
    return y


class ResidualTwoWayBlock(TwoWayBlock):
    """EfficientSAM's block: a residual everywhere; the positions stay in the tokens after the first block."""

    def among_themselves(self, tokens: Tensor, token_pe: Tensor) -> Tensor:
        """Let the tokens (B, N, C) attend to each other, residual included."""
        placed = tokens if self.first else tokens + token_pe
        return placed + self.self_attn(placed, placed, placed)


class MedSa(Sam):
    """SAM with the adapters of Med-SA.

    Args:
        shape: Of the encoder.
        dialect: Of the file to be loaded.
        depth: None for a network of pictures.
        adapter_ratio: Width of the adapters over C.
        prompt_encoder: For other sizes than the published ones.
        mask_decoder: For other sizes than the published ones; its transformer becomes the dialect's.
    """

    def __init__(
        self,
        shape: ViTShape,
        dialect: Dialect | None = None,
        depth: Depth | None = None,
        adapter_ratio: float = ADAPTER_RATIO,
        prompt_encoder: PromptEncoder | None = None,
        mask_decoder: MaskDecoder | None = None,
    ) -> None:
        self.dialect = dialect or Dialect()
        shape = replace(shape, relative_positions=bool(self.dialect.positions))
        encoder = ImageEncoderViT(shape)
        encoder.blocks = nn.ModuleList(
            MedSaBlock(shape, index, adapter_ratio, depth) for index in range(shape.depth)
        )
        grid, size = (shape.grid, shape.grid), (shape.input_size, shape.input_size)
        decoder = mask_decoder or MaskDecoder(shape.out_channels)
        if self.dialect.residual_decoder:
            transformer = decoder.transformer
            transformer.layers = nn.ModuleList(
                _residual(block) for block in transformer.layers if isinstance(block, TwoWayBlock)
            )
        super().__init__(encoder, prompt_encoder or PromptEncoder(shape.out_channels, grid, size), decoder)
        self.image_encoder: ImageEncoderViT
        self.depth = depth


def published_tensors(network: MedSa) -> dict[str, Tensor]:
    """Return what a Med-SA file holds, by the names of the network's dialect, as the network's own tensors.

    The positions alone have another shape: the network's grid, where the file's is 64 x 64.
    """
    return {network.dialect.official(name): tensor for name, tensor in network.state_dict().items()}


def load_into_med_sa(network: MedSa, tensors: Mapping[str, Tensor]) -> MedSa:
    """Load the network of a file, its positions resized to the network's grid.

    Raises:
        WeightsError: Adapters alone, another network or another size.
    """
    refuse_adapters_alone(tensors)
    fitting = dict(tensors)
    if _POSITIONS in fitting:
        fitting[_POSITIONS] = _resized_positions(fitting[_POSITIONS], network.image_encoder.shape.grid)
    copy_into(published_tensors(network), fitting, "Medical SAM Adapter")
    return network.eval()


def load_med_sa(
    tensors: Mapping[str, Tensor], input_size: int | None = None, depth: Depth | None = None
) -> MedSa:
    """Build Med-SA for a file and load it; dialect, encoder and number of masks are read off the file.

    Args:
        tensors: Names and values of the file.
        input_size: Side of the network input; None to read it off the relative positions.
        depth: None for a network of pictures.

    Raises:
        WeightsError: Adapters alone, another network, or an input size that cannot be told.
    """
    refuse_adapters_alone(tensors)
    dialect = Dialect.of(tensors)
    shape = vit_shape_of(tensors, input_size or 0)
    shape = replace(shape, input_size=input_size or _input_size_of(tensors, shape, dialect))
    masks = tensors.get("mask_decoder.mask_tokens.weight", torch.empty(4, 0)).shape[0]
    network = MedSa(shape, dialect, depth, mask_decoder=MaskDecoder(shape.out_channels, masks))
    return load_into_med_sa(network, tensors)


def refuse_adapters_alone(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file of the Medical-Adapter-Zoo.

    Raises:
        WeightsError: It holds adapters and no decoder.
    """
    adapters = any("_Adapter." in key for key in tensors)
    if adapters and not any(key.startswith("mask_decoder.") for key in tensors):
        raise WeightsError(
            "A Med-SA checkpoint with its decoder was wanted, but the file holds the adapters alone, as "
            "those of the Medical-Adapter-Zoo do: the decoder trained with them is missing, so their "
            "results cannot be reproduced. Choose the complete checkpoint that the official training writes."
        )


def _windows(x: Tensor, extent: int) -> Tensor:
    """Cut (B, H, W, C) into windows (B * windows, extent, extent, C), zeros below and to the right."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % extent, 0, -x.shape[1] % extent))
    cut = x.unflatten(1, (-1, extent)).unflatten(3, (-1, extent))  # B, down, n, across, n, C
    return cut.transpose(2, 3).flatten(0, 2)


def _merged(windows: Tensor, shape: Sequence[int]) -> Tensor:
    """Put windows together again as (B, H, W, C), without what they were filled up with."""
    batch, rows, columns, _ = shape
    extent = windows.shape[1]
    down, across = math.ceil(rows / extent), math.ceil(columns / extent)
    x = windows.unflatten(0, (batch, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :rows, :columns]


def _relative(table: Tensor, n: int) -> Tensor:
    """Resize a table over distances to 2n - 1 of them and spread it to (queries, keys, c)."""
    if table.shape[0] != 2 * n - 1:
        table = F.interpolate(table.T[None], 2 * n - 1, mode="linear", align_corners=False)[0].T
    position = torch.arange(n, device=table.device)
    return table[position[:, None] - position[None, :] + n - 1]


def _resized_positions(positions: Tensor, grid: int) -> Tensor:
    tokens = positions.float().permute(0, 3, 1, 2)
    resized = F.interpolate(tokens, (grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def _residual(block: TwoWayBlock) -> ResidualTwoWayBlock:
    """Build EfficientSAM's block with the sizes of SAM's; the weights come later."""
    weight = block.get_parameter("mlp.lin1.weight")
    return ResidualTwoWayBlock(weight.shape[1], block.self_attn.heads, weight.shape[0], block.first)


def _input_size_of(tensors: Mapping[str, Tensor], shape: ViTShape, dialect: Dialect) -> int:
    """Read the input size off the relative positions of a global block."""
    key = f"image_encoder.blocks.{shape.global_blocks[0]}.attn.{dialect.positions}h"
    if key not in tensors:
        raise WeightsError(
            "A Med-SA checkpoint with relative positions, which tell the input size, was wanted, but the "
            "file holds none. State input_size in the model's card."
        )
    return PATCH * (tensors[key].shape[0] + 1) // 2
