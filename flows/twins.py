"""Greedy rows that ask the same: one of them is computed, and all are answered by it."""

from collections import OrderedDict

from flows.dealing import Told
from flows.lease import Lease
from stages.errors import OutOfMemoryError

REMEMBERED = 1024
"""Answers kept for twins that come after; those that share a prompt mostly come together."""


class Twins:
    """Mutable; owned by whoever leases a job's rows."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Lease]] = {}
        """Rows that wait for the answer of one that is with a head."""
        self._said: OrderedDict[int, Told] = OrderedDict()

    def answer_to(self, lease: Lease) -> Told | None:
        """What an equal row was answered not long ago."""
        return None if lease.question is None else self._said.get(lease.question)

    def waits(self, lease: Lease) -> bool:
        """Whether the row waits for an equal one; otherwise equal ones wait for it from now on."""
        if lease.question is None:
            return False
        if lease.question in self._waiting:
            self._waiting[lease.question].append(lease)
            return True
        self._waiting[lease.question] = []
        return False

    def answered(self, lease: Lease, told: Told) -> list[Lease]:
        """The rows that have waited for this one. Its answer is theirs, and that of those to come, but
        for want of memory, which may be another's fault."""
        if lease.question is None:
            return []
        if told.answer.error_type != OutOfMemoryError.kind:
            self._said[lease.question] = told
        if len(self._said) > REMEMBERED:
            self._said.popitem(last=False)
        return self._waiting.pop(lease.question)
