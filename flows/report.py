"""What people see of a run while it goes on: counts, on the terminal and in Prefect.

The data path only changes a `Tally`. Whoever shows it reads it now and then, in a thread of its
own, so that neither a slow terminal nor a lost server holds up a row.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectException
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from planner.explain import under_way
from planner.plan import Plan
from storage.results import ResultRow

log = logging.getLogger(__name__)

LINE_EVERY_S = 5.0
MIRROR_EVERY_S = 10.0


@dataclass(slots=True)
class Tally:
    """Counts of one run; only the driver's thread changes them."""

    rows: int
    """Rows of the input."""
    answered: int
    """Rows that have ended, those of earlier runs included; finished means committed, soon after."""
    failed: int
    """Rows among them that ended as an error."""
    earlier: int
    """Rows that had ended before this run."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    """Tokens of the rows that this run has ended."""
    _started_s: float | None = None
    _stopped_s: float | None = None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """From the first lease to the last commit."""
        self._started_s = time.monotonic()
        try:
            yield
        finally:
            self._stopped_s = time.monotonic()

    def count(self, row: ResultRow) -> None:
        """Take note of a row that ended."""
        self.answered += 1
        self.failed += row.status == "error"
        self.prompt_tokens += row.prompt_tokens
        self.output_tokens += row.output_tokens

    @property
    def seconds(self) -> float:
        """From start to stop, or to now; never zero."""
        if self._started_s is None:
            return 1e-9
        end_s = time.monotonic() if self._stopped_s is None else self._stopped_s
        return max(end_s - self._started_s, 1e-9)

    @property
    def percent(self) -> float:
        """Rows that have ended, of a hundred."""
        return 100.0 * self.answered / self.rows if self.rows else 100.0

    def sentence(self) -> str:
        """The counts in one line."""
        made = self.answered - self.earlier
        left_s = (self.rows - self.answered) * self.seconds / made if made else None
        return (
            f"{self.answered:,} of {self.rows:,} rows, {self.failed:,} failed, "
            f"{self.output_tokens / self.seconds:,.0f} tokens/s, "
            f"ETA {'unknown' if left_s is None else f'{left_s:.0f} s'}"
        )


def finite(document: Any) -> Any:
    """The document with null in place of infinities and NaN, which JSON lacks."""
    if isinstance(document, float):
        return document if math.isfinite(document) else None
    if isinstance(document, dict):
        return {key: finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [finite(value) for value in document]
    return document


class Screen(Console):
    """Where people look. That nobody does any more (`head`, a pager that quit) ends nothing."""

    def on_broken_pipe(self) -> None:
        """Rich would end the process here."""


def announce(plan: Plan) -> None:
    """Say on the terminal, before any row runs, what the run will be and take."""
    places = "; ".join(
        " -> ".join(
            f"{s.node} {s.first_layer}-{s.end_layer}"
            + (f" ({s.weights_offloaded} streamed)" if s.weights_offloaded else "")
            + (" (keys and values parked)" if s.kv_offloaded else "")
            for s in pipeline.stages
        )
        + f", {under_way(pipeline)}"
        for pipeline in plan.pipelines
    )
    Screen(stderr=True, soft_wrap=True, markup=False).print(
        f"plan: layers {places}; {plan.tokens_per_s:,.0f} tokens/s, and {plan.finish_s:,.0f} s if "
        "every row runs to its limit",
        highlight=False,
    )


@contextmanager
def shown(tally: Tally) -> Iterator[None]:
    """Show the tally on the terminal, and as a progress artifact where a Prefect run is on."""
    console = Screen(stderr=True)
    with ExitStack() as stack:
        if console.is_terminal:
            bar = stack.enter_context(_bar(console))
            row = bar.add_task("", total=tally.rows)
            stack.enter_context(_every(0.2, lambda: _move(bar, row, tally)))
        else:
            stack.enter_context(_every(LINE_EVERY_S, lambda: console.print(tally.sentence())))
        stack.enter_context(_every(MIRROR_EVERY_S, _Artifact(tally).update))
        yield


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
    )


def _move(bar: Progress, row: TaskID, tally: Tally) -> None:
    bar.update(row, completed=tally.answered, description=tally.sentence())


class _Artifact:
    """The run's progress artifact; a server that does not answer costs an update, never a row."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._id: UUID | None = None
        self._in_run = bool(FlowRunContext.get() or TaskRunContext.get())

    def update(self) -> None:
        if not self._in_run:
            return
        percent, sentence = self._tally.percent, self._tally.sentence()
        try:
            if self._id is None:
                created = create_progress_artifact(percent, key="progress", description=sentence)
                assert isinstance(created, UUID)
                self._id = created
            else:
                update_progress_artifact(self._id, percent, description=sentence)
        except (httpx.HTTPError, PrefectException) as error:
            log.warning("progress not mirrored error=%s", error)


@contextmanager
def _every(period_s: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` every so often in a thread, and once more at the end."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(period_s):
            act()

    thread = _thread_in_this_context(repeat)
    try:
        yield
    finally:
        over.set()
        thread.join()
        act()


def _thread_in_this_context(act: Callable[[], None]) -> threading.Thread:
    """A started thread that sees the Prefect run of the caller."""
    thread = threading.Thread(target=copy_context().run, args=(act,), daemon=True)
    thread.start()
    return thread
