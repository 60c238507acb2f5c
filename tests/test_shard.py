"""A model cut into shards computes what `transformers` computes, or says why it cannot."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from planner.schedule import Grant, Ring, RingShape, Span, Step
from stages.architecture import Model
from stages.attention import attention_function
from stages.config import WeightKind
from stages.errors import NumericError, ProtocolError, UnsupportedModelError
from stages.ferry import Ferry
from stages.finite import finite_rows
from stages.kv_cache import KvCache
from stages.sampling import Sampler, SamplingParams
from stages.shard import Shard, ShardSpec
from stages.step_index import rounded
from tests.models import write_random_model

NEW_TOKENS = 8
ROWS = 64
GREEDY = SamplingParams()


@dataclass
class Stages:
    """A pipeline in one process: shards, their caches, and the sampler of the last."""

    shards: list[Shard]
    caches: list[KvCache]
    sampler: Sampler = field(default_factory=lambda: Sampler(Ferry(torch.device("cpu"))))

    def compute(self, step: Step, token_ids: Tensor) -> Tensor:
        hidden = self.shards[0].embed(token_ids)
        for shard, cache in zip(self.shards, self.caches, strict=True):
            cache.apply(step)
            hidden = shard.forward(step, hidden, cache)
        return hidden


def cut_into(
    folder: Path,
    stages: int,
    layers: int,
    shape: RingShape,
    dtype: str,
    weights: WeightKind = "stored",
) -> Stages:
    bounds = [layers * i // stages for i in range(stages + 1)]
    shards = [
        Shard.load(ShardSpec(folder, first, end, dtype, weights=weights))
        for first, end in pairwise(bounds)
    ]
    return Stages(shards, [shard.new_cache(shape.blocks, shape.block_tokens) for shard in shards])


def generate(
    stages: Stages,
    shape: RingShape,
    prompts: Sequence[list[int]],
    params: SamplingParams = GREEDY,
    new_tokens: int = NEW_TOKENS,
    pace: Callable[[Ring], None] = lambda _ring: None,
) -> list[list[int]]:
    """Every prompt's continuation, the ring's own policy making the steps; `pace` before each."""
    ring = Ring(shape)
    ids = {row: list(prompt) for row, prompt in enumerate(prompts)}
    for row, prompt in ids.items():
        stages.sampler.admit(row, params, key=row * 7919, seed=11)
        ring.enqueue(row, len(prompt), len(prompt) + new_tokens)
    while (step := ring.next_step()) is not None:
        pace(ring)
        spans = step.spans
        tokens = [ids[s.sequence][s.start : s.start + s.tokens] for s in spans]
        logits = stages.compute(step, torch.tensor(list(chain(*tokens))))
        sampling = [span.sequence for span in spans if span.samples]
        drawn = stages.sampler.sample(logits, sampling, [len(ids[row]) for row in sampling])
        for row, token in zip(sampling, drawn.tolist(), strict=True):
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


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision_stays_near_float32(
    reference: Reference, dtype: str, tolerance: float
) -> None:
    shape = RingShape(1, 8, blocks=256, block_tokens=16, step_tokens=200)
    pipeline = cut_into(reference.folder, 2, 4, shape, dtype)
    for prompt in reference.prompts[:8]:
        ours = prefill(pipeline, [prompt])[0].float()
        theirs = reference.model(torch.tensor([prompt])).logits[0, -1]
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_sampled_tokens_are_the_same_in_any_plan(reference: Reference) -> None:
    answers = []
    for stages, slots, slot_rows in [(1, 1, 30), (2, 3, 4), (3, 2, 11)]:
        shape = RingShape(slots, slot_rows, blocks=1024, block_tokens=8, step_tokens=200)
        pipeline = cut_into(reference.folder, stages, 4, shape, "float32")
        params = SamplingParams(temperature=0.9, top_p=0.95, top_k=50)
        answers.append(generate(pipeline, shape, reference.prompts[:30], params))
    assert answers[0] == answers[1] == answers[2] != reference.answers[:30]


def prefill(
    pipeline: Stages, prompts: Sequence[list[int]], chunk: int = 10**6, stride: int = 1
) -> list[Tensor]:
    """Each prompt's last logits: all prompts side by side, in chunks, blocks `stride` apart."""
    for cache in pipeline.caches:
        cache.clear()
    block_tokens, blocks = pipeline.caches[0].block_tokens, pipeline.caches[0].blocks
    order = [at for offset in range(stride) for at in range(offset, blocks, stride)]
    grants, logits = [], dict[int, Tensor]()
    for row, prompt in enumerate(prompts):
        needed = -(-len(prompt) // block_tokens)
        grants.append(Grant(row, tuple(order[:needed])))
        del order[:needed]
    for start in range(0, max(map(len, prompts)), chunk):
        spans = tuple(
            Span(row, start, min(chunk, len(prompt) - start), start + chunk >= len(prompt))
            for row, prompt in enumerate(prompts)
            if start < len(prompt)
        )
        ids = [prompts[s.sequence][s.start : s.start + s.tokens] for s in spans]
        step = Step(0, 0, spans, tuple(grants) if start == 0 else ())
        answer = pipeline.compute(step, torch.tensor(list(chain(*ids))))
        sampling = [span.sequence for span in spans if span.samples]
        logits.update(zip(sampling, answer, strict=True))
    return [logits[row] for row in range(len(prompts))]


def test_a_row_gets_the_same_bits_in_any_company(reference: Reference) -> None:
    shape = RingShape(1, 64, blocks=1024, block_tokens=16, step_tokens=200)
    pipeline = cut_into(reference.folder, 1, 4, shape, "float32")
    prompts = reference.prompts[:13]
    together = prefill(pipeline, prompts)
    alone = [prefill(pipeline, [prompt])[0] for prompt in prompts]
    paired = [prefill(pipeline, [prompts[-1], prompt])[1] for prompt in prompts]
    assert all(map(torch.equal, together, alone))
    assert all(map(torch.equal, together, paired))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_rounded_steps_make_linear_layers_blind_to_the_batch(threads: int) -> None:
    states, weight = torch.randn(rounded(300), 96), torch.randn(160, 96)
    whole = F.linear(states, weight)
    torch.set_num_threads(threads)
    for tokens in (1, 5, 9, 17, 25, 40, 200):
        assert torch.equal(F.linear(states[: rounded(tokens)], weight), whole[: rounded(tokens)])
    torch.set_num_threads(1)


def test_neither_chunks_nor_the_place_of_blocks_change_a_bit(reference: Reference) -> None:
    shape = RingShape(1, 64, blocks=1024, block_tokens=16, step_tokens=200)
    pipeline = cut_into(reference.folder, 2, 4, shape, "float32")
    prompts = reference.prompts[:13]
    whole = prefill(pipeline, prompts)
    for other in (prefill(pipeline, prompts, chunk=128), prefill(pipeline, prompts, stride=7)):
        assert all(map(torch.equal, whole, other))


@pytest.fixture
def one_layer(tmp_path: Path) -> Shard:
    write_random_model(tmp_path, "llama", seed=3)
    return Shard.load(ShardSpec(tmp_path, 1, 2, "float32"))


TWO_ROWS = Step(
    frame=5,
    slot=0,
    spans=(Span(40, 0, 3, True), Span(41, 0, 2, True)),
    grants=(Grant(40, (0,)), Grant(41, (1,))),
)


def answered(shard: Shard, hidden: Tensor, cache: KvCache) -> Tensor:
    """What the shard makes of two rows, all of it numbers."""
    answer = shard.forward(TWO_ROWS, hidden, cache)
    shard.require_finite(TWO_ROWS, finite_rows(answer).tolist())
    return answer


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("row", "sequence"), [(0, 40), (2, 40), (4, 41)])
def test_a_number_that_is_none_names_the_layers_and_the_sequence(
    one_layer: Shard, bad: float, row: int, sequence: int
) -> None:
    hidden = torch.randn(5, 64)
    hidden[row, 7] = bad
    cache = one_layer.new_cache(2, 16)
    cache.apply(TWO_ROWS)
    with pytest.raises(NumericError, match=rf"layers 1-2 .* frame 5, for sequence {sequence}$"):
        answered(one_layer, hidden, cache)


def test_an_infinite_logit_names_its_sequence(tmp_path: Path) -> None:
    model = write_random_model(tmp_path, "llama", seed=3)
    model.lm_head.weight.data[9] = 3e38
    model.save_pretrained(tmp_path)
    shard = Shard.load(ShardSpec(tmp_path, 3, 4, "float32"))
    cache = shard.new_cache(2, 16)
    cache.apply(TWO_ROWS)
    with pytest.raises(NumericError, match=r"layers 3-4 .* sequence 4[01]"):
        answered(shard, torch.randn(5, 64), cache)


@pytest.mark.parametrize("shape", [(4, 64), (5, 63), (1, 5, 64)])
def test_hidden_states_that_do_not_fit_the_step_are_refused(
    one_layer: Shard, shape: tuple[int, ...]
) -> None:
    cache = one_layer.new_cache(2, 16)
    cache.apply(TWO_ROWS)
    with pytest.raises(ProtocolError, match="frame 5: hidden states"):
        one_layer.forward(TWO_ROWS, torch.zeros(shape), cache)


@pytest.mark.parametrize("token", [-1, 320])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path, token: int) -> None:
    write_random_model(tmp_path, "llama", seed=3)
    with pytest.raises(ProtocolError, match="vocabulary's 320"):
        Shard.load(ShardSpec(tmp_path, 0, 1, "float32")).embed(torch.tensor([0, token]))


def test_a_step_without_samples_answers_no_logits(reference: Reference) -> None:
    shard = Shard.load(ShardSpec(reference.folder, 0, 4, "float32"))
    cache = shard.new_cache(4, 16)
    step = Step(0, 0, (Span(0, 0, 5, False),), (Grant(0, (0,)),))
    cache.apply(step)
    assert shard.forward(step, shard.embed(torch.arange(5)), cache).shape == (0, 320)


@pytest.mark.parametrize(
    "unknown", [{"position_bias": torch.zeros(1)}, {"temperature": 2.0}, {"rotary": "half"}]
)
def test_an_attention_argument_that_we_do_not_know_is_refused_by_name(
    unknown: dict[str, Any],
) -> None:
    heads = torch.zeros(1, 2, 8, 4)
    with pytest.raises(UnsupportedModelError, match=next(iter(unknown))):
        attention_function(torch.nn.Module(), heads, heads, heads, None, **unknown)


def test_a_shard_says_what_it_holds(tmp_path: Path) -> None:
    model = write_random_model(tmp_path, "llama", seed=3)
    shard = Shard.load(ShardSpec(tmp_path, 1, 4, "bfloat16"))
    assert (shard.is_first, shard.is_last) == (False, True)
    assert [kv.layer for kv in shard.facts.kv] == [1, 2, 3]
    assert shard.facts.kv_bytes_per_token == 3 * 2 * (16 + 16) * 2
    held = [model.lm_head, model.model.norm, *model.model.layers[1:]]
    assert shard.facts.weight_bytes == 2 * sum(p.numel() for m in held for p in m.parameters())
