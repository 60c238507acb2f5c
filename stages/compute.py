"""One stage's work on one frame: payload in, layers, payload or tokens out; no sockets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from planner.schedule import Step
from stages.codec import ITEM_BYTES, LEVELS, RAW, decode, encode
from stages.config import Lossless, StageSpec
from stages.errors import FrameError
from stages.frame import Dtype
from stages.sampling import Sampler, SamplingParams
from stages.shard import Shard, ShardSpec
from stages.wire import Admit, SampleFrame, StepFrame

_TAGS = {
    torch.float32: Dtype.FLOAT32,
    torch.bfloat16: Dtype.BFLOAT16,
    torch.float16: Dtype.FLOAT16,
}
_DTYPES = {tag: dtype for dtype, tag in _TAGS.items()}
_RAW_TAG = LEVELS.index(RAW)


@dataclass(slots=True)
class Tachograph:
    """What a stage has done so far; written by the computing thread, read by its heartbeat."""

    frames: int = 0
    tokens: int = 0
    busy_s: float = 0.0


class StageCompute:
    """A shard with its KV cache and, on the last stage, its sampler; owned by one thread."""

    def __init__(
        self, shard: Shard, blocks: int, block_tokens: int, epoch: int, codec: Lossless = RAW
    ) -> None:
        self.shard = shard
        self._codec = codec
        self._cache = shard.new_cache(blocks, block_tokens)
        self._sampler = Sampler()
        self._epoch = epoch

    @classmethod
    def load(cls, spec: StageSpec) -> "StageCompute":
        """Load the spec's layers; raises ModelError."""
        model = spec.model
        shard = Shard.load(ShardSpec(model.folder, model.first_layer, model.end_layer, model.dtype))
        return cls(shard, spec.ring.blocks, spec.ring.block_tokens, spec.epoch, spec.codec)

    def begin(self, step: Step, ids: Tensor, admits: tuple[Admit, ...]) -> StepFrame | SampleFrame:
        """The head's part: embed token ids [step.tokens], then the layers."""
        return self._run(step, self.shard.embed(ids), admits)

    def go_on(self, frame: StepFrame) -> StepFrame | SampleFrame:
        """A later stage's part: the layers on what the previous stage sent."""
        return self._run(frame.step, _array(frame), frame.admits)

    def _run(
        self, step: Step, hidden: Tensor, admits: tuple[Admit, ...]
    ) -> StepFrame | SampleFrame:
        self._cache.apply(step)
        out = self.shard.forward(step, hidden, self._cache)
        if self.shard.is_last:
            return self._sampled(step, out, admits)
        return self._passed_on(step, out, admits)

    def _passed_on(self, step: Step, hidden: Tensor, admits: tuple[Admit, ...]) -> StepFrame:
        tag = _TAGS[hidden.dtype]
        payload, codec = hidden.contiguous().view(torch.uint8).numpy().data, _RAW_TAG
        if self._codec != RAW:
            coded = encode(payload, tag.name.lower(), hidden.shape, self._codec)
            if coded.level != RAW:  # what does not get smaller goes as it is, without a header
                payload, codec = memoryview(coded.tobytes()), LEVELS.index(coded.level)
        return StepFrame(self._epoch, step, hidden.shape[1], tag, payload, codec, admits)

    def _sampled(self, step: Step, logits: Tensor, admits: tuple[Admit, ...]) -> SampleFrame:
        self._sampler.drop(step.ended)
        for a in admits:
            params = SamplingParams(a.temperature, a.top_p, a.top_k)
            self._sampler.admit(a.sequence, params, a.key, a.seed)
        spans = [span for span in step.spans if span.samples]
        tokens = (
            self._sampler.sample(
                logits, [s.sequence for s in spans], [s.start + s.tokens for s in spans]
            )
            if spans
            else []
        )
        return SampleFrame(self._epoch, step.frame, step.slot, tuple(tokens))


def _array(frame: StepFrame) -> Tensor:
    """The frame's activations [tokens, hidden]; raw ones share the frame's buffer."""
    shape, dtype = (frame.step.tokens, frame.hidden), frame.dtype.name.lower()
    buffer = frame.payload
    if frame.codec != _RAW_TAG:
        nbytes = shape[0] * shape[1] * ITEM_BYTES[dtype]
        decoded = decode(frame.payload, max_bytes=nbytes)
        if (decoded.shape, decoded.dtype) != (shape, dtype):
            raise FrameError(
                f"frame {frame.step.frame} says {dtype} {shape}, "
                f"and its payload {decoded.dtype} {decoded.shape}"
            )
        buffer = decoded.buffer.data
    return torch.frombuffer(buffer, dtype=_DTYPES[frame.dtype]).view(shape)
