"""SAMed: SAM that segments eight abdominal organs by itself, with low-rank increments (LoRA) in its encoder.

Paper: Zhang and Liu, "Customized Segment Anything Model for Medical Image Segmentation", arXiv 2023
(https://arxiv.org/abs/2304.13785).
Official code: https://github.com/hitachinsk/SAMed, commit e351840, MIT; the weights are MIT too.

What differs from SAM:
- Queries and values of every block get increments y -> B A y; they are folded into SAM's weights at load.
- One mask per class and one for the background, from SAM's upscaling; there are no prompts.
- SAMed and SAMed_h (ViT-B and ViT-H) bring their own decoder. SAMed_s keeps SAM's decoder transformer, with
  increments of queries and values there too.
- A slice is brought to 224 x 224 and from there to 512 x 512, both with cubic splines. That costs detail, but
  the published weights were trained on what it gives.
- Labels, not probabilities, are resized back, by taking the nearest.

The official loader of ViT-B tells global blocks by the digits in a key's name. For the published sizes that
picks the blocks which do attend globally, and these are what is resized here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import zoom
from torch import Tensor, nn

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.device import out_of_memory_as_error
from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.geometry import Axis
from SAMAdaptLib.models.requirements import require_base, require_grey
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptLib.weights import copy_into, read_checkpoint, recognise

from .automatic import AutomaticSlices
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .sam import Sam, vit_shape_of
from .vit import ImageEncoderViT, ViTShape, blocks_of, with_positions_for

SLICE_SIZE = 224
"""Side of the first of the two pictures that a slice is resized to."""
_OWN_KEYS = ("prompt_encoder.", "mask_decoder.")
_TRANSFORMER = "mask_decoder.transformer."
_FILE_KEYS = ("self_attn", "sa"), ("cross_attn_token_to_image", "cti"), ("cross_attn_image_to_token", "cit")


class Samed(Sam):
    """SAM with a mask per class.

    Args:
        shape: Of the encoder; published at an input size of 512.
        classes: Classes without the background.
        keeps_transformer: Whether the decoder's transformer is SAM's, with increments (SAMed_s).
        prompt_encoder: For other sizes than the published ones.
        mask_decoder: For other sizes than the published ones; one mask per class and one for the background.
    """

    def __init__(
        self,
        shape: ViTShape,
        classes: int,
        keeps_transformer: bool = False,
        prompt_encoder: PromptEncoder | None = None,
        mask_decoder: MaskDecoder | None = None,
    ) -> None:
        grid, size = (shape.grid, shape.grid), (shape.input_size, shape.input_size)
        super().__init__(
            ImageEncoderViT(shape),
            prompt_encoder or PromptEncoder(shape.out_channels, grid, size),
            mask_decoder or MaskDecoder(shape.out_channels, classes + 1),
        )
        self.image_encoder: ImageEncoderViT
        self.keeps_transformer = keeps_transformer

    def forward(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Segment grey slices (B, H, W) in 0..1.

        Returns:
            Logits (B, classes + 1, H / 4, W / 4), the background first, and scores (B, classes + 1).
        """
        embedding = self.image_encoder(slices[:, None].expand(-1, 3, -1, -1))
        sparse, dense = self.prompt_encoder()
        logits, scores = self.mask_decoder(embedding, self.prompt_encoder.dense_pe(), sparse, dense)
        return logits, scores

    def enlarged(self, logits: Tensor) -> Tensor:
        """Bring logits (B, M, h, w) to the size of the network input, bilinearly."""
        size = self.image_encoder.input_size
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)


@dataclass(frozen=True, eq=False)
class LowRankPlace:
    """A weight that gets an increment B A.

    Args:
        down: Key of A in the file.
        up: Key of B.
        weight: (out, in), a view of the network's own.
    """

    down: str
    up: str
    weight: Tensor

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """Make room for A (rank, in) and B (out, rank)."""
        rows, columns = self.weight.shape
        return {self.down: self.weight.new_zeros(rank, columns), self.up: self.weight.new_zeros(rows, rank)}

    def fold(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the increment."""
        self.weight.add_(tensors[self.up].double() @ tensors[self.down].double())


def low_rank_places(network: Samed) -> Iterator[LowRankPlace]:
    """Name the weights that get increments, and the keys of these in the file."""
    for index, block in enumerate(blocks_of(network.image_encoder)):
        weight = block.attn.qkv.weight.detach()
        width = weight.shape[1]
        yield _numbered("w", 2 * index, weight[:width])
        yield _numbered("w", 2 * index + 1, weight[2 * width :])
    if network.keeps_transformer:
        yield from _decoder_places(network.mask_decoder.transformer)


def published_tensors(network: Samed, rank: int) -> dict[str, Tensor]:
    """Name what a SAMed file holds, officially: room for increments, and the network's own tensors."""
    named: dict[str, Tensor] = {}
    for place in low_rank_places(network):
        named |= place.tensors(rank)
    from_sam = base_tensors(network)
    return named | {key: tensor for key, tensor in network.state_dict().items() if key not in from_sam}


def base_tensors(network: Samed) -> dict[str, Tensor]:
    """Return what the network takes from SAM, by its official names."""
    kept = _TRANSFORMER if network.keeps_transformer else ()
    return {
        key: tensor
        for key, tensor in network.state_dict().items()
        if not key.startswith(_OWN_KEYS) or key.startswith(kept)
    }


def load_into_samed(network: Samed, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> Samed:
    """Load a published pair of files; positions of the base are resized to the network's input.

    Args:
        network: Changed in place.
        base: SAM's checkpoint.
        adapter: SAMed's file.

    Raises:
        WeightsError: A file is of another network or another size.
    """
    named = "SAMed_s" if network.keeps_transformer else "SAMed"
    targets = published_tensors(network, _required(adapter, "w_a_000").shape[0])
    copy_into(targets, adapter, named)
    resized = with_positions_for(base, network.image_encoder.shape, "image_encoder.")
    needed = base_tensors(network)
    not_needed = [key for key in resized if key.startswith(_OWN_KEYS) and key not in needed]
    copy_into(needed, resized, f"SAM (the base of {named})", ignore=not_needed)
    for place in low_rank_places(network):
        place.fold(targets)
    return network.eval()


def load_samed(
    base: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    input_size: int = 512,
    keeps_transformer: bool = False,
) -> Samed:
    """Build SAMed for a published pair of files and load them; classes and rank are read off the files.

    Raises:
        WeightsError: A file is of another network.
    """
    classes = _required(adapter, "mask_decoder.mask_tokens.weight").shape[0] - 1
    network = Samed(vit_shape_of(base, input_size), classes, keeps_transformer)
    return load_into_samed(network, base, adapter)


class SamedVolumePredictor(AutomaticSlices):
    """A `VolumePredictor` that segments every slice by itself.

    The card's options may hold `window` (what the network was trained with, in place of the session's),
    `slice_size` (see `SLICE_SIZE`) and `file_axes` (see `AutomaticSlices`).

    Args:
        network: Loaded.
        card: Names classes and options.
        checkpoint_sha256: Of SAMed's own file.
        device: Where to run.
    """

    def __init__(self, network: Samed, card: ModelCard, checkpoint_sha256: str, device: torch.device) -> None:
        """Move the network to the device and freeze it."""
        super().__init__(card, checkpoint_sha256)
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
        self._slice_size = card.options.get("slice_size", SLICE_SIZE)
        trained = card.options.get("window")
        self._trained = IntensityWindow(*trained) if trained else None
        self._window = self._trained or IntensityWindow(0, 1)

    def set_volume(self, volume: Volume, axis: Axis, window: IntensityWindow) -> None:
        """Take a volume, the axis across its slices and the window, which the card may overrule.

        Raises:
            VolumeError: A colour volume.
        """
        require_grey(self.card, volume)
        super().set_volume(volume, axis, window)
        self._window = self._trained or window

    @torch.inference_mode()
    def segment(self, picture: NDArray[Any]) -> tuple[NDArray[np.uint8], float]:
        """Segment one picture.

        Args:
            picture: (rows, columns), the volume's own values, the way the network was trained.

        Returns:
            Class numbers (rows, columns), and the mean probability of the object's pixels, which stands for
            the overlap with the truth.

        Raises:
            DeviceError: Not enough memory.
        """
        lower, upper = self._window.lower, self._window.upper
        seen = (np.clip(picture.astype(np.float32), lower, upper) - lower) / (upper - lower)
        seen = _resized(seen, (self._slice_size, self._slice_size), order=3)
        seen = _resized(seen, self._network.image_encoder.input_size, order=3)
        with out_of_memory_as_error("Segmenting a slice"):
            logits, _ = self._network(torch.from_numpy(seen).to(self._device)[None])
            share, classes = self._network.enlarged(logits)[0].float().softmax(dim=0).max(dim=0)
        labels = classes.to(torch.uint8).cpu().numpy()
        inside = share[classes > 0] if bool((classes > 0).any()) else share
        return _resized(labels, picture.shape, order=0), float(inside.mean())


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> SamedVolumePredictor:
    """Build SAMed of a card; see `SAMAdaptLib.models.build_predictor`.

    The card's options may hold `input_size`, `keeps_transformer` (SAMed_s), and those of the predictor.
    """
    base_file = require_base(card, base)
    adapter = read_checkpoint(checkpoint)
    network = load_samed(
        read_checkpoint(base_file).tensors,
        adapter.tensors,
        card.options.get("input_size", 512),
        card.options.get("keeps_transformer", False),
    )
    return SamedVolumePredictor(network, card, adapter.sha256, device)


def _decoder_places(transformer: nn.Module) -> Iterator[LowRankPlace]:
    """Places of SAMed_s in SAM's decoder: queries and values of every attention."""
    layers = transformer.get_submodule("layers")
    for index, layer in enumerate(layers.children()):
        for attention, letters in _FILE_KEYS:
            query, value = (
                layer.get_parameter(f"{attention}.{name}_proj.weight").detach() for name in ("q", "v")
            )
            yield _numbered(letters, 2 * index, query)
            yield _numbered(letters, 2 * index + 1, value)
    for name in ("q", "v"):
        weight = transformer.get_parameter(f"final_attn_token_to_image.{name}_proj.weight").detach()
        yield LowRankPlace(f"fati_{name}a", f"fati_{name}b", weight)


def _numbered(letters: str, number: int, weight: Tensor) -> LowRankPlace:
    return LowRankPlace(f"{letters}_a_{number:03}", f"{letters}_b_{number:03}", weight)


def _required(adapter: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in adapter:
        raise WeightsError(
            f"A SAMed file was wanted, but the file lacks {name}; it looks like {recognise(adapter)}. Choose "
            "the file that belongs to the model."
        )
    return adapter[name]


def _resized(picture: NDArray[Any], shape_yx: tuple[int, ...], order: int) -> NDArray[Any]:
    """Resize (rows, columns) with splines, corner pixel to corner pixel."""
    if picture.shape == shape_yx:
        return picture
    factors = [wanted / given for wanted, given in zip(shape_yx, picture.shape, strict=True)]
    return np.asarray(zoom(picture, factors, order=order))
