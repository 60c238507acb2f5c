"""Layers whose weights do not stay: they stream through two buffers, each just ahead of its turn.

A step computes a stage's layers in order, so the next streamed layer is always known. While one is
computed from its buffer, the next is on its way into the other; a layer's parameters are views of
the buffer that it came into. On an accelerator layers come from pinned host memory over a stream of
their own, elsewhere from disk.
"""

import ctypes
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planner.cost import STREAM_BUFFERS
from stages.layer_store import LayerFile, LayerStore, PinnedLayers
from stages.scratch_file import page_aligned, pages, scratch_folder

WEIGHT_BYTES = 64
"""A weight's place in its layer is a multiple of this, as torch's own memory is: a product may take
longer from another address, or differ in its last bits."""


def spread(first_layer: int, end_layer: int, count: int) -> tuple[int, ...]:
    """Which of the layers [first_layer, end_layer) stream: `count` of them, as far apart as can be.

    Resident layers between them are computed while the next one comes.
    """
    layers = end_layer - first_layer
    return tuple(first_layer + (2 * i + 1) * layers // (2 * count) for i in range(count))


@dataclass(slots=True)
class StreamCounts:
    """What has streamed so far; written by the computing thread."""

    layers: int = 0
    bytes: int = 0
    waited_s: float = 0.0
    """Seconds that the computing thread stood still for a layer."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in its layer's bytes a parameter lies."""

    parameter: nn.Parameter
    dtype: torch.dtype
    shape: torch.Size
    first: int
    end: int

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.first : self.end].view(self.dtype).view(self.shape)


class _Layer:
    """One streamed layer: which of its bytes are which of its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._places: list[_Place] = []
        end = 0
        for weight in module.parameters():
            first = -(-end // WEIGHT_BYTES) * WEIGHT_BYTES
            end = first + weight.nbytes
            self._places.append(_Place(weight, weight.dtype, weight.shape, first, end))
        self.bytes = pages(end)

    @torch.no_grad()
    def move_to(self, buffer: Tensor) -> None:
        """Copy the parameters' values into a buffer, and leave the memory where they were."""
        for place in self._places:
            place.of(buffer).copy_(place.parameter)
        self.bind(buffer)

    def bind(self, buffer: Tensor) -> None:
        """Make the parameters views of the buffer that the layer has come into."""
        for place in self._places:
            place.parameter.data = place.of(buffer)


@dataclass(frozen=True, slots=True)
class _Coming:
    """A layer that is in its buffer or on its way there, and the event after which it can be used."""

    layer: int
    buffer: Tensor
    there: "Future[torch.Event | None]"


class LayerStream:
    """The streamed layers of one shard; used by the thread that computes the shard's steps.

    A thread of its own copies. What goes wrong there is raised where the layer is waited for.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        """
        Room for layers of those shapes, whose weights may be on meta still.

        Raises:
            StreamError: there is no such room where they would stream from.
        """
        sizes = [_Layer(module).bytes for module in modules]
        self._count = len(sizes)
        self._layers: list[_Layer] = []
        self._device = device
        buffers = min(STREAM_BUFFERS, self._count)
        self._buffers = [_buffer(max(sizes), device) for _ in range(buffers)]
        self._store: LayerStore
        if device.type == "cpu":
            self._store = LayerFile(scratch_folder(), sum(sizes))
        else:
            self._store = PinnedLayers(device)
        self._coming: deque[_Coming] = deque()
        self._copier = ThreadPoolExecutor(1, "layers")
        self.counts = StreamCounts()

    @property
    def buffer_bytes(self) -> int:
        """Bytes on the computing device that all these layers take together."""
        return sum(len(buffer) for buffer in self._buffers)

    def keep(self, module: nn.Module) -> None:
        """Take over the next layer, whose weights were just loaded; StreamError if they cannot be kept.

        After the last one, the first are on their way back.
        """
        layer = _Layer(module)
        layer.move_to(self._buffers[0])
        give_back_memory()
        self._store.keep(self._buffers[0][: layer.bytes])
        self._put_on(module, len(self._layers))
        self._layers.append(layer)
        if len(self._layers) == self._count:
            for number, buffer in enumerate(self._buffers):
                self._fetch(number, buffer, None)

    def _put_on(self, module: nn.Module, number: int) -> None:
        def enter(_module: nn.Module, _inputs: Any) -> None:
            self._enter(number)

        def leave(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
            self._leave()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _enter(self, number: int) -> None:
        """Wait for a layer and put its weights in place."""
        started = time.perf_counter()
        while self._coming[0].layer != number:
            self._leave()  # a step broke off before it came here
        coming = self._coming[0]
        there = coming.there.result()
        if there is not None:
            torch.accelerator.current_stream(self._device).wait_event(there)
        self._layers[number].bind(coming.buffer)
        self.counts.waited_s += time.perf_counter() - started

    def _leave(self) -> None:
        """The first layer's buffer is free: what comes after the layers on their way takes it."""
        left = self._coming.popleft()
        if self._count <= STREAM_BUFFERS:
            self._coming.append(left)  # it can stay
            return
        free = None
        if self._device.type != "cpu":
            free = torch.accelerator.current_stream(self._device).record_event()
        self._fetch((left.layer + STREAM_BUFFERS) % self._count, left.buffer, free)

    def _fetch(self, number: int, buffer: Tensor, free: torch.Event | None) -> None:
        there = self._copier.submit(self._store.fetch, number, buffer, free)
        self._coming.append(_Coming(number, buffer, there))
        self.counts.layers += 1
        self.counts.bytes += self._layers[number].bytes


def give_back_memory() -> None:
    """Have the C library return what was freed; glibc keeps some of it for each thread that loads."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _buffer(count: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return page_aligned(count)
    return torch.empty(count, dtype=torch.uint8, device=device)
