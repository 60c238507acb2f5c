"""The keys and values that a stage really has memory for, once its weights are loaded."""

import logging
from dataclasses import replace

import psutil
import torch

from planner.schedule import RingShape
from stages.errors import OutOfMemoryError
from stages.halving import memory_for
from stages.kv_cache import KvCache
from stages.shard import Shard

log = logging.getLogger(__name__)

FREE_SHARE = 0.9
"""Of the memory that is free, for keys and values: activations and others want some."""


def largest_cache(
    shard: Shard, asked: RingShape, parked_kv: float = 0.0
) -> tuple[KvCache, RingShape]:
    """A cache for the ring asked for, or for as much of it as there is memory, and which ring it is.

    `parked_kv` is the share of its blocks that lie beside the device; the ring then says what one
    row may hold. OutOfMemoryError where that is not even the least that a ring must have.
    """
    ring = asked
    while True:
        try:
            cache = new_cache(shard, ring, ring.blocks - int(parked_kv * ring.blocks))
        except OutOfMemoryError:
            fewer = ring.with_fewer_blocks()
            if fewer is None:
                raise
            ring = fewer
        else:
            if ring != asked:
                log.warning("fewer KV blocks asked=%d held=%d", asked.blocks, ring.blocks)
            parks = cache.frames < cache.blocks
            return cache, replace(ring, row_blocks=cache.frames if parks else 0)


def new_cache(shard: Shard, ring: RingShape, frames: int) -> KvCache:
    """A cache for this ring, of whose blocks so many lie on the device at once, windows aside.

    OutOfMemoryError if this node has no memory for it.
    """
    what = f"the keys and values of {ring.blocks * ring.block_tokens} tokens"
    device = shard.facts.device
    if device.type in ("cpu", "cuda"):  # no other has memory that it could run out of
        _require_free(_bytes(shard, ring, frames), free_bytes(device), what)
    with memory_for(what):
        return shard.new_cache(ring.blocks, ring.block_tokens, ring.window, frames)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that keys and values may come to share with activations."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    # What the allocator keeps for this process is free too.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _require_free(wanted_bytes: int, free: int, what: str) -> None:
    """A system promises memory that it lacks, and kills whoever comes to use it; an accelerator gives
    all that it has, and leaves none for a step's activations."""
    if wanted_bytes > FREE_SHARE * free:
        raise OutOfMemoryError(
            f"no memory for {what}: {wanted_bytes / 1e9:.3g} GB, of {free / 1e9:.3g} GB free",
            (),
        )


def _bytes(shard: Shard, ring: RingShape, frames: int) -> int:
    """What the pools of a ring's cache would take."""
    facts, nowhere = shard.facts, torch.device("meta")
    return KvCache(facts.kv, frames, ring.block_tokens, facts.dtype, nowhere, ring.window).bytes
