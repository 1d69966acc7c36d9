"""MA-SAM: SAM that sees five neighbouring slices.

Two things are added to SAM's encoder: increments of queries and values, factorised as a tensor train that all
blocks share (FacT), and in every block two adapters that mix neighbouring slices. The decoder enlarges
sixteen times and has one mask per class.

Paper: Chen et al., "MA-SAM: Modality-agnostic SAM adaptation for 3D medical image segmentation", Medical
Image Analysis 2024 (https://arxiv.org/abs/2309.08842).

The authors also trained it on colour frames of surgical scenes, with time in place of depth, but published
neither these weights nor code that reads frames. Here colours are taken as they are and stretched over the
stack together, as grey slices are; weights of another rule need that rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.device import out_of_memory_as_error
from SAMAdaptLib.errors import PromptError, VolumeError, WeightsError
from SAMAdaptLib.geometry import Axis
from SAMAdaptLib.prompts import Prompts
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptLib.weights import copy_into, read_checkpoint, recognise

from .mask_decoder import MaskDecoder
from .predictor import SliceMask
from .prompt_encoder import PromptEncoder
from .requirements import require_base
from .sam import Sam, vit_shape_of
from .slice_stacks import FileAxes, Floats, SliceStacks
from .vit import Block, ImageEncoderViT, ViTShape, add_to_qkv, blocks_of, with_positions_for

SLICES = 5
"""Neighbouring slices that the published networks see."""
UPSCALE_DIVISORS = (4, 8, 16, 32)
_PLACES = {"before_attention": "", "after_attention": "_2"}
_SAM_KEYS = ("prompt_encoder.", "mask_decoder.")


class DepthAdapter(nn.Module):
    """Mix each position with the same position of the slices above and below, in few channels.

    Args:
        embed_dim: Channels C of the tokens.
        channels: Channels between the two projections.
        slices: Slices d of a stack; outside of it there are zeros.
    """

    def __init__(self, embed_dim: int, channels: int, slices: int) -> None:
        super().__init__()
        self.slices = slices
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.linear_down = nn.Linear(embed_dim, channels, bias=False)
        self.conv = nn.Conv3d(channels, channels, kernel_size=(3, 1, 1), padding=(1, 0, 0))
        self.linear_up = nn.Linear(channels, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map stacks of tokens (B * d, H, W, C) to the same shape, residual included."""
        y = self.linear_down(self.norm(x)).unflatten(0, (-1, self.slices))  # B, d, H, W, c
        y = F.gelu(self._across_slices(y)).flatten(0, 1)
        mixed: Tensor = x + self.linear_up(y)
        return mixed

    def _across_slices(self, y: Tensor) -> Tensor:
        """Convolve along d; one product per tap is much faster than a 3-D convolution of this kernel."""
        above, here, below = self.conv.weight[..., 0, 0].unbind(-1)
        mixed = F.linear(y, here, self.conv.bias)
        mixed[:, 1:] += F.linear(y[:, :-1], above)
        mixed[:, :-1] += F.linear(y[:, 1:], below)
        return mixed


class FacT(nn.Module):
    """Increments of queries and values, y -> scale * V Q_i U y, with U and V common to all blocks.

    Paper: Jie and Deng, "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", AAAI 2023.

    Args:
        embed_dim: Channels C.
        rank: Width r of the train.
        depth: Number of blocks.
    """

    def __init__(self, embed_dim: int, rank: int, depth: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(rank, embed_dim))
        self.v = nn.Parameter(torch.zeros(embed_dim, rank))
        self.queries = nn.ParameterList(torch.zeros(rank, rank) for _ in range(depth))
        self.values = nn.ParameterList(torch.zeros(rank, rank) for _ in range(depth))

    def fold_into(self, encoder: ImageEncoderViT, scale: float) -> None:
        """Add the increments to the encoder's own weights; it runs as fast as SAM then."""
        u, v = self.u.double(), self.v.double()
        for block, query, value in zip(blocks_of(encoder), self.queries, self.values, strict=True):
            add_to_qkv(block.attn, scale * (v @ query.double() @ u), scale * (v @ value.double() @ u))


class MaSam(Sam):
    """SAM whose encoder holds depth adapters.

    Args:
        shape: Of the encoder; published at an input size of 512.
        classes: Classes without the background.
        adapter_channels: Channels inside the adapters.
        slices: Slices of a stack.
        prompt_encoder: For other sizes than the published ones.
        mask_decoder: For other sizes than the published ones; one mask per class and one for the background.
    """

    def __init__(
        self,
        shape: ViTShape,
        classes: int,
        adapter_channels: int = 384,
        slices: int = SLICES,
        prompt_encoder: PromptEncoder | None = None,
        mask_decoder: MaskDecoder | None = None,
    ) -> None:
        encoder = ImageEncoderViT(shape)
        for block in encoder.blocks:
            for place in _PLACES:
                setattr(block, place, DepthAdapter(shape.embed_dim, adapter_channels, slices))
        grid, size = (shape.grid, shape.grid), (shape.input_size, shape.input_size)
        channels = shape.out_channels
        super().__init__(
            encoder,
            prompt_encoder or PromptEncoder(channels, grid, size),
            mask_decoder or MaskDecoder(channels, classes + 1, upscale_divisors=UPSCALE_DIVISORS),
        )
        self.image_encoder: ImageEncoderViT
        self.slices = slices

    def forward(self, stacks: Tensor, boxes_xyxy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Segment every slice of stacks of slices.

        Args:
            stacks: (B, d, H, W) grey or (B, d, 3, H, W) colour, in 0..1.
            boxes_xyxy: (B, d, 4) in pixels of the slices, for networks trained with boxes.

        Returns:
            Logits (B * d, classes + 1, H, W), the background first, and scores (B * d, classes + 1).
        """
        slices = stacks.flatten(0, 1)
        pictures = slices if slices.ndim == 4 else slices[:, None].expand(-1, 3, -1, -1)
        embedding = self.image_encoder(pictures)
        boxes = None if boxes_xyxy is None else boxes_xyxy.reshape(-1, 4)
        sparse, dense = self.prompt_encoder(boxes_xyxy=boxes)
        logits, scores = self.mask_decoder(embedding, self.prompt_encoder.dense_pe(), sparse, dense)
        return logits, scores


def published_tensors(network: MaSam, fact: FacT) -> dict[str, Tensor]:
    """Return what a MA-SAM file holds, by its official names, as the network's own tensors."""
    named: dict[str, Tensor] = {}
    for letter, cores in (("q", fact.queries), ("v", fact.values)):
        named |= {f"{letter}_FacTs_{index:03}": core.data for index, core in enumerate(cores)}
    named |= {"image_encoder.FacTu.weight": fact.u.data, "image_encoder.FacTv.weight": fact.v.data}
    for index, block in enumerate(blocks_of(network.image_encoder)):
        prefix = f"image_encoder.ImageEncoderViT.blocks.{index}.Block.adapter_"
        named |= {prefix + name: tensor for name, tensor in _adapter_tensors(block)}
    named |= {key: tensor for key, tensor in network.state_dict().items() if key.startswith(_SAM_KEYS)}
    return named


def base_tensors(network: MaSam) -> dict[str, Tensor]:
    """Return what the network takes from SAM: the encoder without adapters, by its official names."""
    return {
        key: tensor
        for key, tensor in network.state_dict().items()
        if not key.startswith(_SAM_KEYS) and not any(f".{place}." in key for place in _PLACES)
    }


def load_into_ma_sam(
    network: MaSam, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float = 1.0
) -> MaSam:
    """Load a published pair of files; positions of the base are resized to the network's input.

    Args:
        network: Changed in place.
        base: SAM's checkpoint.
        adapter: MA-SAM's file.
        scale: Of the increments; it is not in the file, and 1 in all published ones.

    Raises:
        WeightsError: A file is of another network or another size.
    """
    encoder = network.image_encoder
    resized = with_positions_for(base, encoder.shape, "image_encoder.")
    not_needed = [key for key in resized if key.startswith(_SAM_KEYS)]
    copy_into(base_tensors(network), resized, "SAM (the base of MA-SAM)", ignore=not_needed)
    rank = _required(adapter, "image_encoder.FacTu.weight").shape[0]
    fact = FacT(encoder.shape.embed_dim, rank, encoder.shape.depth)
    copy_into(published_tensors(network, fact), adapter, "MA-SAM")
    fact.fold_into(encoder, scale)
    return network.eval()


def load_ma_sam(
    base: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    input_size: int = 512,
    slices: int = SLICES,
    scale: float = 1.0,
) -> MaSam:
    """Build MA-SAM for a published pair of files and load them; classes and widths are read off the files.

    Raises:
        WeightsError: A file is of another network.
    """
    shape = vit_shape_of(base, input_size)
    classes = _required(adapter, "mask_decoder.mask_tokens.weight").shape[0] - 1
    first_adapter = "image_encoder.ImageEncoderViT.blocks.0.Block.adapter_linear_down.weight"
    network = MaSam(shape, classes, _required(adapter, first_adapter).shape[0], slices)
    return load_into_ma_sam(network, base, adapter, scale)


def _adapter_tensors(block: Block) -> Iterator[tuple[str, Tensor]]:
    """Name an adapter's tensors as the file does: after_attention.conv.bias is called conv_2.bias."""
    for place, suffix in _PLACES.items():
        for name, tensor in getattr(block, place).state_dict().items():
            layer, kind = name.split(".")
            yield f"{layer}{suffix}.{kind}", tensor


def _required(adapter: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in adapter:
        raise WeightsError(
            f"A MA-SAM file was wanted, but the file lacks {name}; it looks like {recognise(adapter)}. "
            "Choose the file that belongs to the model."
        )
    return adapter[name]


class MaSamVolumePredictor:
    """A `VolumePredictor`: the official pipeline of overlapping stacks, automatic or from boxes.

    The card's options may hold `window` (what the network was trained with, in place of the session's),
    `file_axes` (see `FileAxes`), and `colour` (true for a network that was trained on colour frames).

    Args:
        network: Loaded.
        card: One that takes no prompts segments every class by itself; else boxes are wanted.
        checkpoint_sha256: Of MA-SAM's own file.
        device: Where to run.
    """

    def __init__(self, network: MaSam, card: ModelCard, checkpoint_sha256: str, device: torch.device) -> None:
        """Move the network to the device and freeze it."""
        self.card = card
        self.checkpoint_sha256 = checkpoint_sha256
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
        self._file_axes = FileAxes(card.options.get("file_axes", "RAS"))
        self._stacks: SliceStacks | None = None

    def set_volume(self, volume: Volume, axis: Axis, window: IntensityWindow) -> None:
        """Take a volume, the axis across its slices and the window, which the card may overrule.

        Raises:
            VolumeError: A colour volume, unless the card says that the network takes it.
        """
        trained = self.card.options.get("window")
        self._stacks = SliceStacks(
            volume,
            axis,
            IntensityWindow(*trained) if trained else window,
            self._network.image_encoder.input_size[0],
            self._network.slices,
            self._file_axes,
            self.card.takes_colour,
        )

    def predict(self, prompts: Prompts, slices: range | None = None) -> Iterator[SliceMask]:
        """Segment slice by slice, each when the last stack that holds it is done.

        Args:
            prompts: Boxes for a network trained with them, else nothing.
            slices: Which, as far as the boxes reach; None for those that hold a box, without boxes for all.

        Raises:
            PromptError: Prompts that the network was not trained for.
            VolumeError: No volume was set.
            DeviceError: Not enough memory.
        """
        stacks = self.stacks
        boxes = self._boxes(prompts, stacks)
        reach = _reach(boxes, prompts, stacks) if boxes else range(len(stacks))
        if slices is not None:
            wanted = [range(max(slices.start, reach.start), min(slices.stop, reach.stop))]
        else:
            wanted = [range(index, index + 1) for index in sorted(boxes)] or [reach]

        def probabilities(centre: int) -> Floats:
            return self.probabilities(centre, _nearest(boxes, centre) if boxes else None)

        for part in wanted:
            for index, mean, _ in stacks.ensemble(part, probabilities):
                yield _as_mask(index, stacks.to_picture(mean, index))

    @property
    def stacks(self) -> SliceStacks:
        """The volume as the network sees it.

        Raises:
            VolumeError: No volume was set.
        """
        if self._stacks is None:
            raise VolumeError("A volume must be set before it is segmented, but none is. Load one first.")
        return self._stacks

    def _boxes(self, prompts: Prompts, stacks: SliceStacks) -> dict[int, Floats]:
        """Boxes in pixels of the network input, by slice; empty for an automatic network."""
        refused = sorted(prompts.kinds() - set(self.card.prompts))
        if refused or (self.card.prompts and not len(prompts)):
            raise PromptError(
                f"{self.card.title} takes {' and '.join(self.card.prompts) or 'no prompts'}, but got "
                f"{' and '.join(refused) or 'nothing'}. Correct the prompts, or choose another model."
            )
        on_slices = prompts.on_slices(stacks.volume.geometry, stacks.axis)
        boxes = {index: pixels.box_xyxy for index, pixels in on_slices.items()}
        return {index: stacks.box_to_input(box, index) for index, box in boxes.items() if box is not None}

    @torch.inference_mode()
    def probabilities(self, centre: int, box_xyxy: Floats | None = None) -> Floats:
        """Segment the stack around one slice.

        Args:
            centre: The slice.
            box_xyxy: (4,) in pixels of the network input; it serves all slices of the stack.

        Returns:
            (d, classes + 1, size, size), the background first.
        """
        stack = torch.from_numpy(self.stacks.stack(centre)).to(self._device)[None]
        boxes = None
        if box_xyxy is not None:
            boxes = torch.from_numpy(box_xyxy).to(self._device).expand(1, self._network.slices, 4)
        with out_of_memory_as_error("Segmenting a stack of slices"):
            logits, _ = self._network(stack, boxes)
            return logits.softmax(dim=1).float().cpu().numpy()


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> MaSamVolumePredictor:
    """Build MA-SAM of a card; see `SAMAdaptLib.models.build_predictor`."""
    base_file = require_base(card, base)
    adapter = read_checkpoint(checkpoint)
    network = load_ma_sam(
        read_checkpoint(base_file).tensors,
        adapter.tensors,
        card.options.get("input_size", 512),
        card.options.get("stack", SLICES),
        card.options.get("scale", 1.0),
    )
    return MaSamVolumePredictor(network, card, adapter.sha256, device)


def _nearest(boxes: Mapping[int, Floats], index: int) -> Floats:
    return boxes[min(boxes, key=lambda boxed: abs(boxed - index))]


def _reach(boxes: Mapping[int, Floats], prompts: Prompts, stacks: SliceStacks) -> range:
    """Slices that boxes speak for: those inside a 3-D box, else up to half a stack beyond those drawn on."""
    span = prompts.span(stacks.volume.geometry, stacks.axis)
    half = stacks.depth // 2
    return span or range(max(0, min(boxes) - half), min(len(stacks), max(boxes) + half + 1))


def _as_mask(index: int, probabilities: Floats) -> SliceMask:
    """Take the likeliest class of each pixel; its mean probability over the object stands for the overlap."""
    labels = probabilities.argmax(axis=0).astype(np.uint8)
    object_pixels = labels > 0
    share = probabilities.max(axis=0)[object_pixels if object_pixels.any() else ...]
    return SliceMask(index, labels, float(np.clip(share.mean(), 0.0, 1.0)))
