"""Layers that stream compute what resident ones do, in less memory, and fail loudly or not at all."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from planner.plan import Pipeline, Plan, StagePlan
from planner.schedule import Grant, Span, Step
from stages.errors import StreamError
from stages.layer_store import LayerFile
from stages.scratch_file import PAGE_BYTES, page_aligned, require_room
from stages.shard import Shard, ShardSpec
from stages.streaming import spread
from tests.jobs import greedy_ids
from tests.models import FAMILIES, write_random_model
from tests.ring import answers, ring_settings, row

TOKENS = 40
STEP = Step(0, 0, (Span(0, 0, TOKENS, False),), (Grant(0, (0, 1, 2)),))


def computed(shard: Shard, hidden: Tensor) -> Tensor:
    cache = shard.new_cache(3, 16)
    cache.apply(STEP)
    return shard.forward(STEP, hidden, cache)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_random_model(folder, "llama", seed=3, num_hidden_layers=8)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_layers_give_the_same_bits_as_resident_ones(family: str, tmp_path: Path) -> None:
    model = write_random_model(tmp_path, family, seed=3)
    hidden = torch.randn(TOKENS, model.config.hidden_size)
    resident, streamed = (
        Shard.load(ShardSpec(tmp_path, 0, 3, "float32", streamed_layers=count)) for count in (0, 3)
    )
    wanted = computed(resident, hidden)
    for _ in range(3):
        assert torch.equal(computed(streamed, hidden), wanted)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_layers_may_stream(llama: Path, count: int, dtype: str) -> None:
    hidden = torch.randn(TOKENS, 64)
    wanted = computed(Shard.load(ShardSpec(llama, 0, 7, dtype)), hidden)
    streamed = Shard.load(ShardSpec(llama, 0, 7, dtype, streamed_layers=min(count, 7)))
    for _ in range(3):
        assert torch.equal(computed(streamed, hidden), wanted)


def test_tokens_are_those_of_one_process_when_a_stage_streams_half_its_layers(llama: Path) -> None:
    prompts = [[(7 * i + 13 * k) % 256 for k in range(5 + 9 * i)] for i in range(12)]
    stages = (StagePlan("a", 0, 4), StagePlan("b", 4, 8, weights_offloaded=2))
    plan = Plan((Pipeline(stages, (), 0, 0),), 0.0, 0.0, 0.0, 0.0, "a test")
    found = answers(
        llama,
        [row(i, prompt, new_tokens=8) for i, prompt in enumerate(prompts)],
        plan,
        ring_settings(slots=2, slot_rows=4),
    )
    model = write_random_model(llama, "llama", seed=3, num_hidden_layers=8)
    for i, prompt in enumerate(prompts):
        assert list(found[i].output_ids) == greedy_ids(model, prompt, 8)


@pytest.mark.parametrize("layers", range(1, 12))
def test_streamed_layers_are_spread_over_the_stage(layers: int) -> None:
    for count in range(1, layers + 1):
        chosen = spread(5, 5 + layers, count)
        gaps = [b - a for a, b in pairwise(chosen)]
        assert len(set(chosen)) == count
        assert all(5 <= layer < 5 + layers for layer in chosen)
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_a_layer_is_on_its_way_while_others_are_computed(llama: Path) -> None:
    shard = Shard.load(ShardSpec(llama, 0, 7, "float32", streamed_layers=4))
    assert shard.stream is not None
    before = shard.stream.counts.layers
    for _ in range(5):
        computed(shard, torch.randn(TOKENS, 64))
    assert shard.stream.counts.layers - before == 5 * 4


def test_a_step_that_broke_off_does_not_spoil_the_next(llama: Path) -> None:
    hidden = torch.randn(TOKENS, 64)
    shard = Shard.load(ShardSpec(llama, 0, 7, "float32", streamed_layers=5))
    wanted = computed(shard, hidden)
    for broken in range(7):

        def fail(*_: Any) -> None:
            raise KeyError("a layer broke")

        hook = shard.model.model.layers[broken].mlp.register_forward_hook(fail)
        with pytest.raises(KeyError, match="a layer broke"):
            computed(shard, hidden)
        hook.remove()
        assert torch.equal(computed(shard, hidden), wanted)


def test_a_file_that_was_cut_ends_the_step_and_says_so(llama: Path) -> None:
    shard = Shard.load(ShardSpec(llama, 0, 7, "float32", streamed_layers=4))
    for file in open_layer_files():
        os.truncate(file, PAGE_BYTES)
    with pytest.raises(
        StreamError, match=r"streamed layers ends \d+ bytes too soon; something cut it"
    ):
        computed(shard, torch.randn(TOKENS, 64))
        computed(shard, torch.randn(TOKENS, 64))


def open_layer_files() -> list[Path]:
    """Open files of this process from which layers stream; they have no other names."""
    files = Path("/proc/self/fd").iterdir()
    return [file for file in files if file.is_file() and "wagonway-" in str(file.resolve())]


def test_layers_come_back_as_they_were_kept(tmp_path: Path) -> None:
    file = LayerFile(tmp_path, 3 * PAGE_BYTES)
    layers = [page_aligned(pages * PAGE_BYTES).random_() for pages in (2, 1)]
    for layer in layers:
        file.keep(layer)
    for place in (1, 0, 1):
        target = page_aligned(2 * PAGE_BYTES)
        file.fetch(place, target)
        assert torch.equal(target[: len(layers[place])], layers[place])


def test_a_folder_in_memory_is_refused() -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("this system has no /dev/shm")
    with pytest.raises(StreamError, match=r"/dev/shm: is in memory \(tmpfs\)"):
        LayerFile(Path("/dev/shm"), PAGE_BYTES)


def test_a_folder_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"1e\+09 GB of layers are to be kept there, and"):
        require_room(tmp_path, 10**18, "layers")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_layers_stream_from_pinned_host_memory_to_an_accelerator(llama: Path) -> None:
    hidden = torch.randn(TOKENS, 64)
    specs = [ShardSpec(llama, 0, 7, "float32", "cuda", streamed_layers=n) for n in (0, 2, 5)]
    wanted, *others = (
        [computed(shard, hidden) for _ in range(3)][-1] for shard in map(Shard.load, specs)
    )
    assert all(torch.equal(other, wanted) for other in others)


COMPUTE = """
import os, sys, threading
from pathlib import Path
import torch
from planner.cost import STEP_TOKENS, WORKSPACE_COPIES
from planner.schedule import Grant, Span, Step
from stages.architecture import read_config, whole_model
from stages.probe import own_bytes
from stages.shard import Shard, ShardSpec

def compute(folder, streamed, group):
    empty, peak, ended = own_bytes(), 0, threading.Event()
    if group:
        (Path(group) / "cgroup.procs").write_text("0")

    def watch():
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    shard = Shard.load(ShardSpec(folder, 0, 8, "float32", streamed_layers=streamed))
    cache = shard.new_cache(8, 16)
    step = Step(0, 0, (Span(0, 0, 128, False),), (Grant(0, tuple(range(8))),))
    for _ in range(3):
        cache.clear()
        cache.apply(step)
        shard.forward(step, torch.randn(128, 1024), cache)
    ended.set()
    watcher.join()
    workspace = WORKSPACE_COPIES * STEP_TOKENS * 1024 * 4
    return peak - empty, shard.facts.weight_bytes + workspace + cache.bytes

torch.set_num_threads(1)
whole_model(read_config(Path(sys.argv[1])), torch.float32)  # imports the family's modules
for asked in sys.argv[2:]:
    streamed, _, group = asked.partition(":")
    if os.fork() == 0:
        print(*compute(Path(sys.argv[1]), int(streamed), group), end=" ", flush=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
"""Load eight layers, of which so many stream, and compute, in a group of processes if one is named.

Prints the memory that this took at most, what a plan counts for it, and how it ended.
"""
PLANNED_BYTES = 250e6
"""What a plan counts with six layers streaming; 458 MB with none."""
FORKED_BYTES = 70e6
"""Pages of its parent that a forked process comes to write to count for its group too."""


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path | None]:
    """A control group whose processes may come to take so much memory; None where none can be made."""
    root, limit = Path("/sys/fs/cgroup"), "memory.max"
    if not (root / "cgroup.controllers").is_file():
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = [line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"]
        root, limit = root / f"memory{own[0] if own else ''}", "memory.limit_in_bytes"
    group = root / f"wagonway-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        if (group / limit).is_file():
            (group / limit).write_text(str(limit_bytes))
            yield group
        else:
            yield None
    finally:
        group.rmdir()


@pytest.fixture(scope="module")
def endings(big_model: Path) -> list[list[int]]:
    """Streaming six of eight layers; the same in a limited group; there, all layers resident."""
    with memory_group(int(1.1 * PLANNED_BYTES + FORKED_BYTES)) as group:
        limited = [f"6:{group}", f"0:{group}"] if group else []
        command = [sys.executable, "-c", COMPUTE, str(big_model), "6", *limited]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return [[int(word) for word in line.split()] for line in ended.stdout.splitlines()]


def test_a_stage_takes_the_memory_that_is_planned_for_it(endings: list[list[int]]) -> None:
    peak, planned, status = endings[0]
    assert status == 0
    assert planned == pytest.approx(PLANNED_BYTES, rel=0.02)
    assert peak <= 1.1 * planned


def test_a_stage_lives_within_a_limit_that_kills_it_when_all_layers_stay(
    endings: list[list[int]],
) -> None:
    if len(endings) == 1:
        pytest.skip("no control group that limits memory can be made here")
    assert endings[1][-1] == 0
    assert endings[2][-1] == -signal.SIGKILL
