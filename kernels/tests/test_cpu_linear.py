"""The compiled linear layer, its transforms and its decoder against float64 formulas, for every instruction set."""

import os
import subprocess
import sys

import pytest
import torch

from quip_kernels import cpu, cpu_library
from quip_kernels import cpu_linear as kernels
from tests import truth
from tests.levels import processor_has
from tests.truth import kron, random_orthogonal, relative_error, sylvester

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the CPU library was not compiled")

LEVELS = range(len(cpu_library.LEVELS))
# rows, columns: single ones, incomplete codes, incomplete groups of 4 and 8 codes, tiles of 16 rows and less, long rows
SHAPES = [(1, 1), (3, 7), (16, 8), (15, 9), (17, 31), (16, 64), (33, 72), (5, 520), (48, 576), (31, 1000), (2, 4099)]
# Relative to the size of the output; two and one planes round activations to 15 and 7 bits and a sign.
ACCURACY = {3: 1e-6, 2: 1e-4, 1: 2e-2}


def some_factors(size):
    """An odd factor and a power of two, as sizes of models are."""
    power = size & -size
    return [random_orthogonal(size // power)] * (size > power) + [sylvester(power)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("planes", [3, 2, 1])
@pytest.mark.parametrize("vectors", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_products(m, n, vectors, planes, level):
    codes = truth.random_linear(m, n, seed=m + n)["codes"]
    x = torch.randn(vectors, n, generator=torch.Generator().manual_seed(n))
    y = kernels.linear(x, codes, None, None, None, None, None, planes, level=processor_has(level))
    expected = x.double() @ truth.decode(codes, n).T
    # a single row may cancel: the error is judged against the sizes that were summed
    size = x.double().norm(dim=1, keepdim=True) * truth.decode(codes, n).norm(dim=1)
    assert ((y.double() - expected).abs() / size).max() < ACCURACY[planes]


@pytest.mark.parametrize("level", LEVELS)
def test_products_with_all_codes_and_every_coordinate(level):
    """Unit vectors read the decoded weight itself: all 65536 codes, all eight coordinates."""
    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16).reshape(4096, 16)
    columns = kernels.linear(torch.eye(128), codes, None, None, None, None, None, level=processor_has(level))
    torch.testing.assert_close(columns.T.double(), truth.decode(codes, 128), rtol=3e-7, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_and_batch_sizes_agree_to_the_bit(level):
    """Products are sums of integers: neither the instructions nor the other vectors of a call change them."""
    codes = truth.random_linear(50, 300)["codes"]
    x = torch.randn(7, 300)
    for planes in kernels.PLANES:
        y = kernels.linear(x, codes, None, None, None, None, None, planes, level=processor_has(level))
        assert torch.equal(y, kernels.linear(x, codes, None, None, None, None, None, planes, level=0))
        for i in range(7):
            assert torch.equal(y[i], kernels.linear(x[i], codes, None, None, None, None, None, planes, level=level))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12, 16, 24, 32, 40, 64, 96, 100, 128, 176, 512, 576, 2048])
@pytest.mark.parametrize("transpose", [False, True])
def test_transform_is_the_kronecker_product(n, transpose):
    factors = some_factors(n)
    q = kron(factors)
    x = torch.randn(2, 3, n)
    y = kernels.transform(x, kernels.Transform(factors), transpose)
    assert y.shape == x.shape
    assert relative_error(y, x.double() @ (q if transpose else q.T)) < 1e-6


@pytest.mark.parametrize("orders", [(5, 7), (3, 16, 2), (2, 3, 8), (4, 25, 3), (60, 20), (1,)])
def test_transform_of_several_dense_factors(orders):
    factors = [random_orthogonal(order, i) for i, order in enumerate(orders)]
    q = kron(factors)
    x = torch.randn(4, q.shape[0])
    before, after, bias = torch.randn(3, q.shape[0])
    y = kernels.transform(x, kernels.Transform(factors), False, before, after, bias)
    expected = (x.double() * before.double()) @ q.T * after.double() + bias.double()
    assert relative_error(y, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("m", "n"), [(12, 64), (64, 12), (7, 24), (96, 100), (1, 5), (36, 17)])
def test_layer(m, n, level, dtype):
    parts = truth.random_linear(m, n)
    codes, su, sv, bias = parts["codes"], *(parts[name].to(dtype) for name in ("su", "sv", "bias"))
    q_in, q_out = some_factors(n), some_factors(m)
    x = torch.randn(2, 3, n).to(dtype)
    arguments = (x, codes, su, sv, bias, kernels.Transform(q_in), kernels.Transform(q_out))
    weight = sv.double()[:, None] * (kron(q_out) @ truth.decode(codes, n) @ kron(q_in).T) * su.double()
    expected = x.double() @ weight.T + bias.double()
    y = kernels.linear(*arguments, dtype=torch.float32, level=processor_has(level))
    assert y.shape == (2, 3, m)
    assert relative_error(y, expected) < 2e-6
    rounded = kernels.linear(*arguments, level=level)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, y.to(dtype))
    without_bias = kernels.linear(*arguments[:4], None, *arguments[5:], dtype=torch.float32, level=level)
    assert relative_error(without_bias, expected - bias.double()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_pytorch_s(dtype):
    """All 16-bit patterns in; out, values on, between and beyond them."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    identity = kernels.Transform([torch.ones(1, 1)])
    given = kernels.transform(every[:, None], identity, dtype=torch.float32)[:, 0]
    assert torch.equal(given.nan_to_num(nan=-1.5), every.float().nan_to_num(nan=-1.5))
    assert torch.equal(given.isnan(), every.isnan())
    finite = every.float()[every.isfinite()].unique()
    between = torch.cat([(finite[1:] + finite[:-1]) / 2, finite * 1.0001, finite * 0.9999, torch.tensor([1e38, -7e4])])
    rounded = kernels.transform(between[:, None], identity, dtype=dtype)[:, 0]
    assert torch.equal(rounded.float(), between.to(dtype).float())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("columns", [1, 8, 17, 32, 40, 75, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode(columns, dtype, level):
    codes = truth.random_linear(37, columns)["codes"]
    weight = kernels.decode(codes, columns, dtype, processor_has(level))
    assert weight.dtype == dtype
    assert torch.equal(weight.double(), truth.decode(codes, columns))


@pytest.mark.parametrize("level", LEVELS)
def test_decode_of_every_code(level):
    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16).reshape(256, 256)
    weight = kernels.decode(codes, 2048, torch.float32, processor_has(level))
    assert torch.equal(weight.double().reshape(65536, 8), truth.e8p_table())


def layer(m=40, n=96, **changes):
    parts = {**truth.random_linear(m, n), **changes}
    q_in, q_out = kernels.Transform(some_factors(n)), kernels.Transform(some_factors(m))
    return lambda x, **options: kernels.linear(
        x, parts["codes"], parts["su"], parts["sv"], parts["bias"], q_in, q_out, **options
    )


def test_views_and_leading_dimensions():
    run = layer()
    x = torch.randn(6, 192)
    expected = run(x[:, :96].contiguous())
    assert torch.equal(run(x[:, :96]), expected)
    assert torch.equal(run(x[:, :96].T.contiguous().T), expected)
    assert torch.equal(run(x[:, :96].reshape(2, 3, 96)), expected.reshape(2, 3, 40))
    assert torch.equal(run(x[0, :96]), expected[0])
    assert torch.equal(run(x[::2, :96]), expected[::2])
    assert torch.equal(run(x[:1, :96].expand(4, 96)), expected[:1].expand(4, 40))
    wide = torch.randint(-(2**15), 2**15, (40, 24)).to(torch.int16)
    assert torch.equal(layer(codes=wide[:, ::2])(x[:, :96]), layer(codes=wide[:, ::2].contiguous())(x[:, :96]))


def test_no_vectors():
    assert layer()(torch.randn(2, 0, 96)).shape == (2, 0, 40)


@pytest.mark.parametrize("planes", kernels.PLANES)
def test_zero_and_extreme_vectors(planes):
    """A vector has a scale of its own: no size of one overflows, or disturbs another."""
    run = layer(bias=torch.zeros(40))
    x = torch.randn(1, 96)
    y = run(x, planes=planes)
    sizes = torch.tensor([0.0, 1e-25, 1.0, 1e30])[:, None]
    many = run(sizes * x, planes=planes)
    assert torch.equal(many[0], torch.zeros(40))
    for i in range(1, 4):
        assert relative_error(many[i], sizes[i].double() * y[0].double()) < ACCURACY[planes]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_give_nan_for_their_vector_alone(value):
    x = torch.randn(3, 96)
    expected = layer()(x)
    x[1, 50] = value
    y = layer()(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("vectors", [1, 9])
def test_threads_do_not_change_a_bit(vectors):
    run = layer(m=2000, n=512)
    x = torch.randn(vectors, 512)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(run(x))
            results.append(run(x, planes=1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[i], results[i % 2]) for i in range(len(results)))


SCRIPT = """
import torch
from quip_kernels import cpu_library, cpu_linear
if {own}: cpu_library.library().quip_share_threads(None)
torch.set_num_threads(4)
codes = torch.randint(-2**15, 2**15, (4096, 256), generator=torch.Generator().manual_seed(0)).to(torch.int16)
x = torch.randn(1, 2048, generator=torch.Generator().manual_seed(1))
y = cpu_linear.linear(x, codes, None, None, None, None, None)
print(cpu_library.LEVELS[cpu_library.default_level()], y.double().sum().item())
"""


def in_new_process(own=False, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(own=own)], env=environment, capture_output=True, text=True, check=False
    )


def test_threads_of_its_own_and_levels_by_the_environment():
    """Without PyTorch's OpenMP the library makes threads; every way gives the same integers."""
    best = cpu_library.library().quip_cpu_level()
    runs = [in_new_process(own=True)]
    runs += [in_new_process(**{cpu_library.LEVEL_VARIABLE: level}) for level in cpu_library.LEVELS[: best + 1]]
    outputs = [run.stdout.split() for run in runs]
    # the first run reads the level of the process that the tests run in
    expected = cpu_library.LEVELS[cpu_library.default_level()]
    assert [level for level, _ in outputs] == [expected, *cpu_library.LEVELS[: best + 1]]
    assert len({total for _, total in outputs}) == 1


def test_an_unknown_level_is_an_error():
    run = in_new_process(**{cpu_library.LEVEL_VARIABLE: "mmx"})
    assert run.returncode != 0
    assert "QUIP_KERNELS_CPU_LEVEL='mmx' must be one of plain" in run.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(2, 80)}, "codes for 80 inputs must be int16"),
        ({"x": torch.zeros(2, 95)}, r"su has shape \[96\], expected \[95\]"),
        ({"x": torch.zeros(2, 96, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
        ({"codes": torch.zeros(40, 12, dtype=torch.int32)}, "got torch.int32"),
        ({"codes": torch.zeros(0, 12, dtype=torch.int16)}, "must be int16"),
        ({"su": torch.zeros(95)}, r"su has shape \[95\], expected \[96\]"),
        ({"sv": torch.zeros(40, dtype=torch.float64)}, "sv must be float32"),
        ({"bias": torch.zeros(1)}, r"bias has shape \[1\]"),
        ({"transform_in": kernels.Transform([torch.ones(1, 1)])}, "a transform of size 1 was given for 96"),
        ({"transform_out": kernels.Transform([torch.ones(1, 1)])}, "a transform of size 1 was given for 40"),
        ({"planes": 4}, "planes=4"),
    ],
)
def test_refused(change, said):
    parts = {**truth.random_linear(40, 96), "x": torch.zeros(2, 96), "transform_in": None, "transform_out": None}
    with pytest.raises(ValueError, match=said):
        kernels.linear(**{**parts, **change})


def test_refused_by_the_others():
    with pytest.raises(ValueError, match=r"expected \[..., 1\]"):
        kernels.transform(torch.zeros(2, 2), kernels.Transform([torch.ones(1, 1)]))
    with pytest.raises(ValueError, match="codes for 17 inputs"):
        kernels.decode(torch.zeros(2, 2, dtype=torch.int16), 17, torch.float32)
    with pytest.raises(ValueError, match="the weight must be"):
        kernels.decode(torch.zeros(2, 2, dtype=torch.int16), 16, torch.float64)
    with pytest.raises(ValueError, match="9 dense factors"):
        kernels.Transform([random_orthogonal(3)] * 9)
