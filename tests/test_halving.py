"""A step too large for the memory is computed in parts, and only who fits nowhere is given up."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from planner.schedule import CHUNK_TOKENS, Span, Step
from stages.compute import StageCompute
from stages.config import StageSpec
from stages.errors import OutOfMemoryError
from stages.halving import FORGIVEN_AFTER, Halving, memory_for
from tests.models import write_random_model
from tests.ring import answers, plan_of, ring_settings, row

POSITION_BYTES = 4 * 2**20


def step(*spans: tuple[int, int, int], frame: int = 5) -> tuple[Step, Tensor]:
    """A step of (sequence, start, tokens), and hidden states that name each position."""
    found = Step(
        frame, 0, tuple(Span(s, start, tokens, samples=True) for s, start, tokens in spans)
    )
    places = [(span.sequence, span.start + i) for span in found.spans for i in range(span.tokens)]
    return found, torch.tensor(places)


@contextmanager
def spare_memory(spare_bytes: int) -> Iterator[None]:
    """This process may ask for so much more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + spare_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Room:
    """Computes what has room; notes how large the parts were."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.tried: list[int] = []

    def compute(self, part: Step, states: Tensor) -> list[tuple[int, int]]:
        """The part's positions."""
        assert part.tokens == len(states)
        self.tried.append(part.tokens)
        if part.tokens > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        expected = [(s.sequence, s.start + i) for s in part.spans for i in range(s.tokens)]
        assert expected == [tuple(each) for each in states.tolist()]
        return expected


def test_what_the_allocator_refuses_is_computed_in_parts_and_the_next_step_knows() -> None:
    halving, (whole, hidden) = Halving(), step(*((n, 300, 1) for n in range(64)))
    sizes: list[int] = []

    def compute(part: Step, _states: Tensor) -> int:
        sizes.append(part.tokens)
        torch.zeros(part.tokens, POSITION_BYTES, dtype=torch.uint8)
        return part.tokens

    with spare_memory(40 * POSITION_BYTES):  # 64 do not fit, 32 do, or 16 if a thread takes some
        parts = halving.run(whole, hidden, compute)
        assert sizes[0] == sum(parts) == 64
        assert max(parts) <= 32
        tried = len(sizes)
        assert halving.run(whole, hidden, compute) == [min(parts)] * (64 // min(parts))
        assert len(sizes) - tried == 64 // min(parts), "nothing was tried in vain"


@given(
    lengths=st.lists(st.integers(1, 3 * CHUNK_TOKENS), min_size=1, max_size=8),
    start=st.integers(0, 2 * CHUNK_TOKENS),
    room=st.integers(CHUNK_TOKENS, 4 * CHUNK_TOKENS),
)
def test_parts_hold_every_position_once_in_order_and_end_where_chunks_do(
    lengths: list[int], start: int, room: int
) -> None:
    whole, hidden = step(*((n, start, tokens) for n, tokens in enumerate(lengths)))
    parts = Halving().run(whole, hidden, Room(room).compute)
    assert [tuple(p) for part in parts for p in part] == [tuple(p) for p in hidden.tolist()]
    ends = {span.start + span.tokens for span in whole.spans}
    assert all(part[-1][1] + 1 in ends or (part[-1][1] + 1) % CHUNK_TOKENS == 0 for part in parts)


def test_only_the_part_that_ends_a_prompt_samples() -> None:
    whole, hidden = step((1, 0, 3 * CHUNK_TOKENS))
    samples = Halving().run(whole, hidden, lambda part, _: part.spans[0].samples)
    assert samples == [True]
    halving = Halving()
    halving.limit_tokens = CHUNK_TOKENS
    assert halving.run(whole, hidden, lambda part, _: part.spans[0].samples) == [False, False, True]


def test_a_row_that_does_not_fit_alone_is_named() -> None:
    whole, hidden = step((1, 0, 2), (7, 0, 40), (3, 0, 2))
    with pytest.raises(OutOfMemoryError, match="40 positions of frame 5") as caught:
        Halving().run(whole, hidden, Room(8).compute)
    assert caught.value.sequences == (7,)


def test_larger_parts_are_tried_again_after_a_while() -> None:
    halving, room = Halving(), Room(16)
    whole, hidden = step(*((n, 0, 1) for n in range(64)))
    halving.run(whole, hidden, room.compute)
    room.tokens = 64
    room.tried.clear()
    for _ in range(2 * FORGIVEN_AFTER + 2):
        halving.run(whole, hidden, room.compute)
    assert room.tried[:4] == [16] * 4
    assert room.tried[-1] == 64


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), memory_for("a test"):
        torch.zeros(2) + torch.zeros(3)


def tight(limit: int, spec: StageSpec) -> StageCompute:
    """A stage whose layers have memory for so many positions at once."""
    compute = StageCompute.load(spec)

    def refuse(_module: nn.Module, _args: object, flags: dict[str, Tensor]) -> None:
        if flags["inputs_embeds"].shape[1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    body = compute.shard.model.get_submodule("model")
    body.register_forward_pre_hook(refuse, with_kwargs=True)
    return compute


@pytest.mark.parametrize("stages", [1, 2])
def test_a_tight_stage_says_the_same_and_gives_up_only_who_fits_nowhere(
    tmp_path: Path, stages: int
) -> None:
    write_random_model(tmp_path, "llama", seed=3)
    prompts = [[(7 * i + j) % 256 for j in range(2 + 3 * i)] for i in range(12)]
    rows = [row(i, ids, 6) for i, ids in enumerate(prompts)]
    expected = answers(tmp_path, rows, plan_of(4, stages), ring_settings(2, 6))
    large = row(99, [j % 256 for j in range(100)], 6)
    found = answers(
        tmp_path,
        [*rows, large],
        plan_of(4, stages),
        ring_settings(2, 6),
        load=lambda spec: tight(40, spec),
    )
    lost = found.pop(99)
    assert (lost.finish_reason, lost.error_type) == ("error", "out_of_memory")
    assert {n: a.output_ids for n, a in found.items()} == {
        n: a.output_ids for n, a in expected.items()
    }
