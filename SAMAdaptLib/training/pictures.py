"""Labelled pictures for training and validation, chosen evenly over patients."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from SAMAdaptLib.errors import JobError

_CT_WINDOWS_HU = ((-160.0, 240.0), (-200.0, 400.0), (-100.0, 200.0))
_MR_PERCENTILES = (0.5, 99.5)
_MANY_CLASSES = 4
_LEAST_PIXELS = 12


@dataclass(frozen=True)
class Item:
    """One line of the index: where a picture or volume and its labels lie."""

    dataset: str
    modality: str
    group: str
    image: Path
    label: Path

    @property
    def is_volume(self) -> bool:
        """Whether slices must be taken from it."""
        return self.image.suffix not in (".png", ".jpg")


@dataclass(frozen=True)
class PictureSource:
    """One picture to be made: an item and, for a volume, the number of the slice draw."""

    item: Item
    draw: int


@dataclass(frozen=True, eq=False)
class LabelledPicture:
    """Grey values 0..255 and uint8 class numbers, both (rows, columns); class 0 is background."""

    picture: NDArray[Any]
    labels: NDArray[np.uint8]


def read_index(path: Path) -> list[Item]:
    """Read the index of the training data.

    Raises:
        JobError: The index is missing or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return [
                Item(
                    row["dataset"],
                    row["modality"],
                    row["group"],
                    path.parent / row["image"],
                    path.parent / row["label"],
                )
                for row in csv.DictReader(stream)
            ]
    except (OSError, KeyError) as error:
        raise JobError(
            f"An index of training data (columns dataset, modality, group, image, label) was wanted at "
            f"{path.name}, but it cannot be read ({error}); check the path in the training file."
        ) from error


def split_by_patient(
    items: Sequence[Item], share: float, seed: int
) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    """Hold back a share of each set's patients; a set with fewer than three patients is all for training.

    Returns:
        Training and validation items by data set, each in an order that goes round the patients.
    """
    train: dict[str, list[Item]] = {}
    held: dict[str, list[Item]] = {}
    for number, dataset in enumerate(sorted({item.dataset for item in items})):
        mine = [item for item in items if item.dataset == dataset]
        groups = sorted({item.group for item in mine})
        rng = np.random.default_rng([seed, number])
        rng.shuffle(groups)
        count = max(1, round(share * len(groups))) if len(groups) >= 3 else 0
        held[dataset] = _round_robin(mine, groups[:count])
        train[dataset] = _round_robin(mine, groups[count:])
    return train, held


def _round_robin(items: Sequence[Item], groups: Sequence[str]) -> list[Item]:
    queues = [[item for item in items if item.group == group] for group in groups]
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def choose_sources(items: Sequence[Item], most: int) -> list[PictureSource]:
    """Take at most `most` pictures; volumes are drawn from again until there are enough (at most 6 times)."""
    sources: list[PictureSource] = []
    for draw in range(6):
        sources += [PictureSource(item, draw) for item in items if draw == 0 or item.is_volume]
    return sources[:most]


def load_picture(source: PictureSource, rng: np.random.Generator) -> LabelledPicture:
    """Read one picture and its labels; of a volume a slice through its labels, isotropic ones any way."""
    if source.item.is_volume:
        return _slice_of_volume(source.item, rng)
    picture = np.asarray(Image.open(source.item.image).convert("L"))
    labels = np.asarray(Image.open(source.item.label))
    if labels.max() == 255:
        labels = (labels > 127).astype(np.uint8)
    return LabelledPicture(picture, clean_labels(labels.astype(np.uint8)))


def clean_labels(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Remove one-pixel rims of wrong classes that resizing left between the classes of multi-class labels."""
    classes = [value for value in np.unique(labels) if value]
    if len(classes) < _MANY_CLASSES:
        return labels
    kept = ndimage.binary_opening(labels == 0)
    for value in classes:
        kept |= ndimage.binary_opening(labels == value)
    nearest = ndimage.distance_transform_edt(~kept, return_distances=False, return_indices=True)
    return labels[tuple(nearest)]


def _slice_of_volume(item: Item, rng: np.random.Generator) -> LabelledPicture:
    image = SimpleITK.ReadImage(str(item.image))
    voxels = SimpleITK.GetArrayFromImage(image)
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(item.label))).astype(np.uint8)
    spacing = image.GetSpacing()
    axis = int(rng.integers(3)) if max(spacing) < 1.5 * min(spacing) else 0
    area = np.count_nonzero(labels, axis=tuple(a for a in range(3) if a != axis))
    index = int(rng.choice(np.flatnonzero(area >= 0.4 * area.max())))
    if item.modality == "CT" or (item.modality not in ("MR", "US") and voxels.min() <= -500):
        lower, upper = _CT_WINDOWS_HU[rng.integers(len(_CT_WINDOWS_HU))]
    else:
        lower, upper = (float(v) for v in np.percentile(voxels[voxels != 0], _MR_PERCENTILES))
    grey = np.clip((voxels.take(index, axis) - lower) / max(upper - lower, 1e-6), 0, 1)
    return LabelledPicture(np.rint(255 * grey).astype(np.uint8), np.take(labels, index, axis))


def largest_slices(folder: Path, least_pixels: int = 50) -> list[LabelledPicture]:
    """Give every structure of a labelled volume on its largest slice, one binary picture each."""
    voxels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "image.nii.gz"))).astype(np.float32)
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "label.nii.gz")))
    lower, upper = _CT_WINDOWS_HU[0]
    if voxels.min() > -500:
        lower, upper = (float(v) for v in np.percentile(voxels[voxels != 0], _MR_PERCENTILES))
    grey = np.rint(255 * np.clip((voxels - lower) / (upper - lower), 0, 1)).astype(np.uint8)
    found = []
    for value in np.unique(labels[labels > 0]):
        area = np.count_nonzero(labels == value, axis=(1, 2))
        if area.max() >= least_pixels:
            index = int(area.argmax())
            found.append(LabelledPicture(grey[index], (labels[index] == value).astype(np.uint8)))
    return found


def structures(labels: NDArray[np.uint8]) -> list[NDArray[np.bool_]]:
    """List the masks that can be asked for: every class, and its larger connected parts if it has several."""
    masks: list[NDArray[np.bool_]] = []
    for value in np.unique(labels[labels > 0]):
        whole = labels == value
        if np.count_nonzero(whole) < _LEAST_PIXELS:
            continue
        masks.append(whole)
        parts, count = ndimage.label(whole)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        big = [k for k in np.argsort(sizes)[::-1][:4] if sizes[k] >= _LEAST_PIXELS]
        if count > 1:
            masks += [parts == k + 1 for k in big]
    return masks
