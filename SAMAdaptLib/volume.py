"""A volume: voxels with their place in the patient, and the grey window that a network sees."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import VolumeError
from .geometry import Geometry

CT_WINDOWS: dict[str, tuple[float, float]] = {
    "soft tissue": (-160.0, 240.0),
    "lung": (-1350.0, 150.0),
    "bone": (-450.0, 1050.0),
    "brain": (0.0, 80.0),
    "liver": (-45.0, 105.0),
}
"""Presets as (lower, upper) in HU; "soft tissue" is level 40, width 400, as MedSAM was trained with."""

_CT_AIR_HU = -500  # nothing but CT reaches so low, and every CT of a body does
_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels on a grid.

    Args:
        voxels: (K, J, I) grey, or (K, J, I, 3) colour; any real type. Never written to.
        geometry: Where the voxels lie.
        modality: DICOM modality such as "CT", "MR" or "US"; None when unknown.
        name: What front ends call it; never patient data.

    Raises:
        VolumeError: The array does not fit the grid, is not real, or holds NaN or infinity.
    """

    voxels: NDArray[Any]
    geometry: Geometry
    modality: str | None = None
    name: str = "volume"

    def __post_init__(self) -> None:
        """Refuse voxels that no later step could explain."""
        shape = self.voxels.shape
        if (
            shape[:3] != self.geometry.shape_kji
            or self.voxels.ndim not in (3, 4)
            or shape[3:] not in ((), (3,))
        ):
            raise VolumeError(
                f"Voxels of shape {self.geometry.shape_kji} (slices, rows, columns), with 3 colours at "
                "most, were "
                f"wanted, but came as {shape}. Load one scalar or RGB volume; of a time series choose one "
                "frame."
            )
        if self.voxels.dtype.kind not in "iufb":
            raise VolumeError(
                f"Voxels must be real numbers, but are of type {self.voxels.dtype}. Convert the volume to "
                "a scalar one."
            )
        if self.voxels.dtype.kind == "f" and not np.isfinite(self.voxels).all():
            count = int(np.count_nonzero(~np.isfinite(self.voxels)))
            raise VolumeError(
                f"Every voxel must be a finite number, but {count} are NaN or infinite. "
                "Replace them, for example by the background value, and try again."
            )

    @property
    def is_colour(self) -> bool:
        """Whether the last axis holds red, green and blue."""
        return self.voxels.ndim == 4

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over voxels, type, shape and grid: equal only for the same image at the same place."""
        digest = hashlib.sha256(f"{self.voxels.dtype.str}{self.voxels.shape}".encode())
        for picture in self.voxels:
            digest.update(np.ascontiguousarray(picture).data)
        digest.update(self.geometry.affine_ijk_to_ras.tobytes())
        if self.geometry.slice_origins_ras is not None:
            digest.update(self.geometry.slice_origins_ras.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class IntensityWindow:
    """The grey values that a network sees as black and as white.

    Raises:
        VolumeError: The upper value is not above the lower one.
    """

    lower: float
    upper: float

    def __post_init__(self) -> None:
        """Refuse an empty window, which would turn every picture to one grey."""
        if not self.upper > self.lower:
            raise VolumeError(
                f"The upper end of the intensity window must be above the lower one, but they are "
                f"{self.upper:g} and "
                f"{self.lower:g}. Choose another window."
            )

    def apply(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Map values linearly to 0..255, cut off outside the window, rounded to the nearest."""
        scaled = (np.asarray(values, dtype=np.float32) - self.lower) * (255.0 / (self.upper - self.lower))
        return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def default_window(volume: Volume) -> IntensityWindow:
    """Choose the window by what the volume is; it never depends on the display.

    CT gets the soft-tissue window, 8-bit pictures (ultrasound, colour) keep their values, everything else
    gets the 0.5 and 99.5 percentiles of its voxels other than the background 0, as in MedSAM.
    """
    voxels = volume.voxels
    if voxels.dtype == np.uint8:
        return IntensityWindow(0, 255)
    if volume.modality == "CT" or (volume.modality is None and float(voxels.min()) <= _CT_AIR_HU):
        return IntensityWindow(*CT_WINDOWS["soft tissue"])
    foreground = voxels[voxels != 0]
    if foreground.size == 0:
        return IntensityWindow(0, 1)
    lower, upper = (float(value) for value in np.percentile(foreground, _PERCENTILES))
    return IntensityWindow(lower, upper) if upper > lower else IntensityWindow(lower - 1, lower + 1)
