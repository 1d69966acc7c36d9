"""Prompt files: which objects to segment in a volume, as JSON that a person can write."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from SAMAdaptLib.errors import JobError, PromptError
from SAMAdaptLib.prompts import Prompts, prompts_from_json, prompts_to_json

PROMPT_FORMAT = "samadapt-prompts-1"

PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 174, 128),
    (221, 130, 101),
    (144, 144, 238),
    (216, 191, 100),
    (157, 108, 162),
    (101, 184, 214),
    (220, 110, 150),
    (150, 200, 70),
)
"""Colours for objects that name none; told apart on grey and by most colour-blind eyes."""

_EXAMPLE = '{"objects": [{"name": "liver", "prompts": [{"kind": "point", "point_ras": [40, 10, 20]}]}]}'


@dataclass(frozen=True)
class ObjectTask:
    """One object to segment.

    Args:
        name: What the segment is called.
        prompts: Where it is, in RAS mm.
        colour_rgb: 0 to 255 each.
        terminology: Slicer's seven parts divided by `~`; empty to look the name up.
        propagate: Whether to carry it beyond the prompted slices.
        slices: Range to propagate over; None for the reach of a 3-D box, else the whole volume.
    """

    name: str
    prompts: Prompts
    colour_rgb: tuple[int, int, int] = PALETTE[0]
    terminology: str = ""
    propagate: bool = True
    slices: range | None = None


def read_prompt_file(path: str | os.PathLike[str]) -> list[ObjectTask]:
    """Read a prompt file.

    Raises:
        JobError: No such file, not JSON, or without objects; shows what one looks like.
        PromptError: A prompt that holds something else than it should.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JobError(
            f"A prompt file (JSON) was wanted, but {file.name} cannot be read as one. Write for example "
            f"{_EXAMPLE}"
        ) from error
    objects = content.get("objects") if isinstance(content, dict) else None
    if not isinstance(objects, list) or not objects:
        raise JobError(f"{file.name} should list objects, but lists none. Write for example {_EXAMPLE}")
    return [_task(entry, number, file.name) for number, entry in enumerate(objects)]


def prompt_file_text(tasks: list[ObjectTask]) -> str:
    """Return tasks as the text of a prompt file."""
    objects = [
        {
            "name": task.name,
            "colour_rgb": list(task.colour_rgb),
            "terminology": task.terminology,
            "propagate": task.propagate,
            "slices": [task.slices.start, task.slices.stop] if task.slices else None,
            "prompts": prompts_to_json(task.prompts),
        }
        for task in tasks
    ]
    return json.dumps({"format": PROMPT_FORMAT, "objects": objects}, indent=1) + "\n"


def _task(entry: Any, number: int, file: str) -> ObjectTask:
    if not isinstance(entry, dict) or "prompts" not in entry:
        raise JobError(
            f"Object {number + 1} of {file} should hold a list of prompts. Write for example {_EXAMPLE}"
        )
    try:
        prompts = prompts_from_json(entry["prompts"])
    except PromptError as error:
        raise PromptError(f"Object {number + 1} of {file}: {error}") from error
    slices, colour = entry.get("slices"), entry.get("colour_rgb", PALETTE[number % len(PALETTE)])
    if slices is not None and not _are_whole_numbers(slices, 2):
        raise JobError(
            f"Object {number + 1} of {file}: slices should be two whole numbers [first, last + 1]."
        )
    if not _are_whole_numbers(colour, 3) or not all(0 <= value <= 255 for value in colour):
        raise JobError(f"Object {number + 1} of {file}: colour_rgb should be three numbers from 0 to 255.")
    return ObjectTask(
        name=str(entry.get("name") or f"object {number + 1}"),
        prompts=prompts,
        colour_rgb=(colour[0], colour[1], colour[2]),
        terminology=str(entry.get("terminology") or ""),
        propagate=bool(entry.get("propagate", True)),
        slices=range(*slices) if slices is not None else None,
    )


def _are_whole_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(type(value) is int for value in values)
    )
