"""Find a Python that can make SAMAdapt's environment, or say which one to install; used by run.py.

Standard library only, for Python 3.8 and newer, so that an older Python can tell what is missing.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

VERSIONS = ((3, 12), (3, 11))  # the one that Slicer embeds first
WINDOWS = os.name == "nt"
PROBE = """
import json, sys
try:
    import ensurepip, venv
    ready = sys.maxsize > 2**32
except ImportError:
    ready = False
base = getattr(sys, "_base_executable", sys.executable)
print(json.dumps([sys.version_info[:3], base, ready]))
"""


class SetupError(Exception):
    """The environment cannot be made; the text says why and what to do."""


@dataclass(frozen=True)
class Interpreter:
    """A Python that was asked for its version."""

    version: tuple[int, ...]
    executable: str
    makes_environments: bool

    def __str__(self) -> str:
        return "Python {} ({})".format(".".join(map(str, self.version)), self.executable)


def clean_variables() -> dict[str, str]:
    """Return the process environment without what would lead Python to foreign packages."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__", "VIRTUAL_ENV")
    return {**{k: v for k, v in os.environ.items() if k not in foreign}, "PYTHONNOUSERSITE": "1"}


def ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a short command outside every foreign Python setting and keep what it says."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=clean_variables(), check=False
    )


def candidate_commands() -> list[list[str]]:
    """Return every command that may start a suitable Python, likely ones first."""
    home, pyenv = Path.home(), Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    names = [f"python{major}.{minor}" for major, minor in VERSIONS] + ["python3", "python"]
    commands = [[sys.executable]] + [[path] for path in map(shutil.which, names) if path]
    if WINDOWS and shutil.which("py"):
        commands += [["py", f"-{major}.{minor}"] for major, minor in VERSIONS]
    places = [(pyenv / "versions", "*/bin/python"), (pyenv / "pyenv-win/versions", "*/python.exe")]
    for major, minor in VERSIONS:
        version = f"{major}.{minor}"
        places += [
            (home / ".local/share/uv/python", f"*-{version}*/bin/python3"),
            (Path("/opt/homebrew/bin"), f"python{version}"),
            (Path("/usr/local/bin"), f"python{version}"),
            (Path("/usr/bin"), f"python{version}"),
            (Path("/Library/Frameworks/Python.framework/Versions"), f"{version}/bin/python{version}"),
        ]
    return commands + [
        [str(path)] for folder, name in places for path in sorted(folder.glob(name), reverse=True)
    ]


def probe(command: Sequence[str]) -> Interpreter | None:
    """Ask a Python for its version and whether it can make environments; None where it does not answer."""
    try:
        version, executable, ready = json.loads(ask([*command, "-c", PROBE]).stdout)
        return Interpreter(tuple(version), str(executable), bool(ready))
    except (OSError, ValueError):
        return None


def rank(interpreters: Sequence[Interpreter]) -> list[Interpreter]:
    """Keep each suitable Python once: 3.12 before 3.11, otherwise in the order found."""
    usable: dict[str, Interpreter] = {}
    for one in interpreters:
        if one.makes_environments and one.version[:2] in VERSIONS:
            usable.setdefault(os.path.realpath(one.executable), one)
    return sorted(usable.values(), key=lambda one: VERSIONS.index((one.version[0], one.version[1])))


def advice(system: str, found: Sequence[Interpreter]) -> str:
    """Say in plain words which Python is missing and how to get it."""
    half = [one for one in found if one.version[:2] in VERSIONS and not one.makes_environments]
    if half:
        minor = half[0].version[1]
        return (
            f"{half[0]} is there, but it cannot make environments. Install its venv module "
            f"(Debian, Ubuntu: sudo apt install python3.{minor}-venv) or a 64-bit Python, and run this again."
        )
    others = sorted({".".join(map(str, one.version[:2])) for one in found})
    how = {
        "Windows": "Install it with 'winget install Python.Python.3.12' or from python.org",
        "Darwin": "Install it with 'brew install python@3.12' or from python.org",
    }.get(
        system,
        "Install it with its venv module (Ubuntu 24.04: sudo apt install python3.12-venv; "
        "Debian 12: sudo apt install python3.11-venv; Fedora: sudo dnf install python3.12)",
    )
    return (
        f"SAMAdapt needs Python 3.12 or 3.11, but only {', '.join(others) or 'none'} was found. {how}, "
        "and run this again; a Python in an unusual place is named with --python PATH."
    )


def find_interpreters(explicit: str | None) -> list[Interpreter]:
    """Return the suitable Pythons, best first.

    Raises:
        SetupError: None is suitable.
    """
    commands = [[explicit]] if explicit else candidate_commands()
    found = [one for one in map(probe, commands) if one is not None]
    ranked = rank(found)
    if explicit and not ranked:
        came = str(found[0]) if found else f"{explicit}, which does not start as a Python"
        raise SetupError(f"--python wants a Python 3.12 or 3.11 with its venv module, but got {came}.")
    if not ranked:
        raise SetupError(advice(platform.system(), found))
    return ranked
