"""Which KV blocks are free: numbers only, owned by the head; a stage decides where a block lies."""

from bisect import bisect_left, insort


class BlockPool:
    """Free block numbers as runs, so that a sequence gets neighbours where it can.

    Neighbouring blocks let a stage read a sequence's keys and values in place, without gathering.
    """

    def __init__(self, blocks: int, first: int = 0) -> None:
        self._runs: list[tuple[int, int]] = [(first, blocks)] if blocks else []
        self.free = blocks

    def take(self, count: int) -> tuple[int, ...] | None:
        """`count` blocks, from one run if any is long enough; None if too few are free."""
        if count > self.free:
            return None
        self.free -= count
        for i, (start, length) in enumerate(self._runs):
            if length >= count:
                self._runs[i : i + 1] = [(start + count, length - count)] if length > count else []
                return tuple(range(start, start + count))
        return self._take_scattered(count)

    def _take_scattered(self, count: int) -> tuple[int, ...]:
        taken: list[int] = []
        while len(taken) < count:
            start, length = self._runs.pop(0)
            part = min(length, count - len(taken))
            taken.extend(range(start, start + part))
            if part < length:
                self._runs.insert(0, (start + part, length - part))
        return tuple(taken)

    def give_back(self, blocks: tuple[int, ...]) -> None:
        """Return blocks that `take` gave; neighbours grow together again."""
        for run in _runs(blocks):
            insort(self._runs, run)
            i = bisect_left(self._runs, run)
            self._merge(i)
            if i:
                self._merge(i - 1)
        self.free += len(blocks)

    def _merge(self, i: int) -> None:
        if i + 1 < len(self._runs):
            (start, length), (after, more) = self._runs[i], self._runs[i + 1]
            assert start + length <= after, "a block was given back twice"
            if start + length == after:
                self._runs[i : i + 2] = [(start, length + more)]


def _runs(blocks: tuple[int, ...]) -> list[tuple[int, int]]:
    """The same numbers as runs of neighbours: (first, how many)."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
