"""What the tests of several model families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from SAMAdaptLib.verify.golden_sets import GoldenSet, find_sets

TOLERANCE = 1e-4
"""Of the golden sets."""


def shared_set(shared_data: Path, family: str, name: str) -> GoldenSet:
    """Return a recorded set that is too large for the project; the test is skipped where it is absent."""
    file = shared_data.parent / "goldens" / family / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"the recorded set {family}/{name} is not beside the shared data")
    return find_sets(file)[0]


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a value that matters."""
    chance = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            values = 0.3 * torch.randn(tensor.shape, generator=chance)
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return network.eval()


def silent_keys(tensors: Mapping[str, Tensor], run: Callable[[], list[Tensor]]) -> set[str]:
    """Change each tensor of a network by itself; name those whose change moves no output by the tolerance.

    Args:
        tensors: The network's own, by official names.
        run: From the network as it is to its outputs.
    """
    chance = torch.Generator().manual_seed(0)
    silent = set()
    with torch.inference_mode():
        expected = [output.clone() for output in run()]
        for name, tensor in tensors.items():
            kept = tensor.clone()
            tensor.add_((0.3 * torch.randn(tensor.shape, generator=chance) + 0.1).to(tensor.dtype))
            moved = max(float((a - b).abs().max()) for a, b in zip(run(), expected, strict=True))
            if moved <= TOLERANCE:
                silent.add(name)
            tensor.copy_(kept)
    return silent
