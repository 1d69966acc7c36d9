"""The sizes of a network, read off the tensors of its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.weights import recognise

from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .vit import ViTShape

DECODER_HEADS = 8
"""Of SAM's mask decoder; the number of heads leaves no trace in a file."""


class Sizes:
    """Asks a checkpoint for the shapes that a network of some kind must have.

    Args:
        tensors: Of the file, by official names.
        network: Name of the network that is wanted, for errors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], network: str) -> None:
        """Keep the question."""
        self._tensors = tensors
        self._network = network

    def of(self, name: str) -> torch.Size:
        """Return the shape of a tensor.

        Raises:
            WeightsError: The checkpoint lacks it: it is of another network.
        """
        if name not in self._tensors:
            raise WeightsError(
                f"A checkpoint of {self._network} was wanted, but the file lacks {name}; it looks like "
                f"{recognise(self._tensors)}. Choose the file that belongs to the model."
            )
        return self._tensors[name].shape

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return name in self._tensors

    def numbers(self, pattern: str) -> list[int]:
        """Return, sorted, the numbers that stand where the group of a regular expression is."""
        found = (re.match(pattern, name) for name in self._tensors)
        return sorted({int(match[1]) for match in found if match})

    def count(self, prefix: str) -> int:
        """Count the members of a list of modules; `prefix` ends before the number."""
        return len(self.numbers(re.escape(prefix) + r"(\d+)\."))

    def vit(self, prefix: str) -> ViTShape:
        """Return the shape of a ViT encoder with relative positions.

        Raises:
            WeightsError: There is none.
        """
        _, grid, _, width = self.of(f"{prefix}pos_embed")
        depth = self.count(f"{prefix}blocks.")
        tables = [self.of(f"{prefix}blocks.{index}.attn.rel_pos_h") for index in range(depth)]
        extents = [(length + 1) // 2 for length, _ in tables]
        patch = self.of(f"{prefix}patch_embed.proj.weight")[-1]
        return ViTShape(
            embed_dim=width,
            depth=depth,
            heads=width // tables[0][1],
            global_blocks=tuple(index for index, extent in enumerate(extents) if extent == grid),
            input_size=grid * patch,
            patch_size=patch,
            window=next((extent for extent in extents if extent != grid), grid),
            mlp_ratio=self.of(f"{prefix}blocks.0.mlp.lin1.weight")[0] / width,
            out_channels=self.of(f"{prefix}neck.0.weight")[0],
            qkv_bias=self.has(f"{prefix}blocks.0.attn.qkv.bias"),
        )

    def prompt_encoder(self, prefix: str, shape: ViTShape) -> PromptEncoder:
        """Build the prompt encoder beside an image encoder.

        Raises:
            WeightsError: The checkpoint holds none.
        """
        grid, size = (shape.grid, shape.grid), (shape.input_size, shape.input_size)
        channels = self.of(f"{prefix}mask_downscaling.3.weight")[0]
        return PromptEncoder(shape.out_channels, grid, size, channels)

    def mask_decoder(self, prefix: str, heads: int = DECODER_HEADS) -> MaskDecoder:
        """Build SAM's mask decoder.

        Raises:
            WeightsError: The checkpoint holds none.
        """
        masks, width = self.of(f"{prefix}mask_tokens.weight")
        upscaled = [self.of(f"{prefix}output_upscaling.{index}.weight")[1] for index in (0, 3)]
        return MaskDecoder(
            embed_dim=width,
            mask_tokens=masks,
            depth=self.count(f"{prefix}transformer.layers."),
            heads=heads,
            mlp_dim=self.of(f"{prefix}transformer.layers.0.mlp.lin1.weight")[0],
            upscale_divisors=[width // channels for channels in upscaled],
            score_width=self.of(f"{prefix}iou_prediction_head.layers.0.weight")[0],
            score_depth=self.count(f"{prefix}iou_prediction_head.layers."),
        )
