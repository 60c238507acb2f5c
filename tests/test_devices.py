"""A step on a device is queued, never waited for, until its bytes leave; and it touches one device."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.schedule import Grant, RingShape, Span, Step
from planner.windows import Window
from stages.compute import StageCompute
from stages.config import ProbeSpec
from stages.ferry import Ferry
from stages.probe import probe
from stages.shard import Shard, ShardSpec
from stages.wire import Admit, SampleFrame, StepFrame
from tests.models import FAMILIES, write_random_model

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(
                not torch.cuda.is_available(), reason="there is no CUDA device here"
            ),
        ],
    ),
]
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "bincount",
    "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave",
}  # fmt: skip
"""Operators whose answer, or the shape of it, the host must have before it can go on."""
RING = RingShape(2, 8, blocks=64, block_tokens=16, step_tokens=300)
STEPS = [
    Step(
        0, 0,
        (Span(0, 0, 20, True), Span(1, 0, 130, True), Span(2, 0, 3, True)),
        (Grant(0, (0, 1)), Grant(1, tuple(range(2, 14))), Grant(2, (20, 31))),
    ),
    Step(1, 0, (Span(0, 20, 1, True), Span(1, 130, 1, True), Span(2, 3, 1, True))),
]  # fmt: skip
ADMITS = (
    Admit(0, 5, 6, 0.0, 1.0, 0),
    Admit(1, 6, 6, 0.8, 1.0, 0),
    Admit(2, 7, 6, 1.5, 0.9, 40),
)


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on every operator for which a host would stand still until its device has answered."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{func} would wait for the device"
        if name.startswith("index"):
            masks = [t for t in tree_leaves(args[1]) if getattr(t, "dtype", None) == torch.bool]
            assert not masks, f"{func} by a mask would wait for the device"
        return func(*args, **(kwargs or {}))


def no_waiting() -> Any:
    return NoWaiting()  # type: ignore[no-untyped-call]


class Nowhere(Ferry):
    """To the device `meta`, which knows shapes alone: whoever asks it for a number gets an error."""

    def __init__(self) -> None:
        self.sent = 0

    def to_device(self, host: Tensor) -> Tensor:
        assert host.device.type == "cpu"
        self.sent += 1
        return host.to("meta")

    def to_host(self, result: Tensor) -> Tensor:
        assert result.is_meta, "only what was computed on the device comes back"
        return torch.zeros(result.shape, dtype=result.dtype)


def nowhere(folder: Path, first: int, end: int, ring: RingShape) -> tuple[StageCompute, Nowhere]:
    """A stage on the device `meta`."""
    shard = Shard.load(ShardSpec(folder, first, end, "bfloat16"))
    shard.model.to("meta")
    shard.facts = replace(shard.facts, device=torch.device("meta"))
    shard.ferry = ferry = Nowhere()
    return StageCompute(shard, ring, epoch=1), ferry


def windowed(step: Step) -> Step:
    """The same with blocks for windowed layers too."""
    near = (Grant(g.sequence, tuple(RING.blocks + b for b in g.blocks)) for g in step.grants)
    return replace(step, grants=step.grants + tuple(near))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_waits_for_its_device_and_each_sends_one_index(tmp_path: Path, family: str) -> None:
    write_random_model(tmp_path, family, seed=3)
    ring = replace(RING, window=Window(24, 40)) if family in ("gemma3", "gpt_oss") else RING
    (head, to_head), (tail, to_tail) = (
        nowhere(tmp_path, first, end, ring) for first, end in ((0, 2), (2, 4))
    )
    for step in STEPS if ring.window is None else map(windowed, STEPS):
        to_head.sent = to_tail.sent = 0
        admits = () if step.frame else ADMITS
        with no_waiting():
            passed = head.begin(step, torch.arange(step.tokens), admits)
            assert isinstance(passed, StepFrame)
            done = tail.go_on(replace(passed, admits=admits))
        assert isinstance(done, SampleFrame)
        assert to_head.sent == 2, "token ids, and the step's numbers"
        assert to_tail.sent == 4, "activations, the step's numbers; who draws, and by what chance"


def test_a_step_that_waited_would_be_noticed() -> None:
    for act in (
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
    ):
        with no_waiting(), pytest.raises(AssertionError, match="would wait"):
            act(torch.ones(3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_tokens_are_the_same_on_any_device(tmp_path: Path, family: str, device: str) -> None:
    write_random_model(tmp_path, family, seed=3)
    drawn = []
    for each in ("cpu", device):
        stage = StageCompute(Shard.load(ShardSpec(tmp_path, 0, 4, "float32", each)), RING, epoch=1)
        frames = [
            stage.begin(step, torch.arange(step.tokens) * 7 % 300, () if step.frame else ADMITS)
            for step in STEPS
        ]
        drawn.append([frame.tokens for frame in frames if isinstance(frame, SampleFrame)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_sent_to_a_device_comes_back(device: str) -> None:
    ferry, host = Ferry(torch.device(device)), torch.randn(1000, 33)
    for _ in range(20):
        there = ferry.to_device(host)
        assert there.device.type == device
        assert torch.equal(ferry.to_host(there * 2), host * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_probe_says_what_computes_here(tmp_path: Path, device: str) -> None:
    write_random_model(tmp_path, "llama", seed=3)
    facts = probe(ProbeSpec(folder=tmp_path, device=device, repeats=1))  # type: ignore[arg-type]
    assert facts.device == device
    assert facts.device_free_bytes > 0
    assert (facts.host_to_device_bytes_per_s > 0) == (device != "cpu")
