"""The encoder of trellis codes: of all paths through the trellis, the one nearest to a tile (Viterbi's algorithm).

A tile's sequence of 256 weights, V for each of T = 256/V states s_0 … s_{T−1} of L = 16 bits, is a closed path: state t is
the state before it, shifted left by f_t bits, with f_t new bits at its low end; and state 0 follows state T−1. The number
that neighbours s_{t−1} and s_t share, e_t = s_t >> f_t = s_{t−1} mod 2^(L−f_t), is called the *edge* before s_t.

**Costs** are integers, so that every implementation finds the same path. Values and weights are rounded to numbers of 16
bits, v and x (`Metric`). One weight costs

    d = |v − x|,    r = min(d, 2^15 >> h),    cost = ((r << h)² >> 16) + ((d − r) >> 2),    v − x cut to 16 bits,

where h, the *doublings*, makes errors of the usual size large enough; very large ones cost less than their square. With
M_t[e] the least cost of all paths up to edge e,

    M_{t+1}[e] = min over j of  M_t[s >> f_t] + cost(s),    s = j·2^(L−f_{t+1}) + e

and of equal costs the smallest j wins. Costs stay within 16 bits: a sum above 65535 becomes 65535, and after every second
step the least cost is subtracted from all.

**Closing the path** takes a first pass with both ends free, through a window around the seam between the last state and
state 0, which finds the edge there; and then passes with fixed ends, from an edge round to the same edge: the first from
the edge before state 0, the next from the edge before state T/2 of the path found, and so on in turn. The path found before
is among the candidates of such a pass, so that none makes it worse. (QTIP, arXiv 2406.11235, section 3.2, has one of them.)
From a fixed edge on, costs are exact until every edge can be reached, and an edge that cannot be reached has none; then the
least cost is subtracted and the others are cut to 65535. The optimum over all closed paths is not guaranteed.

Error of a unit Gaussian with code mul1 at 2, 3 and 4 bits, relative to a whole first pass and one more (768 tiles):

    window   64, one pass     +1.6 %    +1.4 %    +1.3 %
    window   64, two passes   +0.2 %    +0.1 %     0.0 %
    window  256, two passes   −0.2 %    −0.2 %    −0.1 %   (the default)
    window  256, four         −0.2 %    −0.2 %    −0.1 %
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from quip_kernels import cpu as cpu_kernels
from quip_kernels import cpu_viterbi

from .implementation import encoder

STATE_BITS = 16
STATES = 1 << STATE_BITS
TILE_WEIGHTS = 256
# Steps of the first pass at most, and passes with fixed ends.
WINDOW = 256
PASSES = 2
MOST_COST = 0xFFFF
REBASED = 2
# The usual error of a weight costs at least this much.
_USUAL_COST = 48
_NO_PATH = 1 << 20
# Tiles encoded at a time: 4 MB of back-pointers each.
_TILES = {"cpu": 8, "cuda": 256}


class Metric(NamedTuple):
    """The values of a code as integers.

    Attributes:
        levels: int16 [V, 2^L], round(value · scale).
        scale: of weights and values; the largest value becomes ±32767.
        doublings: h.
        range: the least and the largest level.
    """

    levels: torch.Tensor
    scale: float
    doublings: int
    range: tuple[int, int]


def metric(values: torch.Tensor, bits: float) -> Metric:
    """The integers for the values of a code, for this number of bits per weight.

    Args:
        values: floating point [2^L, V].
        bits: K. The usual squared error of a weight is taken to be a share 2^−2K of the values' mean square, or n^(−2/V) if
            only n values differ and this is more.
    """
    largest = values.abs().max().item()
    scale = 32767 / largest if largest > 0 else 1.0
    levels = (values.double() * scale).round().to(torch.int16).T.contiguous()
    share = max(2.0 ** (-2 * bits), levels.unique(dim=1).shape[1] ** (-2 / len(levels)))
    usual = levels.double().square().mean().item() * share / 65536
    doublings = math.ceil(math.log(_USUAL_COST / usual, 4)) if usual > 0 else 0
    return Metric(levels, scale, min(max(doublings, 0), 15), (int(levels.min()), int(levels.max())))


def fresh_bits(bits: float, weights: int) -> tuple[int, int]:
    """New bits of the states with an even number and of those with an odd one; they differ only for half bits.

    Args:
        bits: K, a multiple of 1/2.
        weights: V; 1 for half bits.
    """
    twice = round(2 * bits * weights)
    return twice // 2, twice - twice // 2


def quantize(x: torch.Tensor, code: Metric) -> torch.Tensor:
    """Weights as integers: float32 [N, T·V] → int16 [N, T, V], cut to the range of the levels."""
    found = (x * code.scale).round().clamp(*code.range)
    return found.to(torch.int16).view(len(x), x.shape[1] // len(code.levels), len(code.levels))


def encode(x: torch.Tensor, code: Metric, bits: float) -> torch.Tensor:
    """The states of the closed paths nearest to tiles, by the encoder for their device (`implementation`).

    Args:
        x: float32 [N, 256], the weights of each tile in the order of its sequence.
        code: the values of a code, on the device of x.
        bits: K, a multiple of 1/2; V·K at most 16.

    Returns:
        int32 [N, 256 / V].
    """
    fresh = fresh_bits(bits, len(code.levels))
    tiles = quantize(x, code)
    arguments = (tiles, code.levels, fresh, code.doublings, min(WINDOW, tiles.shape[1]), PASSES)
    implementation = encoder(x.device)
    if implementation == "cpu" and cpu_kernels.is_available():
        return cpu_viterbi.search(*arguments)
    if implementation == "triton":
        from quip_kernels.gpu import viterbi as gpu_viterbi  # Triton is not installed everywhere

        return gpu_viterbi.search(*arguments)
    return search(*arguments)


def search(
    x: torch.Tensor,
    levels: torch.Tensor,
    fresh: tuple[int, int],
    doublings: int,
    window: int = WINDOW,
    passes: int = PASSES,
) -> torch.Tensor:
    """The closed path of every tile, in PyTorch on any device: the reference for the compiled encoders.

    Args:
        x: int16 [N, T, V], the tiles; T a multiple of 4.
        levels: int16 [V, 2^L].
        fresh: f_t for even and for odd t, each from 1 to L.
        doublings: h.
        window: steps of the first pass, even; cut to T.
        passes: those with fixed ends, at least 1.

    Returns:
        The states, int32 [N, T].
    """
    at_once = _TILES.get(x.device.type, _TILES["cpu"])
    trellis = _Trellis(levels.int(), fresh, doublings)
    parts = [trellis.search(part.int(), window, passes) for part in x.split(at_once)]
    return torch.cat(parts) if parts else torch.empty(0, x.shape[1], dtype=torch.int32, device=x.device)


class _Trellis:
    """The steps of one trellis; see [`search`] for the arguments."""

    def __init__(self, levels: torch.Tensor, fresh: tuple[int, int], doublings: int):
        self.levels, self._fresh, self.doublings = levels, fresh, doublings
        self.state_bits = levels.shape[1].bit_length() - 1

    def fresh(self, t: int) -> int:
        return self._fresh[t % 2]

    def edge_bits(self, t: int) -> int:
        """Bits of the edge before state t."""
        return self.state_bits - self.fresh(t)

    def edges(self, t: int) -> int:
        return 1 << self.edge_bits(t)

    def search(self, x: torch.Tensor, window: int, passes: int) -> torch.Tensor:
        """See the module's [`search`]; x int32."""
        count, steps = x.shape[:2]
        edges = self.find_seam(x, window)
        states = torch.empty(count, steps, dtype=torch.int32, device=x.device)
        for number in range(passes):
            begin = number % 2 * (steps // 2)
            if number:
                edges = states[:, begin].long() >> self.fresh(begin)
            self.close(x, begin, edges, states)
        return states

    def find_seam(self, x: torch.Tensor, window: int) -> torch.Tensor:
        """The edge before state 0 of the best path through the window around it: int64 [N]."""
        steps = x.shape[1]
        half = min(window, steps) // 2
        order = [t % steps for t in range(steps - half, steps + half)]
        costs = torch.zeros(len(x), self.edges(order[0]), dtype=torch.int32, device=x.device)
        costs, back = self.forward(x, order, costs, reached=self.edge_bits(order[0]))
        edges = (costs.long() << STATE_BITS | torch.arange(costs.shape[1], device=x.device)).amin(1) & (STATES - 1)
        for t, choices in reversed(list(zip(order, back, strict=True))[half:]):
            edges = self.state_before(edges, t, choices) >> self.fresh(t)
        return edges

    def close(self, x: torch.Tensor, begin: int, edges: torch.Tensor, states: torch.Tensor) -> None:
        """Write the best closed path through these edges [N] before state `begin` to `states` [N, T]."""
        steps = x.shape[1]
        order = [(begin + i) % steps for i in range(steps)]
        costs = torch.full((len(x), self.edges(begin)), _NO_PATH, dtype=torch.int32, device=x.device)
        costs.scatter_(1, edges[:, None], 0)
        _, back = self.forward(x, order, costs, reached=0)
        for t, choices in reversed(list(zip(order, back, strict=True))):
            found = self.state_before(edges, t, choices)
            states[:, t] = found
            edges = found >> self.fresh(t)

    def forward(
        self, x: torch.Tensor, order: list[int], costs: torch.Tensor, reached: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Costs behind the last of the states `order`, and for each of them the best j for every edge behind it.

        Args:
            costs: int32 [N, edges], before the first.
            reached: the number of low bits that the edges with a cost have free.
        """
        back = []
        closed = reached < self.edge_bits(order[0])
        for number, t in enumerate(order):
            choices = 1 << self.fresh(t + 1)
            sums = costs.repeat_interleave(1 << self.fresh(t), 1) + self._distances(x[:, t])
            if not closed:
                sums = sums.clamp_max(MOST_COST)
            # the number of the choice in the low bits settles ties
            sums = sums.view(len(x), choices, -1).to(torch.int32 if choices <= 256 else torch.int64)
            best = (sums * choices + torch.arange(choices, dtype=sums.dtype, device=x.device)[:, None]).amin(1)
            back.append((best & (choices - 1)).to(torch.uint8 if choices <= 256 else torch.int32))
            costs = (best >> self.fresh(t + 1)).int()
            reached += self.fresh(t)
            opened = closed and reached >= self.edge_bits(t + 1)
            if opened or (not closed and number % REBASED == REBASED - 1):
                costs = (costs - costs.amin(1, keepdim=True)).clamp_max(MOST_COST)
            closed = closed and not opened
        return costs, back

    def _distances(self, x: torch.Tensor) -> torch.Tensor:
        """Cost of every state for the weights x [N, V]: [N, 2^L]."""
        error = (self.levels - x[:, :, None]).clamp_(-(1 << 15), (1 << 15) - 1).abs_()
        usual = error.clamp_max((1 << 15) >> self.doublings)
        squares = (usual << self.doublings).square_() >> 16
        return squares.add_((error - usual) >> 2).sum(1, dtype=torch.int32)

    def state_before(self, edges: torch.Tensor, t: int, back: torch.Tensor) -> torch.Tensor:
        """State t of the best paths to these edges [N] behind it."""
        return (back.gather(1, edges[:, None])[:, 0].long() << self.edge_bits(t + 1)) + edges


def pack(states: torch.Tensor, fresh: tuple[int, int]) -> torch.Tensor:
    """The rings of bits of closed paths, as `trellis.py` lays them out: states int [N, T] → words int16 [N, 16·K].

    State t begins where its own highest bits are; as many of them as the next state's new bits are its share of the ring.
    """
    parts = []
    for parity in (0, 1):
        # the bits that the state with the other parity, which comes next, does not have any more
        own = fresh[1 - parity]
        shifts = STATE_BITS - 1 - torch.arange(own, device=states.device)
        parts.append((states[:, parity::2, None].int() >> shifts) & 1)
    ring = torch.cat(parts, 2).view(len(states), sum(fresh) * states.shape[1] // 32, 16)
    weights = 1 << torch.arange(15, -1, -1, device=states.device)
    return (ring * weights).sum(2).to(torch.int16)
