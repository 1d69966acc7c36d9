"""Make SAMAdapt's own environment, and keep it while it fits; used by run.py.

The environment is the folder .venv in the project. It is made once, used again while pyproject.toml stays the
same, and made anew when it is broken or half made; deleting it is safe.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence

from find_python import WINDOWS, Interpreter, SetupError, ask, clean_variables, find_interpreters

PROJECT = Path(__file__).resolve().parents[1]
ENVIRONMENT = PROJECT / ".venv"
STAMP = ENVIRONMENT / "samadapt.json"
LOG = ENVIRONMENT / "setup.log"
ENVIRONMENT_PYTHON = ENVIRONMENT / ("Scripts/python.exe" if WINDOWS else "bin/python")

EXTRAS = "scene,test"
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OFFERS = {
    "cpu": "gets PyTorch for the processor",
    "cuda": "gets PyTorch for CUDA",
    "none": "gets no PyTorch",
    "broken": "makes no working environment",
}
OLDEST_PIP = (23, 2)  # older ones download whole files where a look at the metadata would do

HEALTHY = """
import importlib.util, sys
names = ("torch", "SAMAdaptLib", "pytest", "ruff")
sys.exit(not all(importlib.util.find_spec(name) for name in names))
"""


@contextmanager
def step(text: str) -> Iterator[list[str]]:
    """Print one line for one step, with its time when it is done and what was added to the yielded list."""
    print(f"  {text} ... ", end="", flush=True)
    start, notes = time.monotonic(), []
    try:
        yield notes
    except BaseException:
        print("failed", flush=True)
        raise
    print(", ".join([f"{time.monotonic() - start:.0f} s", *notes]), flush=True)


def useful_lines(log: str, count: int = 8) -> list[str]:
    """Return the last lines of pip's output that tell a person something."""
    noise = ("WARNING", "Looking in", "Collecting", "Downloading", "Using cached", "[notice]", "Preparing")
    lines = [line.rstrip() for line in log.splitlines()]
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith(noise)]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines)[-count:]


def remedy(log: str, wheels: Path | None) -> str:
    """Say what to do about a failed pip run."""
    text = log.lower()
    if "no space left" in text:
        return "The disk is full: the environment needs about 3 GB in the project folder."
    if wheels is not None and ("no matching distribution" in text or "could not find a version" in text):
        return f"A wheel is missing in {wheels}: add it, for this platform and Python, and run this again."
    signs = ("connection", "timed out", "name resolution", "ssl", "proxy", "from versions: none")
    if any(sign in text for sign in signs):
        return (
            "The package index was not reached, or has nothing for this machine: check the network and the "
            "proxy (pip config list), or install from a folder of wheels with --wheels FOLDER."
        )
    return f"The whole output of pip is in {LOG}; run this again when the cause is mended."


def pip(arguments: Sequence[str], wheels: Path | None) -> str:
    """Run the environment's pip quietly; its output goes to the log and is returned.

    Raises:
        SetupError: pip failed; holds its last useful lines and what to do.
    """
    source = ["--no-index", "--find-links", str(wheels)] if wheels else []
    command = [str(ENVIRONMENT_PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [*command, "--prefer-binary", *source, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=PROJECT,
        env=clean_variables(),
        check=False,
    )
    with LOG.open("a", encoding="utf-8") as log:
        log.write(done.stdout)
    if done.returncode:
        lines = "\n".join(f"    {line}" for line in useful_lines(done.stdout))
        raise SetupError(f"pip could not install what is needed:\n{lines}\n  {remedy(done.stdout, wheels)}")
    return done.stdout


def make_environment(interpreter: Interpreter) -> None:
    """Make an empty environment, replacing whatever stood there."""
    if ENVIRONMENT.exists():
        shutil.rmtree(ENVIRONMENT)
    done = ask([interpreter.executable, "-m", "venv", str(ENVIRONMENT)])
    if done.returncode:
        last = " ".join(useful_lines(done.stdout + done.stderr, 1))
        raise SetupError(
            f"{interpreter} could not make an environment ({last}). Try another with --python PATH."
        )


def renew_old_pip(wheels: Path | None) -> None:
    """Bring pip to a version that reads metadata without downloading whole packages."""
    version = ask(
        [str(ENVIRONMENT_PYTHON), "-c", "import pip; print(*pip.__version__.split('.')[:2])"]
    ).stdout
    if wheels is None and tuple(map(int, version.split())) < OLDEST_PIP:
        pip(["--upgrade", "pip"], wheels)


def has_nvidia_driver() -> bool:
    """Tell whether this machine has an NVIDIA driver and a card that it sees."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Path("/proc/driver/nvidia/version").exists()
    listing = ask([tool, "-L"])
    return listing.returncode == 0 and "GPU" in listing.stdout


def wants_cuda(report: dict[str, Any]) -> bool:
    """Tell from a pip installation report whether PyTorch brings NVIDIA's libraries along."""
    needs = [need for one in report["install"] for need in one["metadata"].get("requires_dist", [])]
    return any(need.lower().startswith(("nvidia-", "cuda-")) for need in needs)


def torch_offer(arguments: Sequence[str], wheels: Path | None) -> str:
    """Ask pip, without installing, which PyTorch this environment would get: cpu, cuda or none."""
    file = ENVIRONMENT / "torch-report.json"
    try:
        pip(["--dry-run", "--no-deps", "--quiet", "--report", str(file), *arguments], wheels)
    except SetupError:
        return "none"
    return "cuda" if wants_cuda(json.loads(file.read_text(encoding="utf-8"))) else "cpu"


def offer_with(interpreter: Interpreter, wanted: Sequence[str], wheels: Path | None) -> str:
    """Make an environment with this Python and tell which PyTorch it would get; broken where it cannot."""
    try:
        make_environment(interpreter)
        renew_old_pip(wheels)
    except SetupError:
        return "broken"
    return torch_offer(wanted, wheels)


def choose_torch(interpreters: Sequence[Interpreter], wheels: Path | None) -> list[str]:
    """Make an empty environment with the Python that gets the right PyTorch.

    Without an NVIDIA driver the build with CUDA is several gigabytes of no use, so that every suitable Python
    is asked for a CPU build, then PyTorch's own index, before the large one is taken.

    Returns:
        The pip arguments that install PyTorch.
    """
    driver = has_nvidia_driver()
    wanted = ["torch"] if driver else [TORCH]
    welcome = ("cpu",) if platform.system() == "Linux" and not driver else ("cpu", "cuda")
    offers = []
    for interpreter in interpreters:
        with step(str(interpreter)) as notes:
            offers.append(offer_with(interpreter, wanted, wheels))
            notes.append(OFFERS[offers[-1]])
        if offers[-1] in welcome:
            return wanted
    best = next(
        one
        for kind in ("cuda", "none", "broken")
        for one, offer in zip(interpreters, offers)
        if offer == kind
    )
    if best != interpreters[-1] or offers[-1] == "broken":
        make_environment(best)
        renew_old_pip(wheels)
    index = ["--index-url", TORCH_CPU_INDEX, TORCH]
    if wheels is None and torch_offer([*index, "--retries", "1", "--timeout", "15"], wheels) == "cpu":
        return index
    if "cuda" in offers:
        print("  No CPU build of PyTorch was found; the build with CUDA comes instead (about 3 GB).")
    return wanted


def wanted_stamp(python: str | None) -> dict[str, str]:
    """Return what the stamp of an environment that fits this tree holds."""
    digest = hashlib.sha256((PROJECT / "pyproject.toml").read_bytes()).hexdigest()
    return {"pyproject": digest, "folder": str(ENVIRONMENT), "extras": EXTRAS, "python": python or ""}


def read_stamp() -> dict[str, str]:
    """Return the stamp, which is written last; empty where the environment is half made or not there."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def is_healthy() -> bool:
    """Tell whether the environment's Python starts and finds the main packages."""
    try:
        return ask([str(ENVIRONMENT_PYTHON), "-c", HEALTHY]).returncode == 0
    except OSError:
        return False


@contextmanager
def only_one() -> Iterator[None]:
    """Hold a lock that the system releases even when this process is killed."""
    with (PROJECT / ".venv.lock").open("w", encoding="utf-8") as lock:
        try:
            if WINDOWS:
                import msvcrt

                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SetupError("Another run is making the environment. Wait until it is ready.") from error
        yield


def what_to_do(stamp: dict[str, str], wanted: dict[str, str]) -> str:
    """Return "keep" for an environment that fits, "update" for an older one, "make" where none works."""
    same_place = stamp.get("folder") == wanted["folder"]  # an environment that was moved does not start
    same_python = not wanted["python"] or stamp.get("python") == wanted["python"]
    if not (same_place and same_python and is_healthy()):
        return "make"
    parts = ("pyproject", "extras")
    return "keep" if all(stamp.get(part) == wanted[part] for part in parts) else "update"


def ensure_environment(python: str | None, wheels: Path | None) -> None:
    """Make the environment, or leave it as it is when it fits.

    Args:
        python: The Python to use; None looks for one.
        wheels: Folder of wheels to install from without network; None uses pip's configured index.

    Raises:
        SetupError: No suitable Python, or pip failed.
    """
    wanted = wanted_stamp(python)
    if what_to_do(read_stamp(), wanted) == "keep":  # needs no lock, so that a read-only project works too
        return
    with only_one():
        stamp = read_stamp()
        action = what_to_do(stamp, wanted)  # asked again: another run may just have made it
        if action == "make":
            print("Making the environment .venv (once; some minutes, about 3 GB)", flush=True)
            torch = choose_torch(find_interpreters(python), wheels)
            with step("Installing PyTorch"):
                pip(torch, wheels)
        elif action == "update":
            print("Bringing the environment .venv up to date with pyproject.toml", flush=True)
            wanted["python"] = stamp["python"]
            STAMP.unlink()
        if action != "keep":
            with step("Installing SAMAdapt and what it needs"):
                pip(["--editable", f".[{EXTRAS}]"], wheels)
            STAMP.write_text(json.dumps(wanted), encoding="utf-8")
