"""Rows that no pipeline has yet: put in order, encoded just ahead of need, and answered in the end."""

from collections import deque
from collections.abc import Iterator
from itertools import islice

from flows.dealing import Told
from flows.job import Sampling
from flows.lease import Clerk, Lease
from flows.twins import Twins
from planner.schedule import most_rounds
from stages.control import LeasedRow
from stages.errors import OutOfMemoryError
from storage.prompts import PromptRow
from storage.results import ResultRow

WINDOW_ROWS, WINDOW_CHARACTERS = 2**14, 2**24
"""Rows that are put in order at once, and their prompts' length: what begins alike is computed together
wherever it stands among them. Pipelines wait for as long as it takes to read so many."""
BREATH_ROWS = 1024
"""Rows that end without a pipeline, before what has ended is taken away."""
TOKEN_CHARACTERS = 4
"""Of a prompt that is not encoded yet, for its place in the order."""


class Waiting:
    """Prompt rows, window by window: longest expected first, its prefix's others right behind it.

    A pipeline keeps to one prefix while it has rows, and takes up one that nobody is at next, so that
    a beginning is computed by few pipelines. Mutable; owned by the driver's thread.
    """

    def __init__(self, rows: Iterator[PromptRow], count: int, sampling: Sampling) -> None:
        """`count` of them will come; `sampling` is the job's, over which a row may have its own."""
        self._rows = rows
        self._left = count
        self._sampling = sampling
        self._ended = False
        self._groups: dict[str, deque[PromptRow]] = {}
        """Of the window, by prefix, in order; none is empty."""
        self._at: dict[int, str] = {}
        """The prefix that a pipeline is at."""

    def __len__(self) -> int:
        return 0 if self._ended else max(self._left, 1)  # what is empty has been found to be

    def take(self, pipeline: int) -> PromptRow | None:
        """The next row for a pipeline; None once there are no more."""
        if not self._groups and not self._read_window():
            return None
        prefix = self._at.get(pipeline)
        if prefix not in self._groups:
            prefix = self._at[pipeline] = self._next_prefix()
        group = self._groups[prefix]
        row = group.popleft()
        if not group:
            del self._groups[prefix]
        self._left -= 1
        return row

    def _next_prefix(self) -> str:
        """The first that nobody is at; else the one with most rows left."""
        taken = set(self._at.values())
        free = (prefix for prefix in self._groups if prefix not in taken)
        return next(free, None) or max(self._groups, key=lambda prefix: len(self._groups[prefix]))

    def _read_window(self) -> bool:
        window: list[PromptRow] = []
        characters = 0
        for row in islice(self._rows, WINDOW_ROWS):
            window.append(row)
            characters += row.length
            if characters >= WINDOW_CHARACTERS:
                break
        for row in sorted(window, key=self._rounds, reverse=True):
            self._groups.setdefault(row.prefix_hash, deque()).append(row)
        self._ended = not window
        return not self._ended

    def _rounds(self, row: PromptRow) -> float:
        return most_rounds(row.length / TOKEN_CHARACTERS, self._sampling.quota(row.sampling))


class Intake:
    """A run's rows on their way to the pipelines, and back; mutable, owned by the driver's thread."""

    def __init__(self, waiting: Waiting, clerk: Clerk) -> None:
        self._waiting = waiting
        self._clerk = clerk
        self._twins = Twins()
        self._leases: dict[int, Lease] = {}
        self._again: deque[Lease] = deque()
        """Twins of a row that found no memory: each is to find out for itself."""
        self._ended: list[ResultRow] = []
        self.unfit = 0
        """Rows that no pipeline has memory for."""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._again)

    def take(self, pipeline: int) -> LeasedRow | None:
        """The next row that a pipeline must answer; None if there is none, or `ended` grows long."""
        while len(self._ended) < BREATH_ROWS:
            lease: Lease | ResultRow | None
            if self._again:
                lease = self._again.popleft()
            else:
                prompt = self._waiting.take(pipeline)
                if prompt is None:
                    return None
                lease = self._clerk.lease(prompt)
            if lease is None:
                self.unfit += 1
            elif isinstance(lease, ResultRow):
                self._ended.append(lease)
            elif (known := self._twins.answer_to(lease)) is not None:
                self._ended.append(self._clerk.ended(lease, known))
            elif not self._twins.waits(lease):
                self._leases[lease.row.row] = lease
                return lease.row
        return None

    def take_ended(self) -> list[ResultRow]:
        """Rows that ended, since this was last asked, without a pipeline of their own."""
        ended, self._ended = self._ended, []
        return ended

    def answered(self, told: Told) -> Iterator[ResultRow]:
        """The result of a row, and those of its twins, unless it only lacked memory just then."""
        first = self._leases.pop(told.answer.row)
        yield self._clerk.ended(first, told)
        twins = self._twins.answered(first, told)
        if told.answer.error_type == OutOfMemoryError.kind:
            self._again.extend(twins)
            return
        for lease in twins:
            yield self._clerk.ended(lease, told)
