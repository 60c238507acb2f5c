"""The ring's policy: which rows travel in which slot, when, and with how many tokens.

Pure decisions over counts. The head runs them on real frames and the simulator on imagined ones, so
neither can drift from the other. Token ids, text and sockets are unknown here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive positions [start, start + tokens) of one sequence that a step computes."""

    sequence: int
    """The head's number of the sequence, unique within an epoch."""
    start: int
    """First position computed; as many tokens of the sequence are in the KV cache already."""
    tokens: int
    samples: bool
    """Whether the last position yields the sequence's next token."""


@dataclass(frozen=True, slots=True)
class Grant:
    """KV blocks added to the end of a sequence's block table, in order."""

    sequence: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One micro-batch's work, numbered: every stage computes frames strictly in that order."""

    frame: int
    slot: int
    spans: tuple[Span, ...]
    grants: tuple[Grant, ...] = ()
    ended: tuple[int, ...] = ()
    """Sequences that no later frame will name; what stages hold of them may go."""

    @property
    def tokens(self) -> int:
        """Positions that the step computes."""
        return sum(span.tokens for span in self.spans)
