"""How near a ring comes to its slowest stage or link, whatever the network; and who else how near.

    python -m benchmarks.ring [--cells E1x2,E5x8]

Stages are processes on hosts of an emulated WAN. Their layers sleep C(n) for a step of n tokens, since
two cores cannot host several real ones; head, scheduler, frames, codec, links and the activations
that cross them are real. Rows have one token of prompt, so that after its first round a run decodes
only; what is reported is its steady rate, after the links' first seconds. One ring's rows bring prompts.

Beside it stand the same ring with one batch of 32 (A, measured everywhere), with all its rows in one
batch (B), and one batch whose activations pass through a client, as in Petals, with stages that also
push to one another and without (C). B and C are sums of seconds, measured at two stages to show how
good these sums are.
"""

import argparse
import math
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path as FilePath

import numpy as np

from benchmarks.record import RESULTS, Claim, record
from benchmarks.ring_arithmetic import NETWORKS, ROWS, Cell, stage_s
from benchmarks.ring_forecast import forecast_steady_rows_per_s, forecast_tokens_per_s
from benchmarks.ring_hosts import WARM_ROUNDS, Hosts, Lap, Ran
from benchmarks.ring_picture import draw
from benchmarks.wan import obstacle
from planner.tempo import MOST
from stages.codec import RAW
from stages.link_codec import LOSSLESS
from stages.turns import LEARNING_S, TURN_S

STAGES = (2, 4, 8)
CELLS = {f"{n.name}x{stages}": Cell(n, stages) for stages, n in product(STAGES, NETWORKS)}
PICTURED = ("E2x4", "E5x8")
MEASURED_S = 8.0
LEAST_ROUNDS = 3
REACHED = 0.90
FORECAST = 0.15

QUOTAS = (24, 48, 96)
TAIL_ROWS, TAIL_SLOT_ROWS = 120, 8
TAIL_RATIO = 1.6
PROMPTED, PROMPT_TOKENS, PROMPT_WAVES = "E1x4", (16, 400), 2
ADAPTING_TOKENS = 10


def lap(cell: Cell, slots: int, slot_rows: int = ROWS, levels: Sequence[str] = (RAW,)) -> Lap:
    """
    The cell's ring for some seconds; one batch alone needs fewer.

    Where links are to be full they take two turns of their connections, once each has had its first.
    """
    round_s = max(cell.loop_s(slot_rows), slots * cell.bottleneck_s)
    warm_s, for_s = 0.0, MEASURED_S if slots > 1 else MEASURED_S / 2
    if slots > 1 and cell.bound_by_links:
        warm_s, for_s = LEARNING_S + TURN_S, 2 * TURN_S
    warm_rounds = max(WARM_ROUNDS, math.ceil(warm_s / round_s))
    rounds = warm_rounds + 1 + max(LEAST_ROUNDS, math.ceil(for_s / round_s))
    quotas = (rounds,) * (slots * slot_rows)
    paces = (1.0,) * cell.stages
    known = paces, cell.network.path, slots, quotas, slot_rows, tuple(levels)
    return Lap(*known, warm_rounds=warm_rounds)


def measured(hosts: Hosts, name: str, wanted: Lap) -> Ran:
    """Run it, and say so: the whole takes a while."""
    ran = hosts.run(wanted)
    sys.stderr.write(
        f"{name}: {sum(wanted.quotas) / ran.seconds:.1f} tokens/s, {ran.seconds:.0f} s, "
        f"steps {1e3 * overrun_s(wanted, ran):.1f} ms too long, load {os.getloadavg()[0]:.1f}\n"
    )
    return ran


def overrun_s(wanted: Lap, ran: Ran) -> float:
    """Mean seconds by which this machine woke a sleeping stage too late."""
    late = [
        steps[:, 1] - steps[:, 0] - [pace * stage_s(int(tokens)) for tokens in steps[:, 2]]
        for pace, steps in zip(wanted.paces, ran.steps, strict=True)
    ]
    return float(np.concatenate(late).mean())


def steady_forecast_claim(name: str, wanted: Lap, ran: Ran) -> Claim:
    """The simulator's steady rate over the measured one, both past the links' first seconds.

    For those no forecast is made: a new connection takes seconds to learn what its wire carries.
    """
    over = forecast_steady_rows_per_s(wanted) / ran.steady_rows_per_s
    return _within(f"{name}: simulated, over measured", over)


def forecast_claim(name: str, wanted: Lap, ran: Ran) -> Claim:
    """The same of a whole lap, of rows that end at all times: it has no steady part."""
    over = forecast_tokens_per_s(wanted) * ran.seconds / sum(wanted.quotas)
    return _within(f"{name}: simulated, over measured, start and end included", over)


def _within(claim: str, over: float) -> Claim:
    """A plan that promises too little is as wrong as one that promises too much: another is chosen."""
    return Claim(claim, over, "ratio", 1 - FORECAST, 1 + FORECAST)


def cell_claims(hosts: Hosts, name: str, cell: Cell, pictures: dict[str, Ran]) -> list[Claim]:
    """One cell: ours with the codec off and on, and what it is compared with."""
    slots = cell.slots
    wanted = lap(cell, slots)
    ours = measured(hosts, name, wanted)
    coded = measured(hosts, f"{name} coded", lap(cell, slots, levels=LOSSLESS))
    alone = measured(hosts, f"{name} A", lap(cell, 1))
    if name in PICTURED:
        pictures[f"{name}, {slots} micro-batches of {ROWS}"] = ours
        pictures[f"{name}, one batch of {ROWS}"] = alone
    rate, a_rate = ours.steady_rows_per_s, alone.steady_rows_per_s
    bound = ROWS / cell.bottleneck_s
    coded_bound = ROWS / cell.coded_bottleneck_s(coded.ratio)
    against_a = REACHED * cell.loop_s() / cell.bottleneck_s
    b_rate = slots * ROWS / cell.loop_s(slots * ROWS)
    return [
        Claim(f"{name}: {slots} micro-batches of {ROWS}", rate, "tokens/s"),
        Claim(f"{name}: of the slowest stage or link", rate / bound, "ratio", REACHED),
        Claim(f"{name}: the same from the first lease on", ours.early_rows_per_s / bound, "ratio"),
        Claim(f"{name}: codec on (ratio {coded.ratio:.2f}), of the slowest stage or coded link",
              coded.steady_rows_per_s / coded_bound, "ratio", REACHED),
        Claim(f"{name}: codec on, over codec off", coded.steady_rows_per_s / rate, "ratio"),
        Claim(f"{name}: over A, one batch of {ROWS}", rate / a_rate, "ratio", against_a),
        Claim(f"{name}: A, measured over computed", a_rate * cell.loop_s() / ROWS, "ratio"),
        Claim(f"{name}: over B, one batch of {slots * ROWS} (computed)", rate / b_rate, "ratio"),
        Claim(f"{name}: over C, through a client with push (computed)",
              rate * cell.pushed_s() / ROWS, "ratio"),
        Claim(f"{name}: over C, through a client alone (computed)",
              rate * cell.relayed_s() / ROWS, "ratio"),
        steady_forecast_claim(name, wanted, ours),
        Claim(f"{name}: this machine wakes a stage too late by", 1e3 * overrun_s(wanted, ours),
              "ms a step"),
        Claim(f"{name}: mean row latency", ours.token_s, "s a token"),
        Claim(f"{name}: mean row latency of A", alone.token_s, "s a token"),
    ]  # fmt: skip


def computed_claims(hosts: Hosts, name: str, cell: Cell) -> list[Claim]:
    """B and C measured, over the sums that stand for them elsewhere; for a ring of two stages."""
    rows, path = cell.slots * ROWS, cell.network.path
    one_batch = measured(hosts, f"{name} B", lap(cell, 1, rows))
    found = [
        Claim(f"{name}: B, measured over computed",
              one_batch.steady_rows_per_s * cell.loop_s(rows) / rows, "ratio")
    ]  # fmt: skip
    to_and_fro = [pace for _ in range(cell.stages) for pace in (0.0, 1.0)] + [0.0]
    pushed = [0.0, *(1.0,) * cell.stages, 0.0]
    for traffic, paces, loop_s in (
        ("with push", pushed, cell.pushed_s()),
        ("alone", to_and_fro, cell.relayed_s()),
    ):
        quotas = (WARM_ROUNDS + 6,) * ROWS
        ran = measured(
            hosts, f"{name} C {traffic}", Lap(tuple(paces), path, 1, quotas, client=True)
        )
        over = ran.steady_rows_per_s * loop_s / ROWS
        found.append(
            Claim(f"{name}: C through a client {traffic}, measured over computed", over, "ratio")
        )
    return found


def tail_claims(hosts: Hosts) -> list[Claim]:
    """Rows of unequal length, against batches that end together: their short rows compute on."""
    cell = CELLS["E1x2"]
    quotas = [QUOTAS[row % len(QUOTAS)] for row in range(TAIL_ROWS)]
    slots = math.ceil(cell.loop_s(TAIL_SLOT_ROWS) / stage_s(TAIL_SLOT_ROWS)) + 1
    paces = (1.0,) * cell.stages
    seconds, forecasts = [], []
    for name, asked in (("continuous", quotas), ("static", [max(QUOTAS)] * TAIL_ROWS)):
        wanted = Lap(paces, cell.network.path, slots, asked, TAIL_SLOT_ROWS)
        ran = measured(hosts, f"long tail, {name}", wanted)
        seconds.append(ran.seconds)
        forecasts.append(forecast_claim(f"long tail, {name}", wanted, ran))
    mixed = "/".join(map(str, QUOTAS))
    shape = (
        f"long tail, {TAIL_ROWS} rows of {mixed} tokens, {slots} micro-batches of {TAIL_SLOT_ROWS}"
    )
    return [
        Claim(f"{shape}", sum(quotas) / seconds[0], "tokens/s"),
        Claim("long tail: over batches that end together", seconds[1] / seconds[0], "ratio",
              TAIL_RATIO),
        Claim("long tail: the most that unequal rows allow",
              max(QUOTAS) * len(QUOTAS) / sum(QUOTAS), "ratio"),
        *forecasts,
    ]  # fmt: skip


def prompt_claims(hosts: Hosts) -> list[Claim]:
    """Rows that bring prompts: a step with chunks of them takes longer, and must hold nobody up."""
    cell, dice = CELLS[PROMPTED], random.Random(1)
    slots = math.ceil(1.25 * cell.loop_s(TAIL_SLOT_ROWS) / stage_s(TAIL_SLOT_ROWS)) + 1
    count = PROMPT_WAVES * slots * TAIL_SLOT_ROWS
    wanted = Lap(
        (1.0,) * cell.stages, cell.network.path, slots,
        [dice.choice(QUOTAS) for _ in range(count)], TAIL_SLOT_ROWS,
        prompts=[dice.randint(*PROMPT_TOKENS) for _ in range(count)],
    )  # fmt: skip
    ran = measured(hosts, f"{PROMPTED} with prompts", wanted)
    shape = "{}, prompts of {} to {} tokens".format(PROMPTED, *PROMPT_TOKENS)
    return [
        Claim(f"{shape}: {count} rows, {slots} micro-batches of {TAIL_SLOT_ROWS}",
              sum(wanted.quotas) / ran.seconds, "tokens/s"),
        Claim(f"{shape}: of its time, the busiest stage computes", ran.late_busy(), "ratio",
              REACHED),
        forecast_claim(shape, wanted, ran),
    ]  # fmt: skip


def adapting_claims(hosts: Hosts) -> list[Claim]:
    """A ring planned for a quick network, over a slow one: it opens the slots that this needs."""
    planned, met = CELLS["E1x2"], CELLS["E5x2"]
    quotas = (ADAPTING_TOKENS,) * (3 * met.slots * ROWS)  # there are always rows that wait
    paces = (1.0,) * met.stages
    rates = {
        most: measured(
            hosts,
            f"E5x2 begun as E1x2, at most {most} slots",
            Lap(paces, met.network.path, planned.slots, quotas, most_slots=most),
        ).late_rows_per_s()
        for most in (planned.slots, MOST * planned.slots)
    }
    fixed, adapted = rates.values()
    bound = ROWS / met.bottleneck_s
    return [
        Claim(f"E5x2 with E1x2's {planned.slots} micro-batches: of the slowest stage or link",
              fixed / bound, "ratio"),
        Claim("the same, opened as it was measured to need", adapted / bound, "ratio", REACHED),
    ]  # fmt: skip


def main() -> None:
    """Measure all, or the cells asked for, whose rows alone are then renewed; or say what hinders."""
    missing = obstacle()
    if missing:
        sys.exit(f"slow wires are emulated in namespaces: {missing}")
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", default=",".join(CELLS), help="of " + ", ".join(CELLS))
    names = parser.parse_args().cells.split(",")
    whole = set(names) == set(CELLS)
    pictures: dict[str, Ran] = {}
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as scratch, Hosts(max(STAGES), FilePath(scratch)) as hosts:
        for name in names:
            claims += cell_claims(hosts, name, CELLS[name], pictures)
            if CELLS[name].stages == 2:
                claims += computed_claims(hosts, name, CELLS[name])
        if whole:
            claims += tail_claims(hosts)
            claims += prompt_claims(hosts)
            claims += adapting_claims(hosts)
    record("ring", claims, again=() if whole else [f"{name}:" for name in names])
    if whole:
        draw(pictures, RESULTS / "ring.png")


if __name__ == "__main__":
    main()
