"""Pictures one after the other in time, a folder of them or a video, as a volume whose slices are frames."""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from SAMAdaptLib.errors import VolumeError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.volume import Volume

PICTURE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})
MOST_BYTES = 4 * 1024**3
"""What all frames together may take in memory unless the caller allows more: 4 GiB, 690 frames of full HD."""

_FORMATS = ("BMP", "JPEG", "PNG", "TIFF")
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_AFFINE_IJK_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def holds_frames(path: str | os.PathLike[str]) -> bool:
    """Tell by the names alone whether this is a video, or a folder with pictures directly in it."""
    source = Path(path)
    if source.is_dir():
        return any(_is_picture(file) for file in source.iterdir())
    return source.suffix.lower() in VIDEO_SUFFIXES


def read_frames(
    path: str | os.PathLike[str],
    *,
    every: int = 1,
    first: int = 0,
    last: int | None = None,
    most_bytes: int = MOST_BYTES,
) -> Volume:
    """Read a folder of pictures, or a video, as a volume: K is time, J the rows, I the columns.

    Pictures come in the order of the numbers in their names (frame2 before frame10). Transparency is dropped,
    grey is written as three equal colours, and a note about turning the camera is not followed: the pixels
    are those that are stored. The grid is 1 x 1 x 1 mm; pixel (X, Y) of slice K lies at RAS (-X, -Y, K), so
    that a slice across K is the frame as stored.

    Args:
        path: Folder of PNG, JPEG, BMP or TIFF pictures of one size, or a video file (needs PyAV).
        every: Take one frame of so many, from `first` on.
        first: First frame, counted from 0.
        last: Last frame, included; None for all that follow.
        most_bytes: Refuse to hold more.

    Returns:
        Voxels (K, J, I, 3) uint8.

    Raises:
        VolumeError: Nothing to read, unlike sizes, more than 8 bits, a damaged file, too many frames, or a
            video where PyAV is not installed.
    """
    _check_choice(every, first, last)
    source = Path(path).absolute()
    chosen = slice(first, None if last is None else last + 1, every)
    if source.is_dir():
        frames = _pictures(source, chosen, most_bytes)
    elif source.is_file():
        frames = _video(source, chosen, most_bytes)
    else:
        raise VolumeError(
            f"A folder of pictures or a video was wanted, but there is no {source.name}. Check the path."
        )
    voxels = _joined(frames, source.name, most_bytes)
    name = source.name if source.is_dir() else source.stem
    return Volume(voxels, Geometry(voxels.shape[:3], _AFFINE_IJK_TO_RAS), name=name)


def _check_choice(every: int, first: int, last: int | None) -> None:
    if every < 1 or first < 0 or (last is not None and last < first):
        raise VolumeError(
            f"Frames are counted from 0, the last is not before the first, and one of every 1 or more is "
            f"taken, but first is {first}, last {last} and every {every}. Correct them."
        )


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".")


def _natural(file: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", file.name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], file.name


def _pictures(folder: Path, chosen: slice, most_bytes: int) -> Iterator[NDArray[np.uint8]]:
    files = sorted((file for file in folder.iterdir() if _is_picture(file)), key=_natural)[chosen]
    sizes = [_size_of(file) for file in files]
    if files:
        (columns, rows), _ = Counter(sizes).most_common(1)[0]
        for file, size in zip(files, sizes, strict=True):
            if size != (columns, rows):
                raise VolumeError(
                    f"All frames must be of one size, but {file.name} has {size[0]} x {size[1]} pixels and "
                    f"most others {columns} x {rows}. Take it out of the folder or resize it."
                )
        _refuse_more(len(files) * rows * columns * 3, most_bytes)
    return (_colours_of(file) for file in files)


def _size_of(file: Path) -> tuple[int, int]:
    """Read columns and rows from the header, and refuse what is not one picture of 8 bits."""
    with _opened(file) as picture:
        count = getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1
        if picture.mode not in _EIGHT_BIT_MODES or count != 1:
            raise VolumeError(
                f"A frame should be one grey or RGB picture of 8 bits, but {file.name} holds {count} of mode "
                f"{picture.mode}. Save it as such a PNG."
            )
        return picture.size


def _colours_of(file: Path) -> NDArray[np.uint8]:
    with _opened(file) as picture:
        try:
            # A palette may hold transparency, which only this way leaves without a warning.
            through = picture.convert("RGBA") if picture.mode in ("P", "PA") else picture
            return np.array(through.convert("RGB"))
        except _UNREADABLE as error:
            raise _damaged(file) from error


def _opened(file: Path) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except _UNREADABLE as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> VolumeError:
    return VolumeError(
        f"{file.name} cannot be read as a picture (damaged, or another format than its name says). Replace "
        "it or take it out of the folder."
    )


def _video(file: Path, chosen: slice, most_bytes: int) -> Iterator[NDArray[np.uint8]]:
    try:
        import av
        import imageio.v3 as imageio
    except ImportError as error:
        raise VolumeError(
            f"{file.name} is read with PyAV and imageio, which are not installed. Run `pip install av "
            "imageio`, or give a folder with the frames as pictures."
        ) from error
    try:
        with imageio.imopen(str(file), "r", plugin="pyav") as video:
            frames, rows, columns = video.properties(format="rgb24").shape[:3]  # 0 frames: not stated
            _refuse_more(len(range(frames)[chosen]) * rows * columns * 3, most_bytes)
            yield from islice(video.iter(format="rgb24"), chosen.start, chosen.stop, chosen.step)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise VolumeError(
            f"{file.name} cannot be read as a video (damaged, without pictures, or of an unknown format). "
            "Convert it, for example to MP4, or give a folder with the frames as pictures."
        ) from error


def _joined(frames: Iterable[NDArray[np.uint8]], name: str, most_bytes: int) -> NDArray[np.uint8]:
    """Put frames into one array; each is let go when it is copied, so that no two copies are held."""
    held: deque[NDArray[Any]] = deque()
    for frame in frames:
        if held and frame.shape != held[0].shape:
            raise VolumeError(
                f"All frames must be of one size, but it changes at frame {len(held)} of those chosen from "
                f"{name}. Choose frames before or after it."
            )
        held.append(frame)
        _refuse_more(len(held) * frame.nbytes, most_bytes)
    if not held:
        raise VolumeError(
            f"{name} holds no frame of those chosen. Give a folder with PNG, JPEG, BMP or TIFF pictures or a "
            "video, and a first frame that it has."
        )
    voxels = np.empty((len(held), *held[0].shape), dtype=np.uint8)
    for index in range(len(voxels)):
        voxels[index] = held.popleft()
    return voxels


def _refuse_more(needed: int, most_bytes: int) -> None:
    if needed > most_bytes:
        raise VolumeError(
            f"At most {most_bytes / 1024**2:.0f} MiB of frames are held at once, but these take "
            f"{needed / 1024**2:.0f} MiB or more. Choose a part (first, last), fewer (every), or smaller "
            "pictures."
        )
