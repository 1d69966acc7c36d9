"""SAM-UNet: a ResNet beside SAM's encoder, and features of several depths in the decoder.

Paper: Yang et al., "SAM-UNet: Enhancing Zero-Shot Segmentation of SAM for Universal Medical Images", arXiv
2024 (https://arxiv.org/abs/2408.09886).
Official code: https://github.com/Hhankyangg/sam-unet, commit a0b84c5, no licence stated (files of SAM keep
its Apache-2.0 headers). No weights are published.

What differs from SAM:
- The input is 256 pixels. A ResNet-34 or 50 sees the same picture; each of its four stages is brought to the
  token grid and added before one of the four global blocks.
- What the first three global blocks give, and the embedding, are added up at four times the grid.
- One token and one mask: neither SAM's masks nor its scores. The mean probability inside of the mask stands
  for the score.
- The file holds the optimizer as an object: see `SAMAdaptLib.tensor_reader`.

The official code takes the last block of every three for a global one, whatever the size; so does this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.errors import PromptError
from SAMAdaptLib.weights import copy_into, read_checkpoint

from .layers import MLP, LayerNorm2d
from .mask_decoder import SINGLE_MASK
from .prompt_encoder import PromptEncoder
from .sam import SamSlicePredictor
from .sizes import DECODER_HEADS, Sizes
from .two_way_transformer import TwoWayTransformer
from .vit import ImageEncoderViT, ViTShape

BLOCKS_PER_GROUP = 3
"""The last of each group attends globally."""
_FIRST_STRIDE = 4
"""Side of the network input over that of what the first stage of a ResNet gives."""
_PLACES = (
    ("image_encoder.sam_img_encoder.", "image_encoder.vit."),
    ("prompt_encoder.sam_prompt_encoder.", "prompt_encoder."),
    ("mask_decoder.sam_mask_decoder.", "mask_decoder."),
    ("resnet.", "image_encoder.resnet."),
    ("adapters_in.", "image_encoder.adapters_in."),
    ("adapters_bridge.", "image_encoder.adapters_bridge."),
    ("embedding_encoder.", "image_encoder.embedding_encoder."),
)
"""Names in the official file and here."""


class ResidualBlock(nn.Module):
    """A block of a ResNet: two 3 x 3 convolutions, or one between two of 1 x 1, which it strides in.

    Args:
        channels: That come in.
        width: Of the inner convolutions.
        stride: 1 or 2.
        bottleneck: Whether there are three convolutions; the last then leaves four times the width.
    """

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        out = 4 * width if bottleneck else width
        widths = [channels, *[width] * (len(kernels) - 1), out]
        self.depth = len(kernels)
        for index, (kernel, n, m) in enumerate(zip(kernels, widths[:-1], widths[1:], strict=True)):
            step = stride if index == bottleneck else 1
            convolution = nn.Conv2d(n, m, kernel, step, padding=kernel // 2, bias=False)
            self.add_module(f"conv{index + 1}", convolution)
            self.add_module(f"bn{index + 1}", nn.BatchNorm2d(m))
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, out, H / stride, W / stride)."""
        y = x
        for number in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            if number < self.depth:
                y = F.relu(y)
        return F.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """A ResNet without its head (He et al., CVPR 2016).

    Args:
        base: Width of the first stage; each further stage doubles it.
        depths: Blocks of each stage.
        bottleneck: See `ResidualBlock`.
    """

    def __init__(self, base: int, depths: tuple[int, ...], bottleneck: bool) -> None:
        super().__init__()
        self.stage0 = nn.Sequential(
            nn.Conv2d(3, base, kernel_size=7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(base),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        channels = base
        self.widths: list[int] = []
        for stage, depth in enumerate(depths, start=1):
            width = base << (stage - 1)
            blocks = nn.Sequential()
            for index in range(depth):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(ResidualBlock(channels, width, stride, bottleneck))
                channels = 4 * width if bottleneck else width
            self.add_module(f"stage{stage}", blocks)
            self.widths.append(channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, 3, S, S) to what each stage gives, (B, c, S / 4, S / 4) first."""
        x = self.stage0(x)
        maps = []
        for stage in range(1, len(self.widths) + 1):
            x = self.get_submodule(f"stage{stage}")(x)
            maps.append(x)
        return maps


class Reshaper(nn.Module):
    """Brings a map of the ResNet to grid and width of the tokens.

    Args:
        channels: Of the map.
        extent: Side of the map.
        grid: Side of the token grid.
        out: Channels of the tokens.
    """

    def __init__(self, channels: int, extent: int, grid: int, out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while extent != grid:
            if extent > grid:
                layers += [nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1)]
                channels, extent = 2 * channels, extent // 2
            else:
                layers += [nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)]
                channels, extent = channels // 2, 2 * extent
            layers += [LayerNorm2d(channels), nn.GELU()]
        self.reshaper = nn.Sequential(*layers, nn.Conv2d(channels, out, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, extent, extent) to (B, out, grid, grid)."""
        y: Tensor = self.reshaper(x)
        return y


class SamUnetEncoder(nn.Module):
    """SAM's encoder with a ResNet beside it.

    Args:
        shape: Of SAM's encoder.
        resnet: With as many stages as there are groups of blocks.
        fused: Channels of the map of several depths.
    """

    def __init__(self, shape: ViTShape, resnet: ResNet, fused: int) -> None:
        super().__init__()
        self.input_size = (shape.input_size, shape.input_size)
        self.vit = ImageEncoderViT(shape)
        self.resnet = resnet
        extent = shape.input_size // _FIRST_STRIDE
        self.adapters_in = nn.ModuleList(
            Reshaper(channels, extent >> stage, shape.grid, shape.embed_dim)
            for stage, channels in enumerate(resnet.widths)
        )
        self.adapters_bridge = nn.ModuleList(
            _upscaling(shape.embed_dim, shape.out_channels, fused) for _ in resnet.widths[1:]
        )
        self.embedding_encoder = _upscaling(shape.out_channels, shape.out_channels // 4, fused)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures (B, 3, S, S).

        Returns:
            The embedding (B, C, h, w), and the map of several depths (B, fused, 4h, 4w).
        """
        tokens = self.vit.patch_embed(x) + self.vit.pos_embed
        bridged = []
        bridges = [*reversed(self.adapters_bridge), None]  # the deepest of them is the official first
        blocks = list(self.vit.blocks)
        for group, feature in enumerate(self.resnet(x)):
            *local, last = blocks[BLOCKS_PER_GROUP * group : BLOCKS_PER_GROUP * (group + 1)]
            for block in local:
                tokens = block(tokens)
            tokens = last(tokens + self.adapters_in[group](feature).permute(0, 2, 3, 1))
            bridge = bridges[group]
            if bridge is not None:
                bridged.append(bridge(tokens.permute(0, 3, 1, 2)))
        embedding = self.vit.neck(tokens.permute(0, 3, 1, 2))
        return embedding, sum(bridged, self.embedding_encoder(embedding))


class SamUnetDecoder(nn.Module):
    """One token, one mask, and the map of several depths added to the upscaled image.

    Args:
        embed_dim: Channels C of the embedding.
        fused: Channels of the map of several depths.
        depth: Blocks of the transformer.
        heads: Its heads.
        mlp_dim: Hidden width of its MLPs.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        fused: int = 32,
        depth: int = 2,
        heads: int = DECODER_HEADS,
        mlp_dim: int = 2048,
    ) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(embed_dim, depth, heads, mlp_dim)
        self.output_upscaling = _upscaling(embed_dim, embed_dim // 4, fused).append(nn.GELU())
        self.med_token = nn.Embedding(1, embed_dim)
        self.hf_mlp = MLP([embed_dim, embed_dim, embed_dim, fused])
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(fused, 2 * fused, kernel_size=3, padding=1),
            LayerNorm2d(2 * fused),
            nn.GELU(),
            nn.Conv2d(2 * fused, fused, kernel_size=3, padding=1),
        )

    def forward(
        self,
        features: tuple[Tensor, Tensor],
        dense_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        masks: slice = SINGLE_MASK,
    ) -> tuple[Tensor, Tensor]:
        """Decode; a batch of 1 of the features serves every prompt.

        Args:
            features: What the encoder gives.
            dense_pe: (1, C, h, w).
            sparse: (B, N, C).
            dense: (B, C, h, w).
            masks: There is one whatever is asked for.

        Returns:
            Mask logits (B, 1, 4h, 4w) and the mean probability inside of the mask (B, 1).
        """
        embedding, several_depths = features
        source = embedding + dense
        grid = source.shape[-2:]
        own = self.med_token.weight.expand(source.shape[0], 1, -1)
        tokens = torch.cat([own, sparse.expand(source.shape[0], -1, -1)], dim=1)
        image, pe = (x.flatten(2).transpose(1, 2) for x in (source, dense_pe))  # B, hw, C
        tokens, image = self.transformer(image, pe, tokens)
        upscaled = self.output_upscaling(image.transpose(1, 2).unflatten(2, grid))
        upscaled = self.embedding_maskfeature(upscaled) + several_depths
        logits = torch.einsum("bc,bchw->bhw", self.hf_mlp(tokens[:, 0]), upscaled)[:, None]
        return logits, _mean_inside(logits)


class SamUnet(nn.Module):
    """The three boxes of SAM, two of them changed.

    Args:
        image_encoder: With the ResNet.
        prompt_encoder: SAM's.
        mask_decoder: With one mask.
    """

    def __init__(
        self, image_encoder: SamUnetEncoder, prompt_encoder: PromptEncoder, mask_decoder: SamUnetDecoder
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder


def published_tensors(network: SamUnet) -> dict[str, Tensor]:
    """Return what a SAM-UNet file holds, by its official names, as the network's own tensors."""
    return {_official(name): tensor for name, tensor in network.state_dict().items()}


def build_sam_unet(tensors: Mapping[str, Tensor], decoder_heads: int = DECODER_HEADS) -> SamUnet:
    """Build the network whose sizes those of the tensors are, its weights not yet loaded.

    Args:
        tensors: By official names.
        decoder_heads: Heads of the decoder, which no tensor tells.

    Raises:
        WeightsError: The file is of another network.
    """
    sizes = Sizes(tensors, "SAM-UNet")
    shape = sizes.vit("image_encoder.sam_img_encoder.")
    shape = replace(shape, global_blocks=tuple(range(BLOCKS_PER_GROUP - 1, shape.depth, BLOCKS_PER_GROUP)))
    stages = range(1, shape.depth // BLOCKS_PER_GROUP + 1)
    resnet = ResNet(
        sizes.of("resnet.stage0.0.weight")[0],
        tuple(sizes.count(f"resnet.stage{stage}.") for stage in stages),
        sizes.has("resnet.stage1.0.conv3.weight"),
    )
    fused = sizes.of("mask_decoder.embedding_maskfeature.3.weight")[0]
    layers = "mask_decoder.sam_mask_decoder.transformer.layers."
    decoder = SamUnetDecoder(
        shape.out_channels,
        fused,
        sizes.count(layers),
        decoder_heads,
        sizes.of(f"{layers}0.mlp.lin1.weight")[0],
    )
    prompts = sizes.prompt_encoder("prompt_encoder.sam_prompt_encoder.", shape)
    return SamUnet(SamUnetEncoder(shape, resnet, fused), prompts, decoder)


def load_sam_unet(tensors: Mapping[str, Tensor], decoder_heads: int = DECODER_HEADS) -> SamUnet:
    """Build SAM-UNet for a file and load it; all sizes are read off the file.

    Raises:
        WeightsError: The file is of another network.
    """
    network = build_sam_unet(tensors, decoder_heads)
    copy_into(published_tensors(network), tensors, "SAM-UNet")
    return network.eval()


def box_of_largest_part(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the box (x0, y0, x1, y1) that the official evaluation gives for a mask (rows, columns).

    It is that of the largest part whose pixels touch, corners included; x1 and y1 are the first outside.

    Raises:
        PromptError: The mask is empty.
    """
    parts, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        raise PromptError("A box around a mask was wanted, but the mask is empty. Draw the object first.")
    largest = int(np.bincount(parts.ravel())[1:].argmax())
    rows, columns = ndimage.find_objects(parts)[largest]
    return np.array([columns.start, rows.start, columns.stop, rows.stop], dtype=np.float32)


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> SamSlicePredictor:
    """Build SAM-UNet of a card; see `SAMAdaptLib.models.build_predictor`."""
    file = read_checkpoint(checkpoint)
    return SamSlicePredictor(load_sam_unet(file.tensors), card, file.sha256, device=device)


def _upscaling(channels: int, middle: int, out: int) -> nn.Sequential:
    """Four times the grid, in two steps."""
    return nn.Sequential(
        nn.ConvTranspose2d(channels, middle, kernel_size=2, stride=2),
        LayerNorm2d(middle),
        nn.GELU(),
        nn.ConvTranspose2d(middle, out, kernel_size=2, stride=2),
    )


def _mean_inside(logits: Tensor) -> Tensor:
    """Mean probability of the pixels above 0 of (B, M, h, w), as (B, M); 0 where there are none."""
    inside = logits > 0
    return (logits.sigmoid() * inside).sum(dim=(2, 3)) / inside.sum(dim=(2, 3)).clamp(min=1)


def _official(name: str) -> str:
    if name.startswith("mask_decoder.") and not name.startswith(
        ("mask_decoder.transformer.", "mask_decoder.output_upscaling.")
    ):
        return name
    for official, own in _PLACES:
        if name.startswith(own):
            return official + name.removeprefix(own)
    return name
