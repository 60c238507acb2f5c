"""One stage's work on one frame: payload in, layers, payload or tokens out; no sockets."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from planner.schedule import RingShape, Step
from stages.config import StageSpec
from stages.finite import finite_rows
from stages.frame import RAW, Dtype
from stages.halving import Halving, memory_for
from stages.kv_room import largest_cache, new_cache
from stages.sampling import NO_TOKEN, Sampler, SamplingParams
from stages.shard import Shard, ShardSpec
from stages.wire import Admit, SampleFrame, StepFrame

_TAGS = {
    torch.float32: Dtype.FLOAT32,
    torch.bfloat16: Dtype.BFLOAT16,
    torch.float16: Dtype.FLOAT16,
}
_DTYPES = {tag: dtype for dtype, tag in _TAGS.items()}


@dataclass(slots=True)
class Tachograph:
    """What a stage has done so far; written by the computing thread, read by its heartbeat."""

    frames: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    cpu_s: float = 0.0
    """Of it, the computing thread's processor time: layers on an accelerator leave it idle."""


class Compute(Protocol):
    """What a stage does with its frames, one after another, and the ring that it has memory for."""

    @property
    def ring(self) -> RingShape: ...
    def settle(self, ring: RingShape) -> None: ...
    def begin(
        self, step: Step, ids: Tensor, admits: tuple[Admit, ...]
    ) -> StepFrame | SampleFrame: ...
    def go_on(self, frame: StepFrame) -> StepFrame | SampleFrame: ...


class StageCompute:
    """A shard with its KV cache and, on the last stage, its sampler; owned by one thread."""

    def __init__(self, shard: Shard, ring: RingShape, epoch: int, parked_kv: float = 0.0) -> None:
        self.shard = shard
        self.cache, self._ring = largest_cache(shard, ring, parked_kv)
        self._sampler = Sampler(shard.ferry)
        self._halving = Halving()
        self._epoch = epoch

    @classmethod
    def load(cls, spec: StageSpec) -> "StageCompute":
        """Load the spec's layers; raises ModelError, StreamError and OutOfMemoryError."""
        model = spec.model
        with memory_for(f"the weights of layers {model.first_layer}-{model.end_layer}"):
            shard = Shard.load(
                ShardSpec(
                    model.folder,
                    model.first_layer,
                    model.end_layer,
                    model.dtype,
                    model.device,
                    streamed_layers=model.streamed_layers,
                    weights=model.weights,
                )
            )
        return cls(shard, spec.ring.shape(), spec.epoch, model.parked_kv)

    @property
    def ring(self) -> RingShape:
        """The ring that there are KV blocks for: the one asked for, or one with fewer."""
        return self._ring

    def settle(self, ring: RingShape) -> None:
        """Hold no more than this ring's blocks, as another stage has no memory for more."""
        if (ring.blocks, ring.window) != (self._ring.blocks, self._ring.window):
            # What one row may hold was counted on.
            frames = min(self.cache.frames, ring.blocks)
            del self.cache  # there may be no memory for both
            self.cache = new_cache(self.shard, ring, frames)
        self._ring = ring

    def begin(self, step: Step, ids: Tensor, admits: tuple[Admit, ...]) -> StepFrame | SampleFrame:
        """The head's part: embed token ids [step.tokens], then the layers."""
        return self._run(step, self.shard.embed(ids), admits)

    def go_on(self, frame: StepFrame) -> StepFrame | SampleFrame:
        """A later stage's part: the layers on what the previous stage sent."""
        return self._run(frame.step, self.shard.ferry.to_device(_array(frame)), frame.admits)

    def _run(
        self, step: Step, hidden: Tensor, admits: tuple[Admit, ...]
    ) -> StepFrame | SampleFrame:
        """Nothing waits for the device before `_arrived`."""
        self.cache.apply(step)
        if self.shard.is_last:
            self._take_in(step, admits)
            tokens = self._arrived(self._halving.run(step, hidden, self._sampled)).tolist()
            self.shard.require_finite(step, [token != NO_TOKEN for token in tokens])
            return SampleFrame(self._epoch, step.frame, step.slot, tuple(tokens))
        answer = self._arrived(self._halving.run(step, hidden, self._layers))
        self.shard.require_finite(step, finite_rows(answer).tolist())
        return self._passed_on(step, answer, admits)

    def _arrived(self, parts: list[Tensor]) -> Tensor:
        """What a step's parts answered, as one, in the host's memory."""
        return self.shard.ferry.to_host(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _layers(self, step: Step, hidden: Tensor) -> Tensor:
        return self.shard.forward(step, hidden, self.cache)

    def _sampled(self, step: Step, hidden: Tensor) -> Tensor:
        logits = self._layers(step, hidden)
        spans = [span for span in step.spans if span.samples]
        if not spans:
            return logits.new_empty(0, dtype=torch.int64)
        return self._sampler.sample(
            logits, [s.sequence for s in spans], [s.start + s.tokens for s in spans]
        )

    def _take_in(self, step: Step, admits: tuple[Admit, ...]) -> None:
        self._sampler.drop(step.ended)
        for a in admits:
            params = SamplingParams(a.temperature, a.top_p, a.top_k)
            self._sampler.admit(a.sequence, params, a.key, a.seed)

    def _passed_on(self, step: Step, hidden: Tensor, admits: tuple[Admit, ...]) -> StepFrame:
        payload = hidden.contiguous().view(torch.uint8).numpy().data
        return StepFrame(
            self._epoch, step, hidden.shape[1], _TAGS[hidden.dtype], payload, admits=admits
        )


def _array(frame: StepFrame) -> Tensor:
    """The frame's activations [tokens, hidden], in the frame's own buffer."""
    assert frame.codec == RAW, "the link has decoded what it carried"
    flat = torch.frombuffer(frame.payload, dtype=_DTYPES[frame.dtype])
    return flat.view(frame.step.tokens, frame.hidden)
