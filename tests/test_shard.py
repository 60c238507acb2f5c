"""A model cut into shards computes what `transformers` computes, or says why it cannot."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from planner.schedule import Ring, RingShape, Step
from stages.architecture import Model
from stages.kv_cache import KvCache
from stages.sampling import Sampler, SamplingParams
from stages.shard import Shard, ShardSpec
from tests.models import write_random_model

NEW_TOKENS = 8
ROWS = 64
GREEDY = SamplingParams()


@dataclass
class Stages:
    """A pipeline in one process: shards, their caches, and the sampler of the last."""

    shards: list[Shard]
    caches: list[KvCache]
    sampler: Sampler = field(default_factory=Sampler)

    def compute(self, step: Step, token_ids: Tensor) -> Tensor:
        hidden = self.shards[0].embed(token_ids)
        for shard, cache in zip(self.shards, self.caches, strict=True):
            cache.apply(step)
            hidden = shard.forward(step, hidden, cache)
        return hidden


def cut_into(folder: Path, stages: int, layers: int, shape: RingShape, dtype: str) -> Stages:
    bounds = [layers * i // stages for i in range(stages + 1)]
    shards = [Shard.load(ShardSpec(folder, first, end, dtype)) for first, end in pairwise(bounds)]
    return Stages(shards, [shard.new_cache(shape.blocks, shape.block_tokens) for shard in shards])


def generate(
    stages: Stages,
    shape: RingShape,
    prompts: Sequence[list[int]],
    params: SamplingParams = GREEDY,
    new_tokens: int = NEW_TOKENS,
) -> list[list[int]]:
    """Every prompt's continuation, the ring's own policy making the steps."""
    ring = Ring(shape)
    ids = {row: list(prompt) for row, prompt in enumerate(prompts)}
    for row, prompt in ids.items():
        stages.sampler.admit(row, params, key=row * 7919, seed=11)
        ring.enqueue(row, len(prompt), len(prompt) + new_tokens)
    while (step := ring.next_step()) is not None:
        spans = step.spans
        tokens = [ids[s.sequence][s.start : s.start + s.tokens] for s in spans]
        logits = stages.compute(step, torch.tensor(list(chain(*tokens))))
        sampling = [span.sequence for span in spans if span.samples]
        drawn = stages.sampler.sample(logits, sampling, [len(ids[row]) for row in sampling])
        for row, token in zip(sampling, drawn, strict=True):
            ids[row].append(token)
        ended = [row for row in sampling if len(ids[row]) == len(prompts[row]) + new_tokens]
        ring.returned(step.slot, ended)
    return [ids[row][len(prompt) :] for row, prompt in enumerate(prompts)]


def ragged_prompts(rows: int, vocab: int, longest: int = 300) -> list[list[int]]:
    dice = random.Random(4)
    lengths = [1, 2, 3, longest, *(dice.randint(1, longest) for _ in range(rows - 4))]
    return [[dice.randrange(vocab) for _ in range(length)] for length in lengths]


@dataclass
class Reference:
    folder: Path
    model: Model
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    folder = tmp_path_factory.mktemp(request.param)
    model = write_random_model(folder, request.param, seed=3, max_shard_size="200KB")
    model.generation_config.eos_token_id = None
    prompts = ragged_prompts(ROWS, model.config.vocab_size)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        # A mask of ones, or generate would hide prompt tokens that happen to be the pad token.
        out = model.generate(
            ids, attention_mask=ids >= 0, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        answers.append(out[0, len(prompt) :].tolist())
    return Reference(folder, model, prompts, answers)


def explain(reference: Reference, got: list[list[int]]) -> str:
    """The first row that differs, and how close the reference's two best logits were there."""
    for row, (ours, theirs) in enumerate(zip(got, reference.answers, strict=True)):
        if ours != theirs:
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            ids = torch.tensor([reference.prompts[row] + theirs[:at]])
            best = reference.model(ids).logits[0, -1].topk(2).values
            return f"row {row} token {at}: {ours} != {theirs}; top-2 gap {best[0] - best[1]:.3g}"
    return ""


@pytest.mark.parametrize(("stages", "slots", "slot_rows"), [(1, 1, 64), (2, 3, 7), (3, 2, 16)])
def test_greedy_tokens_equal_transformers_generate(
    reference: Reference, stages: int, slots: int, slot_rows: int
) -> None:
    shape = RingShape(slots, slot_rows, blocks=1024, block_tokens=16, step_tokens=slot_rows + 150)
    pipeline = cut_into(reference.folder, stages, 4, shape, "float32")
    got = generate(pipeline, shape, reference.prompts)
    assert got == reference.answers, explain(reference, got)
