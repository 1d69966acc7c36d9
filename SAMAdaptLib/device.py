"""Where a network runs, and what to say when it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import DeviceError


def pick_device(name: str | None = None) -> torch.device:
    """Return the device called `name` ("cpu", "cuda", "cuda:1", "mps"), or the fastest one present.

    Raises:
        DeviceError: The device is not there.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, _, number = name.partition(":")
    if not present.get(kind, False) or (
        number and (not number.isdigit() or int(number) >= torch.cuda.device_count())
    ):
        there = ", ".join(key for key, here in present.items() if here)
        raise DeviceError(f"Device '{name}' was wanted, but this machine has {there}. Choose one of these.")
    return torch.device(name)


@contextmanager
def out_of_memory_as_error(what: str) -> Iterator[None]:
    """Turn torch's out-of-memory exceptions within the block into a `DeviceError` that says what to do.

    Args:
        what: What was being done, as in "Encoding a slice".
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{what} needs more GPU memory than is free. Close other programs or use the CPU."
        ) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise DeviceError(
            f"{what} needs more memory than is free. Close other programs or choose a smaller model."
        ) from error
