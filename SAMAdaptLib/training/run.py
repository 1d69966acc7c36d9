"""A training run from its file to the weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from SAMAdaptLib.files import sha256_of_file
from SAMAdaptLib.models.mobile_sam import load_mobile_sam
from SAMAdaptLib.training.cache import TRAIN, build_cache
from SAMAdaptLib.training.config import TrainingConfig
from SAMAdaptLib.training.engine import Report, Trainer
from SAMAdaptLib.training.export import write_summary, write_weights
from SAMAdaptLib.weights import read_checkpoint

WEIGHTS_NAME = "mobile_sam.samadapt.safetensors"


def run_training(config: TrainingConfig, report: Report) -> Path:
    """Encode, train, choose and write; what was done before a kill is not done again.

    Returns:
        The weights' file in the output folder; `summary.json`, `log.csv` and `curves.png` lie beside it.

    Raises:
        JobError: The index of the data cannot be read.
        WeightsError: The base is missing or of another network.
    """
    torch.set_num_threads(config.threads)
    checkpoint = read_checkpoint(config.base)
    base = load_mobile_sam(checkpoint.tensors, config.input_size)
    cache = build_cache(config, base, checkpoint.sha256, report)
    trainer = Trainer(config, base, cache, report)
    trainer.train()
    share, scores = trainer.choose()
    facts = {
        "base": checkpoint.name,
        "base_sha256": checkpoint.sha256,
        "licence": config.licence,
        "seed": str(config.seed),
        "steps": str(config.steps),
        "share": str(share),
        "input_size": str(config.input_size),
        "data_sets": json.dumps(sorted(cache.rows(TRAIN))),
    }
    path = config.output / WEIGHTS_NAME
    sha256 = write_weights(trainer.blended(share), facts, path)
    write_summary(
        config.output / "summary.json",
        {**facts, "sha256": sha256, "bytes": path.stat().st_size, "validation": asdict(scores)},
    )
    report(f"wrote {path.name}, {path.stat().st_size} bytes, SHA-256 {sha256_of_file(path)}")
    return path
