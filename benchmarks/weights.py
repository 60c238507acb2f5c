"""What layers' weights in eight or four bits save, cost and change.

    python -m benchmarks.weights

Bytes and seconds are a probe's, of one layer of a random Llama, 1024 wide, on one thread; the
perplexities are the example model's on text it was not trained on. Each level is set beside the
stored weights in the same type; int4 is there in bfloat16 alone.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.activations import EXAMPLE, token_windows
from benchmarks.codec import perplexity
from benchmarks.pipelines import write_llama
from benchmarks.record import Claim, record
from stages.config import DType, ProbeFacts, ProbeSpec, WeightKind
from stages.probe import probe
from stages.quantize import quantize

LEVELS: tuple[tuple[DType, WeightKind], ...] = (
    ("float32", "stored"),
    ("float32", "int8"),
    ("bfloat16", "stored"),
    ("bfloat16", "int8"),
    ("bfloat16", "int4"),
)
REPEATS = 3
WINDOWS = 48


def example_perplexity(dtype: DType, weights: WeightKind) -> float:
    """The example model's on held-out text, its layers' linear weights kept at that level."""
    tokens = token_windows(AutoTokenizer.from_pretrained(EXAMPLE), WINDOWS)
    model: Any = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=getattr(torch, dtype))
    for layer in model.model.layers:
        quantize(layer, weights)
    return perplexity(model, tokens)


def main() -> None:
    """Probe the levels in turns; report each beside the stored weights of its type."""
    torch.set_num_threads(1)
    seen: dict[tuple[DType, WeightKind], list[ProbeFacts]] = {level: [] for level in LEVELS}
    with tempfile.TemporaryDirectory() as scratch:
        write_llama(Path(scratch))
        for _ in range(REPEATS):
            for (dtype, weights), facts in seen.items():
                facts.append(probe(ProbeSpec(folder=Path(scratch), dtype=dtype, weights=weights)))
    figures = {
        (dtype, weights): {
            "MiB of one layer": facts[0].layer_bytes / 2**20,
            "ms for one token each of 32 rows": 1e3 * statistics.median(f.decode_s for f in facts),
            "ms for 128 prompt tokens": 1e3 * statistics.median(f.prefill_s for f in facts),
            "perplexity of the example model": example_perplexity(dtype, weights),
        }
        for (dtype, weights), facts in seen.items()
    }
    claims = []
    for (dtype, weights), own in figures.items():
        for name, figure in own.items():
            claims.append(Claim(f"{dtype}, {weights}: {name}", figure, ""))
            if weights != "stored":
                ratio = figure / figures[dtype, "stored"][name]
                claims.append(Claim(f"{dtype}, {weights}: {name}, over stored", ratio, "ratio"))
    record("weights", claims)


if __name__ == "__main__":
    main()
