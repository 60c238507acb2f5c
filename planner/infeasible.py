"""Why nothing fits, in one sentence with numbers."""

import numpy as np

from planner.cost import Cell, Role, kv_layer_bytes, role_bytes, stage_table, workspace_bytes
from planner.facts import InfeasibleError
from planner.problem import Problem, roles


def why_in_order(given: Problem, tried: tuple[Cell, ...]) -> InfeasibleError:
    """The reason that no split over all nodes in order exists; takes the smallest setting."""
    cell, model = tried[0], given.model
    if len(given.nodes) > model.layers:
        return InfeasibleError(
            f"{len(given.nodes)} stages cannot share {model.layers} layers; use at most "
            f"{model.layers} nodes"
        )
    for source, target in _ring_hops(given):
        if given.net.bytes_per_s[source, target] <= 0:
            return InfeasibleError(no_link(given, source, target))
    most = 0
    for node, role in zip(given.nodes, roles(len(given.nodes)), strict=True):
        fits = _layers_that_fit(given, node.name, cell, role)
        if not fits:
            return InfeasibleError(
                f"no layer fits on node {node.name}: {_needs(given, cell, node.name, role)}"
            )
        most += fits
    return InfeasibleError(short_of_memory(given, cell, most))


def why_none(given: Problem, tried: tuple[Cell, ...]) -> InfeasibleError:
    """The reason that no ring over any of the nodes exists."""
    cell = tried[0]
    table = stage_table(given.nodes, given.model, given.work, cell, Role.MIDDLE)
    fits = np.isfinite(table.busy_s).sum(axis=1)
    if fits.max() < 1:
        roomiest = max(given.nodes, key=lambda node: node.memory_bytes)
        needs = _needs(given, cell, roomiest.name, Role.MIDDLE)
        return InfeasibleError(f"no node fits a layer: of the roomiest, {roomiest.name}, {needs}")
    if fits.sum() < given.model.layers:
        return InfeasibleError(short_of_memory(given, cell, int(fits.sum())))
    pairs = np.argwhere((given.net.bytes_per_s <= 0) & ~np.eye(len(given.nodes), dtype=bool))
    if len(pairs):
        return InfeasibleError(
            f"{no_link(given, int(pairs[0][0]), int(pairs[0][1]))}; {len(pairs)} links are missing, "
            "and no nodes that reach one another in a ring hold the whole model"
        )
    return InfeasibleError(
        f"{given.model.layers} layers fit on all nodes together, but not with the embedding and "
        f"the LM head ({_gb(given.model.embedding_bytes + given.model.head_bytes)}); free memory "
        "on one node for each"
    )


def no_link(given: Problem, source: int, target: int) -> str:
    """A sentence about a link over which nothing can go."""
    a, b = given.nodes[source].name, given.nodes[target].name
    return (
        f"node {a} cannot send to node {b}: the link carries 0 bytes per second; measure it, "
        "or give it or default_link a rate"
    )


def short_of_memory(given: Problem, cell: Cell, layers_that_fit: int) -> str:
    """A sentence about the memory that the layers lack, offload already tried."""
    model = given.model
    per_layer = model.layer_bytes + kv_layer_bytes(model, given.work, cell.rows)
    short = (model.layers - layers_that_fit) * per_layer
    return (
        f"memory is short by {_gb(short)} in all: with offload tried, {layers_that_fit} of "
        f"{model.layers} layers fit at {cell.rows} row{'s' if cell.rows > 1 else ''} in flight "
        f"({_gb(model.layer_bytes)} of weights and {_gb(per_layer - model.layer_bytes)} of KV "
        "cache each); add a node, free memory, or use a smaller model or dtype"
    )


def _layers_that_fit(given: Problem, name: str, cell: Cell, role: Role) -> int:
    table = stage_table((given.cluster.node(name),), given.model, given.work, cell, role)
    return int(np.isfinite(table.busy_s).sum())


def _needs(given: Problem, cell: Cell, name: str, role: Role) -> str:
    model, node = given.model, given.cluster.node(name)
    kv = kv_layer_bytes(model, given.work, cell.rows)
    extra = role_bytes(model, role) + workspace_bytes(model, cell)
    return (
        f"it has {_gb(node.memory_bytes)} free, and one layer needs {_gb(model.layer_bytes)} of "
        f"weights, {_gb(kv)} of KV cache and {_gb(extra)} beside them"
    )


def _ring_hops(given: Problem) -> list[tuple[int, int]]:
    n = len(given.nodes)
    return [(i, (i + 1) % n) for i in range(n)] if n > 1 else []


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
