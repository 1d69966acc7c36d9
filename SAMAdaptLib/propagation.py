"""Slice models lifted to volumes: the mask of one slice prompts the next, up and down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from skimage.transform import resize

from .cards import cards_that_take
from .embeddings import EmbeddingCache
from .errors import PromptError, VolumeError
from .geometry import Axis
from .models.predictor import SliceEmbedding, SliceMask, SlicePrediction, SlicePredictor
from .postprocess import innermost_xy, without_specks
from .prompts import PixelPrompts, Prompts
from .volume import IntensityWindow, Volume

_LONGEST_SIDE = 1024  # no network of the list looks closer
_GREYS_A_LEVEL = 8  # 32 levels tell organs apart and survive the noise of a small mask


@dataclass(frozen=True)
class ChainRule:
    """How a mask is carried to the next slice, and when to stop.

    Args:
        widen: Share by which the box of the last mask grows on each side.
        lowest_score: Stop when the network expects less overlap than this.
        largest_growth: Stop when the area grows by more than this factor from one slice to the next.
        smallest_overlap: Stop when less than this share of the smaller of two neighbouring masks is common;
            an object that tapers off keeps its overlap, one that was lost does not.
        smallest_likeness: Stop when the grey values inside the mask share less than this with those of the
            slices before (intersection of histograms): past its end a network draws what lies there instead.
    """

    widen: float = 0.02
    lowest_score: float = 0.5
    largest_growth: float = 2.0
    smallest_overlap: float = 0.5
    smallest_likeness: float = 0.6


class SliceBySlice:
    """A `VolumePredictor` made of a `SlicePredictor`.

    The result is a function of the prompts alone: the rounds of clicks on a slice are replayed in order, each
    correcting the mask before it, so undo, removal of a prompt and replay of a record give the same mask.

    Args:
        slices: The two-dimensional network.
        rule: How masks are carried on.
    """

    def __init__(self, slices: SlicePredictor, rule: ChainRule | None = None) -> None:
        """Wait for a volume."""
        self.card = slices.card
        self.checkpoint_sha256 = slices.checkpoint_sha256
        self.embeddings: EmbeddingCache[SliceEmbedding] = EmbeddingCache(_bytes_of)
        self._slices = slices
        self._rule = rule or ChainRule()
        self._view: _View | None = None
        self._rounds: dict[int, list[tuple[PixelPrompts, SlicePrediction]]] = {}

    def set_volume(self, volume: Volume, axis: Axis, window: IntensityWindow) -> None:
        """Take a volume, the axis across its slices and the window that the network sees.

        Embeddings are kept when nothing changed, so that the next object costs decodings only.
        """
        view = _View(volume, axis, window)
        if self._view is None or not self._view.shows_the_same(view):
            self.embeddings.clear()
        self._view = view
        self._rounds.clear()

    def predict(self, prompts: Prompts, slices: range | None = None) -> Iterator[SliceMask]:
        """Segment the prompted slices, then, if `slices` is given, propagate from them over it.

        Raises:
            PromptError: No prompt, a kind that the network does not take, or a place outside the volume.
            VolumeError: No volume was set.
        """
        if self._view is None:
            raise VolumeError(
                "A volume must be set before prompts are segmented, but none is. Load one first."
            )
        self._check_kinds(prompts)
        rounds = prompts.rounds_on_slices(self._view.volume.geometry, self._view.axis)
        anchors: dict[int, _Link] = {}
        for index in sorted(rounds):
            anchors[index] = self._anchor(index, rounds[index])
            yield anchors[index].as_mask(index)
        if slices is not None:
            yield from self._propagate(anchors, slices)

    def _check_kinds(self, prompts: Prompts) -> None:
        if not len(prompts):
            raise PromptError(
                f"{self.card.title} needs a prompt, but none was placed. Click on the object or draw a box."
            )
        for kind in sorted(prompts.kinds() - set(self.card.prompts)):
            raise PromptError(
                f"{self.card.title} takes {' and '.join(self.card.prompts)} prompts, but a {kind} was "
                "placed. "
                f"Remove it, or choose a model that takes it: "
                f"{', '.join(cards_that_take(kind)) or 'none of the list'}."
            )

    def _anchor(self, index: int, rounds: Sequence[PixelPrompts]) -> _Link:
        """Segment a prompted slice, correcting round by round; rounds already seen are not decoded again."""
        last = rounds[-1]
        if last.mask is not None and not len(last.labels) and last.box_xyxy is None:
            return _Link(last.mask, 1.0)  # painted by the user: taken as it is
        done = self._rounds.setdefault(index, [])
        kept = 0
        while kept < min(len(done), len(rounds)) and _same(done[kept][0], rounds[kept]):
            kept += 1
        del done[kept:]
        for pixels in rounds[kept:]:
            previous = done[-1][1].low_res if done else None
            done.append((pixels, self._decode(index, pixels, previous)))
        prediction = done[-1][1]
        inside = last.points_xy[last.labels == 1]
        return _Link(without_specks(prediction.logits > 0, inside), _clipped(prediction.score))

    def _propagate(self, anchors: dict[int, _Link], slices: range) -> Iterator[SliceMask]:
        """Walk from every anchor to both sides, half way to the next one, as long as the object goes on."""
        known = sorted(anchors)
        for number, index in enumerate(known):
            below = known[number - 1] if number else None
            above = known[number + 1] if number + 1 < len(known) else None
            first = slices.start if below is None else max(slices.start, (below + index) // 2 + 1)
            stop = slices.stop if above is None else min(slices.stop, (index + above) // 2 + 1)
            for indices in (range(index + 1, stop), range(index - 1, first - 1, -1)):
                walked = self._walk(index, anchors[index], indices)
                yield from (result for result in walked if result.index in slices)

    def _walk(self, start: int, anchor: _Link, indices: range) -> Iterator[SliceMask]:
        """Carry a mask from slice to slice until the object ends.

        The logits of a slice are not fed to the next: a network that corrects its own mask on one picture
        holds on to a neighbour's for too long.
        """
        if not anchor.mask.any():
            return
        link = anchor
        greys = self._greys(start, anchor.mask)
        for index in indices:
            prediction = self._decode(index, self._carried(link.mask), None)
            mask = without_specks(prediction.logits > 0, np.empty((0, 2)))
            score = _clipped(prediction.score)
            if not self._goes_on(mask, link.mask, score):
                return
            seen = self._greys(index, mask)
            if np.minimum(seen, greys).sum() < self._rule.smallest_likeness:
                return
            link, greys = _Link(mask, score), (greys + seen) / 2
            yield link.as_mask(index)

    def _greys(self, index: int, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Share of each grey level inside a mask of a slice, smoothed so that noise does not tell."""
        assert self._view is not None
        levels = self._view.greys(index)[mask] // _GREYS_A_LEVEL
        counts = np.bincount(levels, minlength=256 // _GREYS_A_LEVEL).astype(np.float64)
        smooth: NDArray[np.float64] = gaussian_filter1d(counts, 1.0, mode="nearest")
        return smooth / smooth.sum()

    def _carried(self, mask: NDArray[np.bool_]) -> PixelPrompts:
        """Prompts for the next slice: the box of the last mask, a little wider, or a click in its middle."""
        if "box" not in self.card.prompts and "point" in self.card.prompts:
            return PixelPrompts.of([innermost_xy(mask)], [1])
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        corners = np.asarray([[columns[0], rows[0]], [columns[-1], rows[-1]]], dtype=np.float64)
        margin = self._rule.widen * (corners[1] - corners[0]) + 1
        limits = np.asarray(mask.shape[::-1]) - 1
        box = [*np.maximum(corners[0] - margin, 0), *np.minimum(corners[1] + margin, limits)]
        return PixelPrompts.of(box_xyxy=box)

    def _goes_on(self, mask: NDArray[np.bool_], last: NDArray[np.bool_], score: float) -> bool:
        area, before = int(mask.sum()), int(last.sum())
        if area == 0 or score < self._rule.lowest_score or area > self._rule.largest_growth * before:
            return False
        return int((mask & last).sum()) >= self._rule.smallest_overlap * min(area, before)

    def _decode(
        self, index: int, pixels: PixelPrompts, previous: NDArray[np.float32] | None
    ) -> SlicePrediction:
        view = self._view
        assert view is not None
        embedding = self.embeddings.get(index, lambda: self._slices.encode(view.picture(index)))
        prediction = self._slices.decode(embedding, view.to_network(pixels, index), previous)
        return SlicePrediction(
            view.from_network(prediction.logits, index), prediction.score, prediction.low_res
        )


@dataclass(frozen=True, eq=False)
class _Link:
    """One slice of the chain: mask (rows, columns) and score."""

    mask: NDArray[np.bool_]
    score: float

    def as_mask(self, index: int) -> SliceMask:
        return SliceMask(index, self.mask.astype(np.uint8), self.score)


@dataclass(frozen=True, eq=False)
class _View:
    """The volume as a stack of pictures with square pixels.

    Slices across I or J of a volume with thick slices have oblong pixels; a network that was trained on
    square ones would see a squeezed patient, so pictures are stretched for it and its masks shrunk back.
    """

    volume: Volume
    axis: Axis
    window: IntensityWindow

    def shows_the_same(self, other: _View) -> bool:
        return self.volume is other.volume and (self.axis, self.window) == (other.axis, other.window)

    def windowed(self, index: int) -> NDArray[np.uint8]:
        """The slice at its own size, (rows, columns[, 3])."""
        values = self.volume.geometry.plane(self.axis, index).extract(self.volume.voxels)
        return values if self.volume.is_colour and values.dtype == np.uint8 else self.window.apply(values)

    def greys(self, index: int) -> NDArray[np.uint8]:
        """The slice at its own size in grey, (rows, columns)."""
        values = self.windowed(index)
        return values.mean(axis=2).astype(np.uint8) if self.volume.is_colour else values

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The slice with square pixels."""
        plane = self.volume.geometry.plane(self.axis, index)
        grey = self.windowed(index)
        shape = self._square_shape(index)
        if shape == plane.shape_yx:
            return np.ascontiguousarray(grey)
        stretched = resize(grey, shape + grey.shape[2:], order=1, preserve_range=True, anti_aliasing=True)
        return np.asarray(np.rint(stretched), dtype=np.uint8)

    def to_network(self, pixels: PixelPrompts, index: int) -> PixelPrompts:
        scale = self._scale_xy(index)
        box = None if pixels.box_xyxy is None else (pixels.box_xyxy.reshape(2, 2) + 0.5) * scale - 0.5
        mask = pixels.mask
        if mask is not None and mask.shape != self._square_shape(index):
            mask = resize(mask, self._square_shape(index), order=0, preserve_range=True, anti_aliasing=False)
        return PixelPrompts.of((pixels.points_xy + 0.5) * scale - 0.5, pixels.labels, box, mask)

    def from_network(self, logits: NDArray[np.float32], index: int) -> NDArray[np.float32]:
        shape = self.volume.geometry.plane(self.axis, index).shape_yx
        if logits.shape == shape:
            return logits
        return np.asarray(
            resize(logits, shape, order=1, preserve_range=True, anti_aliasing=False), dtype=np.float32
        )

    def _square_shape(self, index: int) -> tuple[int, int]:
        plane = self.volume.geometry.plane(self.axis, index)
        x_mm, y_mm = plane.spacing_xy_mm
        if max(x_mm, y_mm) < 1.05 * min(x_mm, y_mm):
            return plane.shape_yx
        rows, columns = plane.shape_yx
        size_mm = np.asarray([rows * y_mm, columns * x_mm])
        pixel_mm = max(min(x_mm, y_mm), size_mm.max() / max(_LONGEST_SIDE, *plane.shape_yx))
        rows, columns = (max(1, round(mm / pixel_mm)) for mm in size_mm.tolist())
        return rows, columns

    def _scale_xy(self, index: int) -> NDArray[np.float64]:
        shape = self.volume.geometry.plane(self.axis, index).shape_yx
        return np.asarray(self._square_shape(index)[::-1]) / np.asarray(shape[::-1])


def _same(first: PixelPrompts, second: PixelPrompts) -> bool:
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)


def _clipped(score: float) -> float:
    return float(np.clip(score, 0.0, 1.0))


def _bytes_of(embedding: SliceEmbedding) -> int:
    parts: Any = embedding.features if isinstance(embedding.features, list | tuple) else [embedding.features]
    return sum(part.nbytes for part in parts)
