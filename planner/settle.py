"""The settings of chosen rings: how many rows go round in them, for the job at hand."""

from collections.abc import Iterable, Sequence

from planner.cost import Cell
from planner.finish import courses, finish_s, together_s
from planner.problem import Found, Problem, again

SAME = 0.005
"""Rates and finish times this close count as equal; the calmer setting then wins."""
SLOWER = 1.5
"""What a ring loses of its rate beyond this, no shorter tail brings back."""
FEW_RINGS = 8
FEW_WAVES = 20
"""A job that fills at most so many rings at most so many times is settled for its end; a longer one, or
one of more rings, for its rate."""


def settled(given: Problem, tried: Sequence[Cell], rings: list[Found]) -> list[Found]:
    """The same rings, each in the calmest of those cells in which the job is done first, or as soon.

    Cells differ from a ring's own in one setting.
    """
    in_flight = sum(ring.cell.rows for ring in rings)
    if len(rings) > FEW_RINGS or given.work.rows > FEW_WAVES * in_flight:
        return [_calmest((r.split.row_s, r) for r in _near(given, tried, ring)) for ring in rings]
    for place in range(len(rings)):
        known = courses(given, rings)
        options = []
        for ring in _near(given, tried, rings[place]):
            known[place] = courses(given, [*rings[:place], ring, *rings[place + 1 :]])[place]
            options.append((together_s(given.work.rows, known), ring))
        rings = [*rings[:place], _calmest(options), *rings[place + 1 :]]
    return rings


def soonest(given: Problem, found: list[Found]) -> Found:
    """The ring that ends the job first alone; of those as soon, the calmest."""
    return _calmest((finish_s(given, [ring]), ring) for ring in found)


def _near(given: Problem, tried: Sequence[Cell], ring: Found) -> list[Found]:
    """The ring, and the same nodes in the cells that differ in one setting, their layers split anew."""
    near, now = [ring], ring.cell
    for cell in tried:
        same_batch = cell.micro_batch_rows == now.micro_batch_rows
        if cell.draft_len != now.draft_len or not (same_batch or cell.in_flight == now.in_flight):
            continue
        other = again(given, ring, cell)
        if other and other.split.row_s <= SLOWER * ring.split.row_s:
            near.append(other)
    return near


def _calmest(options: Iterable[tuple[float, Found]]) -> Found:
    """Of the rings of least seconds, or nearly so, the calmest."""
    known = list(options)
    limit = min(seconds for seconds, _ in known) * (1.0 + SAME)
    return min((ring for seconds, ring in known if seconds <= limit), key=_unrest)


def _unrest(ring: Found) -> tuple[bool, int, int]:
    """Calm is: one micro-batch more than the ring needs, as real steps jitter; then few rows."""
    cell = ring.cell
    needed = ring.split.life_s / (ring.split.row_s * cell.micro_batch_rows)
    slack = cell.in_flight >= min(needed + 1.0, len(ring.split.layers) * 4.0)
    return (not slack, cell.rows, cell.in_flight)
