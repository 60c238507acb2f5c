"""The settings that the solver tries: exact over this grid, and it says so."""

from collections.abc import Iterable
from dataclasses import replace

from planner.cost import PARKED_KV, Cell
from planner.facts import Workload
from planner.plan import RAW

MICRO_BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
IN_FLIGHT = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DRAFT_LENGTHS = (0, 1, 2, 4, 8)
WAVES = (1, 2, 3, 4)
"""A job of few rows is also tried cut into so many even waves, so that no last one is half empty."""


def cells(
    work: Workload,
    micro_batch_rows: int | None = None,
    in_flight: int | None = None,
    draft_lengths: tuple[int, ...] | None = None,
) -> tuple[Cell, ...]:
    """All settings worth trying, fewer where the caller fixes some or the job has few rows."""
    if draft_lengths is None:
        draft_lengths = tuple(n for n in DRAFT_LENGTHS if n <= len(work.acceptance))
    found: set[Cell] = set()
    for slots in (in_flight,) if in_flight else IN_FLIGHT:
        even = {-(-work.rows // (slots * waves)) for waves in WAVES}
        batches = (micro_batch_rows,) if micro_batch_rows else sorted({*MICRO_BATCH_ROWS, *even})
        for batch in batches:
            # Rows in flight beyond the job's rows would only reserve memory for nobody.
            fits = batch * slots < work.rows + slots
            if (batch <= MICRO_BATCH_ROWS[-1] and fits) or batch == micro_batch_rows:
                found.update(Cell(batch, slots, n) for n in draft_lengths)
    return tuple(sorted(found, key=lambda c: (c.rows, c.micro_batch_rows, c.draft_len)))


def grid_words(tried: tuple[Cell, ...], work: Workload) -> str:
    """The settings that were tried, for people."""
    batches = {cell.micro_batch_rows for cell in tried}
    even = batches - {*MICRO_BATCH_ROWS} and len(batches) > 1
    words = [
        f"micro-batches of {_listed(batches & {*MICRO_BATCH_ROWS} if even else batches)} rows"
        + (f", or of what cuts the job into {WAVES[0]} to {WAVES[-1]} even waves" if even else ""),
        f"{_listed({cell.in_flight for cell in tried})} of them in flight",
        f"{_listed({cell.draft_len for cell in tried})} drafted tokens",
        f"links with codec {_listed([RAW, *work.codec])}",
        "any number of layers streamed",
        f"{_listed([f'{share:.0%}' for share in PARKED_KV])} of KV parked",
    ]
    return "; ".join(words)


def _listed(values: Iterable[int | str]) -> str:
    """1, 2 or 3."""
    *most, last = [str(v) for v in (sorted(values) if isinstance(values, set) else values)]
    return f"{', '.join(most)} or {last}" if most else last


def neighbours(tried: tuple[Cell, ...], cell: Cell) -> list[Cell]:
    """Cells one step away in each setting."""
    found: list[Cell] = []
    for name in ("micro_batch_rows", "in_flight", "draft_len"):
        line = sorted(
            (c for c in tried if replace(c, **{name: getattr(cell, name)}) == cell),
            key=lambda c: int(getattr(c, name)),
        )
        at = line.index(cell)
        found.extend(line[max(at - 1, 0) : at] + line[at + 1 : at + 2])
    return found


def near_cells(tried: tuple[Cell, ...], own: set[Cell], steps: int) -> tuple[Cell, ...]:
    """These cells and those within so many steps of them."""
    near, edge = set(own), set(own)
    for _ in range(steps):
        edge = {beside for cell in edge for beside in neighbours(tried, cell)} - near
        near |= edge
    return tuple(cell for cell in tried if cell in near)
