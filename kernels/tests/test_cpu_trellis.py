"""Trellis codes in the compiled library, for every instruction set, against the reference that decodes by table."""

import pytest
import torch

from quip_kernels import cpu, cpu_library
from quip_kernels import cpu_trellis as kernels
from quip_kernels.cpu_linear import Transform
from quip_kernels.cpu_trellis import Layout
from tests.levels import processor_has
from transformers_quip.codebooks.trellis import Trellis

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the CPU library was not compiled")

LEVELS = range(len(cpu_library.LEVELS))
COMPUTED = [Layout(code, k, order) for code in kernels.CODES[:5] for k, order in ((2, "rows"), (3, "exl3"), (8, "qtip"))]
COMPUTED += [Layout(code, k, "exl3") for code in ("2mad", "mcg", "mul1") for k in (1, 4, 5, 6, 7)]
COMPUTED += [Layout("mul1", k, "exl3") for k in (1.5, 2.5, 3.5)]
TABULATED = [
    (Layout("hyb", 2, "qtip"), (512, 2)),
    (Layout("hyb", 3, "qtip"), (512, 2)),
    (Layout("hyb", 8, "rows"), (2, 1)),
    (Layout("hyb", 1, "exl3"), (32768, 2)),
    (Layout("quantlut", 4, "rows"), (1024, 2)),
    (Layout("quantlut", 5, "qtip"), (65536, 1)),
    (Layout("quantlut", 6, "exl3"), (2048, 2)),
    (Layout("quantlut", 8, "rows"), (512, 2)),
    (Layout("lut", 7, "rows"), (65536, 2)),
]
CASES = [(layout, None) for layout in COMPUTED] + TABULATED


def some_codes(m, n, k):
    generator = torch.Generator().manual_seed(m + n + int(k))
    codes = torch.randint(-(2**15), 2**15, (m, int(n // 16 * k)), generator=generator)
    return codes.to(torch.int16)


def some_table(shape, dtype=torch.float16):
    if shape is None:
        return None
    table = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    table[0, 0] = 3e-6  # not a normal float16
    return table.to(dtype)


def truth(codes, n, layout, table, dtype=torch.float32):
    stored = {"codes": codes} if table is None else {"codes": codes, "table": table}
    return Trellis(*layout, None if table is None else tuple(table.shape)).decode(stored, n, dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("layout", "shape"), CASES, ids=str)
def test_decode_is_exact(layout, shape, level):
    # n: more tiles than are converted at a time, and not a multiple of that
    m, n, table = 32, 160, some_table(shape)
    codes = some_codes(m, n, layout.k)
    weight = kernels.decode(codes, n, torch.float32, layout, table, level=processor_has(level))
    assert torch.equal(weight, truth(codes, n, layout, table))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("code", kernels.CODES[:5])
def test_every_state(code, level):
    """With 8 bits, the first state of a tile is its first word: one tile for each state."""
    codes = torch.arange(65536).to(torch.int16)[:, None].expand(65536, 128)
    some = codes[:: 1 if level == 2 else 16].reshape(-1, 8)
    weight = kernels.decode(some, 16, torch.float32, Layout(code, 8, "rows"), level=processor_has(level))
    values = Trellis(code, 8, "rows").values(None, torch.device("cpu"))
    assert torch.equal(weight.view(-1, 256)[:, 0], values[:: 1 if level == 2 else 16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layout", "shape"), [CASES[0], CASES[7], TABULATED[0]], ids=str)
def test_decode_rounds_once(layout, shape, dtype):
    codes, table = some_codes(48, 64, layout.k), some_table(shape)
    weight = kernels.decode(codes, 64, dtype, layout, table)
    assert torch.equal(weight, truth(codes, 64, layout, table, dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("code", ["hyb", "quantlut"])
def test_tables_of_every_type(code, dtype, level):
    """float32 tables need 32 bits for each number, float16 ones fit into 16; bfloat16 is either, as its range goes."""
    layout, codes = Layout(code, 2, "qtip"), some_codes(16, 32, 2)
    table = some_table((256, 2), dtype) * 1e-5
    weight = kernels.decode(codes, 32, torch.float32, layout, table, level=processor_has(level))
    assert torch.equal(weight, truth(codes, 32, layout, table))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(("layout", "shape"), CASES, ids=str)
def test_products(layout, shape, vectors, level):
    m, n, table = 48, 192, some_table(shape)
    codes = some_codes(m, n, layout.k)
    x = torch.randn(vectors, n, generator=torch.Generator().manual_seed(3))
    z = kernels.products(x, codes, layout, table, level=processor_has(level))
    weight = truth(codes, n, layout, table).double()
    size = x.double().norm(dim=1, keepdim=True) * weight.norm(dim=1)
    assert ((z.double() - x.double() @ weight.T).abs() / size).max() < 1e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer(dtype, vectors, level):
    """Everything around the products, for vectors that are not contiguous, with su, sv and bias of other types than x."""
    m, n, layout, generator = 48, 96, Layout("2mad", 2, "rows"), torch.Generator().manual_seed(4)
    codes = some_codes(m, n, 2)
    q_in, q_out = (torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0] for size in (n, m))
    su, sv, bias = torch.randn(n, generator=generator), torch.randn(m, generator=generator), torch.ones(m).half()
    x = torch.randn(vectors, n + 16, generator=generator).to(dtype)[:, 16:]
    given = (su, sv.bfloat16(), bias, Transform([q_in]), Transform([q_out]), layout)
    y = kernels.linear(x, codes, *given, level=processor_has(level))
    weight = truth(codes, n, layout, None).double()
    z = (x.double() * su.double()) @ q_in @ weight.T
    expected = z @ q_out.T * given[1].double() + bias.double()
    assert y.dtype == dtype
    accuracy = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert (y.double() - expected).norm() / expected.norm() < accuracy
    alone = kernels.linear(x, codes, None, None, None, None, None, layout)
    assert (alone.double() - x.double() @ weight.T).norm() / alone.double().norm() < accuracy


def test_layers_are_told_apart_by_their_tensors():
    """The description of a layer is kept; another tensor at another place, or of another type, makes another one."""
    layout, codes, x = Layout("1mad", 2, "rows"), some_codes(16, 32, 2), torch.ones(32)
    z = kernels.products(x, codes, layout)
    for sv in (torch.full((16,), 2.0), torch.full((16,), 3.0), torch.full((16,), 5.0).half()):
        assert torch.equal(kernels.linear(x, codes, None, sv, None, None, None, layout), z * sv.float())
        assert torch.equal(kernels.linear(x, codes, None, None, sv, None, None, layout), z + sv.float())
    assert not torch.equal(kernels.products(x, codes, layout._replace(order="qtip")), z)
    assert not torch.equal(kernels.products(x, codes, layout._replace(code="2mad")), z)


def test_products_do_not_depend_on_threads_or_on_other_vectors():
    layout, codes = Layout("mul1", 3, "exl3"), some_codes(512, 128, 3)
    x = torch.randn(5, 128)
    alone = torch.stack([kernels.products(v, codes, layout) for v in x])
    assert torch.equal(kernels.products(x, codes, layout), alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(kernels.products(x, codes, layout), alone)
    finally:
        torch.set_num_threads(threads)
    assert kernels.products(x[:0], codes, layout).shape == (0, 512)


def test_not_finite_activations_show():
    layout, codes = Layout("1mad", 2, "rows"), some_codes(16, 32, 2)
    for value in (float("nan"), float("inf")):
        x = torch.zeros(32)
        x[5] = value
        assert not kernels.products(x, codes, layout).isfinite().all()


def test_what_does_not_fit_is_refused():
    layout, codes, x = Layout("mul1", 2, "exl3"), some_codes(16, 32, 2), torch.zeros(32)
    hyb, table = Layout("hyb", 2, "qtip"), torch.zeros(512, 2)
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16 on the CPU, got torch.float64"):
        kernels.products(x.double(), codes, layout)
    with pytest.raises(ValueError, match=r"with 2 bits must be \[m, 4\], got \[16, 3\]"):
        kernels.products(x, codes[:, :3], layout)
    with pytest.raises(ValueError, match="multiples of 16"):
        kernels.decode(codes[:8], 32, torch.float32, layout)
    with pytest.raises(ValueError, match="has no trellis"):
        kernels.decode(codes, 32, torch.float32, Layout("4mad", 2, "rows"))
    with pytest.raises(ValueError, match="has no trellis"):
        kernels.decode(codes, 32, torch.float32, Layout("mcg", 2.5, "exl3"))
    with pytest.raises(ValueError, match="mul1 has no table"):
        kernels.decode(codes, 32, torch.float32, layout, table)
    with pytest.raises(ValueError, match="hyb needs a table"):
        kernels.decode(codes, 32, torch.float32, hyb)
    for wrong in (table[:500], table.double(), torch.zeros(512, 3), torch.zeros(65536, 2)):
        with pytest.raises(ValueError, match="the table of code hyb must be"):
            kernels.decode(codes, 32, torch.float32, hyb, wrong)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, not torch.float64"):
        kernels.decode(codes, 32, torch.float64, layout)
    with pytest.raises(ValueError, match=r"sv has shape \[32\], expected \[16\]"):
        kernels.linear(x, codes, x, x, None, None, None, layout)
    with pytest.raises(ValueError, match="bias must be float32, bfloat16 or float16 on the CPU, got torch.int64"):
        kernels.linear(x, codes, x, None, torch.zeros(16).long(), None, None, layout)
    with pytest.raises(ValueError, match="a transform of size 32 was given for 16 features"):
        kernels.linear(x, codes, None, None, None, None, Transform([torch.eye(32)]), layout)
    with pytest.raises(ValueError, match="a transform of size 16 was given for 32 features"):
        kernels.linear(x, codes, None, None, None, Transform([torch.eye(16)]), None, layout)
