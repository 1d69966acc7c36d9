"""Which DICOM files belong together: files, their headers, and the image series among them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import InvalidDicomError

from SAMAdaptLib.errors import DicomError

from .guards import DAMAGE, quiet, told_as

PathLike: TypeAlias = str | os.PathLike[str]

_NOT_PICTURES = frozenset({"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "FID", "DOC"})
"""Modalities whose objects are no pictures of the patient, although some of them carry pixels."""

DAMAGED_HEADER = (
    "A readable DICOM series was wanted, but the header of a file is damaged or breaks the format. "
    "Copy the series again from the archive."
)

_DICOM_SUFFIXES = frozenset({".dcm", ".ima", ".dicom"})


@dataclass(frozen=True)
class FoundSeries:
    """The files of one image series, in the order of their names; nothing is checked or sorted yet.

    Printing it shows neither headers nor paths, which may name the patient.

    Attributes:
        uid: SeriesInstanceUID, empty where the files have none.
        paths: One file per header.
        headers: Every file's attributes without its pixels.
    """

    uid: str
    paths: tuple[Path, ...] = field(repr=False)
    headers: tuple[Dataset, ...] = field(repr=False)

    @property
    def modality(self) -> str:
        """DICOM modality such as CT or MR."""
        return str(self.headers[0].get("Modality") or "unknown modality")

    @property
    def image_count(self) -> int:
        """Number of pictures, the frames of multi-frame files counted one by one."""
        return sum(int(header.get("NumberOfFrames") or 1) for header in self.headers)

    @property
    def description(self) -> str:
        """What a person needs to tell series apart, without anything about the patient."""
        number = series_number(self.headers[0])
        named = "no series number" if number is None else f"series number {number}"
        return f"{self.modality}, {self.image_count} images, {named}"


@quiet()
@told_as(DAMAGED_HEADER)
def find_series(source: PathLike | Iterable[PathLike]) -> list[FoundSeries]:
    """Find the image series in a folder (with its subfolders), one file or a list of files.

    Files that are not DICOM and objects that are no images (segmentations, structure sets, reports, DICOMDIR)
    are passed over.

    Returns:
        One entry per SeriesInstanceUID, sorted by series number.

    Raises:
        DicomError: Nothing is there, no file is DICOM, no DICOM file is an image, or a file that calls itself
            DICOM by its name cannot be read.
    """
    paths = list(_files(source))
    if not paths:
        raise DicomError(
            "A DICOM series was wanted, but the folder holds no files. Choose the folder with the images."
        )
    members: dict[str, list[tuple[Path, Dataset]]] = {}
    others: set[str] = set()
    for number, path in enumerate(paths, start=1):
        header = _read_header(path, f"file {number} of {len(paths)} in the order of names")
        if header is None:
            continue
        if _is_picture(header):
            members.setdefault(str(header.get("SeriesInstanceUID") or ""), []).append((path, header))
        else:
            others.add(str(header.get("Modality") or "other objects"))
    if not members:
        raise DicomError(_nothing_found(len(paths), others))
    found = [
        FoundSeries(uid, tuple(path for path, _ in files), tuple(header for _, header in files))
        for uid, files in members.items()
    ]
    return sorted(found, key=lambda one: (series_number(one.headers[0]) or 0, one.uid))


def choose_series(found: list[FoundSeries], series: int | str | None) -> FoundSeries:
    """Take a series by its number in the list (from 1) or its SeriesInstanceUID; None takes the only one.

    Raises:
        DicomError: Several are there and none was chosen, or the choice is not among them.
    """
    listed = "; ".join(f"{number}: {one.description}" for number, one in enumerate(found, start=1))
    if series is None:
        if len(found) == 1:
            return found[0]
        raise DicomError(
            f"One series was wanted, but {len(found)} were found ({listed}). "
            "Choose one by its number in this list, for example series=1."
        )
    for number, one in enumerate(found, start=1):
        if series in (number, str(number), one.uid):
            return one
    raise DicomError(f"Series {series} was chosen, but these were found: {listed}. Choose one of them.")


def _files(source: PathLike | Iterable[PathLike]) -> Iterator[Path]:
    if not isinstance(source, str | os.PathLike):
        yield from sorted(Path(path) for path in source)
        return
    path = Path(source)
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(
            Path(folder) / name
            for folder, _, names in os.walk(path)
            for name in names
            if not name.startswith(".") and name != "DICOMDIR"
        )
    else:
        raise DicomError(
            "A folder or file with DICOM images was wanted, but there is none at this path. Check it."
        )


def _read_header(path: Path, which: str) -> FileDataset | None:
    """Return the attributes before the pixels, or None for a file that does not claim to be DICOM."""
    try:
        header = dcmread(path, stop_before_pixels=True, force=_starts_without_preamble(path))
        header.get("SOPClassUID")
        return header
    except InvalidDicomError:
        if path.suffix.lower() not in _DICOM_SUFFIXES:
            return None
    except DAMAGE:
        pass
    raise DicomError(
        f"A DICOM file was wanted, but {which} cannot be read (damaged, cut short or protected). "
        "Copy it again from the archive, or take it out of the folder."
    )


def _starts_without_preamble(path: Path) -> bool:
    """Whether a file begins with an attribute of group 0002 or 0008, as some old DICOM files do."""
    with path.open("rb") as stream:
        start = stream.read(132)
    return (
        len(start) == 132
        and start[128:] != b"DICM"
        and start[:2] in (b"\x02\x00", b"\x08\x00")
        and start[3] == 0
    )


def _is_picture(header: Dataset) -> bool:
    return "Rows" in header and "Columns" in header and str(header.get("Modality")) not in _NOT_PICTURES


def _nothing_found(count: int, others: set[str]) -> str:
    if others:
        return (
            f"A DICOM image series was wanted, but the folder holds only {', '.join(sorted(others))}. "
            "Choose the folder with the images that belong to it."
        )
    return (
        f"A DICOM series was wanted, but none of the {count} files is DICOM. "
        "Choose the folder with the images."
    )


def series_number(header: Dataset) -> int | None:
    """Return SeriesNumber, None where it is absent or no number."""
    try:
        return int(str(header.get("SeriesNumber")))
    except ValueError:
        return None
