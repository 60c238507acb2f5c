"""A row in flight, as its head knows it: token ids, when to stop, and how long each part took."""

from dataclasses import dataclass
from typing import Literal

from stages.control import Answer, LeasedRow
from stages.prompt import PromptEncoder, StopScanner


@dataclass(slots=True)
class Sequence:
    """Mutable; only the head changes it. Times are seconds on the head's clock."""

    row: LeasedRow
    ids: list[int]
    """The prompt's ids, then those sampled."""
    stops: StopScanner | None
    """Looks for the row's stop strings; None where it has none."""
    leased_at: float
    started_at: float | None = None
    first_token_at: float | None = None
    admitted: bool = False
    """Whether the last stage knows how it is sampled."""
    computed: int = 0
    """Positions computed since the row last entered the ring."""
    replayed: int = 0
    """Positions that had to be computed again."""
    finish: Literal["stop", "length"] | None = None

    @property
    def limit(self) -> int:
        """Tokens that it may grow to."""
        return len(self.row.token_ids) + self.row.max_new_tokens

    @property
    def output_ids(self) -> list[int]:
        """What has been sampled so far, an end token included."""
        return self.ids[len(self.row.token_ids) :]

    def grow(self, token: int, end_ids: frozenset[int], now: float) -> None:
        """Append a sampled token; an end token, a stop string or the limit sets `finish`."""
        self.ids.append(token)
        if self.first_token_at is None:
            self.first_token_at = now
        if token in end_ids or (self.stops is not None and self.stops.feed(token)):
            self.finish = "stop"
        elif len(self.ids) == self.limit:
            self.finish = "length"

    def answer(self, encoder: PromptEncoder, now: float) -> Answer:
        """How the row ended; the text ends before a stop string."""
        assert self.finish is not None
        text = encoder.decode(self.output_ids) if self.stops is None else self.stops.text()
        return self._ended(self.finish, text, now)

    def failure(self, error_type: str, message: str, now: float) -> Answer:
        """The row's end as a typed error; what it had said so far does not pass for an answer."""
        return self._ended("error", "", now, error_type, message)

    def _ended(
        self,
        reason: Literal["stop", "length", "error"],
        text: str,
        now: float,
        error_type: str | None = None,
        message: str | None = None,
    ) -> Answer:
        started = now if self.started_at is None else self.started_at
        first = now if self.first_token_at is None else self.first_token_at
        return Answer(
            row=self.row.row,
            output_ids=tuple(self.output_ids),
            text=text,
            finish_reason=reason,
            error_type=error_type,
            error_message=message,
            prompt_tokens=len(self.row.token_ids),
            output_tokens=len(self.output_ids),
            replayed_tokens=self.replayed,
            queued_s=started - self.leased_at,
            prefill_s=first - started,
            decode_s=now - first,
        )
