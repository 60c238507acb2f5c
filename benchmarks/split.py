"""What splitting a model costs: three stages against one, on the same cores and the same rows.

They share the cores, so all that is lost is our own overhead: TLS, frames, the scheduler's steps,
layers computed by one thread in place of two.
"""

import statistics
import tempfile
from pathlib import Path

from benchmarks.pipelines import Timed, greedy_row, timed_run, write_llama
from benchmarks.record import Claim, record
from stages.config import Ring

ROWS, PROMPT_TOKENS, NEW_TOKENS = 96, 32, 32
SLOT_ROWS, SLOTS = 32, 3
CORES = 2
SPLITS = {1: (8,), 3: (3, 3, 2)}
"""Layers of each stage; the LM head costs as much as two and a half."""
REPEATS = 3


def main() -> None:
    """Interleave one and three stages; report the ratio of medians, and where the time goes."""
    rows = [
        greedy_row(i, [(7 * i + 13 * k) % 32_000 for k in range(PROMPT_TOKENS)], NEW_TOKENS)
        for i in range(ROWS)
    ]
    ring = Ring(slots=SLOTS, slot_rows=SLOT_ROWS, blocks=SLOTS * SLOT_ROWS * 6, block_tokens=16,
                step_tokens=SLOT_ROWS + 256)  # fmt: skip
    runs: dict[int, list[Timed]] = {1: [], 3: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_llama(folder)
        for _ in range(REPEATS):
            for stages, done in runs.items():
                threads = max(1, CORES // stages)
                done.append(timed_run(folder, rows, SPLITS[stages], threads, ring))
    assert all(
        run.answers[i].output_ids == runs[1][0].answers[i].output_ids
        for run in (*runs[1], *runs[3])
        for i in range(ROWS)
    ), "stages changed the tokens"
    rate = {n: ROWS * NEW_TOKENS / statistics.median(r.seconds for r in runs[n]) for n in runs}
    claims = [
        Claim("one stage, two threads", rate[1], "tokens/s"),
        Claim("three stages of one thread", rate[3], "tokens/s"),
        Claim("three stages over one", rate[3] / rate[1], "ratio", target=0.8),
    ]
    last = runs[3][-1]
    for name, beat in sorted(last.vitals.items()):
        layers_s, all_s = beat.compute_cpu_s, beat.cpu_s - last.ready[name].cpu_s
        claims += [
            Claim(f"{name}: in its layers", beat.busy_s / last.seconds, "of the time"),
            Claim(f"{name}: on a core for its layers", layers_s / last.seconds, "of the time"),
            Claim(f"{name}: on a core for all else (frames, TLS, codec, queues)",
                  (all_s - layers_s) / last.seconds, "of the time"),
        ]  # fmt: skip
    record("split", claims)


if __name__ == "__main__":
    main()
