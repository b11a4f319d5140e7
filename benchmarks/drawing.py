"""Pictures that several benchmarks draw: parts of a time as stacked bars, and curves beside a reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


def stacked_bars(bars: Sequence[tuple[str, Mapping[str, float]]], xlabel: str, title: str, path: Path) -> None:
    """A bar for each label, of parts by name, the first leftmost (PNG). A part that one lacks is nothing."""
    figure = Figure(figsize=(11, 1.5 + 0.4 * len(bars)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for part in dict.fromkeys(part for _, parts in bars for part in parts):
        widths = [parts.get(part, 0.0) for _, parts in bars]
        axes.barh(range(len(bars)), widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel=xlabel)
    axes.set_title(title, fontsize=9)
    axes.grid(True, axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def curves(
    x: Sequence[float],
    runs: Mapping[str, Tensor],
    reference: str,
    colors: Sequence[str],
    labels: tuple[str, str],
    title: str,
    path: Path,
    *,
    spread: bool = False,
) -> None:
    """The mean over the seeds of each case, and the same less the reference's (PNG).

    Args:
        x: of the points.
        runs: by case, (seeds, points).
        labels: what x is, and what is plotted.
        spread: also show the reference's smallest and largest value at each point.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    center = runs[reference].mean(0)
    if spread:
        low, high = runs[reference].min(0).values, runs[reference].max(0).values
        left.fill_between(x, low, high, color="black", alpha=0.15, label=f"{reference}: all seeds")
        right.fill_between(x, low - center, high - center, color="black", alpha=0.15)
    for color, (case, values) in zip(colors, runs.items(), strict=True):
        mean = values.mean(0)
        left.plot(x, mean, color=color, linewidth=1.2, label=case)
        right.plot(x, mean - center, color=color, linewidth=1.2)
    left.set(xlabel=labels[0], ylabel=f"{labels[1]} (nats a byte), mean of the seeds")
    right.set(xlabel=labels[0], ylabel=f"difference from {reference} (nats a byte)")
    for axes in (left, right):
        axes.grid(True, alpha=0.3)
    left.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
