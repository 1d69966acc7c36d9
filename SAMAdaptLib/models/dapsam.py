"""DAPSAM: SAM that segments prostates or optic discs by itself, also on pictures of other scanners.

Paper: Wei et al., "Prompting Segment Anything Model with Domain-Adaptive Prototype for Generalizable Medical
Image Segmentation", MICCAI 2024 (https://arxiv.org/abs/2409.12522).
Official code: https://github.com/wkklavis/DAPSAM, commit c7fd62e, no licence stated.

What differs from SAM:
- The tokens as they enter the encoder make a low-level feature, which is merged into the tokens before every
  block and stands beside the MLP of every block.
- The dense prompt is made from the embedding and a memory of prototypes; there are no prompts of the user.
- All masks of the decoder are returned: one for the prostate; disc with cup, and cup.

Defects that the weights depend on, and that are reproduced here:
- The low-level feature is made of tokens whose memory was read as channels first without being turned.
- The gate before a block weighs columns of the token grid, not channels. The one beside the MLP is right.
- Prototypes are matched by the product, where the paper says by the cosine.

The tag v1.0.0, to which the published files belong, names two modules otherwise; both vocabularies are read.

The official evaluation resizes no prostate slice (they are 384 x 384) and skips slices without prostate. Here
slices of other sizes are resized, and all are segmented.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.device import out_of_memory_as_error
from SAMAdaptLib.errors import CardError, VolumeError
from SAMAdaptLib.geometry import Axis
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptLib.weights import copy_into, read_checkpoint

from .automatic import AutomaticSlices
from .mask_decoder import MaskDecoder
from .prompt_encoder import PositionalEncoding
from .sizes import DECODER_HEADS, Sizes
from .vit import ImageEncoderViT, ViTShape, blocks_of

ADAPTER_SCALE = 0.5
"""Share of the tokens in what is merged, and of what stands beside an MLP."""
PERCENTILES = (0.2, 99.8)
"""Of the positive voxels of a slice, where its values are cut off."""
_OLD_NAMES = (
    ("image_encoder.prompt_generator.", "image_encoder.l_adapter."),
    (".Channel_MLP_Adapter.", ".channel_adapter."),
)
_OFFICIAL_PLACE = ".channel_adapter."
_PLACE = ".beside_mlp."


class LowLevelAdapter(nn.Module):
    """Makes the low-level feature and merges it into the tokens before each block.

    Args:
        embed_dim: Channels C of the tokens.
        hidden: Width of the bottleneck of each block's own MLP.
        depth: Number of blocks.
    """

    def __init__(self, embed_dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embedding_generator = nn.Linear(embed_dim, embed_dim)
        for index in range(depth):
            mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))
            self.add_module(f"lightweight_mlp_{index}", mlp)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map the tokens (B, H, W, C) that enter the encoder to the low-level feature (B, H, W, C)."""
        batch, rows, columns, channels = tokens.shape
        misread = tokens.reshape(batch, channels, rows * columns).transpose(1, 2)
        feature: Tensor = self.embedding_generator(misread)
        return feature.unflatten(1, (rows, columns))

    def merged(self, index: int, tokens: Tensor, low_level: Tensor) -> Tensor:
        """Merge the feature into the tokens before a block; all (B, H, W, C)."""
        mixed = ADAPTER_SCALE * tokens + low_level
        gate = mixed.amax(dim=(1, 3), keepdim=True) + mixed.mean(dim=(1, 3), keepdim=True)  # B, 1, W, 1
        mlp = self.get_submodule(f"lightweight_mlp_{index}")
        merged: Tensor = tokens + mlp(mixed * gate.sigmoid())
        return merged


class ChannelAdapter(nn.Module):
    """Weighs the channels of tokens and low-level feature, then a bottleneck; stands beside an MLP."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.D_fc1 = nn.Linear(embed_dim, hidden)
        self.D_fc2 = nn.Linear(hidden, embed_dim)

    def forward(self, x: Tensor, low_level: Tensor) -> Tensor:
        """Map tokens and feature (B, H, W, C) to what is added to the MLP's output."""
        mixed = x + low_level
        gate = mixed.amax(dim=(1, 2), keepdim=True) + mixed.mean(dim=(1, 2), keepdim=True)  # B, 1, 1, C
        y: Tensor = self.D_fc2(F.gelu(self.D_fc1(mixed * gate.sigmoid())))
        return ADAPTER_SCALE * y


class DapsamEncoder(ImageEncoderViT):
    """SAM's encoder with the low-level feature in both places of every block.

    Args:
        shape: Sizes of the encoder.
        merge_width: Bottleneck before a block.
        adapter_width: Bottleneck beside an MLP.
    """

    def __init__(self, shape: ViTShape, merge_width: int, adapter_width: int) -> None:
        super().__init__(shape)
        self.l_adapter = LowLevelAdapter(shape.embed_dim, merge_width, shape.depth)
        for block in blocks_of(self):
            block.beside_mlp = ChannelAdapter(shape.embed_dim, adapter_width)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) to embeddings (B, out_channels, h, w)."""
        x = self.patch_embed(x) + self.pos_embed
        low_level = self.l_adapter(x)
        for index, block in enumerate(self.blocks):
            x = block(self.l_adapter.merged(index, x, low_level), low_level)
        embedding: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return embedding


class PrototypePrompt(nn.Module):
    """Makes the dense prompt of an embedding from a memory of prototypes.

    Args:
        embed_dim: Channels C of the embedding.
        prototypes: Size of the memory.
    """

    def __init__(self, embed_dim: int, prototypes: int) -> None:
        super().__init__()
        self.memory_bank = nn.Embedding(prototypes, embed_dim)
        self.fuse_conv = nn.Conv2d(2 * embed_dim + 1, embed_dim, kernel_size=1)
        self.pe_layer = PositionalEncoding(embed_dim // 2)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        memory = self.memory_bank.weight
        summary = embedding.mean(dim=(2, 3)) + embedding.amax(dim=(2, 3))  # B, C
        recalled = (summary @ memory.T).softmax(dim=1) @ memory
        recalled = recalled[:, :, None, None].expand_as(embedding)
        likeness = F.cosine_similarity(recalled, embedding, dim=1, eps=1e-7)[:, None]
        prompt: Tensor = self.fuse_conv(torch.cat([embedding, recalled, likeness], dim=1))
        return prompt


class Dapsam(nn.Module):
    """Encoder, prototypes and decoder.

    Args:
        image_encoder: With its adapters.
        prompt_generator: In the place of SAM's prompt encoder.
        mask_decoder: With a mask per output.
    """

    def __init__(
        self, image_encoder: DapsamEncoder, prompt_generator: PrototypePrompt, mask_decoder: MaskDecoder
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_generator = prompt_generator
        self.mask_decoder = mask_decoder

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Segment pictures (B, 3, S, S), each standardised.

        Returns:
            Logits (B, masks, S / 4, S / 4) and scores (B, masks).
        """
        embedding = self.image_encoder(pictures)
        dense_pe = self.prompt_generator.pe_layer.of_cells((embedding.shape[2], embedding.shape[3]))
        nothing = embedding.new_empty(1, 0, embedding.shape[1])
        logits, scores = self.mask_decoder(embedding, dense_pe, nothing, self.prompt_generator(embedding))
        return logits, scores

    def enlarged(self, logits: Tensor) -> Tensor:
        """Bring logits (B, M, h, w) to the size of the network input, bilinearly."""
        size = self.image_encoder.input_size
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def published_tensors(network: Dapsam) -> dict[str, Tensor]:
    """Return what a DAPSAM file holds, by its newer official names, as the network's own tensors."""
    return {name.replace(_PLACE, _OFFICIAL_PLACE): tensor for name, tensor in network.state_dict().items()}


def with_new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a file of v1.0.0 the newer names; those of a newer file stay as they are."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in _OLD_NAMES:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def build_dapsam(tensors: Mapping[str, Tensor], decoder_heads: int = DECODER_HEADS) -> Dapsam:
    """Build the network whose sizes those of the tensors are, its weights not yet loaded.

    Args:
        tensors: With the newer names.
        decoder_heads: Heads of the decoder, which no tensor tells.

    Raises:
        WeightsError: The file is of another network.
    """
    sizes = Sizes(tensors, "DAPSAM")
    prototypes, width = sizes.of("prompt_generator.memory_bank.weight")
    encoder = DapsamEncoder(
        sizes.vit("image_encoder."),
        sizes.of("image_encoder.l_adapter.lightweight_mlp_0.0.weight")[0],
        sizes.of("image_encoder.blocks.0.channel_adapter.D_fc1.weight")[0],
    )
    return Dapsam(
        encoder, PrototypePrompt(width, prototypes), sizes.mask_decoder("mask_decoder.", decoder_heads)
    )


def load_dapsam(tensors: Mapping[str, Tensor], decoder_heads: int = DECODER_HEADS) -> Dapsam:
    """Build DAPSAM for a file of either vocabulary and load it; all sizes are read off the file.

    Raises:
        WeightsError: The file is of another network.
    """
    renamed = with_new_names(tensors)
    network = build_dapsam(renamed, decoder_heads)
    copy_into(published_tensors(network), renamed, "DAPSAM")
    return network.eval()


def standardised_slice(values: NDArray[Any]) -> NDArray[np.float32] | None:
    """Cut a grey slice off at percentiles of its positive values and standardise it with its own numbers.

    Args:
        values: (rows, columns); zeros are taken for what lies around the patient and are not cut off.

    Returns:
        (3, rows, columns), three times the same; None if there is nothing in the slice to be seen.
    """
    cut = values.astype(np.float64)
    positive = cut > 0
    if not positive.any():
        return None
    lower, upper = np.percentile(cut[positive], PERCENTILES)
    cut[positive] = cut[positive].clip(lower, upper)
    if cut.std() == 0:
        return None
    return np.repeat(((cut - cut.mean()) / cut.std())[None], 3, axis=0).astype(np.float32)


def standardised_photograph(picture: NDArray[np.uint8], size: int) -> NDArray[np.float32] | None:
    """Resize a photograph (rows, columns, 3) to a square, bicubically, and standardise each colour.

    Returns:
        (3, size, size); None if a colour is the same everywhere.
    """
    resized = np.array(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))
    colours = resized.transpose(2, 0, 1).astype(np.float64)
    mean, std = (part(axis=(1, 2), keepdims=True) for part in (colours.mean, colours.std))
    return None if (std == 0).any() else ((colours - mean) / std).astype(np.float32)


class DapsamVolumePredictor(AutomaticSlices):
    """A `VolumePredictor` that segments every slice, or every photograph of a series, by itself.

    The card's option `photographs` says that the network takes colour; `file_axes` is that of
    `AutomaticSlices`. Masks may lie inside each other: a pixel gets the number of the last that holds it.

    Args:
        network: Loaded.
        card: Names classes and options.
        checkpoint_sha256: Of the file.
        device: Where to run.

    Raises:
        CardError: The card names another number of classes than the network has masks.
    """

    def __init__(
        self, network: Dapsam, card: ModelCard, checkpoint_sha256: str, device: torch.device
    ) -> None:
        """Move the network to the device and freeze it."""
        super().__init__(card, checkpoint_sha256)
        masks = network.mask_decoder.mask_tokens.num_embeddings
        if card.classes and len(card.classes) != masks:
            raise CardError(
                f"The card {card.name} names {len(card.classes)} classes, but the file has {masks} masks. "
                "Choose the file that belongs to the model."
            )
        self._takes_colour = bool(card.options.get("photographs", False))
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device

    def set_volume(self, volume: Volume, axis: Axis, window: IntensityWindow) -> None:
        """Take a volume and the axis across its slices; the values are standardised slice by slice.

        Raises:
            VolumeError: Colour where grey is wanted, or grey where colour is.
        """
        if volume.is_colour != self._takes_colour:
            wanted, came = ("colour", "grey") if self._takes_colour else ("grey", "colour")
            raise VolumeError(
                f"{self.card.title} takes {wanted} images, but this one is {came}. Choose another model."
            )
        super().set_volume(volume, axis, window)

    @torch.inference_mode()
    def segment(self, picture: NDArray[Any]) -> tuple[NDArray[np.uint8], float]:
        """Segment one picture (rows, columns[, 3]); the mean probability inside stands for the overlap.

        Raises:
            DeviceError: Not enough memory.
        """
        seen = self._input(picture)
        if seen is None:
            return np.zeros(picture.shape[:2], np.uint8), 1.0
        with out_of_memory_as_error("Segmenting a slice"):
            logits, _ = self._network(seen.to(self._device))
            logits = self._network.enlarged(logits)
            share = _resized(logits, picture.shape[:2])[0].sigmoid().cpu().numpy()
        labels = np.zeros(share.shape[1:], np.uint8)
        for number, inside in enumerate(share >= 0.5, start=1):
            labels[inside] = number
        surest = share.max(axis=0)
        return labels, float(surest[labels > 0].mean() if labels.any() else 1 - surest.mean())

    def _input(self, picture: NDArray[Any]) -> Tensor | None:
        size = self._network.image_encoder.input_size
        seen = (
            standardised_photograph(picture, size[0]) if self._takes_colour else standardised_slice(picture)
        )
        return None if seen is None else _resized(torch.from_numpy(seen)[None], size)


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> DapsamVolumePredictor:
    """Build DAPSAM of a card; see `SAMAdaptLib.models.build_predictor`."""
    file = read_checkpoint(checkpoint)
    return DapsamVolumePredictor(load_dapsam(file.tensors), card, file.sha256, device)


def _resized(pictures: Tensor, shape_yx: tuple[int, ...]) -> Tensor:
    """Resize (B, M, rows, columns) bilinearly."""
    if pictures.shape[2:] == shape_yx:
        return pictures
    return F.interpolate(pictures, shape_yx, mode="bilinear", align_corners=False, antialias=True)
