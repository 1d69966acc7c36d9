"""Writing without halves: a file appears under its name only when it is complete."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` and rename it onto `path` when the block succeeds.

    The temporary name keeps every suffix of the target, because writers choose the format by it.
    When the block raises, the temporary file is removed and an older file of that name is untouched.

    Args:
        path: The file to write; its folder must exist.

    Yields:
        The path to write to; no file is there yet.
    """
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=".samadapt-", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        yield temporary
        os.replace(temporary, target)


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
