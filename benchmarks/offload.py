"""A stage of six layers in the memory of three: five stream from disk while it computes.

    python -m benchmarks.offload

The roofline of a step is the longer of what it takes with all layers resident and what reading the
streamed ones takes alone; both are measured in turn with the streaming stage, and medians count. A
process of its own shows what memory such a stage takes at most, against what a plan counts for it.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.pipelines import write_llama
from benchmarks.record import Claim, record
from benchmarks.stage_memory import memory_claims, taken, taken_apart
from planner.schedule import Grant, Span, Step
from stages.kv_cache import KvCache
from stages.layer_store import bytes_per_s
from stages.scratch_file import scratch_folder
from stages.shard import Shard, ShardSpec

LAYERS, STREAMED = 6, 5
"""Five that stream take two buffers: three layers' memory in all."""
CONTEXT, BLOCK_TOKENS = 128, 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows that compute so many positions each, the first at `start`."""

    rows: int
    start: int
    tokens: int

    @property
    def name(self) -> str:
        if self.start:
            return f"{self.rows} rows decoding"
        return f"{self.rows * self.tokens} prompt tokens"


SHAPES = (
    Shape(8, CONTEXT, 1),
    Shape(32, CONTEXT, 1),
    Shape(64, CONTEXT, 1),
    Shape(1, 0, 128),
)


class Stage:
    """A shard with a cache in which every row's context is granted."""

    def __init__(self, shard: Shard, shape: Shape) -> None:
        self.shard = shard
        each = -(-(shape.start + shape.tokens) // BLOCK_TOKENS)
        grants = tuple(
            Grant(row, tuple(range(row * each, (row + 1) * each))) for row in range(shape.rows)
        )
        spans = tuple(Span(row, shape.start, shape.tokens, False) for row in range(shape.rows))
        self.step = Step(0, 0, spans)
        self.cache: KvCache = shard.new_cache(each * shape.rows, BLOCK_TOKENS)
        self.cache.apply(Step(0, 0, spans, grants))
        self.hidden = torch.randn(shape.rows * shape.tokens, shard.facts.hidden)

    def compute(self) -> Tensor:
        return self.shard.forward(self.step, self.hidden, self.cache)

    def step_s(self, steps: int) -> float:
        """Seconds of a step in a row of them: the first one's layers are on their way before it."""
        self.compute()
        started = time.perf_counter()
        for _ in range(steps):
            self.compute()
        return (time.perf_counter() - started) / steps


def shard_of(folder: Path, streamed: int) -> Shard:
    return Shard.load(ShardSpec(folder, 0, LAYERS, "float32", streamed_layers=streamed))


def speed(folder: Path, turns: int, steps: int) -> list[Claim]:
    """Each shape's step beside its roofline."""
    resident, streaming = shard_of(folder, 0), shard_of(folder, STREAMED)
    assert streaming.stream is not None
    layer_bytes = streaming.stream.buffer_bytes // 2
    claims = []
    for shape in SHAPES:
        alone, streamed = Stage(resident, shape), Stage(streaming, shape)
        streamed.hidden = alone.hidden
        assert torch.equal(alone.compute(), streamed.compute()), "streaming changed a bit"
        took: dict[str, list[float]] = {"compute": [], "read": [], "streaming": []}
        for _ in range(turns):
            rate = bytes_per_s(scratch_folder(), layer_bytes, STREAMED)
            took["read"].append(STREAMED * layer_bytes / rate)
            took["compute"].append(alone.step_s(steps))
            took["streaming"].append(streamed.step_s(steps))
        middle = {name: statistics.median(seconds) for name, seconds in took.items()}
        roof = max(middle["compute"], middle["read"])
        ratio = statistics.median(
            max(compute, read) / whole
            for compute, read, whole in zip(
                took["compute"], took["read"], took["streaming"], strict=True
            )
        )
        bound = "computing" if middle["compute"] >= middle["read"] else "reading"
        claims += [
            Claim(f"{shape.name}: computing, all resident", 1e3 * middle["compute"], "ms"),
            Claim(f"{shape.name}: reading {STREAMED} layers alone", 1e3 * middle["read"], "ms"),
            Claim(f"{shape.name}: streaming", 1e3 * middle["streaming"], "ms"),
            Claim(f"{shape.name}: of the roofline, {1e3 * roof:.0f} ms of {bound}", ratio,
                  "ratio", target=0.9),
        ]  # fmt: skip
    return claims


def held(folder: Path, streamed: int) -> tuple[Shard, KvCache]:
    """A stage that has computed for a while."""
    stage = Stage(shard_of(folder, streamed), SHAPES[-1])
    stage.step_s(3)
    return stage.shard, stage.cache


def memory(folder: Path) -> list[Claim]:
    """Of two processes, one with all layers resident."""
    ours, resident = (
        taken_apart("benchmarks.offload", folder, "--streamed", str(streamed))
        for streamed in (STREAMED, 0)
    )
    names = "memory with all layers resident", f"memory with {STREAMED} streaming"
    return memory_claims(resident, names[0], ours, names[1])


def main() -> None:
    """Measure speed and memory; with --memory-of, be the process whose memory is measured."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--memory-of", type=Path)
    options.add_argument("--streamed", type=int, default=STREAMED)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    if chosen.memory_of is not None:
        print(taken(chosen.memory_of, partial(held, chosen.memory_of, chosen.streamed)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_llama(Path(scratch))
        claims = memory(Path(scratch))
        record("offload", claims + speed(Path(scratch), chosen.turns, chosen.steps))


if __name__ == "__main__":
    main()
