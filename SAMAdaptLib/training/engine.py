"""The loop: steps, moving average, validation, checkpoints to go on from, and the choice at the end."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.models.mobile_sam import MobileSam
from SAMAdaptLib.training.batches import Sampler, replace_by_things
from SAMAdaptLib.training.cache import FeatureCache
from SAMAdaptLib.training.config import TrainingConfig
from SAMAdaptLib.training.curves import draw_curves
from SAMAdaptLib.training.rounds import StepContext, step_loss
from SAMAdaptLib.training.validation import Case, Scores, list_cases, validate

State = dict[str, Tensor]
Report = Callable[[str], None]


@dataclass
class Progress:
    """What a checkpoint holds besides the weights; `recent` are the losses, smoothed over 20 steps."""

    step: int = 0
    recent: dict[str, float] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)
    best: float = 0.0


def trained_parameters(model: MobileSam, config: TrainingConfig) -> dict[str, torch.nn.Parameter]:
    """Freeze what the cache holds, and return what is trained by its official name."""
    chosen = {}
    for name, parameter in model.named_parameters():
        upper = name.startswith(("image_encoder.layers.3.", "image_encoder.neck."))
        trains = not name.startswith("image_encoder.") or (upper and config.encoder_rate > 0)
        parameter.requires_grad_(trains)
        if trains:
            chosen[name] = parameter
    return chosen


def rate_factor(step: int, config: TrainingConfig) -> float:
    """Return the share of the peak rate: in each cycle a linear rise, then a half cosine down to 2 %."""
    length, start = 1, 0
    for length in config.cycles:
        if step < start + length:
            break
        start += length
    step -= start
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, length - config.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Trainer:
    """One run; `train` may be called again after a kill and gives the same weights.

    Args:
        config: The training file.
        base: The model to start from; it is also the teacher and is not changed.
        cache: The frozen part's output.
        report: Receives one line of text now and then.
    """

    def __init__(self, config: TrainingConfig, base: MobileSam, cache: FeatureCache, report: Report) -> None:
        torch.manual_seed(config.seed)
        self.config, self.cache, self.report = config, cache, report
        self.teacher = copy.deepcopy(base).eval().requires_grad_(False)
        self.model = copy.deepcopy(base).eval()
        self.parameters = trained_parameters(self.model, config)
        self.average: State = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.Adam(self._groups(), betas=(0.9, 0.99))
        self.sampler = Sampler(config, cache)
        self.cases: list[Case] = list_cases(cache)
        self.progress = Progress()
        config.output.mkdir(parents=True, exist_ok=True)

    def _groups(self) -> list[dict[str, Any]]:
        encoder = [p for name, p in self.parameters.items() if name.startswith("image_encoder.")]
        others = [p for name, p in self.parameters.items() if not name.startswith("image_encoder.")]
        rates = ((encoder, self.config.encoder_rate), (others, self.config.rate))
        return [{"params": params, "lr": rate, "peak": rate} for params, rate in rates if params]

    def train(self) -> None:
        """Run all steps that are left, validating and saving on the way."""
        self._resume()
        recent = self.progress.recent
        while self.progress.step < self.config.steps:
            parts = self._step(self.progress.step)
            self.progress.step += 1
            for name, value in parts.items():
                recent[name] = 0.95 * recent.get(name, value) + 0.05 * value
            if self.progress.step % 20 == 0:
                self.report(
                    f"step {self.progress.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in recent.items())
                )
            if (
                self.progress.step % self.config.validate_every == 0
                or self.progress.step == self.config.steps
            ):
                self._note(recent)
                self._save()

    def _step(self, step: int) -> dict[str, float]:
        rng = np.random.default_rng([self.config.seed, step])
        batch = replace_by_things(
            self.sampler.draw(rng), self.teacher, self.cache, self.config.thing_share, rng
        )
        factor = rate_factor(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts = step_loss(StepContext(self.config, self.model, self.teacher, self.cache, batch, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        decay = min(self.config.averaging, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)
        return parts

    def blended(self, share: float, weights: Mapping[str, Tensor] | None = None) -> MobileSam:
        """Return a model whose trained weights are `share` of the average, the rest of the base (WiSE-FT)."""
        model = copy.deepcopy(self.teacher)
        trained = self.average if weights is None else weights
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.lerp_(trained[name], share)
        return model

    def measure(self, model: MobileSam) -> Scores:
        """Validate with the run's own draws."""
        return validate(model, self.cache, self.cases, self.config.seed)

    def _note(self, losses: Mapping[str, float]) -> None:
        scores = self.measure(self.blended(1.0))
        row = {"step": float(self.progress.step), **losses, **_columns(scores)}
        self.progress.log.append(row)
        self.progress.best = max(self.progress.best, scores.mean)
        write_log(self.config.output / "log.csv", self.progress.log)
        draw_curves(self.progress.log, self.config.output / "curves.png")
        self.report(
            f"step {self.progress.step}: box {scores.box:.4f}, click {scores.click:.4f} "
            f"(single {scores.click_single:.4f}), five {scores.five:.4f}"
        )

    def choose(self) -> tuple[float, Scores]:
        """Try the blends and return the share with the best mean whose box is no worse than the base's."""
        base = self.measure(self.teacher)
        found = {share: self.measure(self.blended(share)) for share in self.config.blends}
        for share, scores in {0.0: base, **found}.items():
            self.report(f"blend {share}: {json.dumps(_columns(scores))} {json.dumps(scores.by_set)}")
        kept = {s: v for s, v in found.items() if v.box >= base.box} or found
        share = max(kept, key=lambda s: kept[s].mean)
        return share, kept[share]

    def _save(self) -> None:
        state = {
            "model": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        with atomic_path(self.config.output / "resume.pt") as temporary:
            torch.save(state, temporary)

    def _resume(self) -> None:
        path = self.config.output / "resume.pt"
        if not path.is_file():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["model"][name])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.report(f"going on from step {self.progress.step}")


def _columns(scores: Scores) -> dict[str, float]:
    return {
        "dice_box": scores.box,
        "dice_click": scores.click,
        "dice_click_single": scores.click_single,
        "dice_five": scores.five,
    }


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    """Write the validation log as CSV."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
