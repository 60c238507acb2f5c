"""Logits in, token ids out, for the sequences that live on the last stage.

A draw depends on the row's logits, seed, key and position alone: the same row gives the same token
wherever it runs and whatever runs beside it.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import ProtocolError

NUCLEUS_PROBE = 256
"""Likeliest tokens looked at first for a top-p cut; eight times as many while that is too few."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a row's tokens are drawn; temperature 0 is greedy, top_k 0 and top_p 1 cut nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 or more")

    @property
    def cuts(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1.0


@dataclass(frozen=True, slots=True)
class _Live:
    params: SamplingParams
    key: int
    seed: int


class Sampler:
    """What the last stage holds of each live sequence; mutable, owned by the stage's thread."""

    def __init__(self) -> None:
        self._live: dict[int, _Live] = {}

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences that were admitted and not dropped."""
        return tuple(self._live)

    def admit(self, sequence: int, params: SamplingParams, key: int, seed: int) -> None:
        """Hold a sequence's parameters; `key` and `seed` are unsigned 64-bit numbers."""
        self._live[sequence] = _Live(params, key, seed)

    def drop(self, sequences: Iterable[int]) -> None:
        """Forget sequences that ended."""
        for sequence in sequences:
            self._live.pop(sequence, None)

    def clear(self) -> None:
        """Forget all: a new epoch begins."""
        self._live.clear()

    def sample(
        self, logits: Tensor, sequences: Sequence[int], positions: Sequence[int]
    ) -> list[int]:
        """One token id a row of logits [n, vocab]; row i is drawn for position i of sequence i.

        Greedy rows take the largest logit, the lowest id among equals. Raises ProtocolError for a
        sequence that was never admitted.
        """
        rows = [self._row(sequence) for sequence in sequences]
        ids: list[int] = logits.argmax(-1).tolist()
        drawn = [at for at, row in enumerate(rows) if row.params.temperature > 0.0]
        for at in drawn:
            row = rows[at]
            ids[at] = draw(logits[at], row.params, uniform(row.seed, row.key, positions[at]))
        return ids

    def _row(self, sequence: int) -> _Live:
        if sequence not in self._live:
            raise ProtocolError(f"sequence {sequence} samples but was never admitted")
        return self._live[sequence]


def uniform(seed: int, key: int, position: int) -> float:
    """A number in [0, 1) that depends on its three counters (unsigned 64-bit) and nothing else."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, key, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(logits: Tensor, params: SamplingParams, chance: float) -> int:
    """The token id at which the distribution function of one row [vocab] passes `chance`.

    Temperature, then top-k, then top-p, as transformers' warpers mean them; in float64.
    """
    scores = logits.double() / params.temperature
    if not params.cuts:
        return int(_pass(torch.softmax(scores, -1), chance))
    ids, probabilities = _cut(scores, params)
    return int(ids[_pass(probabilities, chance)])


def _cut(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Ids that may be drawn and their weights, likeliest first, the lower id first among equals."""
    vocab = len(scores)
    limited = 0 < params.top_k < vocab
    log_total = scores.logsumexp(-1)
    probe = params.top_k if limited else NUCLEUS_PROBE
    while True:
        ids, ranked = _at_least_the_top(scores, min(probe, vocab))
        weights = torch.softmax(ranked, -1) if limited else (ranked - log_total).exp()
        before = weights.cumsum(-1) - weights
        enough = limited or len(ids) == vocab or bool(before[-1] >= params.top_p)
        if enough:
            kept = max(1, int((before < params.top_p).sum()))
            return ids[:kept], weights[:kept]
        probe *= 8


def _at_least_the_top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and scores of the `count` largest and of all that equal the last of them, ranked."""
    least = scores.topk(count).values[-1]
    ids = (scores >= least).nonzero().flatten()
    ranked, order = scores[ids].sort(descending=True, stable=True)
    return ids[order], ranked


def _pass(weights: Tensor, chance: float) -> Tensor:
    """The first index at which the running sum of the weights exceeds `chance` of their total."""
    sums = weights.cumsum(-1)
    # Strictly below the total, or rounding could pass every weight that is not zero.
    target = torch.minimum(sums[-1] * chance, torch.nextafter(sums[-1], torch.zeros_like(sums[-1])))
    return torch.searchsorted(sums, target, right=True)
