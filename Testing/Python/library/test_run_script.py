"""The decisions of run.py and the two scripts under it; pip and real environments are not touched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import find_python
import run
import setup_environment
from find_python import Interpreter, SetupError

NEWER = Interpreter((3, 12, 1), "/opt/a/bin/python3.12", True)
OLDER = Interpreter((3, 11, 7), "/opt/b/bin/python3.11", True)
BARE = Interpreter((3, 11, 2), "/usr/bin/python3.11", False)
FOREIGN = Interpreter((3, 14, 0), "/opt/c/bin/python3.14", True)


# ---- the command line ----


def test_options_are_taken_out_wherever_they_stand(tmp_path: Path) -> None:
    words = ["--python=/opt/python", "demo", "--volume", "a b.nii", "--wheels", str(tmp_path), "-x"]
    request = run.read_arguments(words)
    assert request == run.Request("demo", tmp_path, "/opt/python", ["--volume", "a b.nii", "-x"])


def test_a_second_word_that_names_a_command_is_passed_on() -> None:
    assert run.read_arguments(["test", "demo"]) == run.Request("test", None, None, ["demo"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tset"], "one of demo, test, setup, but 'tset' came"),
        (["test", "--wheels"], "--wheels needs a value"),
        (["test", "--wheels", "no/such/folder"], "no folder .*folder"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        run.read_arguments(words)


def test_a_wrong_command_line_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["tset"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- which Python ----


def test_the_python_that_slicer_embeds_comes_first_and_each_only_once() -> None:
    assert find_python.rank([OLDER, FOREIGN, BARE, NEWER, OLDER]) == [NEWER, OLDER]


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ("Linux", "sudo apt install python3.12-venv"),
        ("Darwin", "brew install python@3.12"),
        ("Windows", "winget install Python.Python.3.12"),
    ],
)
def test_a_missing_python_is_named_with_the_way_to_get_it(system: str, words: str) -> None:
    text = find_python.advice(system, [FOREIGN])
    assert words in text
    assert "only 3.14 was found" in text


def test_a_python_without_its_venv_module_is_not_called_missing() -> None:
    text = find_python.advice("Linux", [FOREIGN, BARE])
    assert "python3.11-venv" in text
    assert "3.14" not in text


def test_this_python_answers_the_probe() -> None:
    answer = find_python.probe([sys.executable])
    assert answer is not None
    assert answer.version == sys.version_info[:3]
    assert answer.makes_environments


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "print('hello')"])
def test_something_that_is_no_python_gives_no_interpreter(code: str, tmp_path: Path) -> None:
    impostor = tmp_path / "impostor.py"
    impostor.write_text(code)
    assert find_python.probe([sys.executable, str(impostor)]) is None
    assert find_python.probe([str(tmp_path / "absent")]) is None


def test_an_unsuitable_explicit_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_python, "probe", lambda command: FOREIGN)
    with pytest.raises(SetupError, match=r"--python wants a Python 3\.12 or 3\.11 .*got Python 3\.14\.0"):
        find_python.find_interpreters("/opt/c/bin/python3.14")


# ---- which PyTorch ----


def report(requires: Sequence[str]) -> dict[str, object]:
    return {"install": [{"metadata": {"name": "torch", "requires_dist": list(requires)}}]}


@pytest.mark.parametrize(
    ("requires", "cuda"),
    [
        (["filelock", "sympy>=1.13"], False),
        (["filelock", 'nvidia-cudnn-cu13==9.20; platform_system == "Linux"'], True),
        (["cuda-toolkit[cublas]==13.0.3"], True),
    ],
)
def test_cuda_is_seen_in_what_pytorch_asks_for(requires: list[str], cuda: bool) -> None:
    assert setup_environment.wants_cuda(report(requires)) is cuda


@pytest.mark.parametrize(
    ("status", "said", "there"),
    [
        (0, "GPU 0: NVIDIA RTX (UUID: GPU-1)", True),
        (9, "couldn't communicate with the driver", False),
        (0, "", False),
    ],
)
def test_a_driver_counts_only_when_it_sees_a_card(
    monkeypatch: pytest.MonkeyPatch, status: int, said: str, there: bool
) -> None:
    answer = subprocess.CompletedProcess(["nvidia-smi"], status, said, "")
    monkeypatch.setattr(setup_environment.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(setup_environment, "ask", lambda command: answer)
    assert setup_environment.has_nvidia_driver() is there


class Machine:
    """Stands in for pip and venv: tells which environments were made, in order, and offers PyTorch builds."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, offers: dict[str, str], driver: bool, system: str
    ) -> None:
        self.made: list[Interpreter] = []
        self.offers = offers
        monkeypatch.setattr(setup_environment, "has_nvidia_driver", lambda: driver)
        monkeypatch.setattr(setup_environment.platform, "system", lambda: system)
        monkeypatch.setattr(setup_environment, "make_environment", self.make)
        monkeypatch.setattr(setup_environment, "renew_old_pip", lambda wheels: None)
        monkeypatch.setattr(setup_environment, "torch_offer", self.offer)

    def make(self, interpreter: Interpreter) -> None:
        self.made.append(interpreter)
        if self.offers[self.version()] == "broken":
            raise SetupError("its ensurepip does not work")

    def version(self) -> str:
        return ".".join(map(str, self.made[-1].version[:2]))

    def offer(self, arguments: Sequence[str], wheels: Path | None) -> str:
        if "--index-url" in arguments:
            return self.offers.get("index", "none")
        return self.offers[self.version()]


PINNED = [setup_environment.TORCH]
CPU_INDEX = ["--index-url", setup_environment.TORCH_CPU_INDEX, setup_environment.TORCH]


@pytest.mark.parametrize(
    ("offers", "driver", "system", "arguments", "last"),
    [
        ({"3.12": "cpu"}, False, "Linux", PINNED, NEWER),
        ({"3.12": "cuda", "3.11": "cpu"}, False, "Linux", PINNED, OLDER),
        ({"3.12": "cuda", "3.11": "cuda", "index": "cpu"}, False, "Linux", CPU_INDEX, NEWER),
        ({"3.12": "none", "3.11": "cuda"}, False, "Linux", PINNED, OLDER),
        ({"3.12": "cuda", "3.11": "broken"}, False, "Linux", PINNED, NEWER),
        ({"3.12": "broken", "3.11": "cpu"}, False, "Linux", PINNED, OLDER),
        ({"3.12": "cuda", "3.11": "cpu"}, True, "Linux", ["torch"], NEWER),
        ({"3.12": "cpu"}, False, "Darwin", PINNED, NEWER),
        ({"3.12": "none", "3.11": "cpu"}, False, "Windows", PINNED, OLDER),
        ({"3.12": "none", "3.11": "none"}, False, "Linux", PINNED, NEWER),
    ],
)
def test_pytorch_is_chosen_by_driver_and_offer(
    monkeypatch: pytest.MonkeyPatch,
    offers: dict[str, str],
    driver: bool,
    system: str,
    arguments: list[str],
    last: Interpreter,
) -> None:
    machine = Machine(monkeypatch, offers, driver, system)
    assert setup_environment.choose_torch([NEWER, OLDER], None) == arguments
    assert machine.made[-1] == last


def test_when_no_python_makes_an_environment_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, {"3.12": "broken", "3.11": "broken"}, driver=False, system="Linux")
    with pytest.raises(SetupError, match="its ensurepip does not work"):
        setup_environment.choose_torch([NEWER, OLDER], None)


def test_a_large_download_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Machine(monkeypatch, {"3.12": "cuda", "3.11": "cuda"}, driver=False, system="Linux")
    assert setup_environment.choose_torch([NEWER, OLDER], None) == PINNED
    assert "about 3 GB" in capsys.readouterr().out


def test_a_folder_of_wheels_never_leads_to_another_index(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Machine(monkeypatch, {"3.12": "none", "3.11": "cuda", "index": "cpu"}, driver=False, system="Linux")
    assert setup_environment.choose_torch([NEWER, OLDER], tmp_path) == PINNED


# ---- keeping the environment ----


@pytest.mark.parametrize(
    ("change", "healthy", "python", "action"),
    [
        ({}, True, None, "keep"),
        ({"pyproject": "older"}, True, None, "update"),
        ({"extras": "test"}, True, None, "update"),
        ({"folder": "/moved/.venv"}, True, None, "make"),
        ({}, False, None, "make"),
        ({}, True, "/opt/other/python", "make"),
    ],
)
def test_the_environment_is_kept_updated_or_made(
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    healthy: bool,
    python: str | None,
    action: str,
) -> None:
    monkeypatch.setattr(setup_environment, "is_healthy", lambda: healthy)
    stamp = {**setup_environment.wanted_stamp(None), **change}
    assert setup_environment.what_to_do(stamp, setup_environment.wanted_stamp(python)) == action


def test_a_half_made_environment_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stamp = tmp_path / "samadapt.json"
    monkeypatch.setattr(setup_environment, "STAMP", stamp)
    monkeypatch.setattr(setup_environment, "is_healthy", lambda: True)
    wanted = setup_environment.wanted_stamp(None)
    for text in ("", '{"pyproject": ', "[]"):
        stamp.write_text(text)
        assert setup_environment.what_to_do(setup_environment.read_stamp(), wanted) == "make"
    stamp.write_text(json.dumps(wanted))
    assert setup_environment.what_to_do(setup_environment.read_stamp(), wanted) == "keep"


def test_an_environment_that_fits_is_not_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "samadapt.json").write_text(json.dumps(setup_environment.wanted_stamp(None)))
    monkeypatch.setattr(setup_environment, "STAMP", tmp_path / "samadapt.json")
    monkeypatch.setattr(setup_environment, "is_healthy", lambda: True)
    for forbidden in ("only_one", "make_environment", "pip"):
        monkeypatch.delattr(setup_environment, forbidden)
    setup_environment.ensure_environment(None, None)


def test_two_runs_never_make_it_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup_environment, "PROJECT", tmp_path)
    with (
        setup_environment.only_one(),
        pytest.raises(SetupError, match="Another run"),
        setup_environment.only_one(),
    ):
        pass
    with setup_environment.only_one():
        pass


# ---- what a person reads when pip fails ----

PIP_SAID = """Looking in links: /wheels
Collecting torch==2.13.0
  Downloading torch-2.13.0.whl (200 MB)
WARNING: Retrying after connection broken
ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)
ERROR: No matching distribution found for torch==2.13.0
[notice] A new release of pip is available
"""


def test_only_the_lines_that_matter_are_shown() -> None:
    assert [line[:30] for line in setup_environment.useful_lines(PIP_SAID)] == [
        "ERROR: Could not find a versio",
        "ERROR: No matching distributio",
    ]
    assert setup_environment.useful_lines("Collecting a\nkilled\n\n") == ["killed"]


@pytest.mark.parametrize(
    ("log", "wheels", "words"),
    [
        ("OSError: [Errno 28] No space left on device", None, "disk is full"),
        (PIP_SAID, Path("/wheels"), "wheel is missing in"),
        ("NewConnectionError: Temporary failure in name resolution", None, "--wheels FOLDER"),
        ("error: metadata-generation-failed", None, "setup.log"),
    ],
)
def test_a_failure_ends_with_what_to_do(log: str, wheels: Path | None, words: str) -> None:
    assert words in setup_environment.remedy(log, wheels)


# ---- running the tests ----


class Commands:
    """Stands in for the environment's Python: remembers the commands and answers with set exit statuses."""

    def __init__(self, statuses: dict[str, int], output: str = "") -> None:
        self.statuses, self.output = statuses, output
        self.seen: list[str] = []

    def __call__(self, arguments: Sequence[str], quiet: bool) -> subprocess.CompletedProcess[str]:
        line = " ".join(arguments)
        self.seen.append(line)
        status = next((code for part, code in self.statuses.items() if part in line), 0)
        return subprocess.CompletedProcess(list(arguments), status, self.output if status else "")


def test_every_check_and_ring_runs_and_the_rings_run_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands({})
    monkeypatch.setattr(run, "run_python", commands)
    assert run.test([]) == 0
    assert [line for line in commands.seen if "pytest" in line] == [
        "-m pytest -q Testing/Python/library",
        "-m pytest -q Testing/Python/scene",
    ]
    for tool in ("ruff check", "ruff format --check", "mypy", "lint_imports"):
        assert sum(tool in line for line in commands.seen) == 1


@pytest.mark.parametrize("part", ["ruff check", "ruff format", "mypy", "lint_imports", "library", "scene"])
def test_one_failure_fails_the_whole_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    commands = Commands({part: 1})
    monkeypatch.setattr(run, "run_python", commands)
    assert run.test([]) == 1
    assert len([line for line in commands.seen if "import slicer" not in line]) == 6
    assert capsys.readouterr().out.splitlines()[-1].startswith("Failed: ")


def test_no_tests_found_is_a_failure_unless_words_chose_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_python", Commands({"pytest": 5}))
    assert run.test(["library"]) == 1
    assert run.test(["library", "-k", "nothing"]) == 0


def test_scene_code_that_does_not_start_is_a_failure_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = Commands(
        {"import slicer": 1}, output="ImportError: libGL.so.1: cannot open shared object file"
    )
    monkeypatch.setattr(run, "run_python", commands)
    assert run.test(["scene"]) == 1
    said = capsys.readouterr().out
    assert "libGL.so.1: cannot open shared object file" in said
    assert "delete .venv" in said


def test_a_machine_without_scene_code_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = Commands({"import slicer": 1}, output="ModuleNotFoundError: No module named 'slicer'")
    monkeypatch.setattr(run, "run_python", commands)
    assert run.test(["scene"]) == 0
    assert "scene: not run (slicer-core has no build for this machine)" in capsys.readouterr().out
