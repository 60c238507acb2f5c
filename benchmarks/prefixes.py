"""What shared beginnings save: prompts whose first three quarters are one instruction, or each its own.

Both kinds have the same lengths, run through the same two stages, and answer as many tokens.
"""

import random
import statistics
import tempfile
from pathlib import Path

from benchmarks.pipelines import Timed, greedy_row, timed_run, write_llama
from benchmarks.record import Claim, record
from stages.config import Ring
from stages.control import LeasedRow

ROWS, PROMPT_TOKENS, SHARED_TOKENS, NEW_TOKENS = 48, 512, 384, 16
SLOTS, SLOT_ROWS = 3, 8
REPEATS = 3
HIDDEN_BYTES = 1024 * 4


def rows_of(shared: bool) -> list[LeasedRow]:
    """The rows; where nothing is shared, every one's first token already differs."""
    dice = random.Random(0)
    instruction = [dice.randrange(32_000) for _ in range(SHARED_TOKENS)]
    rows = []
    for number in range(ROWS):
        own = [dice.randrange(32_000) for _ in range(PROMPT_TOKENS - SHARED_TOKENS)]
        ids = instruction + own if shared else [number, *instruction[1:], *own]
        rows.append(greedy_row(number, ids, NEW_TOKENS))
    return rows


def prefill_bytes(run: Timed) -> int:
    """Activations that crossed the forward link for prompts; the rest is a position per token."""
    payload = sum(link.payload_bytes_sent for link in run.vitals["stage-0"].links)
    return payload - HIDDEN_BYTES * ROWS * (NEW_TOKENS - 1)


def main() -> None:
    """Interleave the two kinds; report ratios of medians."""
    blocks = (SLOTS * SLOT_ROWS + 4) * (PROMPT_TOKENS + NEW_TOKENS) // 16
    ring = Ring(slots=SLOTS, slot_rows=SLOT_ROWS, blocks=blocks, block_tokens=16,
                step_tokens=SLOT_ROWS + 256)  # fmt: skip
    runs: dict[bool, list[Timed]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_llama(folder)
        for _ in range(REPEATS):
            for shared, done in runs.items():
                done.append(timed_run(folder, rows_of(shared), (4, 4), 1, ring))
    rate = {
        shared: ROWS * NEW_TOKENS / statistics.median(run.seconds for run in done)
        for shared, done in runs.items()
    }
    sent = {shared: prefill_bytes(done[0]) for shared, done in runs.items()}
    record("prefixes", [
        Claim("every prompt its own", rate[False], "tokens/s"),
        Claim("three quarters shared", rate[True], "tokens/s"),
        Claim("shared over own: tokens/s", rate[True] / rate[False], "ratio", target=2.0),
        Claim("shared over own: bytes of prompts' activations sent", sent[True] / sent[False],
              "ratio", limit=0.3),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
