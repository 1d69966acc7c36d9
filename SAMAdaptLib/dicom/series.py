"""A DICOM series as a Volume that remembers the files it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from SAMAdaptLib.volume import Volume

from .finding import DAMAGED_HEADER, FoundSeries, PathLike, choose_series, find_series, series_number
from .geometry import geometry_of, tilt_degrees
from .guards import quiet, told_as
from .pixels import read_voxels
from .slices import SliceSource, slice_sources
from .stacking import Stack, stack_slices


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """One series, read. Printing it shows neither headers nor paths, which may name the patient.

    Attributes:
        volume: Real values (HU for CT) on the series' own grid; k grows along the normal of rows and columns.
        headers: Attributes of every file without its pixels: in the order of k for classic files, the order
        of
            names for multi-frame ones.
        paths: The file of every header.
        stack: Which header and frame each k comes from, with its exact place.
        warnings: What is unusual and worth saying, in plain sentences.
    """

    volume: Volume = field(repr=False)
    headers: tuple[Dataset, ...] = field(repr=False)
    paths: tuple[Path, ...] = field(repr=False)
    stack: Stack = field(repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def slices(self) -> tuple[SliceSource, ...]:
        """The source of each k."""
        return self.stack.slices

    @property
    def is_multiframe(self) -> bool:
        """Whether slices are frames of enhanced files."""
        return self.slices[0].frame_number is not None

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID, empty where the files have none."""
        return str(self.headers[0].get("SeriesInstanceUID") or "")

    @property
    def is_monochrome1(self) -> bool:
        """Whether low values are meant to be shown bright; the values themselves are as stored."""
        return str(self.headers[0].get("PhotometricInterpretation")) == "MONOCHROME1"


@quiet()
@told_as(DAMAGED_HEADER)
def read_series(
    source: PathLike | Iterable[PathLike],
    series: int | str | None = None,
    *,
    phase: int | None = None,
    allow_gaps: bool = False,
) -> DicomSeries:
    """Read one classic or enhanced multi-frame series from a folder, a file or a list of files.

    Slices are sorted by ImagePositionPatient along the normal, never by file name. A tilted gantry gives a
    sheared grid and uneven slice distances keep their exact positions; nothing is resampled.

    Args:
        source: Folder (searched with its subfolders), file, or files.
        series: Which series where there are several: its number in the list that the error gives, or its UID.
        phase: Which image to take where every position holds several (from 1): phases, echoes, time points.
        allow_gaps: Read a series with missing slices; the slices that are there keep their positions.

    Raises:
        DicomError: Nothing readable, several series, missing or repeated slices, several orientations or
        sizes,
            no pixels or pixels that cannot be decoded.
    """
    found = choose_series(find_series(source), series)
    files = _without_copies(found)
    stack = stack_slices(files.headers, slice_sources(files.headers), phase, allow_gaps)
    headers, paths, stack = _in_order_of_k(files, stack)
    voxels = read_voxels(paths, stack.slices)
    geometry = geometry_of(stack, (voxels.shape[1], voxels.shape[2]))
    volume = Volume(voxels, geometry, modality=_modality(headers[0]), name=_name(headers[0]))
    copies = len(found.paths) - len(files.paths)
    return DicomSeries(volume, headers, paths, stack, (*_unusual_files(headers, copies), *_unusual(stack)))


def _without_copies(found: FoundSeries) -> FoundSeries:
    """Keep one file of every SOP instance: a folder often holds the same image twice."""
    kept: dict[str, int] = {}
    for index, header in enumerate(found.headers):
        kept.setdefault(str(header.get("SOPInstanceUID") or f"file {index}"), index)
    chosen = list(kept.values())
    return FoundSeries(
        found.uid, tuple(found.paths[n] for n in chosen), tuple(found.headers[n] for n in chosen)
    )


def _in_order_of_k(files: FoundSeries, stack: Stack) -> tuple[tuple[Dataset, ...], tuple[Path, ...], Stack]:
    """Sort headers and paths by the first k that needs them, and drop those that no k needs."""
    order = list(dict.fromkeys(source.header_index for source in stack.slices))
    if any(source.frame_number is not None for source in stack.slices):
        order.sort()
    new_index = {old: new for new, old in enumerate(order)}
    slices = tuple(replace(source, header_index=new_index[source.header_index]) for source in stack.slices)
    headers = tuple(files.headers[n] for n in order)
    return headers, tuple(files.paths[n] for n in order), replace(stack, slices=slices)


def _modality(header: Dataset) -> str | None:
    return str(header.get("Modality") or "") or None


def _name(header: Dataset) -> str:
    """Name the volume; descriptions of series are free text and may say something about the patient."""
    number = series_number(header)
    return f"{_modality(header) or 'DICOM'} series {number if number is not None else ''}".strip()


def _unusual_files(headers: Sequence[Dataset], copies: int) -> list[str]:
    said: list[str] = []
    if copies:
        said.append(f"{copies} files were copies of other files in the folder and were passed over.")
    if any(header.get("PhotometricInterpretation") == "MONOCHROME1" for header in headers):
        said.append("The pictures are meant to be shown inverted (MONOCHROME1); their values are kept.")
    return said


def _unusual(stack: Stack) -> list[str]:
    said: list[str] = []
    if len(stack.slices) == 1:
        said.append("The series has a single slice; its thickness is taken from the header.")
        return said
    tilt = tilt_degrees(stack)
    if tilt:
        said.append(f"The gantry was tilted by {tilt:.1f} degrees: the grid is sheared and kept so.")
    gaps = stack.gaps_mm
    if np.ptp(gaps) > 0.01:
        said.append(
            f"The slices lie at uneven distances ({gaps.min():.2f} to {gaps.max():.2f} mm); "
            "each keeps its own position."
        )
    return said
