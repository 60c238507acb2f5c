"""What layers' weights in eight or four bits save, cost and change.

    python -m benchmarks.weights

Bytes and seconds are a probe's, of one layer of a random Llama, 1024 wide, on one thread; the
perplexities are the example model's on text it was not trained on. All is computed in float32.
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
from stages.config import ProbeFacts, ProbeSpec, WeightKind
from stages.probe import probe
from stages.quantize import quantize

LEVELS: tuple[WeightKind, ...] = ("stored", "int8", "int4")
REPEATS = 3
WINDOWS = 48


def example_perplexity(weights: WeightKind) -> float:
    """The example model's on held-out text, its layers' linear weights kept at that level."""
    tokens = token_windows(AutoTokenizer.from_pretrained(EXAMPLE), WINDOWS)
    model: Any = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    for layer in model.model.layers:
        quantize(layer, weights)
    return perplexity(model, tokens)


def main() -> None:
    """Probe the levels in turns; report each beside the stored weights."""
    torch.set_num_threads(1)
    seen: dict[WeightKind, list[ProbeFacts]] = {weights: [] for weights in LEVELS}
    with tempfile.TemporaryDirectory() as scratch:
        write_llama(Path(scratch))
        for _ in range(REPEATS):
            for weights, facts in seen.items():
                facts.append(probe(ProbeSpec(folder=Path(scratch), weights=weights)))
    perplexities = {weights: example_perplexity(weights) for weights in LEVELS}
    claims = []
    for weights, facts in seen.items():
        decode_s = statistics.median(each.decode_s for each in facts)
        prefill_s = statistics.median(each.prefill_s for each in facts)
        claims += [
            Claim(f"{weights}: one layer", facts[0].layer_bytes / 2**20, "MiB"),
            Claim(f"{weights}: one token each of 32 rows", 1e3 * decode_s, "ms"),
            Claim(f"{weights}: 128 prompt tokens", 1e3 * prefill_s, "ms"),
            Claim(f"{weights}: the example model's perplexity", perplexities[weights], ""),
        ]
    for weights in LEVELS[1:]:
        change = perplexities[weights] / perplexities["stored"]
        saved = seen["stored"][0].layer_bytes / seen[weights][0].layer_bytes
        claims.append(Claim(f"{weights}: perplexity over that without", change, "ratio"))
        claims.append(Claim(f"{weights}: times smaller in memory", saved, "ratio"))
    record("weights", claims)


if __name__ == "__main__":
    main()
