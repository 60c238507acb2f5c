"""A stage that holds the keys and values of two slots out of eight: the others lie on its disk.

    python -m benchmarks.parking

The roofline of a step is the longer of what it takes with everything resident and what its slot's
keys and values take to come back alone; all are measured in turn, and medians count. A process of
its own shows what memory such a stage takes at most, against what a plan counts for it.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import Claim, record
from benchmarks.stage_memory import memory_claims, taken, taken_apart
from planner.schedule import Grant, Span, Step
from stages.kv_cache import KvCache
from stages.shard import Shard, ShardSpec

LAYERS, SLOTS, RESIDENT = 6, 8, 2
PARKED = 1.0 - RESIDENT / SLOTS
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of a slot, and the positions that each of them sees."""

    rows: int
    context: int

    @property
    def blocks(self) -> int:
        """Blocks of one row, with room for what it decodes here."""
        return -(-(self.context + 1) // BLOCK_TOKENS)

    @property
    def name(self) -> str:
        return f"{SLOTS} slots of {self.rows} rows that see {self.context}"


SHAPES = (Shape(32, 127), Shape(32, 255))
HELD = Shape(32, 255)
"""Whose memory is measured."""


def write_grouped_llama(folder: Path) -> None:
    """A random Llama, 1024 wide, whose 16 heads share 4 of keys and values, as today's do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, num_hidden_layers=LAYERS + 1, num_attention_heads=16,
        num_key_value_heads=4, intermediate_size=2816, vocab_size=1000,
        max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


class Ring:
    """A stage whose slots' contexts are granted and written; its steps go round them."""

    def __init__(self, shard: Shard, shape: Shape, parked: float) -> None:
        self.shard, self.shape = shard, shape
        each = shape.blocks
        blocks = SLOTS * shape.rows * each
        self.cache: KvCache = shard.new_cache(
            blocks, BLOCK_TOKENS, frames=blocks - int(parked * blocks)
        )
        self._steps, self._frame = [], 0
        self._hidden = torch.randn(shape.rows, shard.facts.hidden)
        for slot in range(SLOTS):
            rows = range(slot * shape.rows, (slot + 1) * shape.rows)
            grants = tuple(Grant(n, tuple(range(n * each, (n + 1) * each))) for n in rows)
            whole = tuple(Span(n, 0, shape.context + 1, samples=False) for n in rows)
            self.cache.apply(Step(slot, slot, whole, grants))
            self.cache.bring(Step(slot, slot, whole))  # as if all of it had been computed
            decodes = tuple(Span(n, shape.context, 1, samples=False) for n in rows)
            self._steps.append(Step(slot, slot, decodes))

    def bring(self) -> None:
        """The next slot's keys and values, without computing with them."""
        step = self._steps[self._frame % SLOTS]
        self.cache.apply(step)
        self.cache.bring(step)
        self._frame += 1

    def compute(self) -> None:
        """The next slot's step."""
        step = self._steps[self._frame % SLOTS]
        self.cache.apply(step)
        self.shard.forward(step, self._hidden, self.cache)
        self._frame += 1

    @property
    def waited_s(self) -> float:
        """So far, for what was parked."""
        return 0.0 if self.cache.parking is None else self.cache.parking.counts.waited_s


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of a step."""

    compute_s: float
    copy_s: float
    parked_s: float
    waited_s: float


def measured(resident: Ring, parked: Ring, rounds: int) -> Took:
    """One turn: so many rounds of each, one after another."""
    steps = rounds * SLOTS

    def step_s(ring: Ring, computes: bool) -> float:
        act = ring.compute if computes else ring.bring
        act()
        started = time.perf_counter()
        for _ in range(steps):
            act()
        return (time.perf_counter() - started) / steps

    compute_s = step_s(resident, computes=True)
    copy_s = step_s(parked, computes=False)
    parked.compute()  # what the last copies took is nobody's wait
    before_s = parked.waited_s
    parked_s = step_s(parked, computes=True)
    return Took(compute_s, copy_s, parked_s, (parked.waited_s - before_s) / (steps + 1))


def speed(folder: Path, turns: int, rounds: int) -> list[Claim]:
    """Each shape's step beside its roofline, and what of it is waiting."""
    shard = Shard.load(ShardSpec(folder, 0, LAYERS, "float32"))
    claims = []
    for shape in SHAPES:
        resident, parked = Ring(shard, shape, 0.0), Ring(shard, shape, PARKED)
        took = [measured(resident, parked, rounds) for _ in range(turns)]
        assert parked.cache.parking is not None
        each = statistics.median
        roof = each(max(t.compute_s, t.copy_s) for t in took)
        back_bytes = shape.rows * shape.blocks * BLOCK_TOKENS * shard.facts.kv_bytes_per_token
        rate = back_bytes / each(t.copy_s for t in took)
        name, moved = shape.name, f"{back_bytes / 1e6:.0f} MB, at {rate / 1e6:.0f} MB/s"
        claims += [
            Claim(f"{name}: computing, all resident", 1e3 * each(t.compute_s for t in took), "ms"),
            Claim(f"{name}: fetching {moved}", 1e3 * each(t.copy_s for t in took), "ms"),
            Claim(f"{name}: {PARKED:.0%} parked", 1e3 * each(t.parked_s for t in took), "ms"),
            Claim(f"{name}: of the roofline, {1e3 * roof:.0f} ms",
                  each(max(t.compute_s, t.copy_s) / t.parked_s for t in took), "ratio"),
            Claim(f"{name}: KV wait over the step",
                  each(t.waited_s / t.parked_s for t in took), "ratio", limit=0.05),
        ]  # fmt: skip
    return claims


def held(folder: Path, parked: float) -> tuple[Shard, KvCache]:
    """A stage that has computed for a while."""
    ring = Ring(Shard.load(ShardSpec(folder, 0, LAYERS, "float32")), HELD, parked)
    for _ in range(3 * SLOTS):
        ring.compute()
    return ring.shard, ring.cache


def memory(folder: Path) -> list[Claim]:
    """Of two processes, one with everything resident."""
    ours, resident = (
        taken_apart("benchmarks.parking", folder, "--parked", str(parked))
        for parked in (PARKED, 0.0)
    )
    names = f"{HELD.name}: memory, all resident", f"{HELD.name}: memory, {PARKED:.0%} parked"
    return memory_claims(resident, names[0], ours, names[1])


def main() -> None:
    """Measure speed and memory; with --memory-of, be the process whose memory is measured."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--memory-of", type=Path)
    options.add_argument("--parked", type=float, default=PARKED)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    if chosen.memory_of is not None:
        print(taken(chosen.memory_of, partial(held, chosen.memory_of, chosen.parked)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_grouped_llama(Path(scratch))
        claims = memory(Path(scratch))
        record("parking", claims + speed(Path(scratch), chosen.turns, chosen.rounds))


if __name__ == "__main__":
    main()
