"""Two guards around all that touches headers: no value of theirs in a log, no raw error to a person."""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pydicom.errors import BytesLengthException, InvalidDicomError

from SAMAdaptLib.errors import DicomError, SAMAdaptError

_LOGGERS = ("pydicom", "highdicom")

DAMAGE = (
    ArithmeticError,
    AttributeError,
    BytesLengthException,
    EOFError,
    InvalidDicomError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What pydicom and highdicom raise where bytes or values break the format; values are read when asked for."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep values of headers out of warnings and logs: pydicom quotes odd ones, and they may be names."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def told_as(sentence: str) -> Iterator[None]:
    """Turn errors about damaged files into a DicomError with this sentence; our own errors pass."""
    try:
        yield
    except SAMAdaptError:
        raise
    except DAMAGE as error:
        raise DicomError(sentence) from error
