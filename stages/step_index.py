"""What a step's kernels are told in numbers: built on the host, sent to the device in one copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planner.schedule import Span, Step
from stages.ferry import Ferry
from stages.kv_cache import KvCache

ROUND_TOKENS = 8
"""A step is padded to a multiple of this many positions.

In float32 on the CPU a linear layer then gives a position the same bits whatever stands beside it,
at any number of threads (measured: at 1 to 3 positions a thread they differ).
"""


@dataclass(frozen=True, slots=True)
class StepIndex:
    """Index tensors of one step, int64, on the device that computes."""

    positions: Tensor
    """[rounded tokens]: each token's position in its row; zeros behind them."""
    sampled: Tensor
    """[rounded samples]: which tokens yield logits; zeros behind them."""
    write_at: Mapping[bool, Tensor]
    """[tokens]: where keys and values go, in the pools of windowed layers and in those of others."""

    @classmethod
    def of(cls, step: Step, kv: KvCache, ferry: Ferry) -> "StepIndex":
        """The cache must have applied the step."""
        kinds = kv.kinds
        parts = [
            _padded(np.concatenate([np.arange(s.start, s.start + s.tokens) for s in step.spans])),
            _padded(np.array(_samples(step.spans), np.int64)),
            *(kv.places(windowed, step.spans) for windowed in kinds),
        ]
        sent = ferry.to_device(torch.from_numpy(np.concatenate(parts)))
        positions, sampled, *places = torch.split(sent, [len(part) for part in parts])
        return cls(positions, sampled, dict(zip(kinds, places, strict=True)))


def rounded(count: int) -> int:
    """Positions that a step of so many is padded to; see ROUND_TOKENS."""
    return -(-count // ROUND_TOKENS) * ROUND_TOKENS


def _padded(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.pad(numbers, (0, rounded(len(numbers)) - len(numbers)))


def _samples(spans: Sequence[Span]) -> list[int]:
    """The last token of each span that samples, among all tokens of the step."""
    ends = accumulate(span.tokens for span in spans)
    return [end - 1 for end, span in zip(ends, spans, strict=True) if span.samples]
