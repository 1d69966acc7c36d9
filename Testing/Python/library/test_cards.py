"""The list of models, and the table of the README that is made from it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from SAMAdaptLib.cards import PROMPT_KINDS, ModelCard, all_cards, cards_from_json, cards_that_take, find_card
from SAMAdaptLib.cli.models import markdown_table
from SAMAdaptLib.errors import CardError
from SAMAdaptLib.fetching import CONVERSIONS
from SAMAdaptLib.models import ARCHITECTURES

README = Path(__file__).resolve().parents[3] / "README.md"
MINIMAL = {
    "name": "a.b",
    "title": "A",
    "architecture": "sam",
    "source": {"kind": "manual"},
    "licence": "MIT",
    "default": True,
}


def cards_text(*changes: dict[str, object]) -> str:
    return json.dumps({"models": [MINIMAL | change for change in changes]})


@pytest.mark.parametrize("card", all_cards(), ids=lambda card: card.name)
def test_every_card_is_complete(card: ModelCard) -> None:
    assert card.architecture in ARCHITECTURES
    assert re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", card.name)
    assert card.licence
    assert card.paper
    assert card.modalities
    assert set(card.prompts) <= set(PROMPT_KINDS)
    assert card.sha256 == "" or re.fullmatch(r"[0-9a-f]{64}", card.sha256)
    if card.source.kind in ("package", "url"):
        hashes = [part.sha256 for part in card.source.parts] or [card.sha256]
        assert all(re.fullmatch(r"[0-9a-f]{64}", sha256) for sha256 in hashes), "what is fetched is verified"
        assert card.bytes
        assert all(part.bytes for part in card.source.parts)
    if card.source.parts:
        assert card.source.conversion in CONVERSIONS
    if card.source.kind in ("url", "manual"):
        assert card.source.url.startswith("https://")
    if card.base:
        assert find_card(card.base).architecture == "sam"
    values = [item.value for item in card.classes]
    assert values == sorted(set(values))
    for item in card.classes:
        for code in (item.category, item.type):
            assert code == "" or re.fullmatch(r"[A-Za-z0-9]+\^[^\^]+\^[^\^]+", code)


def test_the_default_needs_no_download() -> None:
    card = find_card()
    assert card.source.kind == "shipped"
    assert card.shipped_path is not None
    assert card.shipped_path.stat().st_size == card.bytes < 25e6


def test_the_readme_shows_the_table_of_the_cards() -> None:
    text = README.read_text(encoding="utf-8")
    between = text.split("<!-- models -->\n")[1].split("<!-- /models -->")[0]
    assert between == markdown_table(), "run `samadapt models list --markdown` and paste it into README.md"


def test_a_wrong_name_gets_the_nearest_ones() -> None:
    with pytest.raises(CardError, match=r"mobile_sam\.sa1b"):
        find_card("mobile_sam.sa")


def test_kinds_of_prompts_lead_to_models() -> None:
    assert "lite_medsam.medsam" in cards_that_take("box")
    assert "lite_medsam.medsam" not in cards_that_take("point")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("no json", "should be JSON"),
        ("{}", "should be JSON"),
        (cards_text({}, {"default": False}), "twice"),
        (cards_text({"default": False}), "exactly one model as default"),
        (cards_text({"colour": "blue"}), r"unknown fields \['colour'\]"),
        (cards_text({"prompts": ["voice"]}), "voice"),
        (json.dumps({"models": [{"name": "a.b"}]}), "lacks"),
    ],
)
def test_broken_lists_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(CardError, match=sentence):
        cards_from_json(text, "Models.json")
