"""What a pipelined job puts on each of its links: bytes handed to TLS, and at the interfaces.

Three stages and the driver, each a process on a host of its own, joined by an emulated WAN of 5
Mbit/s and 20 ms; 32 rows a micro-batch, codec levels as the links choose them. Every position's
activation crosses a forward link once, whether of a prompt or of an answer; on the return link only
token ids travel. Acknowledgements go the other way and have lines of their own.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path as FilePath

from transformers import AutoConfig, AutoTokenizer

from benchmarks.activations import EXAMPLE, WINDOW_TOKENS, token_windows
from benchmarks.far_ring import Carried, FarJob, run
from benchmarks.pipelines import greedy_row, write_llama
from benchmarks.record import Claim, record
from benchmarks.wan import Path, obstacle
from flows.launch import DRIVER

WIRE = Path(rate_bit_per_s=5e6, delay_s=0.020)
SLOTS, SLOT_ROWS = 3, 32
PROMPT_TOKENS, NEW_TOKENS = 48, 64
TLS_LIMIT, INTERFACE_LIMIT, RETURN_LIMIT = 1.03, 1.08, 16
ELSEWHERE_LIMIT = 1 / 8  # of hidden x itemsize; no codec of ours makes an activation as small


@dataclass(frozen=True, slots=True)
class Job:
    """What the table calls it, and what to run."""

    name: str
    far: FarJob

    @property
    def ring(self) -> tuple[tuple[str, str], ...]:
        """Pairs of stages that a link joins; the last returns to the head."""
        stages = self.far.stages
        return tuple(zip(stages, (*stages[1:], stages[0]), strict=True))


def claims(job: Job) -> list[Claim]:
    """The job's figures."""
    config = AutoConfig.from_pretrained(job.far.folder)
    itemsize = 4 if job.far.dtype == "float32" else 2
    done = run(job.far)
    found = [Claim(f"{job.name}: output tokens", done.output_tokens / done.seconds, "tokens/s")]
    for source, target in job.ring[:-1]:
        pair, where = (source, target), f"{job.name}, {source} to {target}"
        ratio = done.number(pair, "ratio")
        ideal_bytes = done.number(pair, "tokens") * config.hidden_size * itemsize / ratio
        tls = done.number(pair, "wire_bytes") / ideal_bytes
        interface = done.wire[pair].delivered_bytes / ideal_bytes
        back = done.wire[target, source].delivered_bytes / ideal_bytes
        acks = done.number(pair, "ack_bytes") / ideal_bytes
        ideal = "of hidden x itemsize / ratio"
        found += [
            Claim(f"{where}: codec ratio", ratio, "ratio"),
            Claim(f"{where}: handed to TLS", tls, ideal, limit=TLS_LIMIT),
            Claim(f"{where}: at the interface", interface, ideal, limit=INTERFACE_LIMIT),
            Claim(f"{where}: acknowledgements handed to TLS", acks, ideal),
            Claim(f"{where}: the way back, at the interface", back, ideal),
        ]
    return found + _elsewhere(job, done, config.hidden_size * itemsize)


def _elsewhere(job: Job, done: Carried, activation_bytes: int) -> list[Claim]:
    """The return link, and what every way but the forward ones carries: no activation goes there."""
    back = job.ring[-1]
    tokens = done.output_tokens
    tls = done.number(back, "wire_bytes") / tokens
    interface = done.wire[back].delivered_bytes / tokens
    driver = sum(t.delivered_bytes for pair, t in done.wire.items() if DRIVER in pair)
    others = {
        f"{job.name}, {' to '.join(pair)}, no way of activations: at the interface": traffic
        for pair, traffic in done.wire.items()
        if pair not in job.ring[:-1]
    }
    limit = ELSEWHERE_LIMIT * activation_bytes
    return [
        *(
            Claim(claim, traffic.delivered_bytes / tokens, "bytes/token", limit=limit)
            for claim, traffic in others.items()
        ),
        Claim(f"{job.name}, return: handed to TLS", tls, "bytes/token", limit=RETURN_LIMIT),
        Claim(f"{job.name}, return: at the interface", interface, "bytes/token"),
        Claim(f"{job.name}: at the driver's interface, both ways", driver / tokens, "bytes/token"),
    ]


def example_job(rows: int) -> Job:
    """The trained example model on text that it has not seen."""
    windows = token_windows(AutoTokenizer.from_pretrained(EXAMPLE), rows * 64 // WINDOW_TOKENS + 1)
    prompts = windows.view(-1, 64)[:rows, :PROMPT_TOKENS].tolist()
    leased = [greedy_row(i, ids, NEW_TOKENS) for i, ids in enumerate(prompts)]
    far = FarJob(EXAMPLE, "float32", (2, 2, 2), WIRE, SLOTS, SLOT_ROWS, leased)
    return Job("example model, float32", far)


def wide_job(folder: FilePath, rows: int) -> Job:
    """A wider model with random weights."""
    write_llama(folder)
    prompts = [[(7 * i + 13 * k) % 32_000 for k in range(PROMPT_TOKENS)] for i in range(rows)]
    leased = [greedy_row(i, ids, 24) for i, ids in enumerate(prompts)]
    far = FarJob(folder, "bfloat16", (3, 3, 2), WIRE, SLOTS, SLOT_ROWS, leased)
    return Job("random model 1024 wide, bfloat16", far)


def main() -> None:
    """Measure both jobs, or say what is in the way."""
    missing = obstacle()
    if missing:
        sys.exit(f"interfaces are counted in namespaces: {missing}")
    with tempfile.TemporaryDirectory() as scratch:
        found = claims(example_job(2 * SLOTS * SLOT_ROWS))
        found += claims(wide_job(FilePath(scratch), SLOTS * SLOT_ROWS))
    record("codec_job", found)


if __name__ == "__main__":
    main()
