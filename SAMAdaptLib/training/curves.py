"""The picture of a run: losses and validation Dice over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from SAMAdaptLib.files import atomic_path

_DICE = ("dice_box", "dice_click", "dice_five")


def draw_curves(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Write a PNG with the losses on the left and the Dice of the averaged weights on the right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    for name in rows[0]:
        if name != "step":
            axes = right if name in _DICE else left
            if not name.startswith("dice") or name in _DICE:
                axes.plot(steps, [row[name] for row in rows], label=name.removeprefix("dice_"))
    left.set(xlabel="step", ylabel="loss", yscale="log")
    right.set(xlabel="step", ylabel="Dice, patients held back")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
