"""The encoder of trellis codes: state for state against all paths of tiny trellises, and against its formulas in loops."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.truth import trellis_weight
from transformers_quip.codebooks import get, viterbi
from transformers_quip.codebooks.trellis import Trellis

# new bits of even and odd states, and T; states have 5 bits
TINY = [((1, 1), 8), ((2, 2), 4), ((1, 2), 4), ((2, 1), 4)]
BITS = 5


def cost_of(levels, x, doublings):
    """Of one state for its weights, by the formula in integers of Python."""
    total = 0
    for v, w in zip(levels, x, strict=True):
        difference = max(-(2**15), min(2**15 - 1, v - w))
        usual = min(abs(difference), 2**15 >> doublings)
        total += ((usual << doublings) ** 2 >> 16) + (abs(difference) - usual >> 2)
    return total


def some_problem(seed, weights, steps, values):
    """Levels [V, 32] and tiles [3, T, V] of few different numbers, so that many paths cost the same."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.tensor(values, dtype=torch.int16)
    levels = pick[torch.randint(len(values), (weights, 1 << BITS), generator=generator)]
    return levels, pick[torch.randint(len(values), (3, steps, weights), generator=generator)]


def all_paths(order, fresh, start):
    """Every path of the states `order` whose first edge is in `start`."""
    for edge in start:
        for news in itertools.product(*(range(1 << fresh[t % 2]) for t in order)):
            path, state = [], edge
            for t, new in zip(order, news, strict=True):
                state = (state << fresh[t % 2] | new) & ((1 << BITS) - 1)
                path.append(state)
            yield path


def edge_behind(state, t, fresh):
    return state & ((1 << BITS - fresh[(t + 1) % 2]) - 1)


def best_path(order, fresh, start, end, cost):
    """Of the cheapest paths the one whose last edge, then whose last states are smallest."""
    candidates = (path for path in all_paths(order, fresh, start) if end in (None, edge_behind(path[-1], order[-1], fresh)))
    return min(
        candidates,
        key=lambda path: (
            sum(cost(s, t) for s, t in zip(path, order, strict=True)),
            edge_behind(path[-1], order[-1], fresh),
            path[::-1],
        ),
    )


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize(("fresh", "steps"), TINY)
def test_states_are_those_of_a_search_through_all_paths(fresh, steps, weights, passes):
    levels, tiles = some_problem(sum(fresh) + weights, weights, steps, [-900, -300, 0, 300, 1100])
    for window in (2, steps):
        found = viterbi.search(tiles, levels, fresh, 1, window, passes)
        for tile, states in zip(tiles.tolist(), found.tolist(), strict=True):
            costs = [[cost_of(value, x, 1) for x in tile] for value in levels.T.tolist()]

            def cost(s, t, costs=costs):
                return costs[s][t]

            order = [t % steps for t in range(steps - window // 2, steps + window // 2)]
            free = range(1 << BITS - fresh[order[0] % 2])
            first = best_path(order, fresh, free, None, cost)
            seam, path = first[window // 2] >> fresh[0], first
            for number in range(passes):
                begin = number % 2 * steps // 2
                if number:
                    seam = path[begin] >> fresh[begin % 2]
                order = [(begin + i) % steps for i in range(steps)]
                turned = best_path(order, fresh, [seam], seam, cost)
                path = [turned[(t - begin) % steps] for t in range(steps)]
            assert states == path


def formulas(tile, levels, fresh, doublings, window):
    """The cheapest path by the formulas of viterbi.py in loops, one pass with a fixed edge."""
    steps = len(tile)

    def run(order, costs):
        choices = []
        for number, t in enumerate(order):
            closed = None in costs
            sums = {}
            for s in range(1 << BITS):
                cost = costs[s >> fresh[t % 2]]
                if cost is not None:
                    total = cost + cost_of(levels[:, s].tolist(), tile[t], doublings)
                    sums[s] = total if closed else min(total, 65535)
            edges = 1 << BITS - fresh[(t + 1) % 2]
            before = [range(e, 1 << BITS, edges) for e in range(edges)]
            best = [min(((sums[s], s) for s in states if s in sums), default=None) for states in before]
            choices.append([b and b[1] for b in best])
            costs = [b and b[0] for b in best]
            if None not in costs and (closed or number % 2 == 1):
                costs = [min(c - min(costs), 65535) for c in costs]
        return costs, choices

    half = window // 2
    order = [t % steps for t in range(steps - half, steps + half)]
    costs, choices = run(order, [0] * (1 << BITS - fresh[order[0] % 2]))
    edge = costs.index(min(costs))
    for t, chosen in reversed(list(zip(order, choices, strict=True))[half:]):
        edge = chosen[edge] >> fresh[t % 2]
    start = [0 if e == edge else None for e in range(1 << BITS - fresh[0])]
    _, choices = run(range(steps), start)
    path = []
    for t in reversed(range(steps)):
        path.append(choices[t][edge])
        edge = path[-1] >> fresh[t % 2]
    return path[::-1]


@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("fresh", [(1, 1), (2, 3), (3, 2), (5, 5)])
def test_costs_are_cut_and_rebased_as_described(fresh, weights):
    """Numbers of all sizes: costs above 16 bits, differences beyond them, and ties among those that were cut."""
    values = [-32768, -32767, -20000, -5000, 0, 7000, 30000, 32767]
    for doublings in (0, 2):
        levels, tiles = some_problem(weights + doublings, weights, 32, values)
        for window in (6, 32):
            found = viterbi.search(tiles, levels, fresh, doublings, window, passes=1).tolist()
            assert found == [formulas(tile, levels, fresh, doublings, window) for tile in tiles.tolist()]


def path_cost(states, tile, levels):
    return sum(cost_of(levels[:, s].tolist(), x, 0) for s, x in zip(states, tile, strict=True))


def test_more_passes_are_never_worse():
    levels, tiles = some_problem(3, 1, 32, list(range(-3000, 3000, 7)))
    costs = []
    for passes in (1, 2, 3, 4):
        found = viterbi.search(tiles, levels, (1, 1), 0, 2, passes).tolist()
        costs.append([path_cost(s, x, levels) for s, x in zip(found, tiles.tolist(), strict=True)])
    assert all(a >= b for fewer, more in itertools.pairwise(costs) for a, b in zip(fewer, more, strict=True))
    assert costs[0] != costs[-1]


@pytest.mark.parametrize("bits", [1, 2.5, 8])
def test_metric(bits):
    values = torch.randn(1 << BITS, 2, generator=torch.Generator().manual_seed(0))
    levels, scale, doublings, limits = viterbi.metric(values, bits)
    torch.testing.assert_close(levels.T / scale, values, rtol=0, atol=0.5001 / scale)
    assert max(map(abs, limits)) == 32767
    assert limits == (levels.min(), levels.max())
    # the usual error, of which no more can be expected of 32 different pairs, is worth 48 to 192
    usual = levels.double().square().mean() * max(4.0**-bits, 1 / 32)
    assert doublings == 0 or 48 <= usual * 4**doublings / 65536 < 192
    assert viterbi.metric(torch.zeros(32, 1), 2).levels.eq(0).all()


def test_new_bits():
    assert viterbi.fresh_bits(3, 1) == (3, 3)
    assert viterbi.fresh_bits(3, 2) == (6, 6)
    assert viterbi.fresh_bits(2.5, 1) == (2, 3)


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 3.5, 5, 8])
def test_packed_states_are_windows_of_the_ring(bits):
    """State t of half bits begins at bit ⌈t·K⌉ of the ring (shared/formats/exl3.md, §11)."""
    ring = torch.randint(0, 2, (int(256 * bits),), generator=torch.Generator().manual_seed(0)).tolist()
    begins = [-int(-t * bits // 1) for t in range(256)]
    states = [int("".join(str(ring[(b + j) % len(ring)]) for j in range(16)), 2) for b in begins]
    words = viterbi.pack(torch.tensor([states]), viterbi.fresh_bits(bits, 1))
    assert "".join(f"{w & 0xFFFF:016b}" for w in words[0].tolist()) == "".join(map(str, ring))


NAMES = [
    "trellis:1mad:k1:rows",
    "trellis:2mad:k5:qtip",
    "trellis:3inst:k3:exl3",
    "trellis:mcg:k8:exl3",
    "trellis:mul1:k2:exl3",
    "trellis:hyb-q9v2:k2:qtip",
    "trellis:hyb-q8v1:k6:rows",
    "trellis:quantlut-q10v2:k8:rows",
    "trellis:lut-q16v2:k3:rows",
]


@pytest.mark.parametrize("name", NAMES)
def test_encoded_tiles_are_decoded_to_their_points(name):
    book = get(name)
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)) * book.gaussian_scale
    codes, points = book.encode(book.to_blocks(weight))
    assert codes.shape == book.codes_shape(32, 48)
    assert codes.dtype == book.code_dtype
    stored, points = book.store(codes), book.from_blocks(points)
    book.check(stored, 32, 48)
    decoded = trellis_weight(name, stored["codes"], 48, stored.get("table"))
    torch.testing.assert_close(decoded, points.double(), rtol=0, atol=0)
    assert torch.equal(book.decode(stored, 48), points)
    bound = weight.square().mean() * 4.0**-book.bits
    floor = 0 if book.table_shape is None else 0.002  # of few values
    assert bound * 0.9 < (points - weight).square().mean() < bound * 2 + floor
    for dtype in (torch.float16, torch.bfloat16):
        if book.table is not None:
            assert torch.equal(book.table.to(dtype).float(), book.table)


def test_error_of_a_gaussian():
    """QTIP's paper has 0.069 for one weight a step at 2 bits and 0.071 for hyb, with one pass less than here."""
    x = torch.randn(24, 256, generator=torch.Generator().manual_seed(2))
    for code, published in (("mul1:k2:exl3", 0.069), ("3inst:k2:rows", 0.069), ("hyb-q9v2:k2:qtip", 0.071)):
        book = get(f"trellis:{code}")
        points = book.encode(x * book.gaussian_scale)[1] / book.gaussian_scale
        assert (points - x).square().mean().item() == pytest.approx(published, rel=0.05)  # of 24 tiles


def test_a_tile_of_outliers_is_cut_to_the_range_of_the_values():
    book = Trellis.parse("trellis:mul1:k4:exl3")
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(3))
    x[:, 100] = torch.tensor([1e30, -1e30, 7, -7])
    points = book.encode(x)[1]
    assert (points[:, 100] * x[:, 100].sign() > 2).all()  # the largest values are near 3.4
    for name in ("mul1:k1:exl3", "mul1:k4:exl3", "mcg:k8:exl3"):  # more than one outlier, so that no sum is ordinary
        other = get(f"trellis:{name}")
        assert other.encode(torch.full((1, 256), 1e30))[1].mean() > (1 if other.bits == 1 else 2)
    assert book.encode(torch.zeros(0, 256))[0].shape == (0, 64)
