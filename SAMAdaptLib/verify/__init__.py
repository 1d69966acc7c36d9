"""Are the numbers those of the official code? Networks run on recorded inputs, outputs compared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from SAMAdaptLib.device import pick_device
from SAMAdaptLib.errors import JobError, SAMAdaptError
from SAMAdaptLib.verify import (
    dapsam,
    db_sam,
    desam,
    hq_sam,
    ma_sam,
    med_sa,
    medsam,
    mobile_sam,
    sam,
    sam2,
    sam_med2d,
    sam_unet,
    samed,
)
from SAMAdaptLib.verify.golden_sets import Array, GoldenSet, Verifier, find_sets

VERIFIERS: dict[str, Verifier] = {
    "sam": sam.outputs,
    "medsam": medsam.outputs,
    "ma_sam": ma_sam.outputs,
    "ma_sam_bbox": ma_sam.outputs,
    "mobile_sam": mobile_sam.outputs,
    "lite_medsam": mobile_sam.outputs,
    "sam_med2d": sam_med2d.outputs,
    "desam": desam.outputs,
    "hq_sam": hq_sam.outputs,
    "med_sa_2d": med_sa.outputs,
    "med_sa_3d": med_sa.outputs,
    "samed": samed.outputs,
    "samed_s": samed.outputs,
    "db_sam": db_sam.outputs,
    "dapsam": dapsam.outputs,
    "sam_unet": sam_unet.outputs,
    "sam2": sam2.outputs,
    "sam2_hiera_tiny": sam2.published,
}
"""Architecture that a set names -> what runs it; another family is one file and one line."""


@dataclass(frozen=True)
class Row:
    """One output of one set.

    Args:
        set: Name of the set.
        output: Name of the output; of a set of several that could not be run, the reason.
        difference: Largest absolute difference; of whole numbers, how many elements differ.
        tolerance: Largest difference allowed.
        passed: Whether it was kept.
    """

    set: str
    output: str
    difference: float
    tolerance: float
    passed: bool


def verify(
    path: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None, device: str = "cpu"
) -> list[Row]:
    """Compare networks with recorded numbers.

    Args:
        path: A folder of sets, or the JSON file of one.
        checkpoint: File for a set that names a published checkpoint; None to take it from the model store.
        device: "cpu", "cuda" or "mps"; the numbers were recorded on a processor in float32.

    Returns:
        A row per output. If a folder holds several sets, one that cannot be run gives one failed row.

    Raises:
        JobError: No set there, a damaged one, or one of an architecture that is not there yet.
        WeightsError: The checkpoint is not on this machine, or is not the one that belongs to the set.
        DeviceError: The device is not there.
    """
    with pick_device(device):
        return _verified(path, checkpoint)


def _verified(path: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None) -> list[Row]:
    given = None if checkpoint is None else Path(checkpoint)
    sets = find_sets(Path(path))
    if len(sets) == 1:
        return list(_rows(sets[0], given))
    rows: list[Row] = []
    for golden in sets:
        try:
            rows += _rows(golden, given)
        except SAMAdaptError as error:
            rows.append(Row(golden.name, f"could not be run: {error}", float("inf"), 0.0, False))
    return rows


def _rows(golden: GoldenSet, checkpoint: Path | None) -> Iterator[Row]:
    architecture = golden.architecture
    if architecture not in VERIFIERS:
        raise JobError(
            f"A set of {', '.join(VERIFIERS)} was wanted, but {golden.name} is of '{architecture}', which "
            "SAMAdapt cannot build yet. Leave it out."
        )
    expected = golden.arrays()
    try:
        for name, value in VERIFIERS[architecture](golden, checkpoint):
            if name in expected:
                yield _compared(golden, name, value, expected[name])
    except KeyError as error:
        raise JobError(
            f"The set {golden.name} should hold {error}, but does not. Restore its files."
        ) from error


def _compared(golden: GoldenSet, name: str, value: Array, expected: Array) -> Row:
    exact = expected.dtype.kind in "iub"
    tolerance = 0.0 if exact else golden.tolerance(name)
    if value.shape != expected.shape:
        return Row(golden.name, name, float("inf"), tolerance, False)
    if exact:
        difference = float(np.count_nonzero(value != expected))
    else:
        distances = np.abs(value.astype(np.float64) - expected)
        difference = float(distances.max(initial=0.0))
    return Row(golden.name, name, difference, tolerance, difference <= tolerance)
