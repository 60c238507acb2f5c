"""One stage against `transformers` generate: ragged prompts, ragged answers, the same weights.

Rows are 256 prompts of 16 to 256 tokens that want 24, 48 or 96 tokens. `generate` gets its best
batch size, padded on the left, rows sorted by length; a batch runs until its longest answer is done.
It is also shown what no user could give it: batches of equal quotas. Loading is not counted.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.pipelines import greedy_row, timed_run, write_llama
from benchmarks.record import Claim, record
from stages.config import Ring
from stages.control import LeasedRow

ROWS = 256
THREADS = 2
BATCHES = (16, 32, 64, 128)
TRIAL_TOKENS = 24
"""Tokens that every row makes while the best batch size is looked for."""
SLOT_ROWS = 64
TIMES = 1.5


def rows_of(count: int) -> list[LeasedRow]:
    """The benchmark's rows, the same every time."""
    dice = random.Random(0)
    return [
        greedy_row(i, [dice.randrange(32_000) for _ in range(dice.randint(16, 256))],
                   (24, 48, 96)[i % 3])
        for i in range(count)
    ]  # fmt: skip


def generate_s(model: PreTrainedModel, rows: Sequence[LeasedRow], batch: int) -> float:
    """Seconds of `generate` for the rows in the order given."""
    started = time.perf_counter()
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        longest = max(len(row.token_ids) for row in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(part):
            ids[i, longest - len(row.token_ids) :] = torch.tensor(row.token_ids)
            mask[i, longest - len(row.token_ids) :] = 1
        quota = max(row.max_new_tokens for row in part)
        model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=quota, min_new_tokens=quota, do_sample=False
        )
    return time.perf_counter() - started


def ours_s(folder: Path, rows: Sequence[LeasedRow]) -> float:
    """Seconds of one stage for the same rows."""
    longest = max(len(row.token_ids) + row.max_new_tokens for row in rows)
    ring = Ring(slots=1, slot_rows=SLOT_ROWS, blocks=SLOT_ROWS * (longest // 16 + 1),
                block_tokens=16, step_tokens=SLOT_ROWS + 256)  # fmt: skip
    timed = timed_run(folder, rows, [8], THREADS, ring)
    assert timed.output_tokens == sum(row.max_new_tokens for row in rows)
    return timed.seconds


def main() -> None:
    """Interleave the contenders and report ratios of medians."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    chosen = options.parse_args()
    torch.set_num_threads(THREADS)
    rows = rows_of(ROWS)
    by_length = sorted(rows, key=lambda row: len(row.token_ids))
    by_quota = sorted(rows, key=lambda row: (row.max_new_tokens, len(row.token_ids)))
    tokens = sum(row.max_new_tokens for row in rows)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_llama(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        trial = [row.model_copy(update={"max_new_tokens": TRIAL_TOKENS}) for row in by_length]
        best = chosen.batches[0]
        if len(chosen.batches) > 1:
            best = min(chosen.batches, key=lambda batch: generate_s(model, trial, batch))
        seconds: dict[str, list[float]] = {"ours": [], "by length": [], "by quota": []}
        for _ in range(chosen.repeats):
            seconds["ours"].append(ours_s(folder, rows))
            seconds["by length"].append(generate_s(model, by_length, best))
            seconds["by quota"].append(generate_s(model, by_quota, best))
    rate = {name: tokens / statistics.median(each) for name, each in seconds.items()}
    record("engine", [
        Claim("one stage, output tokens/s", rate["ours"], "tokens/s"),
        Claim(f"generate, batches of {best} by length", rate["by length"], "tokens/s"),
        Claim(f"generate, batches of {best} of equal quotas", rate["by quota"], "tokens/s"),
        Claim("one stage over generate", rate["ours"] / rate["by length"], "ratio", TIMES),
        Claim("one stage over generate of equal quotas", rate["ours"] / rate["by quota"], "ratio",
              TIMES),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
