from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from SAMAdaptLib import store
from SAMAdaptLib.errors import WeightsError

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.pth"
    path.write_bytes(CONTENT)
    return path


def test_added_file_is_found_by_its_hash_and_the_original_stays(file: Path) -> None:
    added = store.add(file, {"name": "a.b", "licence": "Apache-2.0"})
    assert store.find(SHA256) == store.find(SHA256.upper()) == added.path
    assert added.path.read_bytes() == CONTENT
    assert added.path.name == "net.pth"
    assert added.card["name"] == "a.b"
    assert file.is_file()


def test_moved_file_is_gone_from_where_it_lay(file: Path) -> None:
    assert store.add(file, move=True).path.read_bytes() == CONTENT
    assert not file.exists()


def test_file_that_its_card_does_not_name_is_refused(file: Path) -> None:
    with pytest.raises(WeightsError, match=f"but has {SHA256[:16]}"):
        store.add(file, {"sha256": "0" * 64})
    assert store.list_models() == []


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not there"):
        store.add(tmp_path / "none.pth")


def test_unknown_and_malformed_hashes_are_not_found() -> None:
    assert store.find("0" * 64) is None
    assert store.find("../../secret") is None
    assert store.remove("..") is False


def test_list_is_sorted_and_remove_takes_one(tmp_path: Path) -> None:
    for name in ("b.pth", "a.pth"):
        (tmp_path / name).write_text(name)
        store.add(tmp_path / name)
    names = [entry.path.name for entry in store.list_models()]
    assert names == ["a.pth", "b.pth"]
    assert store.remove(store.list_models()[0].sha256) is True
    assert [entry.path.name for entry in store.list_models()] == ["b.pth"]


def test_adding_twice_keeps_the_first_card(file: Path) -> None:
    store.add(file, {"name": "first"})
    assert store.add(file, {"name": "second"}).card["name"] == "first"


def test_file_cut_short_does_not_count_and_can_be_added_again(file: Path) -> None:
    path = store.add(file).path
    path.write_bytes(CONTENT[:10])
    assert store.find(SHA256) is None
    assert store.list_models() == []
    assert store.add(file).path.read_bytes() == CONTENT


def test_entry_without_card_is_what_a_kill_leaves_and_does_not_count(file: Path, own_folder: Path) -> None:
    place = own_folder / SHA256
    place.mkdir(parents=True)
    (place / "net.pth").write_bytes(CONTENT)
    assert store.find(SHA256) is None
    (place / "card.json").write_text("{")
    assert store.find(SHA256) is None
    assert store.add(file).path == place / "net.pth"


def test_card_cannot_lead_out_of_its_folder(file: Path, own_folder: Path) -> None:
    stored = store.add(file)
    card = stored.path.parent / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "file": "../../net.pth"}))
    assert store.find(SHA256) == own_folder / SHA256 / "net.pth"


def test_default_folder_is_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(store.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    if sys.platform != "darwin":
        assert store.folder() == tmp_path / "SAMAdapt" / "models"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may write anywhere"
)
def test_store_that_cannot_be_written_says_what_to_do(file: Path, own_folder: Path) -> None:
    own_folder.mkdir()
    own_folder.chmod(0o500)
    with pytest.raises(WeightsError, match="set SAMADAPT_MODELS"):
        store.add(file)
