"""Trains the example model: a small Llama that knows the standard library's style.

`python -m examples.train --steps N` writes `examples/model`: bf16 safetensors, tokenizer, chat
template, and `recipe.json`, which says how it was made and how well it does on files it never saw.
The same Python, seed and steps give the same data in the same order.
"""

import argparse
import json
import math
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from examples import corpus, tasks
from examples.tokens import Tokens, source_tokens, stop_ids, task_tokens, train_tokenizer

LONG_WINDOW_TOKENS = 512
JUDGED_WINDOWS = 256  # 131,072 tokens: enough for three digits, and a minute on one core


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result, besides the corpus."""

    steps: int
    seed: int = 0
    window_tokens: int = 256
    batch_windows: int = 8
    long_from: float = 0.85
    """Share of the steps after which windows are longer and fewer, for the far positions' sake."""
    peak_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1

    def batch_shape(self, step: int) -> tuple[int, int]:
        """(windows, tokens in each) of a step; their product stays the same."""
        if step < self.long_from * self.steps:
            return self.batch_windows, self.window_tokens
        shrink = LONG_WINDOW_TOKENS // self.window_tokens
        return self.batch_windows // shrink, LONG_WINDOW_TOKENS

    def rate(self, step: int) -> float:
        """Learning rate: a linear rise, then a cosine down to nothing."""
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * done))


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A random Llama of about 5.5 M parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=704,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # on a CPU, at these lengths, the fastest
    return model


def train(
    model: LlamaForCausalLM, streams: list[Tokens], recipe: Recipe, keep: "KeepEvery"
) -> float:
    """Trains in place on windows drawn evenly from the streams; the mean loss of the last steps."""
    rng = np.random.default_rng(recipe.seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = _loss(model, _windows(streams, recipe.batch_shape(step), rng), bf16=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        keep.after(step, losses)
    return float(np.mean(losses[-100:]))


def judged_windows(tokens: Tokens) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """(windows, tokens in each): at most JUDGED_WINDOWS, evenly spread, none overlapping."""
    count = len(tokens) // LONG_WINDOW_TOKENS
    windows = tokens[: count * LONG_WINDOW_TOKENS].reshape(count, LONG_WINDOW_TOKENS)
    return windows[np.unique(np.linspace(0, count - 1, JUDGED_WINDOWS).astype(np.int64))]


def perplexity(model: LlamaForCausalLM, tokens: Tokens) -> float:
    """Of every judged token but each window's first, in float32."""
    windows = torch.from_numpy(judged_windows(tokens).astype(np.int64))
    with torch.inference_mode():
        sums = [
            _loss(model, batch, bf16=False).item() * len(batch) for batch in torch.split(windows, 8)
        ]
    return math.exp(sum(sums) / len(windows))


def unigram_perplexity(trained: Tokens, tokens: Tokens, vocabulary: int) -> float:
    """Of the same tokens, under the training tokens' frequencies (each count plus one)."""
    seen = np.bincount(trained, minlength=vocabulary) + 1
    return math.exp(-np.log(seen / seen.sum())[judged_windows(tokens)[:, 1:]].mean())


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Prints how training goes, and saves the model as it is now and then."""

    steps: int
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    started: float

    def after(self, step: int, losses: list[float]) -> None:
        """To be called at the end of every step."""
        if (step + 1) % 20 == 0:
            spent_s = time.monotonic() - self.started
            print(f"step={step + 1} loss={np.mean(losses[-20:]):.3f} s={spent_s:.0f}", flush=True)
        if (step + 1) % self.steps == 0:
            save(self.model, self.tokenizer, self.folder)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a new folder beside the old one and puts it in its place."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    rounded = LlamaForCausalLM(model.config).bfloat16()
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    rounded.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def judge(
    folder: Path, learned: Tokens, held_out: list[corpus.Source], seed: int
) -> dict[str, float]:
    """How well the saved model, in float32, foretells files that it never saw."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    judged = source_tokens(tokenizer, held_out)
    on_tasks = task_tokens(tokenizer, held_out, seed)
    return {
        "judged_tokens": judged_windows(judged).size,
        "unigram_perplexity": round(unigram_perplexity(learned, judged, len(tokenizer)), 2),
        "held_out_perplexity": round(perplexity(model, judged), 2),
        "held_out_task_perplexity": round(perplexity(model, on_tasks), 2),
    }


def main() -> None:
    """Reads the library, trains tokenizer and model, saves, measures on held-out files."""
    options = _options()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    sources = corpus.standard_library()
    learned = [source for source in sources if not source.held_out]
    held_out = [source for source in sources if source.held_out]
    tokenizer = train_tokenizer([source.text for source in learned] + list(tasks.INSTRUCTIONS))
    recipe = Recipe(steps=options.steps, seed=options.seed)
    streams = [source_tokens(tokenizer, learned), task_tokens(tokenizer, learned, recipe.seed)]
    model = new_model(tokenizer, recipe.seed)
    keep = KeepEvery(options.keep_every, model, tokenizer, options.out, started)
    loss = train(model, streams, recipe, keep)
    save(model, tokenizer, options.out)
    made = {
        **asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "files_learned": len(learned),
        "files_held_out": len(held_out),
        "corpus_sha256": corpus.sha256(sources),
        "tokens_of_sources": len(streams[0]),
        "tokens_of_tasks": len(streams[1]),
        "tokens_seen": recipe.steps * recipe.batch_windows * recipe.window_tokens,
        "final_train_loss": round(loss, 4),
        "train_s": round(time.monotonic() - started),
        **judge(options.out, streams[0], held_out, recipe.seed),
    }
    (options.out / "recipe.json").write_text(json.dumps(made, indent=2) + "\n")
    print(json.dumps(made, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-every", type=int, default=200, help="steps between saves")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    return parser.parse_args()


def _loss(model: LlamaForCausalLM, windows: torch.Tensor, bf16: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def _windows(
    streams: list[Tokens], shape: tuple[int, int], rng: np.random.Generator
) -> torch.Tensor:
    """(windows, tokens + 1) ids, taken in turn from each stream at random places."""
    windows, tokens = shape
    rows = []
    for index in range(windows):
        stream = streams[index % len(streams)]
        start = rng.integers(len(stream) - tokens)
        rows.append(stream[start : start + tokens + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


if __name__ == "__main__":
    main()
