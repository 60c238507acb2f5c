"""How busy each stage is over time, as a picture: light is idle."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.ring_hosts import Ran

EVERY_S = 0.5


def draw(runs: Mapping[str, Ran], path: Path) -> None:
    """One strip a run, a line a stage; all share the axis of time."""
    heights = [len(ran.steps) + 2 for ran in runs.values()]
    figure = Figure(figsize=(9, 0.22 * sum(heights) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    strips = figure.subplots(len(runs), 1, height_ratios=heights, sharex=True, squeeze=False)[:, 0]
    shown = None
    for strip, (name, ran) in zip(strips, runs.items(), strict=True):
        shown = strip.imshow(
            ran.busy(EVERY_S), aspect="auto", vmin=0, vmax=1, cmap="Blues", interpolation="nearest",
            extent=(0.0, EVERY_S * -(-ran.seconds // EVERY_S), len(ran.steps) + 0.5, 0.5),
        )  # fmt: skip
        strip.set_title(f"{name}: {ran.steady_rows_per_s:.0f} tokens/s", loc="left", fontsize=9)
        strip.set_ylabel("stage", fontsize=8)
        strip.set_yticks(range(1, len(ran.steps) + 1))
        strip.tick_params(labelsize=7)
    longest_s = max(ran.seconds for ran in runs.values())
    strips[-1].set_xlim(0, longest_s)
    strips[-1].set_xlabel("seconds since the first row was leased", fontsize=8)
    if shown is not None:
        figure.colorbar(shown, ax=list(strips), label="fraction of the time computing")
    figure.savefig(path, dpi=130)
