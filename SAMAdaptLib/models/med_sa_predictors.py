"""Medical SAM Adapter in use: a click on a picture, or a click in a chunk of slices.

The network is in `med_sa`. The official code changed twice what the network is shown, without a trace in the
files: cards of models that were trained before 2025-04-13 say `older_inputs`.

In three dimensions the official code cuts a region of 96 x 96 x `chunk` voxels of 1.5 x 1.5 x 2 mm out of the
volume; here it is cut around the click, so that objects up to 14 cm across fit in. What it does with it is
kept, as trained weights depend on it: rows run to the patient's right and columns to anterior; CT from -175
to 250 HU becomes 0..1, which is then standardised as if it were 0..255; and the click is given as row and
column of the region where x and y of the network input are meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import map_coordinates
from torch import Tensor

from SAMAdaptLib.cards import ModelCard, cards_that_take
from SAMAdaptLib.device import out_of_memory_as_error
from SAMAdaptLib.errors import PromptError, VolumeError
from SAMAdaptLib.geometry import AXES, Axis
from SAMAdaptLib.postprocess import innermost_xy
from SAMAdaptLib.prompts import PixelPrompts, Prompts
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptLib.weights import read_checkpoint

from .framing import PIXEL_MEAN, PIXEL_STD, as_colours
from .mask_decoder import SINGLE_MASK
from .med_sa import Depth, MedSa, load_med_sa
from .medsam import Stretched
from .predictor import SliceMask
from .requirements import require_grey
from .sam import SamSlicePredictor

OUT_SIZE = 256
"""Side of the masks that the official code thresholds."""
CHUNK = 96
"""Slices of a chunk, as the official training takes them."""
_OUTSIDE = -10.0
"""Logit of voxels that the region does not reach."""


class Squeezed(Stretched):
    """Med-SA's way: the picture fills the square whatever its shape.

    Args:
        size: Side of the network input.
        out_size: Side of the masks that the official code thresholds.
        older: As until 2025-04-12: colours in 0..1 and not standardised, clicks as row and column, masks
            enlarged by taking the nearest.
        mean: Of red, green and blue in 0..255.
        std: Of red, green and blue.
    """

    def __init__(
        self,
        size: int,
        out_size: int = OUT_SIZE,
        older: bool = False,
        mean: Sequence[float] = PIXEL_MEAN,
        std: Sequence[float] = PIXEL_STD,
    ) -> None:
        """Remember the numbers."""
        super().__init__(size)
        self._out_size = (out_size, out_size)
        self._older = older
        self._mean = torch.tensor(mean, device="cpu")[:, None, None]
        self._std = torch.tensor(std, device="cpu")[:, None, None]

    def to_input(self, picture: NDArray[np.uint8]) -> Tensor:
        """Map (rows, columns[, 3]) in 0..255 to the network input (1, 3, size, size)."""
        colours = as_colours(self.resize(picture).astype(np.float32))
        return colours / 255 if self._older else self.standardised(colours)

    def resize(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize bilinearly with antialiasing to (size, size[, 3])."""
        image = Image.fromarray(np.ascontiguousarray(picture))
        return np.array(image.resize((self.size, self.size), Image.Resampling.BILINEAR))

    def standardised(self, colours: Tensor) -> Tensor:
        """Standardise (B, 3, H, W) as the network does itself."""
        return (colours - self._mean.to(colours.device)) / self._std.to(colours.device)

    def to_input_xy(self, points_xy: NDArray[np.float32], shape_yx: tuple[int, int]) -> NDArray[np.float32]:
        """Map (N, 2) pixels of a picture to what the network takes for pixels of its input."""
        scaled = super().to_input_xy(points_xy, shape_yx)
        return np.ascontiguousarray(scaled[:, ::-1]) if self._older else scaled

    def to_picture(self, low_res: Tensor, shape_yx: tuple[int, int]) -> Tensor:
        """Bring logits (B, M, h, w) to the official size, then to the picture, bilinearly."""
        official = self.to_official_size(low_res)
        return F.interpolate(official, shape_yx, mode="bilinear", align_corners=False)

    def to_official_size(self, low_res: Tensor) -> Tensor:
        """Bring logits (B, M, h, w) to the size that the official code thresholds at."""
        if self._older:
            return F.interpolate(low_res, self._out_size, mode="nearest")
        return F.interpolate(low_res, self._out_size, mode="bilinear", align_corners=False)


class MedSaSlicePredictor(SamSlicePredictor):
    """SAM's predictor; the first mask counts, whatever the prompt."""

    def _candidates(self, prompts: PixelPrompts, mask: Tensor | None) -> slice:
        return SINGLE_MASK


@dataclass(frozen=True)
class Region:
    """The voxels that a network of chunks sees.

    Args:
        chunk: Slices.
        side: Rows and columns.
        spacing_mm: Distances of rows, columns and slices.
    """

    chunk: int
    side: int = 96
    spacing_mm: tuple[float, float, float] = (1.5, 1.5, 2.0)

    @property
    def centre(self) -> tuple[int, int, int]:
        """Slice, row and column where the click lies."""
        return self.chunk // 2, self.side // 2, self.side // 2


@dataclass(frozen=True, eq=False)
class PlacedRegion:
    """A region in a volume, its centre on a point of a slice's picture."""

    region: Region
    volume: Volume
    axis: Axis
    slice_k: int
    centre_xy: NDArray[np.float64]

    @property
    def _steps(self) -> NDArray[np.float64]:
        """Slices, rows and columns of the volume's pictures per slice, row and column of the region.

        The last two are per step to anterior and to the right, so negative; the axes change places.
        """
        row_mm, column_mm, slice_mm = self.region.spacing_mm
        geometry = self.volume.geometry
        number = AXES.index(self.axis)
        direction = geometry.directions[:, number]
        ascending = 1 if direction[np.argmax(np.abs(direction))] > 0 else -1
        x_mm, y_mm = geometry.plane(self.axis, self.slice_k).spacing_xy_mm
        return np.array(
            [ascending * slice_mm / geometry.spacing_mm[number], -column_mm / y_mm, -row_mm / x_mm]
        )

    @property
    def slices(self) -> range:
        """Slices of the volume that lie within the region."""
        step, count = self._steps[0], self.region.chunk
        ends = sorted(
            (self.slice_k - self.region.centre[0] * step, self.slice_k + (count - 1 - count // 2) * step)
        )
        total = self.volume.geometry.shape_ijk[AXES.index(self.axis)]
        return range(max(0, int(np.ceil(ends[0]))), min(total, int(np.floor(ends[1])) + 1))

    def values(self, window: IntensityWindow) -> NDArray[np.float32]:
        """Return the voxels (chunk, rows, columns), the window as 0..1; 0 outside the volume."""
        count, side = self.region.chunk, self.region.side
        z, i, j = np.meshgrid(np.arange(count), np.arange(side), np.arange(side), indexing="ij")
        z0, i0, j0 = self.region.centre
        slice_step, y_step, x_step = self._steps
        slices = self.slice_k + (z - z0) * slice_step
        y = self.centre_xy[1] + (j - j0) * y_step
        x = self.centre_xy[0] + (i - i0) * x_step
        total = self.volume.geometry.shape_ijk[AXES.index(self.axis)]
        first, stop = max(0, int(slices.min())), min(total, int(np.ceil(slices.max())) + 1)
        pictures = np.stack([self._picture(k) for k in range(first, stop)]).astype(np.float64)
        cut = np.clip((pictures - window.lower) / (window.upper - window.lower), 0, 1)
        return map_coordinates(cut, [slices - first, y, x], order=1, mode="constant").astype(np.float32)

    def to_picture(self, logits: NDArray[np.float32], index: int) -> NDArray[np.float32]:
        """Bring logits (chunk, rows, columns) of the region to the picture of a slice of the volume."""
        rows, columns = self.volume.geometry.plane(self.axis, index).shape_yx
        z0, i0, j0 = self.region.centre
        slice_step, y_step, x_step = self._steps
        y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        z = np.full(y.shape, z0 + (index - self.slice_k) / slice_step)
        where = [z, i0 + (x - self.centre_xy[0]) / x_step, j0 + (y - self.centre_xy[1]) / y_step]
        found = map_coordinates(logits, where, order=1, mode="constant", cval=_OUTSIDE)
        return np.asarray(found, dtype=np.float32)

    def to_region_ij(self, points_xy: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map picture points (N, 2) to row and column of the region."""
        _, i0, j0 = self.region.centre
        _, y_step, x_step = self._steps
        offset = np.asarray(points_xy, dtype=np.float64) - self.centre_xy
        return np.column_stack([i0 + offset[:, 0] / x_step, j0 + offset[:, 1] / y_step]).astype(np.float32)

    def slice_of(self, index: int) -> int:
        """Slice of the region that is nearest to one of the volume."""
        return round(self.region.centre[0] + (index - self.slice_k) / self._steps[0])

    def _picture(self, index: int) -> NDArray[np.float64]:
        return self.volume.geometry.plane(self.axis, index).extract(self.volume.voxels)


class MedSaVolumePredictor:
    """A `VolumePredictor` that segments what was clicked in chunks of slices, from chunk to chunk.

    The next chunk is clicked at the innermost point of the last mask; it ends where a mask is empty. The
    card's options may hold `window` (in place of the session's), `side` and `spacing_mm` (see `Region`), and
    `older_inputs`: values in 0..1 as they are, the clicks of all slices given to each.

    Args:
        network: Loaded, with a `Depth` that states its chunk.
        card: Names the options.
        checkpoint_sha256: Of the file.
        device: Where to run.
    """

    def __init__(self, network: MedSa, card: ModelCard, checkpoint_sha256: str, device: torch.device) -> None:
        """Move the network to the device and freeze it."""
        self.card = card
        self.checkpoint_sha256 = checkpoint_sha256
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
        options = card.options
        chunk = network.depth.chunk if network.depth is not None else None
        self._region = Region(
            chunk or 1, options.get("side", 96), tuple(options.get("spacing_mm", (1.5, 1.5, 2.0)))
        )
        self._older = bool(options.get("older_inputs", False))
        self._framing = Squeezed(network.image_encoder.shape.input_size, self._region.side, older=self._older)
        self._opened: tuple[Volume, Axis, IntensityWindow] | None = None

    def set_volume(self, volume: Volume, axis: Axis, window: IntensityWindow) -> None:
        """Take a volume, the axis across its slices and the window, which the card may overrule.

        Raises:
            VolumeError: A colour volume.
        """
        require_grey(self.card, volume)
        trained = self.card.options.get("window")
        self._opened = volume, axis, IntensityWindow(*trained) if trained else window

    def predict(self, prompts: Prompts, slices: range | None = None) -> Iterator[SliceMask]:
        """Segment the clicked slices, then, if `slices` is given, what goes on from them over it.

        Raises:
            PromptError: No click, or another prompt.
            VolumeError: No volume was set.
            DeviceError: Not enough memory.
        """
        if self._opened is None:
            raise VolumeError(
                "A volume must be set before prompts are segmented, but none is. Load one first."
            )
        self._check(prompts)
        volume, axis, _ = self._opened
        clicks = prompts.on_slices(volume.geometry, axis)
        for index, wanted in territories(sorted(clicks), slices).items():
            yield from self._object(index, clicks[index], wanted)

    def _check(self, prompts: Prompts) -> None:
        if not len(prompts):
            raise PromptError(f"{self.card.title} needs a click, but none was placed. Click on the object.")
        for kind in sorted(prompts.kinds() - set(self.card.prompts)):
            others = ", ".join(cards_that_take(kind)) or "none of the list"
            raise PromptError(
                f"{self.card.title} takes {' and '.join(self.card.prompts)} prompts, but a {kind} was "
                f"placed. Remove it, or choose a model that takes it: {others}."
            )

    def _object(self, index: int, clicks: PixelPrompts, wanted: range) -> Iterator[SliceMask]:
        """Segment around a click, the clicked slice first, then from chunk to chunk upwards and downwards."""
        around = self._chunk(index, clicks)
        yield around[index]
        for way in (1, -1):
            masks, at = around, index
            while at + way in wanted and masks[at].labels.any():
                if at + way not in masks:
                    masks = self._next(masks[at], way)
                at += way
                if masks[at].labels.any():
                    yield masks[at]

    def _next(self, last: SliceMask, way: int) -> dict[int, SliceMask]:
        """Segment the chunk that holds the slice after the last one."""
        click = PixelPrompts.of([innermost_xy(last.labels)], [1])
        reaches = last.index + way in self._placed(last.index, click).slices
        return self._chunk(last.index if reaches else last.index + way, click)

    def _placed(self, index: int, clicks: PixelPrompts) -> PlacedRegion:
        assert self._opened is not None
        volume, axis, _ = self._opened
        inside = clicks.points_xy[clicks.labels == 1]
        centre_xy = (inside if len(inside) else clicks.points_xy).astype(np.float64).mean(axis=0)
        return PlacedRegion(self._region, volume, axis, index, centre_xy)

    def _chunk(self, index: int, clicks: PixelPrompts) -> dict[int, SliceMask]:
        """Segment the slices around a clicked one."""
        assert self._opened is not None
        placed = self._placed(index, clicks)
        points = placed.to_region_ij(clicks.points_xy)  # given as x and y, as the official code does
        logits, scores = self.segment(placed.values(self._opened[2]), points, clicks.labels)
        return {
            k: SliceMask(
                k,
                (placed.to_picture(logits, k) > 0).astype(np.uint8),
                float(np.clip(scores[placed.slice_of(k)], 0, 1)),
            )
            for k in placed.slices
        }

    @torch.inference_mode()
    def segment(
        self, values: NDArray[np.float32], points: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Segment one region.

        Args:
            values: (chunk, rows, columns) in 0..1.
            points: (N, 2), the same clicks for each slice.
            labels: (N,): 1 positive, 0 negative.

        Returns:
            Logits (chunk, rows, columns) and scores (chunk,).
        """
        network, size = self._network, self._framing.size
        grey = F.interpolate(torch.from_numpy(values)[:, None], (size, size), mode="bilinear")
        colours = grey.expand(-1, 3, -1, -1)
        pixels = colours if self._older else self._framing.standardised(colours)
        clicks, kinds = torch.from_numpy(points), torch.from_numpy(labels)
        if self._older:  # one prompt, the clicks of all slices, for every slice
            clicks, kinds = clicks.repeat(len(values), 1)[None], kinds.repeat(len(values))[None]
        else:
            clicks, kinds = clicks.expand(len(values), -1, -1), kinds.expand(len(values), -1)
        with out_of_memory_as_error("Segmenting a chunk of slices"):
            embedding = network.image_encoder(pixels.to(self._device))
            sparse, dense = network.prompt_encoder(clicks.to(self._device), kinds.to(self._device))
            low_res, scores = network.mask_decoder(
                embedding, network.prompt_encoder.dense_pe(), sparse, dense, SINGLE_MASK
            )
            logits = self._framing.to_official_size(low_res)[:, 0]
        return logits.float().cpu().numpy(), scores[:, 0].float().cpu().numpy()


def build_predictor(
    card: ModelCard, checkpoint: Path, base: Path | None, device: torch.device
) -> MedSaSlicePredictor | MedSaVolumePredictor:
    """Build Med-SA of a card; see `SAMAdaptLib.models.build_predictor`.

    The card's options may hold `input_size`, `out_size`, `older_inputs` and, for a card of three dimensions,
    `chunk` and those of `MedSaVolumePredictor`.
    """
    file = read_checkpoint(checkpoint)
    depth = Depth(card.options.get("chunk", CHUNK)) if card.dimensions == 3 else None
    network = load_med_sa(file.tensors, card.options.get("input_size"), depth)
    if depth is not None:
        return MedSaVolumePredictor(network, card, file.sha256, device)
    size = network.image_encoder.shape.input_size
    older = card.options.get("older_inputs", False)
    framing = Squeezed(size, card.options.get("out_size", OUT_SIZE), older)
    return MedSaSlicePredictor(network, card, file.sha256, framing, device)


def territories(anchors: Sequence[int], slices: range | None) -> Mapping[int, range]:
    """Share slices among clicked ones, half way to the next; without slices each has only itself."""
    shares: dict[int, range] = {}
    for number, index in enumerate(anchors):
        if slices is None:
            shares[index] = range(index, index + 1)
            continue
        below, above = anchors[:number], anchors[number + 1 :]
        first = max(slices.start, (below[-1] + index) // 2 + 1) if below else slices.start
        stop = min(slices.stop, (index + above[0]) // 2 + 1) if above else slices.stop
        shares[index] = range(first, stop)
    return shares
