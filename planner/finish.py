"""When a job of so many rows is done: loading, the first way round, the steady middle, and the tail.

A ring with few rows left goes round hardly faster than a full one, for it reads the same weights and
crosses the same links. What a round of n rows takes beyond n / R of a full one's seconds is lost, and
the more unequal the rows are, the more such rounds the tail has.
"""

from dataclasses import dataclass, replace

import numpy as np

from planner.cost import Floats
from planner.lengths import apart, survival
from planner.plan import Pipeline
from planner.problem import Found, Problem, among, load_s, pass_s, pipeline_of
from planner.rounds import round_s, steady, token_s

POINTS = 12
"""Numbers of rows for which a round is costed; between them, it is interpolated."""


@dataclass(frozen=True, slots=True)
class Course:
    """A ring's part of a job."""

    row_s: float
    """Seconds per row while the ring is full and prompts travel with decodes."""
    lost_s: float
    """Seconds beside these: loading, the first way round, and what the tail loses."""
    tail_s: float
    """From the last row's admission to its end."""


def finish_s(given: Problem, rings: list[Found]) -> float:
    """Seconds until rings that share the rows have answered them all."""
    return together_s(given.work.rows, courses(given, rings))


def running_s(given: Problem, rings: list[Found]) -> float:
    """The same where their shards are loaded already; infinite of no rings."""
    parts = [
        replace(part, lost_s=part.lost_s - load_s(given, pipeline_of(given, ring)))
        for ring, part in zip(rings, courses(given, rings) if rings else [], strict=True)
    ]
    return together_s(given.work.rows, parts)


def first_done(given: Problem, rings: list[Found]) -> list[Found]:
    """The rings without those that a job would only wait for at its end."""
    known = courses(given, rings)
    kept = sorted(range(len(rings)), key=lambda i: known[i].lost_s + known[i].tail_s)
    best_s = together_s(given.work.rows, known)
    while len(kept) > 1:
        fewer_s = together_s(given.work.rows, [known[i] for i in kept[:-1]])
        if fewer_s > best_s:
            break
        kept, best_s = kept[:-1], fewer_s
    return [rings[i] for i in kept]


def together_s(rows: int, parts: list[Course]) -> float:
    """Each ring gives its rate from the end of its lost time on; one that is too slow gives nothing."""
    parts = sorted(parts, key=lambda part: part.lost_s)
    rate = spent = 0.0
    end_s = float("inf")
    for part in parts:
        if part.lost_s >= end_s:
            break
        rate += 1.0 / part.row_s
        spent += part.lost_s / part.row_s
        end_s = (rows + spent) / rate
    return end_s


def courses(given: Problem, rings: list[Found]) -> list[Course]:
    """What a job of these rings, together, is for each."""
    waves = given.work.rows / sum(ring.cell.rows for ring in rings)
    return [_course(given, ring, waves) for ring in rings]


def _course(given: Problem, ring: Found, waves: float) -> Course:
    own, cell = among(given, ring.order), ring.cell
    pipeline = pipeline_of(given, ring)
    full, bare_s = steady(own, pipeline), round_s(own, pipeline, cell.rows)
    token_bare_s = token_s(own, pipeline, cell.rows)
    left = cell.rows * min(waves, 1.0) * _tail(own, waves, 1.0 - bare_s / full.round_s)
    tail_s = _tokens_s(own, pipeline, left)
    lost_s = tail_s.sum() - token_bare_s * left.sum() / cell.rows
    first_s = load_s(own, pipeline) + pass_s(own, cell, ring.split.life_s)
    return Course(full.row_s, float(first_s + lost_s), float(tail_s.sum()))


def _tokens_s(given: Problem, pipeline: Pipeline, rows: Floats) -> Floats:
    """Seconds of a token of each of these numbers of rows, none with fewer than one."""
    counts = np.geomspace(1.0, max(rows.max(initial=1.0), 1.0), POINTS)
    seconds = [token_s(given, pipeline, n) for n in counts]
    return np.interp(rows, counts, seconds)


def _tail(given: Problem, waves: float, prefilling: float) -> Floats:
    """The share of a ring's rows that still decode after each token of its tail.

    Those left of rows that started together are those that are longer; of rows met at random, what is
    left of them.
    """
    longer = survival(given.work.output_tokens, given.work.rows)
    met = np.cumsum(longer[::-1])[::-1] / longer.sum()
    spread = apart(given.work.output_tokens, waves, prefilling)
    return np.asarray(spread * met + (1.0 - spread) * longer, np.float64)
