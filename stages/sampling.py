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
from stages.ferry import Ferry
from stages.finite import finite_rows

NO_TOKEN = -1
"""What is drawn from logits that are no numbers."""
NUCLEUS_PROBE = 256
"""Likeliest tokens that a top-p cut looks at before it sorts the whole vocabulary."""


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


@dataclass(frozen=True, slots=True)
class _Live:
    params: SamplingParams
    key: int
    seed: int


class Sampler:
    """What the last stage holds of each live sequence; mutable, owned by the stage's thread."""

    def __init__(self, ferry: Ferry) -> None:
        self._ferry = ferry
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

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Sequence[int], positions: Sequence[int]) -> Tensor:
        """One token id a row of logits [n, vocab]; row i is drawn for position i of sequence i.

        The ids [n] stay on the logits' device. Greedy rows take the largest logit, the lowest id
        among equals; rows with a NaN or an infinity get NO_TOKEN. Raises ProtocolError for a
        sequence that was never admitted.
        """
        rows = [self._row(sequence) for sequence in sequences]
        ids, fine = logits.argmax(-1), finite_rows(logits)
        drawn = [at for at, row in enumerate(rows) if row.params.temperature > 0.0]
        chances = [uniform(rows[at].seed, rows[at].key, positions[at]) for at in drawn]
        params = [rows[at].params for at in drawn]
        if drawn and logits.device.type != "cpu":
            ids = self._drawn_there(logits, ids, drawn, params, chances)
        elif drawn:
            known = fine.tolist()
            for at, param, chance in zip(drawn, params, chances, strict=True):
                if known[at]:
                    ids[at] = draw(logits[at], param, chance)
        return ids.masked_fill(~fine, NO_TOKEN)

    def _drawn_there(
        self,
        logits: Tensor,
        ids: Tensor,
        drawn: Sequence[int],
        params: Sequence[SamplingParams],
        chances: Sequence[float],
    ) -> Tensor:
        """The ids with those of some rows drawn; the host sends two small tensors, and goes on."""
        at = self._ferry.to_device(torch.tensor(drawn))
        settings = self._ferry.to_device(table_of(params, chances))
        return ids.index_copy(0, at, draw_together(logits[at], settings))

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

    Temperature, then top-k, then top-p, as transformers' warpers mean them; sums in float64.
    """
    if params.top_k == 0 and params.top_p == 1.0:
        return int(_pass(_weights(logits, logits.max(), params), chance))
    ids, weights = _cut(logits, params)
    return int(ids[_pass(weights, chance)])


def _weights(logits: Tensor, largest: Tensor, params: SamplingParams) -> Tensor:
    """What each logit weighs beside the largest, which weighs 1: no temperature overflows."""
    return ((logits.double() - largest.double()) / params.temperature).exp()


def _cut(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Ids that may be drawn and their weights, likeliest first, the lower id first among equals."""
    vocab = len(logits)
    if 0 < params.top_k < vocab:
        ids, ranked = _top(logits, params.top_k)
        weights = _weights(ranked, ranked[0], params)
        return _nucleus(ids, weights, weights.sum() * params.top_p)
    mass = _weights(logits, logits.max(), params).sum() * params.top_p
    ids, ranked = _top(logits, min(NUCLEUS_PROBE, vocab))
    weights = _weights(ranked, ranked[0], params)
    if bool(weights.sum() < mass):
        ids, ranked = _top(logits, vocab)
        weights = _weights(ranked, ranked[0], params)
    return _nucleus(ids, weights, mass)


def _top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and logits of the `count` largest and of all that equal the last of them, ranked."""
    least = logits.topk(count).values[-1] if count < len(logits) else logits.min()
    ids = (logits >= least).nonzero().flatten()
    ranked, order = logits[ids].sort(descending=True, stable=True)
    return ids[order], ranked


def _nucleus(ids: Tensor, weights: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest that together first reach `mass`, one at least."""
    before = weights.cumsum(-1) - weights
    kept = max(1, int((before < mass).sum()))
    return ids[:kept], weights[:kept]


def _pass(weights: Tensor, chance: float) -> Tensor:
    """The first index at which the running sum of the weights exceeds `chance` of their total."""
    sums = weights.cumsum(-1)
    # Strictly below the total, or rounding could pass every weight that is not zero.
    target = torch.minimum(sums[-1] * chance, torch.nextafter(sums[-1], torch.zeros_like(sums[-1])))
    return torch.searchsorted(sums, target, right=True)


def table_of(params: Sequence[SamplingParams], chances: Sequence[float]) -> Tensor:
    """What `draw_together` must know of each row: [n, 4], float64, on the host."""
    rows = [(p.temperature, p.top_p, p.top_k, c) for p, c in zip(params, chances, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def draw_together(logits: Tensor, settings: Tensor) -> Tensor:
    """What `draw` answers for each row of [n, vocab], for a device that must not be waited for.

    Every row is sorted whole, which a processor could not afford. `settings` is from `table_of`.
    """
    temperature, top_p, top_k, chance = settings.unsqueeze(-1).unbind(1)
    values, by_rank = logits.sort(dim=-1, descending=True, stable=True)
    vocab = logits.shape[-1]
    by_id = torch.arange(vocab, device=logits.device)
    order = torch.where((top_k == 0) & (top_p == 1), by_id, by_rank)
    ranked = logits.gather(-1, order)
    weights = ((ranked.double() - values[:, :1].double()) / temperature).exp()
    kept = torch.where(top_k == 0, vocab, top_k).clamp(max=vocab).long()
    weights = weights * (ranked >= values.gather(-1, kept - 1))
    before = weights.cumsum(-1) - weights
    weights = weights * ((before < weights.sum(-1, keepdim=True) * top_p) | (top_p == 1))
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    target = torch.minimum(total * chance, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(sums, target, right=True).clamp(max=vocab - 1)  # were it a NaN
    return order.gather(-1, place).squeeze(-1)
