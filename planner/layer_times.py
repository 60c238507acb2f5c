"""Seconds of one layer on one node: from its profile where there is one, else from a roofline.

The roofline of n tokens is max(FLOP / flop_per_s, bytes read / memory_bytes_per_s). Where some layers
see a window, one layer is the mean of all: so much of the context as they see on average.
"""

from itertools import groupby

from planner.facts import ModelShape, Node


def prefill_layer_s(node: Node, model: ModelShape, tokens: float, prompt: float) -> float:
    """Seconds to prefill `tokens` positions in one layer, of prompts of `prompt` tokens each.

    A profile is interpolated, and beyond its ends continued: proportionally below the first point,
    by the last slope above. The roofline counts attention as 4 x hidden x what it sees FLOP a token.
    """
    if node.layer_s and node.layer_s.prefill:
        return _along(((0.0, 0.0), *node.layer_s.prefill), tokens)
    flop = _prefill_flop(model, tokens, prompt)
    return max(flop / node.flop_per_s, model.layer_bytes / node.memory_bytes_per_s)


def _prefill_flop(model: ModelShape, tokens: float, prompt: float) -> float:
    return tokens * (model.flop_per_token_layer + 4.0 * model.hidden * model.seen_in_prompt(prompt))


def decode_layer_s(
    node: Node, model: ModelShape, rows: float, context: float, width: int = 1
) -> float:
    """Seconds of one decode (or verify, `width` tokens a row) step of one layer.

    Below the smallest measured step nothing is assumed to be cheaper: it reads the same weights.
    """
    if node.layer_s and node.layer_s.decode:
        return _profiled_decode_s(node, model, rows, context, width)
    flop, read = _decode_flop_and_bytes(model, rows, context, width)
    return max(flop / node.flop_per_s, read / node.memory_bytes_per_s)


def _decode_flop_and_bytes(
    model: ModelShape, rows: float, context: float, width: int
) -> tuple[float, float]:
    seen = model.seen(context)
    flop = rows * width * (model.flop_per_token_layer + 4.0 * model.hidden * seen)
    return flop, model.layer_bytes + rows * seen * model.kv_bytes_per_token_layer


def head_s(node: Node, model: ModelShape, rows: float) -> float:
    """Seconds of the LM head for `rows` positions: profiled, else as a layer by bytes of weights."""
    if node.layer_s and node.layer_s.head:
        return _from_floor(node.layer_s.head, rows)
    if model.layer_bytes <= 0 or model.head_bytes <= 0:
        return 0.0
    return decode_layer_s(node, model, rows, 0.0) * model.head_bytes / model.layer_bytes


def _profiled_decode_s(
    node: Node, model: ModelShape, rows: float, context: float, width: int
) -> float:
    assert node.layer_s is not None
    contexts = sorted(node.layer_s.decode, key=lambda point: point[1])
    curves: list[tuple[float, float]] = []
    for measured, points in groupby(contexts, key=lambda point: point[1]):
        curve = tuple(sorted((float(r), s) for r, _, s in points))
        curves.append((float(measured), _from_floor(curve, rows * width)))
    if len(curves) > 1:
        return max(_along(tuple(curves), context), min(s for _, s in curves) / 2)
    measured, seconds = curves[0]
    # One context was measured: longer ones read more keys and values, by the memory's speed.
    more = rows * (model.seen(context) - model.seen(measured)) * model.kv_bytes_per_token_layer
    return max(seconds + more / node.memory_bytes_per_s, seconds / 2)


def _from_floor(points: tuple[tuple[float, float], ...], x: float) -> float:
    """Along the points, flat below the first; a single point grows in proportion."""
    if x <= points[0][0]:
        return points[0][1]
    if len(points) == 1:
        return points[0][1] * x / points[0][0]
    return _along(points, x)


def _along(points: tuple[tuple[float, float], ...], x: float) -> float:
    """Piecewise linear through at least two points of rising x, its end slopes continued."""
    i = 1
    while i < len(points) - 1 and points[i][0] < x:
        i += 1
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def step_layer_s(
    node: Node,
    model: ModelShape,
    decodes: tuple[float, float],
    prefills: tuple[float, float],
    width: int = 1,
) -> float:
    """Seconds of one layer for a mixed step: (rows, context) decoded, (tokens, prompt) prefilled.

    A row that decodes computes `width` positions, drafts included. The roofline reads the weights
    once for both; profiles of the two are added.
    """
    rows, context = decodes
    tokens, prompt = prefills
    if node.layer_s and node.layer_s.decode:
        total = decode_layer_s(node, model, rows, context, width) if rows else 0.0
        return total + (prefill_layer_s(node, model, tokens, prompt) if tokens else 0.0)
    flop, read = _decode_flop_and_bytes(model, rows, context, width)
    flop += _prefill_flop(model, tokens, prompt) if tokens else 0.0
    return max(flop / node.flop_per_s, read / node.memory_bytes_per_s)
