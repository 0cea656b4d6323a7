"""Trellis codes expanded to bytes, against the weights that the codes stand for and against products in float64."""

import pytest
import torch

from quip_kernels import cpu, cpu_library, cpu_records
from quip_kernels import cpu_trellis as kernels
from quip_kernels.cpu_trellis import Layout
from tests.levels import processor_has
from transformers_quip.codebooks.trellis import Trellis

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the CPU library was not compiled")

LEVELS = range(len(cpu_library.LEVELS))
CASES = [
    (Layout(code, k, order), None) for code in kernels.CODES[:5] for k, order in ((1, "rows"), (2, "exl3"), (3, "qtip"))
]
CASES += [(Layout("mul1", k, "exl3"), None) for k in (1.5, 2.5, 3.5, 4)]
CASES += [
    (Layout("hyb", 2, "qtip"), (512, 2)),
    (Layout("hyb", 3, "rows"), (64, 1)),
    (Layout("quantlut", 4, "rows"), (2048, 2)),
    (Layout("lut", 2, "exl3"), (65536, 1)),
]
SHAPES = [(16, 32), (48, 192), (32, 544), (16, 2080)]  # n: up to 512 columns are summed in integers


def random_weight(layout, shape, m, n):
    generator = torch.Generator().manual_seed(m + n)
    codes = torch.randint(-(2**15), 2**15, (m, int(n // 16 * layout.k)), generator=generator).to(torch.int16)
    table = None if shape is None else torch.randn(shape, generator=generator).half()
    stored = {"codes": codes} if table is None else {"codes": codes, "table": table}
    return codes, table, Trellis(*layout, shape).decode(stored, n).double()


def parts_of(records, n, layout):
    """Units [m/16], codes [m/16, 2nK bytes], and weights [m, n], by the description of the form."""
    code_bytes = int(2 * n * layout.k)
    begin = 64 + -(-code_bytes // 64) * 64
    assert not records[:, 4:64].any()
    assert not records[:, 64 + code_bytes : begin].any()
    units = records[:, :4].contiguous().view(torch.float32).flatten()
    bytes_ = records[:, begin:].reshape(len(records), n // 2, 16, 2)
    weights = bytes_.permute(0, 2, 1, 3).double() * units.double()[:, None, None, None]
    return units, records[:, 64 : 64 + code_bytes], weights.reshape(-1, n)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("layout", "shape"), CASES, ids=str)
def test_records_are_the_rounded_weights(layout, shape, level):
    m, n = 48, 192
    codes, table, weight = random_weight(layout, shape, m, n)
    records = kernels.expand(codes, layout, table, processor_has(level))
    units, kept, rounded = parts_of(records, n, layout)
    rows = weight.reshape(m // 16, -1)
    torch.testing.assert_close(units.double() * 127, rows.abs().amax(1), rtol=1e-6, atol=0)
    assert ((rounded.reshape_as(rows) - rows).abs() <= units[:, None] * 0.501).all()
    assert torch.equal(kept.contiguous().view(torch.int16).flatten(), codes.flatten())
    assert torch.equal(cpu_records.collapse(records, layout.pair_bits), codes)
    assert torch.equal(kernels.decode(records, n, torch.float32, layout, table, level=level).double(), weight)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize(("layout", "shape"), [CASES[1], CASES[16], CASES[-4]], ids=str)
def test_products(layout, shape, m, n, level):
    codes, table, weight = random_weight(layout, shape, m, n)
    records = kernels.expand(codes, layout, table)
    _, _, rounded = parts_of(records, n, layout)
    x = torch.randn(11, n, generator=torch.Generator().manual_seed(n))
    z = kernels.products(x, records, layout, table, processor_has(level), exact=False)
    assert torch.equal(z, kernels.products(x, records, layout, table, 0, exact=False))
    for count in (1, 2, 3, 6):
        assert torch.equal(z[:count], kernels.products(x[:count], records, layout, table, level, exact=False))
    # of the bytes, an activation of 16 bits is wrong by at most half of the largest one / 32767
    most = x.double().abs().amax(1, keepdim=True) / 32767 * 0.501 * rounded.abs().sum(1)
    assert ((z.double() - x.double() @ rounded.T).abs() <= most).all()
    exact = x.double() @ weight.T
    assert (z.double() - exact).norm() / exact.norm() < 1.2e-2
    assert torch.equal(kernels.products(x, records, layout, table, level), kernels.products(x, codes, layout, table, level))


@pytest.mark.parametrize(("layout", "shape"), CASES, ids=str)
def test_the_error_of_every_code_is_that_of_int8_activations(layout, shape):
    codes, table, weight = random_weight(layout, shape, 128, 512)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ weight.T
    z = kernels.products(x, kernels.expand(codes, layout, table), layout, table, exact=False)
    assert (z.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(sign, level):
    layout, n = Layout("lut", 2, "rows"), 1056
    table = torch.full((65536, 1), 2.0)
    records = kernels.expand(torch.zeros(16, n // 8, dtype=torch.int16), layout, table)
    x = torch.full((5, n), sign * 3.0)
    z = kernels.products(x, records, layout, table, processor_has(level), exact=False)
    torch.testing.assert_close(z, torch.full((5, 16), sign * 6.0 * n))


def test_nothing_and_what_is_not_finite():
    layout, codes = Layout("1mad", 2, "rows"), torch.zeros(16, 4, dtype=torch.int16)
    records = kernels.expand(codes, layout)
    x = torch.zeros(3, 32)
    x[1, 5], x[2, 7] = float("nan"), float("-inf")
    z = kernels.products(x, records, layout, exact=False)
    assert torch.equal(z[0], torch.zeros(16))
    assert z[1:].isnan().all()
    table = torch.zeros(65536, 1)
    zero = Layout("lut", 2, "rows")
    assert not kernels.products(x[:1] + 1, kernels.expand(codes, zero, table), zero, table, exact=False).any()


def test_threads_change_nothing():
    layout = Layout("mul1", 3, "exl3")
    codes, _, _ = random_weight(layout, None, 512, 256)
    x, before = torch.randn(5, 256), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            records = kernels.expand(codes, layout)
            found.append((records, kernels.products(x, records, layout, exact=False)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_which_codes_can_be_expanded():
    codes, table = torch.zeros(16, 4, dtype=torch.int16), torch.randn(512, 2)
    assert cpu_records.can_expand(codes, 4)
    assert cpu_records.can_expand(codes, 8, table)
    assert not cpu_records.can_expand(codes, 10)
    assert not cpu_records.can_expand(codes.int(), 4)
    assert not cpu_records.can_expand(codes[:0], 4)
    assert not cpu_records.can_expand(codes.to("meta"), 4)
    for value in (30.0, float("inf"), float("nan")):
        table[3, 1] = value
        assert not cpu_records.can_expand(codes, 4, table)


def test_refused():
    layout, codes = Layout("mul1", 2, "exl3"), torch.zeros(32, 8, dtype=torch.int16)
    records = kernels.expand(codes, layout)
    assert records.shape == (2, 64 + 256 + 1024)
    with pytest.raises(ValueError, match="the library has no trellis"):
        kernels.expand(codes, Layout("4mad", 2, "rows"))
    with pytest.raises(ValueError, match="must be int16"):
        kernels.expand(codes.int(), layout)
    with pytest.raises(ValueError, match="records must be int8"):
        cpu_records.collapse(codes, 4)
    with pytest.raises(ValueError, match="records must be int8"):
        cpu_records.collapse(records[:, :-1], 4)
    with pytest.raises(ValueError, match="records are not of 32 columns"):
        kernels.products(torch.zeros(32), records, layout)
    with pytest.raises(ValueError, match="records must be int8"):
        kernels.products(torch.zeros(64), records, Layout("mul1", 4, "exl3"))
