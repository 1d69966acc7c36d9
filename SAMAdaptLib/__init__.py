"""Segment medical volumes from a few prompts with adapted Segment Anything models.

>>> from SAMAdaptLib import Box, Session, load_model, read_volume  # doctest: +SKIP
>>> session = Session(read_volume("ct.nii.gz"), load_model())  # doctest: +SKIP
>>> session.add(Box.from_corners((20, 10, 42), (90, 80, 42)))  # doctest: +SKIP
>>> session.propagate()  # doctest: +SKIP
>>> session.mask.sum()  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from SAMAdaptLib.errors import SAMAdaptError
    from SAMAdaptLib.frames import read_frames
    from SAMAdaptLib.geometry import Geometry
    from SAMAdaptLib.image_files import read_volume, write_volume
    from SAMAdaptLib.loading import load_model
    from SAMAdaptLib.prompts import Box, MaskPrompt, Point, Prompts, Scribble
    from SAMAdaptLib.session import Session
    from SAMAdaptLib.volume import IntensityWindow, Volume

__version__ = "0.1.0"

_HOMES = {
    "SAMAdaptError": "errors",
    "read_frames": "frames",
    "Geometry": "geometry",
    "read_volume": "image_files",
    "write_volume": "image_files",
    "load_model": "loading",
    "Box": "prompts",
    "MaskPrompt": "prompts",
    "Point": "prompts",
    "Prompts": "prompts",
    "Scribble": "prompts",
    "Session": "session",
    "IntensityWindow": "volume",
    "Volume": "volume",
}

__all__ = [
    "Box",
    "Geometry",
    "IntensityWindow",
    "MaskPrompt",
    "Point",
    "Prompts",
    "SAMAdaptError",
    "Scribble",
    "Session",
    "Volume",
    "load_model",
    "read_frames",
    "read_volume",
    "write_volume",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package costs nothing (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
