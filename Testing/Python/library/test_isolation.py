"""The rules that conftest.py puts on every test: no network, no writing to the user's folders."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 80)])
def test_a_connection_to_another_machine_is_refused(address: tuple[str, int]) -> None:
    with pytest.raises(RuntimeError, match="Tests use no network"):
        socket.create_connection(address, timeout=0.1)


def test_a_raw_connect_is_refused_too() -> None:
    with socket.socket() as plain, pytest.raises(RuntimeError, match=r"192\.0\.2\.1"):
        plain.connect_ex(("192.0.2.1", 80))


def test_loopback_is_open() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client:
        assert client.getpeername() == server.getsockname()


def test_the_home_folder_is_a_temporary_one() -> None:
    assert Path(tempfile.gettempdir()) in Path.home().parents
    assert Path.home().name.startswith("samadapt-home-")
