"""Volumes with known truth and a network with known answers, for every ring."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from SAMAdaptLib.cards import ModelCard, Source
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models.predictor import SliceEmbedding, SlicePrediction
from SAMAdaptLib.prompts import PixelPrompts
from SAMAdaptLib.volume import Volume

IDENTITY = np.diag([1.0, 1.0, 1.0, 1.0])
ANISOTROPIC = np.array([[0.8, 0, 0, -20], [0, 0.7, 0, 11], [0, 0, 3.0, 40], [0, 0, 0, 1.0]])
FLIPPED = ANISOTROPIC @ np.diag([-1.0, 1.0, -1.0, 1.0])
SHEARED = ANISOTROPIC @ np.array([[1, 0, 0, 0], [0, 1, 0.9, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def oblique(spacing_mm: tuple[float, float, float] = (0.9, 1.1, 2.5)) -> np.ndarray:
    """A grid turned about all three axes."""
    a, b, c = 0.3, -0.4, 0.2
    turn_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    turn_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn_x @ turn_y @ turn_z * np.asarray(spacing_mm)
    affine[:3, 3] = (12.0, -7.0, 33.0)
    return affine


GRIDS = {
    "identity": IDENTITY,
    "anisotropic": ANISOTROPIC,
    "flipped": FLIPPED,
    "sheared": SHEARED,
    "oblique": oblique(),
}


def ball(geometry: Geometry, centre_ras: np.ndarray, radius_mm: float) -> np.ndarray:
    """Voxels (K, J, I) whose centre lies within a radius of a point in RAS mm: the truth on any grid."""
    k, j, i = np.indices(geometry.shape_kji).reshape(3, -1)
    distance = np.linalg.norm(geometry.ijk_to_ras(np.column_stack([i, j, k])) - centre_ras, axis=1)
    return (distance <= radius_mm).reshape(geometry.shape_kji)


def ball_volume(
    affine: np.ndarray = IDENTITY, shape_kji: tuple[int, int, int] = (12, 30, 36), radius_mm: float = 7.0
) -> tuple[Volume, np.ndarray]:
    """A dark volume with a bright ball in its middle, and the ball's voxels."""
    geometry = Geometry(shape_kji, affine)
    truth = ball(geometry, geometry.centre_ras, radius_mm)
    return Volume(np.where(truth, 200, 20).astype(np.uint8), geometry), truth


CARD = ModelCard(
    name="bright.test",
    title="Bright objects",
    architecture="bright",
    source=Source("manual"),
    licence="Apache-2.0",
    prompts=("point", "box", "scribble", "mask"),
)


@dataclass
class BrightObjects:
    """A `SlicePredictor` whose answer is known: the bright parts that are pointed at.

    Parts brighter than half of the range that hold a positive point or touch the box, without those that hold
    a negative point. It counts what it is asked, and remembers the earlier logits it was given.
    """

    card: ModelCard = CARD
    checkpoint_sha256: str = "0" * 64
    score: float = 0.9
    encoded: int = 0
    decoded: int = 0
    previous: list[np.ndarray | None] = field(default_factory=list)

    def encode(self, picture: np.ndarray) -> SliceEmbedding:
        self.encoded += 1
        return SliceEmbedding(np.asarray(picture), picture.shape[:2])

    def decode(
        self, embedding: SliceEmbedding, prompts: PixelPrompts, previous: np.ndarray | None = None
    ) -> SlicePrediction:
        self.decoded += 1
        self.previous.append(previous)
        parts, _ = ndimage.label(embedding.features >= 128)
        wanted = self._at(parts, prompts, 1)
        if prompts.box_xyxy is not None:
            x0, y0, x1, y1 = np.rint(prompts.box_xyxy).astype(int)
            wanted |= set(parts[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1].ravel().tolist())
        wanted -= self._at(parts, prompts, 0) | {0}
        mask = np.isin(parts, list(wanted))
        return SlicePrediction(
            np.where(mask, 5.0, -5.0).astype(np.float32),
            self.score,
            np.full((1, 4, 4), self.decoded, np.float32),
        )

    def _at(self, parts: np.ndarray, prompts: PixelPrompts, label: int) -> set[int]:
        points = np.rint(prompts.points_xy[prompts.labels == label]).astype(int)
        return {int(parts[y, x]) for x, y in points}
