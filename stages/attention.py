"""Attention over ragged micro-batches: every row alone, against its own blocks of the KV cache.

`transformers` calls one registered function for every attention layer. What that function works on
(the step and the cache) reaches it through a `Seat` that the shard puts on its modules, never
through keyword arguments, since some families drop those.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from planner.schedule import CHUNK_TOKENS, Span, Step
from stages.block_tables import Rows
from stages.errors import UnsupportedModelError
from stages.kv_cache import KvCache, LayerKv

ATTENTION = "wagonway"
"""The name under which our function is registered with transformers' attention interface.

No mask function is registered with it, and so the families build no mask at all.
"""
SEAT = "wagonway_seat"
"""The attribute under which a module finds its Seat."""
HARMLESS = {"position_ids", "cache_position"}
"""Arguments that say nothing which the step does not say; any other that is set is refused."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a layer makes of the products of its queries and keys."""

    scale: float
    softcap: float | None = None
    """Scores are bent to lie between minus this and this (Gemma 2)."""
    sinks: Tensor | None = None
    """[heads]: a score that takes part in each softmax and has no value (GPT-OSS)."""

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention can do it."""
        return self.softcap is None and self.sinks is None


class Attend(Protocol):
    """What an attention layer does with its queries, keys and values, each [1, heads, T, dim]."""

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        window: int | None,
    ) -> Tensor:
        """The layer's answer, [1, T, heads, value dim]."""


class Seat:
    """Where one shard's attention modules find the step in progress; only the shard fills it."""

    def __init__(self) -> None:
        self._attend: Attend | None = None

    def put_on(self, layer: nn.Module) -> None:
        """Make this the seat of every module inside a layer."""
        for module in layer.modules():
            setattr(module, SEAT, self)

    @contextmanager
    def taken_by(self, attend: Attend) -> Iterator[None]:
        """Answer the layers' attention with `attend` inside the block."""
        self._attend = attend
        try:
            yield
        finally:
            self._attend = None

    @property
    def attend(self) -> Attend:
        assert self._attend is not None, "a layer runs only inside a step"
        return self._attend


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **flags: Any,
) -> tuple[Tensor, None]:
    """Ours in transformers' attention interface; UnsupportedModelError for a flag we don't know."""
    name = type(module).__name__
    softcap, sinks = flags.pop("softcap", None), flags.pop("s_aux", None)
    for flag, setting in flags.items():
        if flag not in HARMLESS and setting is not None and not _is_off(setting):
            raise UnsupportedModelError(f"{name}: attention argument {flag} is not supported")
    if attention_mask is not None:
        raise UnsupportedModelError(f"{name}: a prepared attention mask is not supported")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{name}: attention that is not causal is not supported")
    seat, layer = getattr(module, SEAT), module.layer_idx
    assert isinstance(seat, Seat)
    assert isinstance(layer, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, softcap, sinks)
    return seat.attend(layer, query, key, value, scoring, sliding_window), None


AttentionInterface.register(ATTENTION, attention_function)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive queries of one row and the keys that they see."""

    first: int
    """Where the queries start in the step's concatenated positions."""
    tokens: int
    rows: Rows
    """Where the keys and values lie, from the first that any of the queries sees."""
    mask: Tensor | None
    """Added to the scores, [tokens, keys]; None for a single query, which sees every key."""


class StepAttention:
    """Attention of one step: writes its keys and values, then answers each row from its own.

    Rows are cut at multiples of CHUNK_TOKENS positions, so that a prompt that came in several
    chunks is computed as one that came whole. What says where keys and values lie is made once and
    shared by all layers of a kind.
    """

    def __init__(
        self, step: Step, kv: KvCache, write_at: Mapping[bool, Tensor], dtype: torch.dtype
    ) -> None:
        """`write_at` is StepIndex's."""
        self._kv = kv
        self._dtype = dtype
        self._spans = step.spans
        self._tokens = step.tokens
        self._write_at = write_at
        self._pieces: dict[tuple[bool, int | None], list[Piece]] = {}

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        window: int | None,
    ) -> Tensor:
        """See Attend; positions past the step's tokens are padding and get zeros."""
        windowed = self._kv.is_windowed(layer)
        keys, values = self._kv.write(
            layer, self._write_at[windowed], key[:, :, : self._tokens], value[:, :, : self._tokens]
        )
        pieces = self._pieces.get((windowed, window))
        if pieces is None:
            pieces = self._pieces[windowed, window] = list(self._cut(layer, window))
        answers = _answers(pieces, query, keys, values, scoring)
        padding = query.shape[2] - self._tokens
        if padding:
            answers.append(query.new_zeros(padding, query.shape[1], values.shape[-1]))
        return torch.cat(answers)[None]

    def _cut(self, layer: int, window: int | None) -> Iterator[Piece]:
        firsts = accumulate((span.tokens for span in self._spans), initial=0)
        for span, first in zip(self._spans, firsts, strict=False):
            for start, end in _chunks(span):
                seen_from = 0 if window is None else max(0, start - window + 1)
                rows = self._kv.rows(layer, span.sequence, seen_from, end)
                mask = None
                if end - start > 1:
                    mask = _causal_mask(start, end, seen_from, window, self._dtype, self._kv.device)
                yield Piece(first + start - span.start, end - start, rows, mask)


class Probe:
    """Stands in for attention once, to learn which layers ask for it, how wide and how far."""

    def __init__(self) -> None:
        self.calls: list[LayerKv] = []

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        window: int | None,
    ) -> Tensor:
        """See Attend; every position gets zeros."""
        self.calls.append(LayerKv(layer, key.shape[1], key.shape[3], value.shape[3], window))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def _answers(
    pieces: list[Piece], query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring
) -> list[Tensor]:
    """Each piece's answer, [tokens, heads, value dim], in the order of the pieces."""
    heads, kv_heads, dim = query.shape[1], keys.shape[1], values.shape[-1]
    # A single query's heads that share a KV head stand as that head's queries: no K or V is copied.
    grouped = query.transpose(1, 2).reshape(-1, 1, kv_heads, heads // kv_heads, query.shape[-1])
    singles = grouped.unbind(0)
    answers = []
    for piece in pieces:
        k, v = piece.rows.of(keys), piece.rows.of(values)
        q = query[:, :, piece.first : piece.first + piece.tokens]
        if not scoring.is_plain:
            answers.append(_scored(q, k, v, piece.mask, scoring)[0].transpose(0, 1))
        elif piece.mask is None:
            answer = F.scaled_dot_product_attention(singles[piece.first], k, v, scale=scoring.scale)
            answers.append(answer.reshape(1, heads, dim))
        else:
            answer = F.scaled_dot_product_attention(
                q, k, v, attn_mask=piece.mask, scale=scoring.scale, enable_gqa=heads > kv_heads
            )
            answers.append(answer[0].transpose(0, 1))
    return answers


def _scored(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """Attention [1, heads, T, value dim] by plain products, for scores that torch's has no words for.

    The softmax is computed in float32, as the families that need this compute it.
    """
    kv_heads, tokens = key.shape[1], query.shape[2]
    grouped = query.reshape(1, kv_heads, -1, tokens, query.shape[-1])
    scores = grouped @ key[:, :, None].transpose(-1, -2) * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is not None:
        scores = scores + mask
    if scoring.sinks is not None:
        sinks = scoring.sinks.view(1, kv_heads, -1, 1, 1).expand(-1, -1, -1, tokens, 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : key.shape[2]]
    answer: Tensor = weights.to(query.dtype) @ value[:, :, None]
    return answer.flatten(1, 2)


def _chunks(span: Span) -> Iterator[tuple[int, int]]:
    """The span's positions as ranges that end at multiples of CHUNK_TOKENS, or with the span."""
    start, end = span.start, span.start + span.tokens
    while start < end:
        stop = min(end, (start // CHUNK_TOKENS + 1) * CHUNK_TOKENS)
        yield start, stop
        start = stop


def _causal_mask(
    start: int,
    end: int,
    seen_from: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """0 where query [start, end) sees key [seen_from, end), minus infinity elsewhere."""
    age = torch.arange(start, end, device=device)[:, None] - torch.arange(
        seen_from, end, device=device
    )
    unseen = age < 0 if window is None else (age < 0) | (age >= window)
    return torch.zeros(age.shape, dtype=dtype, device=device).masked_fill_(unseen, -torch.inf)


def _is_off(setting: object) -> bool:
    return isinstance(setting, (bool, int, float)) and not setting
