"""What a wheel and a source archive carry, and that the installed package finds its own data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3]
CARDS = json.loads((PROJECT / "Resources" / "Models.json").read_text(encoding="utf-8"))
BUILD = "from setuptools import build_meta as b; b.build_wheel('out'); b.build_sdist('out')"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive of this tree, built beside it."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, copy)
    for name in ("SAMAdaptLib", "Resources"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return copy / "out"


def shipped_files() -> list[str]:
    """Models.json and every checkpoint that a card says is shipped, relative to Resources."""
    sources = [card["source"] for card in CARDS["models"]]
    return ["Models.json", *(source["path"] for source in sources if source["kind"] == "shipped")]


def test_the_wheel_holds_library_data_licence_and_command(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        commands = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    modules = {str(file.relative_to(PROJECT).as_posix()) for file in (PROJECT / "SAMAdaptLib").rglob("*.py")}
    assert modules <= set(names)
    assert {f"SAMAdaptLib/Resources/{name}" for name in shipped_files()} <= set(names)
    assert "SAMAdaptLib/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "samadapt = SAMAdaptLib.cli:main" in commands
    assert not [name for name in names if name.startswith(("Testing", "SAMAdapt/", "Resources"))]


def test_the_source_archive_holds_what_a_wheel_is_built_from(archives: Path) -> None:
    (source,) = archives.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"Resources/{name}" for name in shipped_files()} <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "SAMAdaptLib/__init__.py"} <= names


def test_the_installed_package_finds_its_models(archives: Path, tmp_path: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import SAMAdaptLib.cards as c; print(c.__file__); print(*[m.name for m in c.all_cards()])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    where, names = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert names.split() == [card["name"] for card in CARDS["models"]]


def test_every_package_of_the_library_is_listed() -> None:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"]) - {"SAMAdaptLib.Resources"}
    folders = {file.parent for file in (PROJECT / "SAMAdaptLib").rglob("*.py")}
    assert listed == {".".join(folder.relative_to(PROJECT).parts) for folder in folders}


def test_recorded_arrays_stay_small() -> None:
    files = [file for file in (PROJECT / "Testing" / "Data").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 15e6, "every version stays in the repository for ever"
