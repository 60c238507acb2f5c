"""Measures the nodes for one job: a probe on each, as a child process; facts out."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import psutil

from flows.errors import JobError, RunError
from flows.job import Job
from flows.layout import Layout
from planner.facts import Cluster, CodecRate, LayerTimes, Link, ModelShape, Node
from stages.codec import FAST, INT8
from stages.config import REFUSED, Codec, Device, ProbeFacts, ProbeSpec
from storage.scratch import Scratch

USABLE_MEMORY = 0.8
"""Share of the free memory that a run may plan with; the rest is the system's and the driver's."""
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Measured:
    """What a plan rests on."""

    cluster: Cluster
    model: ModelShape
    codec: CodecRate
    """The job's codec level on this model's activations."""
    level: str
    threads: int
    """Threads that each stage computes with."""
    basis: tuple[str, ...]
    """The same for people, a line each."""
    device: Device = "cpu"
    """What each stage computes with."""


def measure(job: Job, layout: Layout) -> Measured:
    """Probe this machine for a run of that layout; JobError for a model that must be refused."""
    stages, cores = layout.processes, len(os.sched_getaffinity(0))
    threads = max(1, cores // stages)
    level: Codec = INT8 if job.activations == INT8 else FAST
    spec = ProbeSpec(
        folder=Path(job.model),
        dtype=job.dtype,
        weights=job.weights,
        threads=threads,
        codec=level,
    )
    facts = _probed(spec)
    crowding = max(1.0, stages * threads / cores)
    node_bytes = layout.stage_bytes or USABLE_MEMORY * facts.device_free_bytes / stages
    if facts.device == "cpu":  # else the process lies in other memory
        node_bytes -= facts.process_bytes
    if node_bytes <= 0:
        raise JobError(
            f"a stage may take {(node_bytes + facts.process_bytes) / 1e9:.3g} GB of memory, and its "
            f"process takes {facts.process_bytes / 1e9:.3g} GB before it holds a layer"
        )
    node = _node(spec, facts, node_bytes, crowding)
    nodes = tuple(
        replace(
            node,
            name=f"local-{i}",
            disk_bytes_per_s=facts.disk_bytes_per_s / stages,
            host_bytes=_host_bytes(facts) / stages,
            host_to_device_bytes_per_s=facts.host_to_device_bytes_per_s / stages,
            parked_kv_bytes_per_s=facts.parked_kv_bytes_per_s / stages,
        )
        for i in range(stages)
    )
    links = tuple(
        Link(here.name, there.name, facts.loopback_latency_s, facts.loopback_bytes_per_s)
        for here, there in permutations(nodes, 2)
    )
    codec = CodecRate(facts.codec_ratio, facts.codec_bytes_per_s / crowding)
    shape = _shape(facts)
    basis = (
        f"{cores} cores and {facts.device_free_bytes / 2**30:.1f} GiB free{_of_what(facts)}; "
        f"{stages} stages of {threads} threads on this machine, each at 1/{crowding:.3g} of its "
        "speed alone",
        f"one layer takes {1e3 * facts.prefill_s:.2f} ms for {spec.prefill_tokens} prompt tokens, "
        f"{1e3 * facts.decode_s:.2f} ms for {spec.decode_rows} rows of {spec.context_tokens}",
        f"{facts.layers} layers of {facts.layer_bytes / 2**20:.1f} MiB in {facts.dtype}, "
        f"linear weights as {job.weights}; "
        f"{facts.kv_bytes_per_token_layer:.0f} bytes of keys and values per token and layer"
        + _seen(shape),
        f"codec level {level} makes activations {codec.ratio:.2f} times smaller at "
        f"{codec.bytes_per_s / 1e6:.0f} MB/s",
        f"a stage may hold {node_bytes / 1e9:.3g} GB beside the {facts.process_bytes / 1e9:.3g} GB of "
        f"its process; {_streams(facts)}",
        f"loopback carries {facts.loopback_bytes_per_s / 1e6:.0f} MB/s at "
        f"{1e6 * facts.loopback_latency_s:.0f} us",
    )
    return Measured(Cluster(nodes, links), shape, codec, level, threads, basis, facts.device)


def _host_bytes(facts: ProbeFacts) -> float:
    """What this machine has of memory beside the device's, for all stages; 0 where it is the same."""
    if facts.device == "cpu":
        return 0.0
    free_bytes: int = psutil.virtual_memory().available
    return USABLE_MEMORY * free_bytes


def _of_what(facts: ProbeFacts) -> str:
    return "" if facts.device == "cpu" else f" on {facts.device}"


def _streams(facts: ProbeFacts) -> str:
    if facts.device != "cpu":
        return (
            f"layers stream from host memory at {facts.host_to_device_bytes_per_s / 1e6:.0f} MB/s"
        )
    return facts.disk_obstacle or f"layers stream at {facts.disk_bytes_per_s / 1e6:.0f} MB/s"


def _seen(shape: ModelShape) -> str:
    windowed = shape.windowed_layers(0, shape.layers)
    return f"; {windowed} of them see {shape.window} tokens" if windowed else ""


def _probed(spec: ProbeSpec) -> ProbeFacts:
    if find_spec("torch") is None:
        raise JobError(
            "there is no torch here, so nothing can be computed: "
            "install wagonway with its extra `stage`, or run on a node that has it"
        )
    with Scratch("probe") as folder:
        spec_path, facts_path = folder / "spec.json", folder / "facts.json"
        spec_path.write_text(spec.model_dump_json(), encoding="utf-8")
        child = subprocess.run(
            [sys.executable, "-P", "-m", "stages.probe", str(spec_path), str(facts_path)],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        words = child.stderr.strip().splitlines() or ["it said nothing"]
        if child.returncode == REFUSED:
            raise JobError(words[-1])
        if child.returncode != 0:
            raise RunError(f"the probe ended with status {child.returncode}: {words[-1]}")
        return ProbeFacts.model_validate_json(facts_path.read_text(encoding="utf-8"))


def _node(spec: ProbeSpec, facts: ProbeFacts, memory_bytes: float, crowding: float) -> Node:
    return Node(
        name="local",
        flop_per_s=facts.flop_per_token_layer * spec.prefill_tokens / facts.prefill_s / crowding,
        memory_bytes=memory_bytes,
        memory_bytes_per_s=facts.memory_bytes_per_s / crowding,
        region="local",
        kind=facts.device,
        layer_s=LayerTimes(
            prefill=((spec.prefill_tokens, facts.prefill_s * crowding),),
            decode=((spec.decode_rows, spec.context_tokens, facts.decode_s * crowding),),
            head=((spec.decode_rows, facts.head_s * crowding),),
        ),
    )


def _shape(facts: ProbeFacts) -> ModelShape:
    return ModelShape(
        layers=facts.layers,
        hidden=facts.hidden,
        layer_bytes=facts.layer_bytes,
        kv_bytes_per_token_layer=facts.kv_bytes_per_token_layer,
        activation_value_bytes=_VALUE_BYTES[facts.dtype],
        embedding_bytes=facts.embedding_bytes,
        head_bytes=facts.head_bytes,
        flop_per_token_layer=facts.flop_per_token_layer,
        windows=facts.windows if any(facts.windows) else (),
    )
