"""SAM put together, and its use on one slice.

Paper: Kirillov et al., "Segment Anything", ICCV 2023 (https://arxiv.org/abs/2304.02643).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.device import out_of_memory_as_error
from SAMAdaptLib.errors import PromptError, WeightsError
from SAMAdaptLib.prompts import PixelPrompts
from SAMAdaptLib.weights import load_into, read_checkpoint

from .framing import Framing, LongestSide
from .mask_decoder import SINGLE_MASK, THREE_MASKS, MaskDecoder
from .predictor import SliceEmbedding, SlicePrediction
from .prompt_encoder import PromptEncoder
from .vit import VIT_B, VIT_H, VIT_L, ImageEncoderViT, ViTShape, with_positions_for


class PromptableNetwork(Protocol):
    """Any network with SAM's three parts."""

    @property
    def image_encoder(self) -> nn.Module:
        """From (B, 3, H, W) to (B, C, h, w)."""
        ...

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """From prompts to embeddings."""
        ...

    @property
    def mask_decoder(self) -> nn.Module:
        """From what the encoder gives, and embeddings of prompts, to masks: called as `MaskDecoder` is."""
        ...


class Sam(nn.Module):
    """The three boxes of the paper's figure.

    Args:
        image_encoder: Any network from (B, 3, H, W) to (B, C, h, w).
        prompt_encoder: Knows the input size and the grid.
        mask_decoder: From embeddings to masks.
    """

    def __init__(
        self, image_encoder: nn.Module, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder


def build_sam(shape: ViTShape = VIT_B) -> Sam:
    """Build SAM with a ViT encoder and the decoder of the paper, its weights not yet loaded."""
    grid, size = (shape.grid, shape.grid), (shape.input_size, shape.input_size)
    return Sam(
        ImageEncoderViT(shape),
        PromptEncoder(shape.out_channels, grid, size),
        MaskDecoder(shape.out_channels),
    )


def vit_shape_of(tensors: Mapping[str, Tensor], input_size: int) -> ViTShape:
    """Recognise ViT-B, L or H in a SAM checkpoint.

    Raises:
        WeightsError: It holds no encoder of these sizes.
    """
    positions = tensors.get("image_encoder.pos_embed")
    for shape in (VIT_B, VIT_L, VIT_H):
        if positions is not None and positions.shape[-1] == shape.embed_dim:
            return replace(shape, input_size=input_size)
    found = "no ViT encoder" if positions is None else f"an encoder of {positions.shape[-1]} channels"
    raise WeightsError(
        "A SAM checkpoint with a ViT-B, L or H encoder (768, 1024 or 1280 channels) was wanted, but the file "
        f"holds {found}. Choose the checkpoint that the model's card names."
    )


def load_sam(tensors: Mapping[str, Tensor], input_size: int = 1024) -> Sam:
    """Build SAM for a checkpoint with the official keys and load it.

    Args:
        tensors: Names and values of the checkpoint.
        input_size: Side of the network input; other sizes than 1024 resize the positions.

    Raises:
        WeightsError: The checkpoint is of another network.
    """
    shape = vit_shape_of(tensors, input_size)
    network = build_sam(shape)
    load_into(network, with_positions_for(tensors, shape, "image_encoder."), "SAM")
    return network.eval()


class SamSlicePredictor:
    """A `SlicePredictor` of any network with SAM's three parts.

    Args:
        network: Has `image_encoder`, `prompt_encoder` and `mask_decoder`.
        card: Says which prompts the network was trained for.
        checkpoint_sha256: Of the file the weights came from.
        framing: How pictures enter; None for SAM's own way.
        device: Where to run.
    """

    def __init__(
        self,
        network: PromptableNetwork,
        card: ModelCard,
        checkpoint_sha256: str,
        framing: Framing | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Move the network to the device and freeze it."""
        self.card = card
        self.checkpoint_sha256 = checkpoint_sha256
        self._device = device or torch.device("cpu")
        self._image_encoder: nn.Module = network.image_encoder
        self._prompt_encoder = network.prompt_encoder
        self._mask_decoder = network.mask_decoder
        for part in (self._image_encoder, self._prompt_encoder, self._mask_decoder):
            part.eval().requires_grad_(False).to(self._device)
        self._framing: Framing = framing or LongestSide(self._prompt_encoder.input_size[0])

    @torch.inference_mode()
    def encode(self, picture: NDArray[np.uint8]) -> SliceEmbedding:
        """Encode a picture: (rows, columns) grey or (rows, columns, 3) RGB, 0 to 255.

        Raises:
            DeviceError: Not enough memory.
        """
        with out_of_memory_as_error("Encoding a slice"):
            features = self._image_encoder(self._framing.to_input(picture).to(self._device))
        return SliceEmbedding(features, (picture.shape[0], picture.shape[1]))

    @torch.inference_mode()
    def decode(
        self, embedding: SliceEmbedding, prompts: PixelPrompts, previous: NDArray[np.float32] | None = None
    ) -> SlicePrediction:
        """Segment what the prompts point at; a single click gets the best scored of SAM's three masks.

        Raises:
            PromptError: No prompt, or one that the network was not trained for.
        """
        self._check(prompts)
        shape_yx = embedding.picture_shape_yx
        mask = self._mask_input(prompts, previous, shape_yx)
        sparse, dense = self._prompt_encoder(*self._geometric(prompts, shape_yx), masks=mask)
        with out_of_memory_as_error("Segmenting a slice"):
            low_res, scores = self._mask_decoder(
                embedding.features,
                self._prompt_encoder.dense_pe(),
                sparse,
                dense,
                self._candidates(prompts, mask),
            )
        best = int(scores[0].argmax())
        low_res = low_res[:, best : best + 1]
        logits = self._framing.to_picture(low_res, shape_yx)
        return SlicePrediction(
            logits[0, 0].float().cpu().numpy(), float(scores[0, best]), low_res[0].float().cpu().numpy()
        )

    def _candidates(self, prompts: PixelPrompts, mask: Tensor | None) -> slice:
        """Masks of the decoder from which the best scored is taken."""
        one_click = len(prompts.labels) == 1 and prompts.box_xyxy is None and mask is None
        return THREE_MASKS if one_click else SINGLE_MASK

    def _check(self, prompts: PixelPrompts) -> None:
        taken = self.card.prompts
        given = {
            "point": len(prompts.labels) > 0 and "scribble" not in taken,
            "box": prompts.box_xyxy is not None,
            "mask": prompts.mask is not None,
        }
        refused = [kind for kind, present in given.items() if present and kind not in taken]
        if prompts.is_empty or refused:
            raise PromptError(
                f"{self.card.title} wants a prompt of the kinds {', '.join(taken)} on the slice, but got "
                f"{refused[0] if refused else 'none'}. Place one of these, or choose another model."
            )

    def _geometric(
        self, prompts: PixelPrompts, shape_yx: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Points (1, N, 2), labels (1, N) and box (1, 4) in pixels of the network input."""
        points = labels = box = None
        if len(prompts.labels):
            points = self._to_input(prompts.points_xy, shape_yx)[None]
            labels = torch.from_numpy(prompts.labels).to(self._device)[None]
        if prompts.box_xyxy is not None:
            box = self._to_input(prompts.box_xyxy.reshape(2, 2), shape_yx).reshape(1, 4)
        return points, labels, box

    def _to_input(self, points_xy: NDArray[np.float32], shape_yx: tuple[int, int]) -> Tensor:
        return torch.from_numpy(self._framing.to_input_xy(points_xy, shape_yx)).to(self._device)

    def _mask_input(
        self, prompts: PixelPrompts, previous: NDArray[np.float32] | None, shape_yx: tuple[int, int]
    ) -> Tensor | None:
        """The earlier logits or the mask prompt, (1, 1, 4h, 4w); None if not trained with masks."""
        if "mask" not in self.card.prompts:
            return None
        if previous is not None:
            return torch.from_numpy(previous).to(self._device)[None]
        if prompts.mask is not None:
            low_res_yx = self._prompt_encoder.mask_size
            return self._framing.mask_to_low_res(prompts.mask, low_res_yx).to(self._device)
        return None


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> SamSlicePredictor:
    """Build SAM of a card; see `SAMAdaptLib.models.build_predictor`."""
    file = read_checkpoint(checkpoint)
    network = load_sam(file.tensors, card.options.get("input_size", 1024))
    return SamSlicePredictor(network, card, file.sha256, device=device)
