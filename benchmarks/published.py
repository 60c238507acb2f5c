"""The clustered testbed of the block-placement paper, with and without its two added constants.

    python -m benchmarks.published

Sun et al. 2025 (arXiv 2512.21884): BLOOM-176B in nf4, two A100 in one cluster and seven MIG slices in
another, 5 ms and 1 Gbit/s inside, 100 ms and 100 Mbit/s across; 100 requests of 20 prompt tokens come as
a Poisson process. The authors' evaluation adds 250 s to every request of Petals and 60 s to every one of
theirs. Both tables stand here: with these constants, and without. The data's way is part of the 50 ms
that each round trip is charged. Mean seconds per token of ten runs; published values beside them.
"""

from dataclasses import dataclass
from statistics import fmean

import numpy as np

from benchmarks.record import Claim, record
from planner.online import (
    PetalsRouting,
    Prefill,
    Sessions,
    WaitAware,
    retried_s,
    whole_request,
)
from planner.placement import (
    Server,
    Sizes,
    Span,
    cg_bp,
    most_sessions,
    petals,
    petals_blocks,
)
from planner.routing import route_s, shortest_route

HIDDEN, BLOCKS = 14_336, 70
BLOCK_BYTES = 2_466_437_120 * 4.25 / 8 * 1.01
PROMPT_TOKENS, REQUESTS, RUNS = 20, 100, 10
OVERHEAD_S, PROMPT_OVERHEAD_S, INITIAL_S = 0.050, 0.055, 0.100
NEAR_S, FAR_S = 0.005, 0.100
PETALS_CACHE_BYTES = 2 * HIDDEN * 4096 * 2
"""What Petals sets aside per block, for all sessions."""
ADDED_S = {"petals": 250.0, "cg-bp + ws-rr": 60.0}
MIG_BLOCKS = 4
"""The authors' code gives a MIG slice no more blocks than this, in both methods."""
# (client's cluster, output tokens, requests/s): published mean s/token, on the testbed and simulated.
PUBLISHED = {
    (0, 64, 0.5): {"petals": (6.28, 5.33), "cg-bp + ws-rr": (2.00, 1.59)},
    (0, 128, 0.5): {"petals": (5.14, 4.74), "cg-bp + ws-rr": (1.34, 0.92)},
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting of the testbed."""

    client: int
    """The client's cluster: 0 has no servers, 1 the A100s, 2 the MIG slices."""
    tokens: int
    requests_per_s: float

    @property
    def sizes(self) -> Sizes:
        return Sizes(BLOCKS, BLOCK_BYTES, 2 * HIDDEN * (PROMPT_TOKENS + self.tokens) * 2)

    def servers(self) -> list[Server]:
        """Seven MIG slices, two A100."""
        near = {1: "a100", 2: "mig"}.get(self.client)
        return [
            *(_server(f"mig{i}", 9.1e9, 0.0162488, near == "mig", MIG_BLOCKS) for i in range(7)),
            *(_server(f"a100-{i}", 79.138e9, 0.0022197, near == "a100", None) for i in range(2)),
        ]

    def whole(self, server: Server) -> Server:
        """The server with the seconds of a whole request."""
        more_s = 0.035 if server.name.startswith("mig") else 0.005
        first = Prefill(
            server.round_trip_s - OVERHEAD_S + PROMPT_OVERHEAD_S, server.block_s + more_s
        )
        return whole_request(server, first, self.tokens)


def _server(name: str, memory: float, block_s: float, near: bool, most: int | None) -> Server:
    return Server(name, memory, OVERHEAD_S + (NEAR_S if near else FAR_S), block_s, most)


def arrivals(cell: Cell, run: int) -> list[float]:
    """When the requests come; the first at once."""
    gaps = np.random.default_rng(run).exponential(1.0 / cell.requests_per_s, REQUESTS)
    return [float(t) for t in np.cumsum(gaps) - gaps[0]]


def theirs_s(cell: Cell, run: int, added_s: float) -> tuple[float, float]:
    """(seconds per token, seconds of waiting per request) of CG-BP and WS-RR."""
    servers, sizes = cell.servers(), cell.sizes
    alone = cg_bp(servers, sizes, 1)
    assert alone is not None, "one session fits on this testbed"
    route = shortest_route([_whole(cell, span) for span in alone], BLOCKS)
    assert route is not None, "a placement that is feasible has a route"
    # Sessions held at once, by Little's law, one deviation above the mean; every delay counts.
    held = cell.requests_per_s * (route_s(route) + INITIAL_S + added_s)
    sessions = max(1, min(round(held + held**0.5), most_sessions(servers, sizes)))
    placed = cg_bp(servers, sizes, sessions)
    assert placed is not None, "the design is within the corollary's bound"
    router = WaitAware.over([_whole(cell, span) for span in placed], sizes)
    router.retry_s = retried_s
    return _mean(cell, run, added_s, router)


def petals_s(cell: Cell, run: int, added_s: float) -> tuple[float, float]:
    """The same of Petals: servers in random order, its own placement and routing."""
    servers = cell.servers()
    joined = [servers[i] for i in np.random.default_rng(run).permutation(len(servers))]
    held = [min(petals_blocks(s, BLOCK_BYTES, HIDDEN), s.most_blocks or BLOCKS) for s in joined]
    placed = petals(joined, BLOCKS, held)
    spans = [_whole(cell, span) for span in placed]
    slots = [int(span.blocks * PETALS_CACHE_BYTES // cell.sizes.cache_bytes) for span in spans]
    speeds = {server.name: server.block_s for server in servers}
    router = PetalsRouting(Sessions(spans, slots), BLOCKS, lambda a, b: _way_s(cell, a, b), speeds)
    return _mean(cell, run, added_s, router)


def _whole(cell: Cell, span: Span) -> Span:
    return Span(cell.whole(span.server), span.first, span.end)


def _way_s(cell: Cell, one: str, other: str) -> float:
    """Half the round trip between two clusters; "" is the client."""
    clusters = [
        cell.client if not name else (2 if name.startswith("mig") else 1) for name in (one, other)
    ]
    return (NEAR_S if clusters[0] == clusters[1] else FAR_S) / 2.0


def _mean(
    cell: Cell, run: int, added_s: float, router: WaitAware | PetalsRouting
) -> tuple[float, float]:
    totals, waits = [], []
    for now_s in arrivals(cell, run):
        routed = router.route(now_s, added_s=INITIAL_S + added_s)
        assert routed is not None, "both placements cover all blocks"
        route, wait = routed
        waits.append(wait)
        totals.append(wait + route_s(route) + INITIAL_S + added_s)
    return fmean(totals) / cell.tokens, fmean(waits)


def main() -> None:
    """Simulate all cells and record them."""
    claims = []
    for client in (0, 1, 2):
        for tokens in (64, 128):
            for rate in (0.1, 0.5):
                claims.extend(_cell_claims(Cell(client, tokens, rate)))
    record("published", claims)


def _cell_claims(cell: Cell) -> list[Claim]:
    where = f"client in cluster {cell.client}, {cell.tokens} tokens, {cell.requests_per_s:g}/s"
    claims = []
    for words, share in (("with both constants", 1.0), ("without", 0.0)):
        mean = {}
        for name, method in (("petals", petals_s), ("cg-bp + ws-rr", theirs_s)):
            runs = [method(cell, run, share * ADDED_S[name]) for run in range(RUNS)]
            mean[name] = fmean(per_token for per_token, _ in runs)
            waited = fmean(wait for _, wait in runs)
            claims.append(Claim(f"{where}: {name} {words}", mean[name], "s/token"))
            claims.append(Claim(f"{where}: {name} {words}, mean wait", waited, "s"))
        saved = 1.0 - mean["cg-bp + ws-rr"] / mean["petals"]
        claims.append(Claim(f"{where}: time that cg-bp + ws-rr saves, {words}", saved, "share"))
    published = PUBLISHED.get((cell.client, cell.tokens, cell.requests_per_s), {})
    for name, (testbed, simulated) in published.items():
        claims.append(Claim(f"{where}: {name} as published, testbed", testbed, "s/token"))
        claims.append(Claim(f"{where}: {name} as published, simulated", simulated, "s/token"))
    return claims


if __name__ == "__main__":
    main()
