"""The one file that says how a model is trained."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from SAMAdaptLib.errors import JobError


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a training run; with the seed it decides the weights.

    Attributes:
        base: Checkpoint to start from (official MobileSAM keys).
        data: The index of the training pictures, a CSV beside the pictures.
        validation: Folders that hold image.nii.gz and label.nii.gz, used to choose, never to train.
        cache: Folder for the frozen part's output; large, may be deleted.
        output: Folder for checkpoints, log and curves.
        licence: Of the weights, written into their file; what base and data allow.
        seed: Decides split, augmentation, order and prompts.
        threads: Processor threads.
        input_size: Side of the network input in pixels.
        pictures_per_set: Most pictures taken from one data set, spread over its patients.
        records_per_set: Cached (augmented) pictures of each set, so that small sets weigh as much.
        validation_share: Share of each set's patients held back.
        validation_pictures: Most pictures of one set used to validate.
        cycles: Optimiser steps, in cycles: in each the rate rises and falls once.
        pictures_per_step: Pictures in one step.
        prompts_per_picture: Structures prompted on each picture, by box and by click.
        rate: Peak learning rate of the prompt encoder and mask decoder.
        encoder_rate: Peak learning rate of the encoder's last stage and neck; 0 freezes them.
        warmup: Steps of a cycle until the peak; the rate then falls as a half cosine.
        bfloat16: Run the encoder's trained part in bfloat16 (on processors that multiply it faster).
        box_distillation: Weight of keeping the base's answer to a box.
        thing_share: Share of click targets that are whatever the base finds at a random point.
        box_jitter: Largest shift of a box edge as a share of the box's side.
        later_clicks: Most corrections after the first prompt.
        averaging: Decay of the moving average of the weights.
        validate_every: Steps between validations; a checkpoint for resuming is written at the same time.
        blends: Shares of the trained weights to try against the base (1 is the trained model alone).
    """

    base: Path
    data: Path
    cache: Path
    output: Path
    validation: list[Path] = field(default_factory=list)
    licence: str = ""
    seed: int = 20261121
    threads: int = 2
    input_size: int = 512
    pictures_per_set: int = 90
    records_per_set: int = 100
    validation_share: float = 0.15
    validation_pictures: int = 6
    cycles: list[int] = field(default_factory=lambda: [640])
    pictures_per_step: int = 3
    prompts_per_picture: int = 2
    rate: float = 1e-4
    encoder_rate: float = 2e-5
    warmup: int = 50
    bfloat16: bool = True
    box_distillation: float = 0.5
    thing_share: float = 0.25
    box_jitter: float = 0.1
    later_clicks: int = 5
    averaging: float = 0.99
    validate_every: int = 200
    blends: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.0])

    @property
    def steps(self) -> int:
        """Optimiser steps of all cycles."""
        return sum(self.cycles)


def read_config(path: Path) -> TrainingConfig:
    """Read a training file; ~ and $VARIABLES in its paths are expanded, relative paths start at the file.

    Raises:
        JobError: The file cannot be read, holds an unknown name, or lacks a path.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(
            f"A training file in YAML was wanted, but {path.name} cannot be read ({type(error).__name__}); "
            "start from Resources/Training/default_model.yaml."
        ) from error
    known = {entry.name for entry in fields(TrainingConfig)}
    if not isinstance(values, dict) or not values.keys() <= known:
        unknown = sorted(values.keys() - known) if isinstance(values, dict) else ["no list of names"]
        raise JobError(
            f"The training file {path.name} holds names that do not exist ({', '.join(map(str, unknown))}); "
            f"known are {', '.join(sorted(known))}."
        )
    missing = {"base", "data", "cache", "output"} - values.keys()
    if missing:
        raise JobError(f"The training file {path.name} must say {', '.join(sorted(missing))}; add the paths.")
    return TrainingConfig(**{name: _value(name, value, path.parent) for name, value in values.items()})


def _value(name: str, value: Any, folder: Path) -> Any:
    if name in ("base", "data", "cache", "output"):
        return _path(value, folder)
    if name == "validation":
        return [_path(entry, folder) for entry in value]
    return value


def _path(value: str, folder: Path) -> Path:
    return folder / Path(os.path.expandvars(str(value))).expanduser()
