"""Making one labelled picture into many: place, shape, grey values and sharpness."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from SAMAdaptLib.training.pictures import LabelledPicture


@dataclass(frozen=True, eq=False)
class Framed:
    """A picture in the network's frame.

    Attributes:
        picture: (rows, columns) float32 grey values 0..255, the longer side being the input size.
        labels: (size / 2, size / 2) uint8 classes, zero beyond the picture.
    """

    picture: NDArray[np.float32]
    labels: NDArray[np.uint8]


def frame_plain(source: LabelledPicture, size: int) -> Framed:
    """Resize so that the longer side is `size`, as at inference, and nothing else."""
    rows, columns = source.picture.shape
    scale = size / max(rows, columns)
    shape = (max(1, int(rows * scale + 0.5)), max(1, int(columns * scale + 0.5)))
    matrix = np.diag([rows / shape[0], columns / shape[1]])
    centre_in, centre_out = (np.array(s) / 2 - 0.5 for s in (source.picture.shape, shape))
    return _warp(source, matrix, centre_in - matrix @ centre_out, shape, size, nearest_border=True)


def frame_augmented(source: LabelledPicture, size: int, rng: np.random.Generator) -> Framed:
    """Resize as at inference after a random change of place, shape, grey values and sharpness."""
    aspect = source.picture.shape[0] / source.picture.shape[1] * np.exp(rng.uniform(-0.2, 0.2))
    shape = (
        (size, max(size // 4, round(size / aspect)))
        if aspect > 1
        else (max(size // 4, round(size * aspect)), size)
    )
    zoom = np.exp(rng.uniform(np.log(0.75), np.log(1.8)))
    stretch = np.exp(rng.uniform(-0.12, 0.12))
    per_pixel = max(source.picture.shape) / size / zoom
    matrix = (
        _orientation(rng)
        @ _rotation(rng.normal(0, 0.2))
        @ np.diag([per_pixel * stretch, per_pixel / stretch])
    )
    extent = np.array(source.picture.shape)
    centre_in = extent / 2 - 0.5 + rng.uniform(-0.12, 0.12, 2) * extent
    centre_out = np.array(shape) / 2 - 0.5
    changed = LabelledPicture(_regrey(_unsharpen(source.picture, rng), rng), source.labels)
    framed = _warp(changed, matrix, centre_in - matrix @ centre_out, shape, size, nearest_border=False)
    return Framed(_noise(framed.picture, rng), framed.labels)


def _orientation(rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw one of the eight flips and quarter turns; half of the time none."""
    if rng.random() < 0.5:
        return np.eye(2)
    flips = np.diag(rng.choice([-1.0, 1.0], 2))
    return flips[::-1] if rng.random() < 0.5 else flips


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _warp(
    source: LabelledPicture,
    matrix: NDArray[np.float64],
    offset: NDArray[np.float64],
    shape: tuple[int, int],
    size: int,
    nearest_border: bool,
) -> Framed:
    """Resample; `matrix` and `offset` take (row, column) of the frame to those of the source."""
    fill = float(source.picture.min())
    mode = "nearest" if nearest_border else "constant"
    picture = ndimage.affine_transform(
        source.picture.astype(np.float32), matrix, offset, shape, order=1, mode=mode, cval=fill
    )
    half = (shape[0] // 2, shape[1] // 2)
    labels = np.zeros((size // 2, size // 2), np.uint8)
    # The middle of a label pixel lies between two pixels of the picture.
    labels[: half[0], : half[1]] = ndimage.affine_transform(
        source.labels, 2 * matrix, offset + matrix @ np.array([0.5, 0.5]), half, order=0, mode="constant"
    )
    return Framed(picture, labels)


def _unsharpen(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    """Blur, or imitate a coarser grid, now and then."""
    grey = picture.astype(np.float32)
    kind = rng.random()
    if kind < 0.2:
        return ndimage.gaussian_filter(grey, rng.uniform(0.4, 1.3))
    if kind < 0.5 and min(picture.shape) > 120:
        factor = rng.uniform(1.5, 3.0)
        coarse = ndimage.zoom(
            ndimage.gaussian_filter(grey, 0.35 * factor), 1 / factor, order=1, grid_mode=True, mode="nearest"
        )
        back = np.array(picture.shape) / np.array(coarse.shape)
        return ndimage.zoom(coarse, back, order=1, grid_mode=True, mode="nearest")
    return grey


def _regrey(grey: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Choose another grey window and gamma; rarely turn black and white round."""
    lower, upper = np.percentile(grey, [rng.uniform(0, 8), 100 - rng.uniform(0, 4)])
    span = max(float(upper - lower), 1.0) * rng.uniform(0.75, 1.35)
    middle = (lower + upper) / 2 + rng.uniform(-0.12, 0.12) * span
    unit = np.clip((grey - middle) / span + 0.5, 0, 1) ** np.exp(rng.uniform(-0.45, 0.45))
    if rng.random() < 0.06:
        unit = 1 - unit
    return (255 * unit).astype(np.float32)


def _noise(grey: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    if rng.random() > 0.35:
        return grey
    noise = rng.normal(0, rng.uniform(2, 14), grey.shape).astype(np.float32)
    if rng.random() < 0.5:
        noise = ndimage.gaussian_filter(noise, 1.0) * 2.5
    return np.clip(grey + noise, 0, 255)
