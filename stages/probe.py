"""Measures one node for one job: checks that its model is computed rightly here, then how fast.

`python -m stages.probe SPEC FACTS` reads a ProbeSpec and writes ProbeFacts; a model that we would
compute wrongly ends it with status REFUSED and the reason as the last line.
"""

import logging
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from planner.schedule import Grant, Span, Step
from stages import layer_store
from stages.architecture import Model, body_of, layer_windows, read_config, whole_model
from stages.checkpoint import Checkpoint, require_whole
from stages.codec import decode, encode
from stages.config import REFUSED, Device, DType, ProbeFacts, ProbeSpec
from stages.errors import ModelError, StreamError
from stages.quantize import prepare
from stages.scratch_file import scratch_folder
from stages.selfcheck import check
from stages.shard import Shard, ShardSpec

log = logging.getLogger(__name__)

BLOCK_TOKENS = 16
COPIED_BYTES = 64 * 2**20  # past every cache
SHIPPED_BYTES = 2**20
SHIPMENTS = 64
STREAMED_BYTES = 128 * 2**20
MOST_STREAMED = 16
PARKING_SLOTS = 4

_NAMES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def probe(spec: ProbeSpec) -> ProbeFacts:
    """The facts of this node and model; raises ModelError for a model that must be refused."""
    torch.set_num_threads(spec.threads)
    found: Device = spec.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(spec.folder, found)
    prepare(spec.weights)
    process_bytes = own_bytes()  # by now it has what computing takes, but no layer yet
    device = torch.device(found)
    free_bytes = _free_bytes(device)
    shard = Shard.load(ShardSpec(spec.folder, 0, 1, spec.dtype, found, weights=spec.weights))
    facts = shard.facts
    config = read_config(spec.folder)
    model = whole_model(config, facts.dtype)
    require_whole(model, Checkpoint(spec.folder))
    layer_parameters = _parameters(body_of(model).layers) / facts.model_layers
    ratio, coded_bytes_per_s = _codec(shard, spec)
    latency_s, bytes_per_s = _loopback()
    layer_bytes = int(layer_parameters * _bytes_per_parameter(shard, model))
    disk_bytes_per_s, disk_obstacle = _disk(layer_bytes)
    return ProbeFacts(
        dtype=_NAMES[facts.dtype],
        device=found,
        layers=facts.model_layers,
        hidden=facts.hidden,
        layer_bytes=layer_bytes,
        embedding_bytes=_parameters(model.get_input_embeddings()) * facts.dtype.itemsize,
        head_bytes=_parameters(model.get_output_embeddings()) * facts.dtype.itemsize,
        kv_bytes_per_token_layer=facts.kv_bytes_per_token,
        windows=layer_windows(config),
        flop_per_token_layer=2.0 * layer_parameters,
        prefill_s=_prefill_s(shard, spec),
        decode_s=_decode_s(shard, spec),
        head_s=_head_s(shard, spec),
        memory_bytes_per_s=_memory_bytes_per_s(device),
        device_free_bytes=free_bytes,
        host_to_device_bytes_per_s=_host_to_device_bytes_per_s(device),
        disk_bytes_per_s=disk_bytes_per_s,
        parked_kv_bytes_per_s=_parked_kv_bytes_per_s(shard, spec),
        disk_obstacle=disk_obstacle,
        process_bytes=process_bytes,
        codec_ratio=ratio,
        codec_bytes_per_s=coded_bytes_per_s,
        loopback_latency_s=latency_s,
        loopback_bytes_per_s=bytes_per_s,
    )


def _parameters(module: Model) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes_per_parameter(shard: Shard, model: Model) -> float:
    """What the first layer takes in memory, as the shard holds it, for each parameter of the model's."""
    held = body_of(shard.model).layers[0].parameters()
    held_bytes: int = sum(part.nbytes for part in held)
    return held_bytes / _parameters(body_of(model).layers[0])


def _median_s(act: Callable[[], object], repeats: int) -> float:
    _done(act)  # the first call allocates
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        _done(act)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _done(act: Callable[[], object]) -> None:
    """Act, and wait until an accelerator has done its part, if it had one."""
    answer = act()
    if isinstance(answer, Tensor) and answer.device.type != "cpu":
        torch.accelerator.synchronize(answer.device)


def _random(shard: Shard, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=shard.facts.dtype, device=shard.facts.device)


def _prefill_s(shard: Shard, spec: ProbeSpec) -> float:
    blocks = -(-spec.prefill_tokens // BLOCK_TOKENS)
    cache = shard.new_cache(blocks, BLOCK_TOKENS)
    spans = (Span(0, 0, spec.prefill_tokens, samples=False),)
    cache.apply(Step(0, 0, spans, (Grant(0, tuple(range(blocks))),)))
    hidden = _random(shard, spec.prefill_tokens, shard.facts.hidden)
    return _median_s(lambda: shard.forward(Step(0, 0, spans), hidden, cache), spec.repeats)


def _decode_s(shard: Shard, spec: ProbeSpec) -> float:
    """The rows' caches hold zeros, which cost what keys and values cost."""
    each = -(-(spec.context_tokens + 1) // BLOCK_TOKENS)
    cache = shard.new_cache(each * spec.decode_rows, BLOCK_TOKENS)
    rows = range(spec.decode_rows)
    spans = tuple(Span(row, spec.context_tokens, 1, samples=False) for row in rows)
    grants = tuple(Grant(row, tuple(range(row * each, (row + 1) * each))) for row in rows)
    cache.apply(Step(0, 0, spans, grants))
    hidden = _random(shard, spec.decode_rows, shard.facts.hidden)
    return _median_s(lambda: shard.forward(Step(0, 0, spans), hidden, cache), spec.repeats)


def _parked_kv_bytes_per_s(shard: Shard, spec: ProbeSpec) -> float:
    """Rate at which a layer's keys and values come back while slots go round and nothing is computed.

    With more layers a block's bytes are more, and this the least that a stage will see; 0 where
    nothing can be parked.
    """
    each = -(-(spec.context_tokens + 1) // BLOCK_TOKENS)
    rows, blocks = spec.decode_rows, PARKING_SLOTS * spec.decode_rows * each
    try:
        cache = shard.new_cache(blocks, BLOCK_TOKENS, frames=2 * blocks // PARKING_SLOTS)
    except StreamError:
        return 0.0
    assert cache.parking is not None, "there is a layer, and room for two slots of its blocks"
    steps = []
    for slot in range(PARKING_SLOTS):
        numbers = range(slot * rows, (slot + 1) * rows)
        grants = tuple(Grant(n, tuple(range(n * each, (n + 1) * each))) for n in numbers)
        whole = tuple(Span(n, 0, spec.context_tokens, samples=False) for n in numbers)
        decodes = tuple(Span(n, spec.context_tokens, 1, samples=False) for n in numbers)
        cache.apply(Step(slot, slot, whole, grants))
        cache.bring(Step(slot, slot, whole))
        steps.append(Step(slot, slot, decodes))

    def go_round() -> None:
        for step in steps:
            cache.apply(step)
            cache.bring(step)
        if shard.facts.device.type != "cpu":
            torch.accelerator.synchronize(shard.facts.device)

    go_round()
    before = cache.parking.counts.bytes_back
    go_round_s = _median_s(go_round, spec.repeats)
    return (cache.parking.counts.bytes_back - before) / (spec.repeats + 1) / go_round_s


def _codec(shard: Shard, spec: ProbeSpec) -> tuple[float, float]:
    """Ratio and bytes a second of the spec's codec on what the first layer makes of some tokens."""
    count = spec.prefill_tokens
    blocks = -(-count // BLOCK_TOKENS)
    cache = shard.new_cache(blocks, BLOCK_TOKENS)
    step = Step(0, 0, (Span(0, 0, count, samples=False),), (Grant(0, tuple(range(blocks))),))
    cache.apply(step)
    ids = torch.arange(count) * 7919 % shard.facts.vocab
    if shard.is_last:  # a model of one layer: nothing is ever sent
        return 1.0, 1e9
    hidden = shard.ferry.to_host(shard.forward(step, shard.embed(ids), cache).contiguous())
    payload = hidden.view(torch.uint8).numpy().data
    dtype, shape = _NAMES[hidden.dtype], hidden.shape
    frame = encode(payload, dtype, shape, spec.codec).tobytes()
    encode_s = _median_s(lambda: encode(payload, dtype, shape, spec.codec), spec.repeats)
    decode_s = _median_s(lambda: decode(frame, max_bytes=payload.nbytes), spec.repeats)
    return payload.nbytes / len(frame), payload.nbytes / max(encode_s, decode_s)


def _head_s(shard: Shard, spec: ProbeSpec) -> float:
    facts = shard.facts
    weights = _random(shard, facts.vocab, facts.hidden)
    hidden = _random(shard, spec.decode_rows, facts.hidden)
    return _median_s(lambda: (hidden @ weights.T).argmax(dim=-1), spec.repeats)


def _memory_bytes_per_s(device: torch.device) -> float:
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _median_s(lambda: target.copy_(source), repeats=3)


def _host_to_device_bytes_per_s(device: torch.device) -> float:
    if device.type == "cpu":
        return 0.0
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    return COPIED_BYTES / _median_s(lambda: target.copy_(source, non_blocking=True), repeats=3)


def _free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses once this process has ended."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available) + own_bytes()
    return int(torch.accelerator.get_memory_info(device)[0])


def _disk(layer_bytes: int) -> tuple[float, str]:
    """Bytes per second at which layers stream from disk, or 0 and why none can."""
    layers = min(MOST_STREAMED, max(1, STREAMED_BYTES // layer_bytes))
    try:
        return layer_store.bytes_per_s(scratch_folder(), layer_bytes, layers), ""
    except StreamError as error:
        return 0.0, str(error)


def own_bytes() -> int:
    """This process's memory, without what it shares with files."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def _loopback() -> tuple[float, float]:
    """One way latency and bytes per second of a connection from this process to itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname())
        here, _ = listener.accept()
    with there, here:
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        echo = threading.Thread(target=_echo, args=(here,))
        echo.start()
        latency_s = _median_s(lambda: _there_and_back(there), repeats=51) / 2
        block = bytes(SHIPPED_BYTES)
        started = time.perf_counter()
        for _ in range(SHIPMENTS):
            there.sendall(block)
        there.shutdown(socket.SHUT_WR)
        echo.join()
        return latency_s, SHIPMENTS * SHIPPED_BYTES / (time.perf_counter() - started)


def _there_and_back(there: socket.socket) -> None:
    there.sendall(b".")
    there.recv(1)


def _echo(here: socket.socket) -> None:
    """Answer single bytes, swallow the rest, until the other end has sent all."""
    buffer = bytearray(SHIPPED_BYTES)
    while count := here.recv_into(buffer):
        if count == 1:
            here.sendall(b".")


def main() -> int:
    """Probe as the spec file says and write the facts file; REFUSED for a bad model."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    spec = ProbeSpec.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        facts = probe(spec)
    except ModelError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    Path(sys.argv[2]).write_text(facts.model_dump_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
