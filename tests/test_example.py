"""The shipped example: a useful small model, real prompts, and a job that runs them."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples import corpus, make_prompts, tasks, train
from examples.tokens import source_tokens
from flows.job import load_job
from stages.prompt import PromptEncoder

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "model"


@pytest.fixture(scope="module")
def prompts() -> pa.Table:
    """The shipped prompts."""
    return pq.read_table(EXAMPLES / "prompts.parquet")


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    """The shipped model's encoder."""
    return PromptEncoder.load(MODEL, "parse")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The shipped model, as the example job computes it."""
    torch.set_num_threads(1)
    loaded: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return loaded


def test_the_job_names_the_shipped_files() -> None:
    job = load_job(EXAMPLES / "job.yaml")
    assert Path(job.model) == MODEL
    assert Path(job.prompts.uri) == EXAMPLES / "prompts.parquet"
    assert job.sampling.max_new_tokens == 64


def test_the_weights_are_small_and_bf16() -> None:
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 20 * 2**20
    with safe_open(weights, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 4e6 <= sum(tensor.numel() for tensor in tensors) <= 8e6


def test_the_recipe_says_how_well_it_does() -> None:
    recipe = json.loads((MODEL / "recipe.json").read_text())
    assert recipe["final_train_loss"] > 0
    assert recipe["held_out_perplexity"] <= recipe["unigram_perplexity"] / 4


def test_it_foretells_unseen_files_four_times_better_than_a_unigram_model(
    model: LlamaForCausalLM,
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    unseen = [source for source in corpus.standard_library() if source.held_out]
    tokens = train.judged_windows(source_tokens(tokenizer, unseen))[::16].reshape(-1)
    best_unigram = train.unigram_perplexity(tokens, tokens, len(tokenizer))
    perplexity = train.perplexity(model, tokens)
    assert perplexity <= best_unigram / 4, f"{perplexity:.1f} against {best_unigram:.1f}"


def test_most_instructed_answers_stop_by_themselves(
    model: LlamaForCausalLM, encoder: PromptEncoder, prompts: pa.Table
) -> None:
    rows = [row for row in prompts.to_pylist() if row["id"].startswith("instructed")][:12]
    forms = [encoder.encode(row["prompt"]) for row in rows[:6]]
    forms += [encoder.encode_messages(row["messages"]) for row in rows[6:]]
    stopped = 0
    for ids in forms:
        output = model.generate(  # type: ignore[misc]
            torch.tensor([ids]), max_new_tokens=64, do_sample=False
        )
        stopped += int(output[0, -1]) in encoder.end_ids
    assert stopped >= 9


def test_there_are_a_thousand_prompts_of_eight_to_four_hundred_tokens(
    encoder: PromptEncoder, prompts: pa.Table
) -> None:
    rows = prompts.to_pylist()
    assert len(rows) >= 1000
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    lengths = [len(encoder.encode(row["prompt"])) for row in rows]
    lengths += [len(encoder.encode_messages(row["messages"])) for row in rows]
    assert min(lengths) >= 8
    assert max(lengths) <= 400


def test_half_of_the_prompts_share_one_of_a_few_instructions(prompts: pa.Table) -> None:
    begins = [prompt.startswith(tasks.INSTRUCTIONS) for prompt in prompts["prompt"].to_pylist()]
    systems = [messages[0]["role"] == "system" for messages in prompts["messages"].to_pylist()]
    assert begins == systems
    assert 3 <= len(tasks.INSTRUCTIONS) <= 5
    assert np.mean(begins) == pytest.approx(0.5, abs=0.01)


def test_the_same_library_gives_the_same_prompts(encoder: PromptEncoder, prompts: pa.Table) -> None:
    built = make_prompts.prompt_table(encoder, seed=0)
    assert built.schema == make_prompts.SCHEMA == prompts.schema
    shipped_from = json.loads((MODEL / "recipe.json").read_text())["corpus_sha256"]
    if corpus.sha256(corpus.standard_library()) == shipped_from:
        assert built == prompts
    else:  # another Python: another library, as many prompts
        assert built == make_prompts.prompt_table(encoder, seed=0)


def test_a_definition_is_found_whole_and_dedented() -> None:
    text = 'class A:\n    def f(\n        self,\n    ):\n        """Do it. Then\n        rest."""\n'
    found = corpus.definitions(corpus.Source("a.py", text))
    assert [one.name for one in found] == ["A", "f"]
    assert found[1].signature == "def f(\n    self,\n):"
    assert found[1].source == 'def f(\n    self,\n):\n    """Do it. Then\n    rest."""'
    assert found[1].sentence == "Do it."


def test_training_with_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    tokens = np.arange(400, dtype=np.int32)
    recipe = train.Recipe(steps=3, window_tokens=32, batch_windows=16)
    losses = []
    for name in ("one", "two"):
        model = train.new_model(tokenizer, seed=1)
        keep = train.KeepEvery(3, model, tokenizer, tmp_path / name, time.monotonic())
        losses.append(train.train(model, [tokens[:200], tokens[200:]], recipe, keep))
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")
    )
    assert losses[0] == losses[1]
    assert first == second
