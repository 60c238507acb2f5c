"""Two real stages of one thread each over slow wires: what they reach, and what each token takes.

A random Llama, 1024 wide, 8 layers, float32, activations lossless; 256 rows of 64 tokens that want 64
more. The first stage has an embedding and five layers, the second three and the LM head, which costs
about as much as two and a half. All processes, the emulated wires too, share this machine's cores.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path as FilePath

from benchmarks.far_ring import Carried, FarJob, run
from benchmarks.pipelines import greedy_row, write_llama
from benchmarks.record import Claim, record
from benchmarks.wan import Path, obstacle

WIRES = {Path(100e6, 0.020): 180.0, Path(10e6, 0.050): 160.0}
"""Each with the output tokens a second that are aimed at."""
SPLIT = (5, 3)
SLOTS, SLOT_ROWS = 4, 32
ROWS, PROMPT_TOKENS, NEW_TOKENS = 256, 64, 64
CPU_MS_LIMIT = 10.0
LINK = ("a", "b")


def claims(job: FarJob, aim: float, repeats: int) -> list[Claim]:
    """The medians of some runs over one pair of wires."""
    name = f"{job.path.rate_bit_per_s / 1e6:.0f} Mbit/s, {1e3 * job.path.delay_s:.0f} ms"
    done = [run(job) for _ in range(repeats)]

    def median(figure: str) -> float:
        return statistics.median(_figures(each, job)[figure] for each in done)

    return [
        Claim(f"{name}: output", median("tokens/s"), "tokens/s", aim),
        Claim(f"{name}: processor time of all processes", median("cpu"), "ms/token",
              limit=CPU_MS_LIMIT),
        Claim(f"{name}: across the interface, forward", median("bytes"), "bytes/token"),
        Claim(f"{name}: activations over what was sent", median("ratio"), "ratio"),
        Claim(f"{name}: of what its slowest stage or link allows", median("bound"), "ratio"),
        Claim(f"{name}: the first stage computes", median("a"), "of the time"),
        Claim(f"{name}: the second stage computes", median("b"), "of the time"),
        Claim(f"{name}: the link carries", median("link"), "of the time"),
    ]  # fmt: skip


def _figures(done: Carried, job: FarJob) -> dict[str, float]:
    tokens, sent_bytes = done.output_tokens, done.wire[LINK].delivered_bytes
    occupied = {stage: beat.busy_s / done.seconds for stage, beat in done.vitals.items()}
    occupied["link"] = 8 * sent_bytes / job.path.rate_bit_per_s / done.seconds
    return occupied | {
        "tokens/s": tokens / done.seconds,
        "cpu": 1e3 * done.cpu_s / tokens,
        "bytes": sent_bytes / tokens,
        "ratio": done.number(LINK, "ratio"),
        "bound": max(occupied.values()),
    }


def main() -> None:
    """Measure both pairs of wires, or say what is in the way."""
    missing = obstacle()
    if missing:
        sys.exit(f"slow wires are emulated in namespaces: {missing}")
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--slots", type=int, default=SLOTS)
    options.add_argument("--slot-rows", type=int, default=SLOT_ROWS)
    chosen = options.parse_args()
    rows = [
        greedy_row(i, [(7919 * i + 104_729 * k) % 32_000 for k in range(PROMPT_TOKENS)], NEW_TOKENS)
        for i in range(ROWS)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder, found = FilePath(scratch), []
        write_llama(folder)
        job = FarJob(folder, "float32", SPLIT, Path(), chosen.slots, chosen.slot_rows, rows)
        for path, aim in WIRES.items():
            found += claims(replace(job, path=path), aim, chosen.repeats)
    record("real_ring", found)


if __name__ == "__main__":
    main()
