#!/usr/bin/env python3
"""Make SAMAdapt's own environment, then run the demo or the tests in it.

    python3 Testing/run.py demo             from a study to a mask, a scene and a DICOM-SEG
    python3 Testing/run.py test             every check: style, types, layers, library, scene
    python3 Testing/run.py test library     only the named ones; other words go to pytest (-k box)
    python3 Testing/run.py setup            only the environment

Anywhere on the line:
    --wheels FOLDER    install from a folder of wheels, without any network
    --python PATH      use this Python instead of looking for one

Standard library only, and starts in any Python from 3.8 on.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Sequence

from find_python import SetupError, clean_variables
from setup_environment import ENVIRONMENT_PYTHON, PROJECT, ensure_environment

COMMANDS = ("demo", "test", "setup")
CHECKS = {
    "style": ["-m", "ruff", "check", "--quiet", "."],
    "format": ["-m", "ruff", "format", "--check", "--quiet", "."],
    "types": ["-m", "mypy", "--no-error-summary"],
    "layers": ["-c", "from importlinter.cli import lint_imports_command as run; run(['--no-logo'])"],
}
RINGS = ("library", "scene")  # each in a process of its own: Slicer's scene code loads its own VTK and ITK
NO_TESTS = 5  # pytest's exit status
SCENE_REMEDY = (
    "Slicer's scene code (slicer-core) is installed, but does not start; its last words are above. "
    "It needs glibc 2.28 or newer on Linux. If that is there, delete .venv and run this again."
)


@dataclass(frozen=True)
class Request:
    """What stood on the command line."""

    command: str | None = None
    wheels: Path | None = None
    python: str | None = None
    rest: list[str] = field(default_factory=list)


def read_arguments(arguments: Sequence[str]) -> Request:
    """Take our two options and the command out; everything else is passed on in its order."""
    command: str | None = None
    options: dict[str, str] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--wheels", "--python"):
            value = value if equals else next(words, "")
            if not value:
                raise SetupError(f"{name} needs a value, but nothing came after it. Give a path.")
            options[name] = value
        elif command is None and not word.startswith("-"):
            command = word
        else:
            rest.append(word)
    if command is not None and command not in COMMANDS:
        raise SetupError(f"The command is one of {', '.join(COMMANDS)}, but {command!r} came.")
    wheels = Path(options["--wheels"]).resolve() if "--wheels" in options else None
    if wheels is not None and not wheels.is_dir():
        raise SetupError(f"--wheels wants a folder of wheel files, but there is no folder {wheels}.")
    return Request(command, wheels, options.get("--python"), rest)


def run_python(arguments: Sequence[str], quiet: bool) -> subprocess.CompletedProcess[str]:
    """Run the environment's Python in the project folder; `quiet` keeps the output for later."""
    pipe = subprocess.PIPE if quiet else None
    return subprocess.run(
        [str(ENVIRONMENT_PYTHON), *arguments],
        stdout=pipe,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        errors="replace",
        cwd=PROJECT,
        env={**clean_variables(), "PYTHONPATH": str(PROJECT / "SAMAdapt")},
        check=False,
    )


def run_check(name: str) -> str:
    """Run one static check; its output is shown only when something is wrong."""
    done = run_python(CHECKS[name], quiet=True)
    if done.returncode:
        print(done.stdout.rstrip(), flush=True)
    return "failed" if done.returncode else "passed"


def run_ring(name: str, words: Sequence[str]) -> str:
    """Run one ring of tests and let pytest speak for itself."""
    if name == "scene":
        start = run_python(["-c", "import slicer"], quiet=True)
        if "No module named 'slicer'" in start.stdout:
            return "not run (slicer-core has no build for this machine)"
        if start.returncode:
            print(f"{start.stdout.strip()}\n{SCENE_REMEDY}", flush=True)
            return "failed"
    done = run_python(["-m", "pytest", "-q", f"Testing/Python/{name}", *words], quiet=False)
    if done.returncode == NO_TESTS and words:
        return "passed (no test fits the words given)"
    return "failed" if done.returncode else "passed"


def test(words: Sequence[str]) -> int:
    """Run the named checks and rings, or all; return 0 only when none failed."""
    every = [*CHECKS, *RINGS]
    chosen = [word for word in words if word in every] or every
    others = [word for word in words if word not in every]
    results = {}
    for name in chosen:
        start = time.monotonic()
        if name in RINGS:
            print(f"{name} tests", flush=True)
        results[name] = run_check(name) if name in CHECKS else run_ring(name, others)
        print(f"{name}: {results[name]}, {time.monotonic() - start:.0f} s", flush=True)
    failed = [name for name, result in results.items() if result == "failed"]
    print(f"Failed: {', '.join(failed)}." if failed else "All passed.", flush=True)
    return 1 if failed else 0


def demo(words: Sequence[str]) -> int:
    """Run the demo in the caller's folder, so that the paths it is given mean what they say."""
    command = [str(ENVIRONMENT_PYTHON), str(PROJECT / "Testing" / "demo.py"), *words]
    return subprocess.run(command, env=clean_variables(), check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """Follow the command line; return the exit status."""
    try:
        request = read_arguments(arguments)
        if request.command is not None:
            ensure_environment(request.python, request.wheels)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"The environment .venv could not be written ({error}). Is the folder writable?", file=sys.stderr
        )
        return 2
    if request.command is None:
        print(__doc__)
        return 0 if {"-h", "--help"} & set(request.rest) else 2
    if request.command == "setup":
        print("The environment .venv is ready.")
        return 0
    return (demo if request.command == "demo" else test)(request.rest)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
