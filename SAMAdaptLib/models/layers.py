"""Layers that the SAM family shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of each pixel of a (B, C, H, W) map."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C with the biased variance."""
        centred = x - x.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        normalised = centred * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], self.weight[:, None, None], normalised)


class MLP(nn.Module):
    """Linear layers with ReLU, or another function, between them: SAM's hypernetworks and score head.

    Args:
        widths: Channels from the input to the output, one more than there are layers.
        activation: Between the layers.
    """

    def __init__(self, widths: Sequence[int], activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., widths[0]) to (..., widths[-1])."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        last: Tensor = self.layers[-1](x)
        return last
