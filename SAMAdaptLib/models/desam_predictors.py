"""DeSAM in use: every slice by itself, prompted by the whole picture or by a grid of points.

The network is in `desam`. Slices are shown as in the official preprocessing: grey values between percentiles
of the whole volume, 256 x 256 pixels, then SAM's way in. The official evaluation counts the middle 156 x 156
of these pixels alone; here the whole slice counts.

Of the grid's masks the official code keeps the first one that its generator gives. That is not the one with
the best score, but the best one that has neither small holes nor small islands. This is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.transform import resize
from torch import Tensor

from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.device import out_of_memory_as_error
from SAMAdaptLib.errors import CardError
from SAMAdaptLib.geometry import Axis
from SAMAdaptLib.models.requirements import require_grey
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptLib.weights import read_checkpoint

from .automatic import AutomaticSlices
from .desam import DeSam, load_desam
from .framing import LongestSide

MODES = ("grid", "box")
SLICE_SIZE = 256
GRID = 9
LOWEST_IOU = 0.5
LARGEST_BOX_OVERLAP = 0.7
SMALLEST_AREA = 1000
"""Holes and islands of fewer pixels are noise."""
_PERCENTILES = (0.5, 99.5)
_WITH_CORNERS = np.ones((3, 3), dtype=int)
_CLASS = 1


@dataclass(frozen=True, eq=False)
class Candidates:
    """Masks of one picture, each with what was known of it.

    Args:
        masks: (N, rows, columns) bool.
        logits: (N, rows, columns) of the masks before they were cleaned.
        scores: (N,), the network's own estimates of the overlap.
        points_xy: (N, 2), the prompts, in pixels of the picture.
    """

    masks: NDArray[np.bool_]
    logits: NDArray[np.float32]
    scores: NDArray[np.float32]
    points_xy: NDArray[np.float64]

    def __len__(self) -> int:
        """Count the masks."""
        return len(self.masks)

    def taken(self, which: NDArray[Any]) -> Candidates:
        """Return some of them, in this order."""
        return Candidates(*(values[which] for values in vars(self).values()))

    @property
    def boxes_xyxy(self) -> NDArray[np.float64]:
        """(N, 4) first and last column and row of each mask; zeros for an empty one."""
        return np.array([_box(mask) for mask in self.masks], dtype=np.float64).reshape(-1, 4)

    @property
    def stability(self) -> NDArray[np.float32]:
        """(N,) overlap of the masks at a strict and a lax threshold."""
        strict, lax = ((self.logits > limit).sum(axis=(1, 2)) for limit in (1, -1))
        return (strict / np.maximum(lax, 1)).astype(np.float32)


def grid_points(side: int, shape_yx: tuple[int, int]) -> NDArray[np.float64]:
    """Return the centres of side x side cells of a picture, (side * side, 2), x running fastest."""
    y, x = np.meshgrid(*[(np.arange(side) + 0.5) / side] * 2, indexing="ij")
    return np.column_stack([x.ravel() * shape_yx[1], y.ravel() * shape_yx[0]])


def select(
    given: Candidates,
    lowest_iou: float = LOWEST_IOU,
    largest_overlap: float = LARGEST_BOX_OVERLAP,
    smallest_area: int = SMALLEST_AREA,
) -> Candidates:
    """Choose among the masks of a grid as SAM's automatic generator does, in its order.

    Args:
        given: One candidate per point.
        lowest_iou: Candidates with no higher score go.
        largest_overlap: Of two whose boxes overlap (IoU) more, the one with the lower score goes.
        smallest_area: Holes and islands of fewer pixels go.

    Returns:
        The survivors: those that had neither holes nor islands first, by score; then those that were cleaned.
    """
    good = given.taken(given.scores > lowest_iou)
    kept = good.taken(_apart(good.boxes_xyxy, good.scores, largest_overlap))
    cleaned = [cleaned_mask(mask, smallest_area) for mask in kept.masks]
    unchanged = np.array([not changed for _, changed in cleaned], dtype=np.float32)
    masks = np.stack([mask for mask, _ in cleaned]) if cleaned else kept.masks
    kept = Candidates(masks, kept.logits, kept.scores, kept.points_xy)
    return kept.taken(_apart(kept.boxes_xyxy, unchanged, largest_overlap))


def cleaned_mask(mask: NDArray[np.bool_], smallest_area: int) -> tuple[NDArray[np.bool_], bool]:
    """Fill small holes, then remove small islands, of which the largest stays; neighbours share a corner.

    Returns:
        The mask, and whether anything was done to it.
    """
    filled, holes = _without_small(~mask, smallest_area, keep_largest=False)
    whole, islands = _without_small(~filled if holes else mask, smallest_area, keep_largest=True)
    return whole, holes or islands


def grey_values(voxels: NDArray[Any]) -> NDArray[np.uint8]:
    """Stretch a volume between its percentiles to 0..255, zeros staying zero, fractions cut off."""
    lower, upper = np.percentile(voxels, _PERCENTILES)
    cut = np.clip(voxels, lower, upper)
    span = cut.max() - cut.min()
    stretched = (cut - cut.min()) / (span if span > 0 else 1) * 255.0
    stretched[voxels == 0] = 0
    return stretched.astype(np.uint8)


def shown(grey: NDArray[np.uint8], size: int = SLICE_SIZE) -> NDArray[np.uint8]:
    """Resize a slice (rows, columns) to a picture (size, size, 3) with cubic splines and antialiasing."""
    resized = resize(grey, (size, size), order=3, preserve_range=True, mode="constant", anti_aliasing=True)
    return np.repeat(resized.astype(np.uint8)[:, :, None], 3, axis=2)


class DeSamVolumePredictor(AutomaticSlices):
    """A `VolumePredictor` that segments every slice by itself, with one class.

    The card's options may hold `mode` ("grid" or "box", as the network was trained), `slice_size`, `grid`,
    `lowest_iou`, `smallest_area` and `file_axes` (see `AutomaticSlices`).

    Args:
        network: Loaded.
        card: Names class and options.
        checkpoint_sha256: Of the file.
        device: Where to run.

    Raises:
        CardError: Another mode.
    """

    def __init__(self, network: DeSam, card: ModelCard, checkpoint_sha256: str, device: torch.device) -> None:
        """Move the network to the device and freeze it."""
        options = card.options
        super().__init__(card, checkpoint_sha256)
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
        self._mode = options.get("mode", MODES[0])
        if self._mode not in MODES:
            raise CardError(
                f"The mode of {card.name} should be {' or '.join(MODES)}, but is '{self._mode}'. Correct "
                "the card."
            )
        self._framing = LongestSide(network.image_encoder.shape.input_size)
        self._slice_size = options.get("slice_size", SLICE_SIZE)
        self._grid = options.get("grid", GRID)
        self._lowest_iou = options.get("lowest_iou", LOWEST_IOU)
        self._smallest_area = options.get("smallest_area", SMALLEST_AREA)
        self._stretched: tuple[Volume, Volume] | None = None

    def set_volume(self, volume: Volume, axis: Axis, window: IntensityWindow) -> None:
        """Take a volume and the axis across its slices; its percentiles overrule the window.

        Raises:
            VolumeError: A colour volume.
        """
        require_grey(self.card, volume)
        if self._stretched is None or self._stretched[0] is not volume:
            grey = Volume(grey_values(volume.voxels), volume.geometry, volume.modality, volume.name)
            self._stretched = volume, grey
        super().set_volume(self._stretched[1], axis, window)

    def segment(self, picture: NDArray[Any]) -> tuple[NDArray[np.uint8], float]:
        """Segment one slice (rows, columns) of the stretched volume: class numbers, and a score."""
        mask, confidence = self.segment_shown(shown(picture, self._slice_size))
        share = resize(mask.astype(np.float32), picture.shape, order=1, mode="edge", anti_aliasing=False)
        return np.where(share > 0.5, _CLASS, 0).astype(np.uint8), confidence

    @torch.inference_mode()
    def segment_shown(self, picture: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], float]:
        """Segment one picture (rows, columns, 3), the way the network was trained.

        Returns:
            The mask (rows, columns), empty if no candidate is good enough, and its score; the score head is
            not trained with the whole box, so its score is 1.
        """
        with out_of_memory_as_error("Segmenting a slice"):
            features = self._network.image_encoder(self._framing.to_input(picture).to(self._device))
            if self._mode == "box":
                return whole_box(self._network, self._framing, features, picture.shape[:2])[0] > 0, 1.0
            found = point_grid(self._network, self._framing, features, picture.shape[:2], self._grid)
        best = select(found, self._lowest_iou, smallest_area=self._smallest_area)
        if not len(best):
            return np.zeros(picture.shape[:2], dtype=bool), float(np.clip(found.scores.max(), 0, 1))
        return best.masks[0], float(np.clip(best.scores[0], 0, 1))


def whole_box(
    network: DeSam, framing: LongestSide, features: list[Tensor], shape_yx: tuple[int, ...]
) -> NDArray[np.float32]:
    """Decode with a box around the whole network input: logits (1, rows, columns) of the picture."""
    device = features[-1].device
    box = torch.tensor([[0.0, 0.0, framing.size, framing.size]], device=device)
    sparse, dense = network.prompt_encoder(boxes_xyxy=box)
    logits, _ = network.mask_decoder(features, network.prompt_encoder.dense_pe(), sparse, dense)
    return framing.to_picture(logits, (shape_yx[0], shape_yx[1]))[:, 0].float().cpu().numpy()


def point_grid(
    network: DeSam, framing: LongestSide, features: list[Tensor], shape_yx: tuple[int, ...], side: int
) -> Candidates:
    """Decode with each point of a grid alone, a row of the grid at a time."""
    rows, columns = shape_yx[0], shape_yx[1]
    points_xy = grid_points(side, (rows, columns))
    device = features[-1].device
    inputs = torch.from_numpy(framing.to_input_xy(points_xy.astype(np.float32), (rows, columns))).to(device)
    dense_pe = network.prompt_encoder.dense_pe()
    found, scored = [], []
    for some in inputs[:, None].split(side):
        labels = torch.ones(len(some), 1, dtype=torch.int64, device=device)
        sparse, dense = network.prompt_encoder(some, labels)
        logits, scores = network.mask_decoder(features, dense_pe, sparse, dense)
        found.append(framing.to_picture(logits, (rows, columns))[:, 0].float().cpu().numpy())
        scored.append(scores[:, 0].float().cpu().numpy())
    logits_nyx = np.concatenate(found)
    return Candidates(logits_nyx > 0, logits_nyx, np.concatenate(scored), points_xy)


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> DeSamVolumePredictor:
    """Build DeSAM of a card; see `SAMAdaptLib.models.build_predictor`.

    The card's options may hold `input_size` and those of the predictor.
    """
    file = read_checkpoint(checkpoint)
    network = load_desam(file.tensors, card.options.get("input_size", 1024))
    return DeSamVolumePredictor(network, card, file.sha256, device)


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _apart(
    boxes_xyxy: NDArray[np.float64], scores: NDArray[np.float32], largest_overlap: float
) -> NDArray[np.intp]:
    """Return, by falling score, the boxes that overlap none before them too much; equal scores keep order."""
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    for index in order:
        if all(_overlap(boxes_xyxy[index], boxes_xyxy[other]) <= largest_overlap for other in kept):
            kept.append(int(index))
    return np.array(kept, dtype=np.intp)


def _overlap(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """IoU of two boxes whose area is the product of their differences, as boxes between pixels have it."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    common = np.prod(np.maximum(high - low, 0))
    union = np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]) - common
    return float(common / union) if union > 0 else 0.0


def _without_small(
    mask: NDArray[np.bool_], smallest_area: int, keep_largest: bool
) -> tuple[NDArray[np.bool_], bool]:
    """Remove parts of fewer pixels; the largest stays, if so wanted, though it be small."""
    parts, count = ndimage.label(mask, structure=_WITH_CORNERS)
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    if not (areas < smallest_area).any():
        return mask, False
    stays = areas >= smallest_area
    if keep_largest and not stays.any():
        stays[areas.argmax()] = True
    return np.concatenate([[False], stays])[parts], True
