"""Which pipeline takes the next row: pure decisions from the pipelines' paces and what they hold.

Three policies. `first-free`: any pipeline with room takes the next row. `worthwhile`, the default: it
does so only if it ends the row before the others could, so that no fast pipeline waits at the end of a
job for a slow one. `ws-rr`: each row is given to a pipeline as it comes, by least waiting and service
(Sun et al. 2025, arXiv 2512.21884), whether or not there is room.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Policy = Literal["worthwhile", "first-free", "ws-rr"]
POLICIES: tuple[Policy, ...] = ("worthwhile", "first-free", "ws-rr")


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a pipeline answers rows, as planned."""

    row_s: float
    """Seconds per row while it is full."""
    pass_s: float
    """Seconds of one way round."""
    tokens_per_pass: float
    rows: int
    """Rows in flight at most."""

    def service_s(self, tokens: float) -> float:
        """Seconds of a row of so many output tokens, from its admission on."""
        return self.pass_s * (1.0 + tokens / self.tokens_per_pass)


@dataclass(slots=True)
class Desk:
    """What the pipelines hold together; mutable, owned by whoever leases the rows out."""

    tokens: float
    """Output tokens of a long row: it is the long ones that others wait for."""
    paces: dict[int, Pace] = field(default_factory=dict)
    """By the pipeline's number."""
    held: dict[int, int] = field(default_factory=dict)
    """Rows by the pipeline's number."""

    def enter(self, number: int, pace: Pace) -> None:
        """A pipeline that starts, empty."""
        self.paces[number], self.held[number] = pace, 0

    def leave(self, number: int) -> None:
        """A pipeline that is gone."""
        del self.paces[number], self.held[number]

    def room(self, number: int) -> int:
        """Rows that a pipeline can take before it is full."""
        return self.paces[number].rows - self.held[number]

    def worthwhile(self, number: int, waiting: int) -> bool:
        """Whether a pipeline ends a long row before the others, with all that wait, would."""
        others = [n for n in self.paces if n != number]
        return self.paces[number].service_s(self.tokens) <= self._ended_s(others, waiting)

    def _ended_s(self, numbers: Sequence[int], rows: int) -> float:
        """Seconds in which these pipelines could end so many long rows more; infinite if never.

        A pipeline counts from the time on at which its first row would be ended: its room then, and
        a place whenever one of its rows leaves.
        """
        room, rate, begins_s = 0.0, 0.0, 0.0
        for service_s, n in sorted((self.paces[n].service_s(self.tokens), n) for n in numbers):
            room += rate * (service_s - begins_s)
            if room >= rows:
                return service_s - (room - rows) / rate
            begins_s = service_s
            room += self.room(n)
            if room >= rows:
                return service_s
            rate += 1.0 / self.paces[n].row_s
        return begins_s + (rows - room) / rate if rate else float("inf")

    def least_wait_and_service(self, open_lines: Sequence[int]) -> int:
        """The pipeline that would end a row first, its present rows waited for."""

        def ends_s(number: int) -> float:
            pace = self.paces[number]
            return max(1 - self.room(number), 0) * pace.row_s + pace.service_s(self.tokens)

        return min(open_lines, key=lambda number: (ends_s(number), number))
