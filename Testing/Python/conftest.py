"""Shared by all rings: real data by one setting, no network, no touch of the user's folders."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

PROJECT = Path(__file__).resolve().parents[2]
REAL_DATA = Path(os.environ.get("SAMADAPT_DATA") or PROJECT.parent / "shared" / "data")
NO_REAL_DATA = "real data is not here"

# Set before any test imports a library: these are read once, when NumPy, PyTorch or Matplotlib start.
_HOME = Path(tempfile.mkdtemp(prefix="samadapt-home-"))
for _name in (
    "HOME",
    "USERPROFILE",
    "APPDATA",
    "LOCALAPPDATA",
    "XDG_CACHE_HOME",
    "XDG_DATA_HOME",
    "XDG_CONFIG_HOME",
):
    os.environ[_name] = str(_HOME)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ.setdefault(_name, str(min(2, os.cpu_count() or 1)))
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("SAMADAPT_MODELS", None)

# The same examples in every run, however slow the machine is.
settings.register_profile("samadapt", deadline=None, derandomize=True)
settings.load_profile("samadapt")


class NetworkRefusedError(RuntimeError):
    """Not an OSError, so that code which survives a lost connection cannot hide an attempt."""


def _refuse_unless_loopback(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        if ipaddress.ip_address(str(name)).is_loopback:
            return
    except ValueError:
        pass
    raise NetworkRefusedError(
        f"Tests use no network, but this one asked for {name!r}. Serve it on 127.0.0.1."
    )


def _guard_connect(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_unless_loopback(address[0])
        return connect(self, address)

    return guarded


def _guard_lookup(lookup: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(host: Any, *args: Any, **options: Any) -> Any:
        _refuse_unless_loopback(host)
        return lookup(host, *args, **options)

    return guarded


def pytest_configure(config: pytest.Config) -> None:
    """Close the network and give Matplotlib a cache that outlives one run."""
    socket.socket.connect = _guard_connect(socket.socket.connect)  # type: ignore[method-assign]
    socket.socket.connect_ex = _guard_connect(socket.socket.connect_ex)  # type: ignore[method-assign]
    socket.getaddrinfo = _guard_lookup(socket.getaddrinfo)
    if config.cache is not None:
        os.environ["MPLCONFIGDIR"] = str(config.cache.mkdir("matplotlib"))


def pytest_unconfigure() -> None:
    """Remove the stand-in for the user's home folder."""
    shutil.rmtree(_HOME, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests on real data did not run; silence would read as success."""
    reports = terminalreporter.stats.get("skipped", [])
    files = Counter(report.fspath for report in reports if NO_REAL_DATA in str(report.longrepr))
    if files:
        where = ", ".join(f"{count} in {file}" for file, count in sorted(files.items()))
        terminalreporter.section("tests on real data that did not run")
        terminalreporter.line(
            f"{where}: no folder {REAL_DATA}; set SAMADAPT_DATA to the one with eval/, dicom/."
        )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images (eval/, dicom/, ...), read-only; the test is skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"{NO_REAL_DATA}: no folder {REAL_DATA}; set SAMADAPT_DATA to run this test")
    return REAL_DATA
