"""A picture of gains: how our simulated tokens/s compare with the best baseline's, by cluster."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # a file is wanted, and there may be no screen

from matplotlib import pyplot as plt

MOST = 4.0
"""Gains beyond are drawn at the edge."""


def draw(path: Path, gains: dict[str, list[float]]) -> None:
    """One curve a plan: the share of clusters on which its gain is at most x."""
    figure, axes = plt.subplots(figsize=(7.0, 4.2), dpi=110)
    for name, values in gains.items():
        ordered = sorted(min(value, MOST) for value in values)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.step(ordered, shares, where="post", label=f"{name} ({len(ordered)} clusters)")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, MOST]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks[:-1]] + [f"≥ {MOST:g}"])
    axes.minorticks_off()
    axes.set_xlabel("simulated tokens/s over the best baseline's")
    axes.set_ylabel("share of clusters at or below")
    axes.set_ylim(0.0, 1.0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
