"""The model store: checkpoints on this machine, found by the SHA-256 of their bytes.

One folder, by default the user's data folder (`SAMADAPT_MODELS` names another). Each file lies in a folder
of its hash beside a card of facts, which is written last: what has no card is not there. Unfinished
downloads stay under `partial` and are gone on with.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.files import atomic_path, sha256_of_file

FOLDER_VARIABLE = "SAMADAPT_MODELS"
_CARD = "card.json"
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint in the store.

    Attributes:
        sha256: Of the file.
        path: Where the file lies.
        size_bytes: Length of the file.
        card: Facts that were given with it (name, licence, ...); empty if none were.
    """

    sha256: str
    path: Path
    size_bytes: int
    card: Mapping[str, Any]


def folder() -> Path:
    """Return the folder of the store; it need not exist."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser() / "SAMAdapt" / "models"
    if sys.platform == "darwin":
        return Path("~/Library/Application Support/SAMAdapt/models").expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "SAMAdapt" / "models"


def partial_folder() -> Path:
    """Return the folder for unfinished downloads, made if needed."""
    path = folder() / "partial"
    path.mkdir(parents=True, exist_ok=True)
    return path


def find(sha256: str) -> Path | None:
    """Return the path of the checkpoint with this hash, or None; a file cut short does not count."""
    entry = _read(sha256)
    return entry.path if entry else None


def add(
    file: str | os.PathLike[str], card: Mapping[str, Any] | None = None, *, move: bool = False
) -> StoredModel:
    """Put a checkpoint into the store; one that is there already is left as it is.

    Args:
        file: The checkpoint.
        card: Facts to keep beside it; "sha256", if given, must be the file's.
        move: Take the file away from where it lies instead of copying it.

    Raises:
        WeightsError: The file is missing or not the one that the card names, or the store cannot be written.
    """
    source, facts = Path(file), dict(card or {})
    if not source.is_file():
        raise WeightsError(f"A checkpoint file was wanted, but {source.name} is not there; check its path.")
    sha256 = sha256_of_file(source)
    wanted = str(facts.get("sha256") or sha256).lower()
    if sha256 != wanted:
        raise WeightsError(
            f"{source.name} should have the SHA-256 {wanted[:16]}..., but has {sha256[:16]}...: it is "
            "damaged or another file. Fetch it again, or add it without naming a model."
        )
    known = _read(sha256)
    if known is not None:
        return known
    try:
        return _write(source, sha256, facts, move)
    except OSError as error:
        raise WeightsError(
            f"The checkpoint {source.name} could not be put into the model store ({error.strerror}); free "
            f"some space or set {FOLDER_VARIABLE} to a folder that can be written."
        ) from error


def list_models() -> list[StoredModel]:
    """Return what the store holds, by name of the file."""
    if not folder().is_dir():
        return []
    entries = [_read(path.name) for path in folder().iterdir() if _HASH.fullmatch(path.name)]
    return sorted((entry for entry in entries if entry), key=lambda entry: (entry.path.name, entry.sha256))


def remove(sha256: str) -> bool:
    """Remove a checkpoint and its card; return whether it was there."""
    there = find(sha256) is not None
    place = folder() / sha256.lower()
    if _HASH.fullmatch(place.name) and place.is_dir():
        (place / _CARD).unlink(missing_ok=True)
        shutil.rmtree(place)
    return there


def _write(source: Path, sha256: str, facts: Mapping[str, Any], move: bool) -> StoredModel:
    place = folder() / sha256
    place.mkdir(parents=True, exist_ok=True)
    target = place / source.name
    with atomic_path(target) as temporary:
        if move:
            shutil.move(source, temporary)
        else:
            shutil.copyfile(source, temporary)
    size = target.stat().st_size
    content = {**facts, "sha256": sha256, "bytes": size, "file": source.name}
    with atomic_path(place / _CARD) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return StoredModel(sha256, target, size, content)


def _read(sha256: str) -> StoredModel | None:
    sha256 = sha256.lower()
    if not _HASH.fullmatch(sha256):
        return None
    place = folder() / sha256
    try:
        card = json.loads((place / _CARD).read_text(encoding="utf-8"))
        path = place / Path(card["file"]).name
        complete = path.stat().st_size == card["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return StoredModel(sha256, path, card["bytes"], card) if complete else None
