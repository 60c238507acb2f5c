"""A ring of stages over real sockets says what `transformers` says in one process."""

import contextlib
import random
import socket
import threading
from pathlib import Path

import pytest
import torch

from stages.architecture import Model
from stages.control import Answer
from stages.worker import Worker
from tests.models import write_random_model
from tests.ring import answers, plan_of, ring_settings, row

LAYERS = 4
ROWS = 64
NEW_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def prompts_of(count: int, longest: int = 300, seed: int = 3) -> list[list[int]]:
    dice = random.Random(seed)
    lengths = [1, 2, 127, 128, 129, longest, *(dice.randint(1, longest) for _ in range(count - 6))]
    return [[dice.randrange(256) for _ in range(length)] for length in lengths[:count]]


def generated(model: Model, prompt: list[int], new_tokens: int) -> list[int]:
    """What `transformers` answers to that prompt alone, greedily."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return [int(token) for token in out[0, len(prompt) :]]


def assert_same(model: Model, prompt: list[int], ours: tuple[int, ...], theirs: list[int]) -> None:
    """Equal, or a failure that says how close the first differing choice was."""
    if list(ours) == theirs:
        return
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + theirs[:place]])).logits[0, -1]
    top = torch.topk(logits, 2).values
    pytest.fail(
        f"prompt of {len(prompt)}: token {place} is {ours[place]}, not {theirs[place]}; "
        f"the top two logits differ by {float(top[0] - top[1]):.3g}"
    )


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]], list[list[int]], Model]:
    """A random model's folder, ragged prompts, and the reference's answers to them."""
    folder = tmp_path_factory.mktemp(str(request.param))
    model = write_random_model(folder, str(request.param), seed=5)
    prompts = prompts_of(ROWS)
    return folder, prompts, [generated(model, p, NEW_TOKENS) for p in prompts], model


@pytest.mark.parametrize(
    ("stages", "slots", "slot_rows"), [(1, 1, 64), (1, 3, 5), (2, 3, 8), (3, 4, 16), (3, 5, 3)]
)
def test_any_ring_writes_the_tokens_of_one_process(
    family: tuple[Path, list[list[int]], list[list[int]], Model],
    stages: int,
    slots: int,
    slot_rows: int,
) -> None:
    folder, prompts, expected, model = family
    rows = [row(i, ids, NEW_TOKENS) for i, ids in enumerate(prompts)]
    found = answers(folder, rows, plan_of(LAYERS, stages), ring_settings(slots, slot_rows))
    for i, (prompt, theirs) in enumerate(zip(prompts, expected, strict=True)):
        assert_same(model, prompt, found[i].output_ids, theirs)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "mixtral", "qwen3_moe", "gpt_oss"])
def test_other_families_write_the_tokens_of_one_process_too(name: str, tmp_path: Path) -> None:
    model = write_random_model(tmp_path, name, seed=5)
    prompts = prompts_of(16, longest=150)
    rows = [row(i, ids, 8) for i, ids in enumerate(prompts)]
    found = answers(tmp_path, rows, plan_of(LAYERS, 3), ring_settings(4, 3))
    for i, prompt in enumerate(prompts):
        assert_same(model, prompt, found[i].output_ids, generated(model, prompt, 8))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_sampled_text_does_not_depend_on_the_ring(name: str, tmp_path: Path) -> None:
    write_random_model(tmp_path, name, seed=8)
    rows = [
        row(i, ids, NEW_TOKENS, temperature=0.9, top_p=0.9, top_k=40 * (i % 2))
        for i, ids in enumerate(prompts_of(24))
    ]
    seen: list[dict[int, tuple[int, ...]]] = []
    for stages, slots, slot_rows in [(1, 1, 24), (2, 3, 4), (3, 4, 2)]:
        found = answers(tmp_path, rows, plan_of(LAYERS, stages), ring_settings(slots, slot_rows))
        seen.append({number: answer.output_ids for number, answer in found.items()})
    assert seen[0] == seen[1] == seen[2]
    greedy = [row(i, r.token_ids, NEW_TOKENS) for i, r in enumerate(rows)]
    drawn = answers(tmp_path, greedy, plan_of(LAYERS, 1), ring_settings(1, 24))
    assert any(drawn[i].output_ids != seen[0][i] for i in drawn), "nothing was sampled"


def test_the_lossless_codec_changes_bytes_not_tokens(
    family: tuple[Path, list[list[int]], list[list[int]], Model],
) -> None:
    folder, prompts, expected, _ = family
    rows = [row(i, ids, NEW_TOKENS) for i, ids in enumerate(prompts)]
    sent: dict[str, int] = {}
    for codec in ("raw", "fast"):
        workers: list[Worker] = []

        def told(worker: Worker, codec: str = codec, workers: list[Worker] = workers) -> None:
            worker.levels = (codec,)  # left to itself, a loopback link sends raw
            workers.append(worker)

        found = answers(folder, rows, plan_of(LAYERS, 2), ring_settings(2, 16), told)
        assert [list(found[i].output_ids) for i in range(ROWS)] == expected
        [head] = [w for w in workers if w._spec.is_head]
        assert head._outbox is not None
        report = head._outbox.report()
        assert report.level == codec
        sent[codec] = report.payload_bytes_sent
    assert sent["fast"] < 0.95 * sent["raw"]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that makes a NaN of token 200."""
    folder = tmp_path_factory.mktemp("poisoned")
    model = write_random_model(folder, "llama", seed=5)
    with torch.no_grad():
        model.get_input_embeddings().weight[200] = float("nan")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stages", [1, 3])
def test_a_row_that_makes_a_nan_fails_alone(poisoned: Path, stages: int) -> None:
    prompts = [[token % 200 for token in ids] for ids in prompts_of(16, longest=150)]
    bad = {3, 9}
    rows = [row(i, [*ids, 200] if i in bad else ids, 6) for i, ids in enumerate(prompts)]
    found = answers(poisoned, rows, plan_of(LAYERS, stages), ring_settings(3, 4))
    failed = {number: a for number, a in found.items() if a.finish_reason == "error"}
    # A greedy row never says token 200 here: its logit would have to be a NaN first.
    assert {number: a.error_type for number, a in failed.items()} == dict.fromkeys(
        bad, "numeric_error"
    )
    clean = [row(i, ids, 6) for i, ids in enumerate(prompts) if i not in bad]
    undisturbed = answers(poisoned, clean, plan_of(LAYERS, 1), ring_settings(1, 16))
    assert {n: a.output_ids for n, a in found.items() if n not in bad} == {
        n: a.output_ids for n, a in undisturbed.items()
    }
    assert any(a.replayed_tokens for n, a in found.items() if n not in bad)


def test_a_stop_string_of_several_tokens_ends_the_row(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", seed=2)
    prompt = [72, 101, 108, 108, 111]
    free = answers(tmp_path, [row(0, prompt, 30)], plan_of(LAYERS, 1), ring_settings(1, 2))[0]
    stop = next(free.text[i : i + 2] for i in range(4, 20) if "\ufffd" not in free.text[i : i + 2])
    rows = [row(0, prompt, 30).model_copy(update={"stop": (stop,)})]
    for stages in (1, 2):
        cut: Answer = answers(tmp_path, rows, plan_of(LAYERS, stages), ring_settings(2, 2))[0]
        assert cut.finish_reason == "stop"
        assert cut.text == free.text[: free.text.index(stop)]
        assert cut.output_tokens < free.output_tokens


def test_an_end_token_ends_the_row_and_leaves_no_text(tmp_path: Path) -> None:
    model = write_random_model(tmp_path, "llama", seed=2)
    prompt = [72, 101, 108, 108, 111]
    free = answers(tmp_path, [row(0, prompt, 30)], plan_of(LAYERS, 1), ring_settings(1, 2))[0]
    end = free.output_ids[5]
    model.generation_config.eos_token_id = end
    model.generation_config.save_pretrained(tmp_path)
    ended = answers(tmp_path, [row(0, prompt, 30)], plan_of(LAYERS, 2), ring_settings(2, 2))[0]
    assert ended.finish_reason == "stop"
    assert ended.output_ids == free.output_ids[: free.output_ids.index(end) + 1]


def test_a_ring_whose_connections_are_cut_goes_on_as_if_nothing_was(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", seed=2)
    rows = [row(i, ids, 40) for i, ids in enumerate(prompts_of(16, longest=150))]
    calm = answers(tmp_path, rows, plan_of(LAYERS, 1), ring_settings(1, 16))
    workers: list[Worker] = []
    over = threading.Event()
    cuts: list[str] = []

    def cut() -> None:
        while not over.wait(0.15):
            for worker in workers:
                if worker._outbox is not None:
                    connection = worker._outbox._connection
                    with contextlib.suppress(OSError):  # cut already, and not yet dialled again
                        # As a router between the two would: neither end has asked for it.
                        socket.socket.shutdown(connection.sockets[0], socket.SHUT_RDWR)
                        cuts.append(connection.peer)

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        found = answers(tmp_path, rows, plan_of(LAYERS, 3), ring_settings(3, 4), workers.append)
    finally:
        over.set()
        cutter.join()
    assert len(cuts) >= 6, "the run was over before its links were cut"
    assert {n: a.output_ids for n, a in found.items()} == {n: a.output_ids for n, a in calm.items()}


def test_more_rows_than_memory_holds_wait_their_turn(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", seed=2)
    rows = [row(i, ids, 8) for i, ids in enumerate(prompts_of(20, longest=150))]
    tight = ring_settings(2, 8).model_copy(update={"blocks": 24})
    roomy = answers(tmp_path, rows, plan_of(LAYERS, 1), ring_settings(1, 20))
    found = answers(tmp_path, rows, plan_of(LAYERS, 2), tight)
    assert {n: a.output_ids for n, a in found.items()} == {
        n: a.output_ids for n, a in roomy.items()
    }


def test_rows_that_outgrow_the_memory_they_were_expected_to_need_are_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_model(tmp_path, "llama", seed=2)
    short = [row(i, ids, 100) for i, ids in enumerate(prompts_of(24, longest=40))]
    alone = answers(tmp_path, short, plan_of(LAYERS, 1), ring_settings(1, 24))
    # All but every sixth end with what they say first, after a fraction of what they may make.
    rows = [
        each.model_copy(update={"stop": (alone[i].text[:2],)})
        if i % 6 and alone[i].text[:2].isascii()
        else each
        for i, each in enumerate(short)
    ]
    calm = answers(tmp_path, rows, plan_of(LAYERS, 1), ring_settings(1, 24))
    assert sum(answer.output_tokens < 100 for answer in calm.values()) > 4
    monkeypatch.setattr("planner.admission.LEARNED_ROWS", 4)
    tight = ring_settings(2, 6).model_copy(update={"blocks": 24})
    found = answers(tmp_path, rows, plan_of(LAYERS, 2), tight)
    assert {n: (a.text, a.output_tokens) for n, a in found.items()} == {
        n: (a.text, a.output_tokens) for n, a in calm.items()
    }
    assert any(answer.replayed_tokens for answer in found.values()), "nobody had to make way"
