"""`samadapt models`: the list of models, and their files on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from SAMAdaptLib import store
from SAMAdaptLib.cards import ModelCard, all_cards, find_card
from SAMAdaptLib.errors import CardError, WeightsError

_TABLE_HEAD = "| model | prompts | trained on | licence of the weights | file |\n|---|---|---|---|---|"


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    parser = commands.add_parser("models", help="list, show, download, add, check and remove models")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all models, and which are on this machine")
    listing.add_argument("--markdown", action="store_true", help="as the table of the README")
    listing.set_defaults(run=_list)
    for name, run, text in (
        ("show", _show, "every fact about a model"),
        ("download", _download, "fetch a model's file, verified; an interrupted download goes on"),
        ("verify", _verify, "check a stored file against its card, and that its network loads it"),
        ("remove", _remove, "delete a model's file from this machine"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("name", help="name of a model")
        action.set_defaults(run=run)
        if name == "download":
            action.add_argument("--yes", action="store_true", help="accept the licence without being asked")
    adding = actions.add_parser("add", help="take a file that you brought by hand")
    adding.add_argument("file", type=Path)
    adding.add_argument("--card", required=True, help="name of the model it is")
    adding.set_defaults(run=_add)


def markdown_table() -> str:
    """Return the model table of the README."""
    rows = [_TABLE_HEAD]
    for card in all_cards():
        prompts = ", ".join(card.prompts) or "none (automatic)"
        name = f"**{card.title}** `{card.name}`" + (" (default)" if card.default else "")
        rows.append(
            f"| {name} | {prompts} | {', '.join(card.modalities)} | {card.licence} | {_where(card)} |"
        )
    return "\n".join(rows) + "\n"


def _where(card: ModelCard) -> str:
    if card.source.kind == "shipped":
        return f"ships with SAMAdapt, {card.bytes / 1e6:.0f} MB"
    size = f", {card.bytes / 1e6:.0f} MB" if card.bytes else ""
    index = "an npm registry" if card.source.registry == "npm" else "a Python package index"
    how = {"package": f"download from {index}", "url": "download", "manual": "bring it by hand"}
    return how[card.source.kind] + size


def _list(parsed: argparse.Namespace) -> int:
    if parsed.markdown:
        print(markdown_table(), end="")
        return 0
    from SAMAdaptLib.loading import is_here

    width = max(len(card.name) for card in all_cards())
    for card in all_cards():
        state = "ready" if is_here(card) else _where(card)
        print(f"{card.name:{width}}  {card.title}: {', '.join(card.prompts) or 'automatic'}; {state}")
    return 0


def _show(parsed: argparse.Namespace) -> int:
    print(json.dumps(dataclasses.asdict(find_card(parsed.name)), indent=1, ensure_ascii=False))
    return 0


def _download(parsed: argparse.Namespace) -> int:
    from SAMAdaptLib.fetching import fetch_model

    card = find_card(parsed.name)
    if card.shipped_path is not None:
        print(f"{card.title} ships with SAMAdapt; nothing to fetch.")
        return 0
    if card.needs_consent and not parsed.yes:
        raise CardError(
            f"{card.title} comes under the licence '{card.licence}', which has to be accepted. Read it at "
            f"{card.repository or card.source.url} and add --yes."
        )
    path = fetch_model(card, progress=_Line().show)
    print(f"\n{card.title}: {path.name}, SHA-256 verified")
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from SAMAdaptLib.loading import load_model

    predictor = load_model(parsed.name, device="cpu")
    print(f"{predictor.card.title}: file intact (SHA-256 {predictor.checkpoint_sha256}), network loads it")
    return 0


def _add(parsed: argparse.Namespace) -> int:
    from SAMAdaptLib.loading import is_here, load_model
    from SAMAdaptLib.weights import read_checkpoint

    card = find_card(parsed.card)
    base = find_card(card.base) if card.base else None
    if base is None or is_here(base):
        load_model(card.name, device="cpu", checkpoint=parsed.file)
    else:
        read_checkpoint(parsed.file)
        print(f"{card.title} stands on {base.title}: run `samadapt models download {base.name}` as well.")
    stored = store.add(parsed.file, {"name": card.name, "licence": card.licence, "sha256": card.sha256})
    print(f"{card.title}: stored {stored.path.name}, SHA-256 {stored.sha256}")
    return 0


def _remove(parsed: argparse.Namespace) -> int:
    from SAMAdaptLib.loading import stored_sha256

    card = find_card(parsed.name)
    sha256 = stored_sha256(card)
    if sha256 is None or not store.remove(sha256):
        raise WeightsError(f"The file of {card.title} is not in the model store; there is nothing to remove.")
    print(f"{card.title}: removed")
    return 0


class _Line:
    """One line that says how much of a download is there."""

    def show(self, done_bytes: int, total_bytes: int | None) -> None:
        of = f" of {total_bytes / 1e6:.0f}" if total_bytes else ""
        print(f"\r{done_bytes / 1e6:.0f}{of} MB", end="", file=sys.stderr, flush=True)
