"""Does our way of computing a model equal `transformers`' own? Asked of a small random one.

Two layers of the job's own config class and flags, narrowed, go through our path (two shards, ragged
and chunked steps) and through the family's plain forward pass. A flag that we drop or misread shows
in the logits; that model is refused before a job starts.
"""

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from planner.schedule import CHUNK_TOKENS, Grant, Span, Step
from stages.architecture import FAMILY_ERRORS, Model, read_config
from stages.errors import UnsupportedModelError
from stages.shard import Shard, ShardSpec

TOLERANCE = 1e-4
"""Largest difference allowed, as a fraction of the largest logit; float32 rounding stays far below."""
NARROW = {
    "vocab_size": 384,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "sliding_window": 24,
    "first_k_dense_replace": 1,
}
"""Upper limits for what only costs time, and for windows, which short rows must outgrow."""
LENGTHS = (1, 30, CHUNK_TOKENS + 22)
"""Tokens known of each row before the last DECODES are fed one by one."""
DECODES = 3
BLOCK_TOKENS = 8


def check(folder: Path, device: str = "cpu") -> float:
    """Refuse a model whose small random likeness we compute differently than `transformers`.

    Ours is computed on the device, theirs by the processor. The answer is the largest difference of
    a logit, relative to the largest logit. Raises UnsupportedModelError, saying what differs, and
    CheckpointError for an unreadable config.
    """
    config = read_config(folder)
    try:
        return _largest_difference(narrowed(config), device)
    except FAMILY_ERRORS as error:
        raise UnsupportedModelError(
            f"{config.model_type}: its layers cannot be run apart: {error!r}"
        ) from error


def narrowed(config: PretrainedConfig) -> PretrainedConfig:
    """The config with two layers, of both kinds where there are two, and small widths.

    Head and rotary dimensions, the ratio of query to KV heads and every flag stay.
    """
    small = copy.deepcopy(config)
    layers = config.num_hidden_layers
    per_layer = {
        name: setting
        for name, setting in vars(config).items()
        if isinstance(setting, list) and len(setting) == layers
    }
    kinds = [tuple(map(str, kind)) for kind in zip(*per_layer.values(), strict=True)] or [()]
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), min(1, layers - 1))
    small.num_hidden_layers = 2
    for name, setting in per_layer.items():
        setattr(small, name, [setting[0], setting[other]])
    for name, limit in NARROW.items():
        width = getattr(config, name, None)
        if isinstance(width, int) and width > limit:
            setattr(small, name, limit)
    _narrow_heads(small)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    return small


def _narrow_heads(small: PretrainedConfig) -> None:
    """At most two KV heads, as many query heads to each as ever; the hidden size follows."""
    heads, hidden = small.num_attention_heads, small.hidden_size
    kv_heads = getattr(small, "num_key_value_heads", None) or heads
    own_dim = getattr(small, "head_dim", None)
    kept = min(2, kv_heads)
    small.num_attention_heads = heads // kv_heads * kept
    if getattr(small, "num_key_value_heads", None):
        small.num_key_value_heads = kept
    small.hidden_size = min(hidden, 128) if own_dim else hidden // heads * small.num_attention_heads


@torch.no_grad()
def randomise(model: Model) -> None:
    """Spread a fresh model's weights so wide that every bias, gain and flag shows in its logits."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))


def _largest_difference(small: PretrainedConfig, device: str) -> float:
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        build: Any = AutoModelForCausalLM.from_config
        reference: Model = build(small, dtype=torch.float32, attn_implementation="eager").eval()
        randomise(reference)
        rows = [torch.randint(0, small.vocab_size, (n + DECODES,)) for n in LENGTHS]
        reference.save_pretrained(name)
        specs = [ShardSpec(Path(name), i, i + 1, "float32", device) for i in range(2)]
        shards = [Shard.load(spec) for spec in specs]
    worst = 0.0
    with torch.inference_mode():
        expected = [reference(ids[None], use_cache=False).logits[0] for ids in rows]
    scale = max(float(logits.abs().max()) for logits in expected)
    for seen in _ours(shards, rows):
        difference = float((seen.logits - expected[seen.row][seen.position]).abs().max()) / scale
        worst = max(worst, difference)
        if not difference <= TOLERANCE:
            raise UnsupportedModelError(
                f"{small.model_type}: a two-layer random model of this kind gives other logits than "
                f"transformers does (by {difference:.2g} of the largest, at position "
                f"{seen.position}; layers: {_layer_kinds(reference)})"
            )
    return worst


@dataclass(frozen=True, slots=True)
class _Seen:
    row: int
    position: int
    logits: Tensor


def _ours(shards: list[Shard], rows: list[Tensor]) -> Iterator[_Seen]:
    """Logits of every span's last position, by our path."""
    caches = [shard.new_cache(64, BLOCK_TOKENS) for shard in shards]
    for step in _steps():
        hidden = shards[0].embed(
            torch.cat([rows[s.sequence][s.start : s.start + s.tokens] for s in step.spans])
        )
        for shard, cache in zip(shards, caches, strict=True):
            cache.apply(step)
            hidden = shard.forward(step, hidden, cache)
        for span, logits in zip(step.spans, shards[-1].ferry.to_host(hidden), strict=True):
            yield _Seen(span.sequence, span.start + span.tokens - 1, logits)


def _steps() -> Iterator[Step]:
    """Ragged prefill in two chunks, then decodes; the last row's blocks lie scattered."""
    cuts = [(0, 1), (0, 13, LENGTHS[1]), (0, CHUNK_TOKENS, LENGTHS[2])]
    grants = (
        Grant(0, tuple(range(1))),
        Grant(1, tuple(range(1, 6))),
        Grant(2, tuple(range(63, 63 - 20, -1))),
    )
    chunks = [Span(row, a, b - a, True) for row, cut in enumerate(cuts) for a, b in pairwise(cut)]
    first = tuple(span for span in chunks if span.start == 0)
    second = tuple(span for span in chunks if span.start > 0)
    yield Step(0, 0, first, grants)
    yield Step(1, 0, second)
    for i in range(DECODES):
        yield Step(2 + i, 0, tuple(Span(r, n + i, 1, True) for r, n in enumerate(LENGTHS)))


def _layer_kinds(model: Model) -> str:
    return ", ".join(sorted({type(layer).__name__ for layer in model.base_model.layers}))
