"""Runs rows through real stage processes without Prefect, for benchmarks: a fleet, timed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flows.launch import Fleet, StageSettings
from flows.stage import stage
from planner.plan import Pipeline, Plan, StagePlan
from stages.config import Ring
from stages.control import Answer, Heartbeat, LeasedRow

SETTLED_S = 1.5
"""After this, stages that are loaded have said so in a heartbeat."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What came of the rows, and how long they took from the first lease to the last answer."""

    answers: dict[int, Answer]
    seconds: float
    vitals: dict[str, Heartbeat]
    """At the end."""
    ready: dict[str, Heartbeat]
    """Before the first lease."""

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.output_tokens for answer in self.answers.values())


def write_llama(folder: Path) -> None:
    """The benchmarks' model: a random Llama, 1024 wide, 8 layers, 16 heads, vocabulary 32,000."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=2816, vocab_size=32_000, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(config.vocab_size)}
    wrap: Any = PreTrainedTokenizerFast  # no end token: every row runs to its quota
    wrap(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))).save_pretrained(folder)


def greedy_row(number: int, ids: Sequence[int], new_tokens: int) -> LeasedRow:
    """A row that makes so many tokens, whatever they are."""
    return LeasedRow(
        row=number, key=number, seed=0, token_ids=tuple(ids), max_new_tokens=new_tokens,
        temperature=0.0, top_p=1.0, top_k=0,
    )  # fmt: skip


def timed_run(
    model: Path, rows: Sequence[LeasedRow], split: Sequence[int], threads: int, ring: Ring
) -> Timed:
    """Rows through stages of so many layers, each a process; starting them is not counted."""
    bounds = list(accumulate(split, initial=0))
    placed = tuple(StagePlan(f"stage-{i}", *ends) for i, ends in enumerate(pairwise(bounds)))
    plan = Plan((Pipeline(placed, (), 0, 0),), 0.0, 0.0, 0.0, 0.0, "")
    settings = StageSettings("benchmark", model, "float32", threads)
    answers: dict[int, Answer] = {}
    with Fleet(plan, [ring], settings, start=stage.fn) as fleet:
        fleet.start()
        time.sleep(SETTLED_S)
        ready, started = fleet.vitals(), time.perf_counter()
        fleet.lease(0, rows)
        while len(answers) < len(rows):
            answers |= {answer.row: answer for answer in fleet.news(timeout_s=60.0).answers}
        seconds = time.perf_counter() - started
    return Timed(answers, seconds, fleet.vitals(), ready)
