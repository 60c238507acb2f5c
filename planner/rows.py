"""Rows to answer, drawn from a workload by a seed: their true lengths, and when they come."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from planner.facts import Lengths, Workload
from planner.lengths import lognormal


@dataclass(frozen=True, slots=True)
class Row:
    """One row to answer: its true lengths, and when it comes."""

    prompt_tokens: int
    output_tokens: int
    arrives_s: float = 0.0
    quota: int = 0
    """Tokens that it may make, if it says so itself; 0: as many as any row of its job."""


def sample_rows(work: Workload, seed: int) -> list[Row]:
    """Rows of lognormal lengths with the workload's mean and 95th percentile."""
    pick = np.random.default_rng(seed)
    prompts = _lengths(pick, work.prompt_tokens, work.rows)
    outputs = _lengths(pick, work.output_tokens, work.rows)
    return [Row(int(p), int(o)) for p, o in zip(prompts, outputs, strict=True)]


def arriving(rows: list[Row], rows_per_s: float, seed: int) -> list[Row]:
    """The same rows coming one by one, as a Poisson process of that rate; the first at once."""
    gaps_s = np.random.default_rng(seed).exponential(1.0 / rows_per_s, len(rows))
    times_s = np.cumsum(gaps_s) - gaps_s[0]
    return [replace(row, arrives_s=float(t)) for row, t in zip(rows, times_s, strict=True)]


def _lengths(pick: np.random.Generator, lengths: Lengths, count: int) -> Iterator[float]:
    """Lognormal with the mean and, if it can have it, the 95th percentile; 1 to `most`."""
    drawn = pick.lognormal(*lognormal(lengths), count)
    return iter(np.clip(np.rint(drawn), 1.0, lengths.most))
