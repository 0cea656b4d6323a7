"""The encoder of trellis codes on GPUs; `transformers_quip.codebooks.viterbi` defines its result to the bit.

One program encodes one tile. The costs of all edges, before and behind a state, are in memory that only it uses and that
stays in the caches; a barrier separates the steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import device_of

NO_PATH = 1 << 20
MOST_TOGETHER = 1024  # edges
# Tiles encoded at a time, and bytes for the choices of a whole pass of all of them; two bits of a weight need 8 MB a tile.
TILES, MOST_BYTES = 512, 4 << 30


@triton.jit
def _distance(levels, x, states, weight, STATES: tl.constexpr, WEIGHTS: tl.constexpr, DOUBLINGS: tl.constexpr):
    """Cost of states for the weights of state number `weight`: int32."""
    total = tl.zeros(states.shape, tl.int32)
    for w in tl.static_range(WEIGHTS):
        error = tl.load(levels + w * STATES + states).to(tl.int32) - tl.load(x + weight * WEIGHTS + w).to(tl.int32)
        error = tl.minimum(tl.maximum(error, -32768), 32767)
        error = tl.abs(error)
        usual = tl.minimum(error, 32768 >> DOUBLINGS)
        q = (usual << DOUBLINGS).to(tl.uint32, bitcast=True)
        total += ((q * q) >> 16).to(tl.int32, bitcast=True) + ((error - usual) >> 2)
    return total


@triton.jit
def _step(
    levels,
    x,
    before,
    after,
    choices,
    t,
    most,
    old,
    fresh,
    BITS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Costs of the edges behind state t, and the choice of its highest bits for each; sums are cut to `most`."""
    edges = 1 << (BITS - fresh)
    for first in range(0, edges, WIDTH):
        edge = first + tl.arange(0, WIDTH)
        best = tl.full([WIDTH], 0x7FFFFFFF, tl.int32)
        number = tl.zeros([WIDTH], tl.int32)
        for j in range(1 << fresh):
            state = j * edges + edge
            total = tl.load(before + (state >> old)) + _distance(levels, x, state, t, 1 << BITS, WEIGHTS, DOUBLINGS)
            total = tl.minimum(total, most)
            number = tl.where(total < best, j, number)
            best = tl.minimum(total, best)
        tl.store(after + edge, best)
        tl.store(choices + edge, number.to(tl.int16))


@triton.jit
def _rebase(costs, edges, WIDTH: tl.constexpr):
    """Subtract the least cost, and cut the others to 16 bits."""
    smallest = tl.full([WIDTH], 0x7FFFFFFF, tl.int32)
    for first in range(0, edges, WIDTH):
        smallest = tl.minimum(smallest, tl.load(costs + first + tl.arange(0, WIDTH)))
    least = tl.min(smallest, 0)
    tl.debug_barrier()
    for first in range(0, edges, WIDTH):
        place = costs + first + tl.arange(0, WIDTH)
        tl.store(place, tl.minimum(tl.load(place) - least, 65535))


@triton.jit
def _fresh(t, even, odd):
    return tl.where(t % 2 == 0, even, odd)


# As constants, one or two new bits would unroll the loops until AMD's scalar registers do not suffice.
@triton.jit(do_not_specialize=["even", "odd"])
def viterbi_kernel(
    x,
    levels,
    costs,
    choices,
    seams,
    states,
    begin,
    count,
    opened,
    steps,
    even,
    odd,
    CLOSED: tl.constexpr,
    BITS: tl.constexpr,
    LEAST: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One pass of `count` steps from state `begin` on, for one tile a program.

    Args:
        x: int16 [N, steps, WEIGHTS]. levels: int16 [WEIGHTS, 2^BITS].
        costs: int32 [N, 2, 2^(BITS − LEAST)], the first half set to the costs before the first state.
        choices: int16 [N, count, 2^(BITS − LEAST)].
        seams: int32 [N]. CLOSED: the edge before and behind the pass, which is read; else that in its middle, which is
            written.
        states: int32 [N, steps], written if CLOSED.
        opened: the number of steps after which every edge is reached; 0: from the beginning.
        even, odd: new bits of states with an even number and of the others; LEAST: the smaller number.
        WIDTH: edges whose costs are computed together; at most the number of edges.
    """
    most_edges: tl.constexpr = 1 << (BITS - LEAST)
    tile = tl.program_id(0).to(tl.int64)
    x += tile * steps * WEIGHTS
    costs += tile * 2 * most_edges
    choices += tile * count * most_edges
    for i in range(count):
        t = (begin + i) % steps
        before = costs + i % 2 * most_edges
        after = costs + (i + 1) % 2 * most_edges
        most = tl.where(i < opened, 0x7FFFFFFF, 65535)
        here = choices + i * most_edges
        rebased = (i + 1 == opened) | ((i >= opened) & (i % 2 == 1))
        old = _fresh(t, even, odd)
        fresh = _fresh(t + 1, even, odd)
        _step(levels, x, before, after, here, t, most, old, fresh, BITS, WEIGHTS, DOUBLINGS, WIDTH)
        tl.debug_barrier()
        if rebased:
            _rebase(after, 1 << (BITS - fresh), WIDTH)
        tl.debug_barrier()
    end = begin + count
    edge = tl.load(seams + tile)
    if not CLOSED:
        # the smallest number of the edges with the least cost
        last = costs + count % 2 * most_edges
        edges = 1 << (BITS - _fresh(end, even, odd))
        packed = tl.full([WIDTH], 0x7FFFFFFF, tl.int32)
        for first in range(0, edges, WIDTH):
            number = first + tl.arange(0, WIDTH)
            packed = tl.minimum(packed, (tl.load(last + number) << 15) + number)
        edge = tl.min(packed, 0) & 0x7FFF
    for back in range(count if CLOSED else count // 2):
        i = count - 1 - back
        t = (begin + i) % steps
        number = tl.load(choices + i * most_edges + edge).to(tl.int32) & 0xFFFF
        state = (number << (BITS - _fresh(t + 1, even, odd))) | edge
        if CLOSED:
            tl.store(states + tile * steps + t, state)
        edge = state >> _fresh(t, even, odd)
    if not CLOSED:
        tl.store(seams + tile, edge)


def search(
    x: torch.Tensor, levels: torch.Tensor, fresh: tuple[int, int], doublings: int, window: int, passes: int
) -> torch.Tensor:
    """The closed path of every tile: the same states as of `transformers_quip.codebooks.viterbi.search`.

    Args:
        x: int16 [N, T, V], T a multiple of 4.
        levels: int16 [V, 2^L], L from 2 to 16.
        fresh: new bits of states with an even number and of the others, 1 to L.
        doublings: 0 to 15.
        window: steps of the first pass, even, 2 to T.
        passes: those after it.

    Returns:
        The states, int32 [N, T].
    """
    bytes_of_tile = 2 * x.shape[1] * (levels.shape[1] >> min(fresh))
    together = max(1, min(TILES, MOST_BYTES // bytes_of_tile))
    parts = [_search(part, levels, fresh, doublings, window, passes) for part in x.split(together)]
    return torch.cat(parts) if parts else torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)


def _search(
    x: torch.Tensor, levels: torch.Tensor, fresh: tuple[int, int], doublings: int, window: int, passes: int
) -> torch.Tensor:
    count, steps, weights = x.shape
    bits = levels.shape[1].bit_length() - 1
    device, edges = x.device, 1 << (bits - min(fresh))
    x, levels = x.contiguous(), levels.contiguous()
    costs = torch.empty(count, 2, edges, dtype=torch.int32, device=device)
    choices = torch.empty(count, steps, edges, dtype=torch.int16, device=device)
    seams = torch.zeros(count, dtype=torch.int32, device=device)
    states = torch.empty(count, steps, dtype=torch.int32, device=device)

    def run(begin: int, number: int, opened: int, closed: bool) -> None:
        with device_of(x):
            viterbi_kernel[(count,)](
                x,
                levels,
                costs,
                choices,
                seams,
                states,
                begin,
                number,
                opened,
                steps,
                *fresh,
                CLOSED=closed,
                BITS=bits,
                LEAST=min(fresh),
                WEIGHTS=weights,
                DOUBLINGS=doublings,
                WIDTH=min(MOST_TOGETHER, 1 << (bits - max(fresh))),
                num_warps=8,
            )

    costs.zero_()
    run(steps - window // 2, window, 0, closed=False)
    opened, reached = 0, 0
    while reached < bits - fresh[opened % 2]:
        reached += fresh[opened % 2]
        opened += 1
    for number in range(passes):
        begin = number % 2 * (steps // 2)
        if number:
            seams.copy_(states[:, begin] >> fresh[begin % 2])
        costs[:, 0].fill_(NO_PATH).scatter_(1, seams[:, None].long(), 0)
        run(begin, steps, opened, closed=True)
    return states
