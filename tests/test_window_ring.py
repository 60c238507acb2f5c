"""Rings whose windowed layers keep only their window say what `transformers` says."""

import random
from pathlib import Path

import pytest
import torch

from stages.architecture import Model, layer_windows
from stages.control import Answer, LeasedRow
from stages.shard import Shard, ShardSpec
from stages.worker import Worker
from tests.models import FAMILIES, random_model, write_random_model
from tests.ring import answers, plan_of, row, windowed_settings

WINDOW = 8
NEW_TOKENS = 48
LAYERS = 4


def rows_that_share(count: int) -> list[LeasedRow]:
    """Prompts of up to 25 windows, most with a beginning of twelve in common."""
    dice = random.Random(2)
    beginning = [dice.randrange(256) for _ in range(100)]
    prompts = [
        beginning[: dice.choice((0, 70, 100, 100))]
        + [dice.randrange(256) for _ in range(dice.choice((5, 40, 100)))]
        for _ in range(count)
    ]
    return [row(i, ids, NEW_TOKENS) for i, ids in enumerate(prompts)]


def assert_greedy(model: Model, prompt: tuple[int, ...], said: tuple[int, ...]) -> None:
    """Every token is the one that `transformers` would say next."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == list(said)


def with_stops(rows: list[LeasedRow], calm: dict[int, Answer]) -> list[LeasedRow]:
    """The long ones, which enter first, end with the first letter that they say; the short ones,
    which are then expected to end as early, do not."""
    letters = {i: next((c for c in calm[i].text if c.isascii()), None) for i in calm}
    return [
        each.model_copy(update={"stop": (letter,)})
        if len(each.token_ids) > 100 and (letter := letters[i])
        else each
        for i, each in enumerate(rows)
    ]


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "gpt_oss"])
def test_layers_that_keep_their_window_write_the_tokens_of_one_process(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_random_model(tmp_path, family, seed=5, sliding_window=WINDOW)
    rows = rows_that_share(18)
    ring = windowed_settings(1, 18, blocks=400, window=WINDOW, rows=5)
    calm = answers(tmp_path, rows, plan_of(LAYERS, 1), ring)
    for i, each in enumerate(rows):
        assert_greedy(model, each.token_ids, calm[i].output_ids)
    monkeypatch.setattr("planner.admission.LEARNED_ROWS", 2)
    stopped = with_stops(rows, calm)
    workers: list[Worker] = []
    tight = windowed_settings(2, 5, blocks=28, window=WINDOW, rows=3)
    found = answers(tmp_path, stopped, plan_of(LAYERS, 3), tight, workers.append)
    for i, answer in found.items():
        end = answer.output_tokens if stopped[i].stop else None
        assert answer.output_ids == calm[i].output_ids[:end]
    assert any(answer.replayed_tokens for answer in found.values()), "nobody had to make way"
    alone = sum(len(each.token_ids) + found[i].output_tokens for i, each in enumerate(rows))
    assert workers[0].done.tokens < alone, "nobody shared"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_says_what_each_layer_sees(family: str, tmp_path: Path) -> None:
    write_random_model(tmp_path, family, seed=5)
    shard = Shard.load(ShardSpec(tmp_path, 0, LAYERS, "float32"))
    probed = [kv.window or 0 for kv in shard.facts.kv]
    assert list(layer_windows(shard.model.config)) == probed


def test_a_config_without_kinds_of_layers_windows_them_all() -> None:
    assert layer_windows(random_model("mistral", 1, sliding_window=9).config) == (9,) * LAYERS
    assert layer_windows(random_model("mistral", 1, sliding_window=None).config) == (0,) * LAYERS
