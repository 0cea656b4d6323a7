"""Layers of many vectors of 16 bits against float64 formulas, and conditions that must not change a bit of them."""

import itertools

import pytest
import torch

from quip_kernels import cpu_library, cpu_many
from quip_kernels.cpu_linear import Transform
from tests import truth
from tests.truth import kron, random_orthogonal, relative_error, sylvester

pytestmark = pytest.mark.skipif(not cpu_many.is_available(), reason="needs the compiled CPU library and AMX")

# Inputs of the products and the result are rounded to bfloat16, each an error of about 1.7e-3; or inputs to int8, with an
# error of 0.29 units, which is 0.0023 times the largest number, and that is up to four times their usual size.
ACCURACY = 3e-3
ACCURACY_INT8 = 0.012


def signs(order):
    """An orthogonal matrix of entries of one size whose rows and columns are in no order, so that it is not Sylvester's."""
    shuffled = torch.randperm(order, generator=torch.Generator().manual_seed(order))
    matrix = sylvester(order)[shuffled][:, shuffled.flip(0)]
    matrix[:, ::3] *= -1
    return matrix


def paley(q):
    """The Hadamard matrix of order q + 1 for a prime q = 3 mod 4, over its root: I + S, S skew with the character of q."""
    square = {i * i % q for i in range(1, q)}
    character = [0 if i == 0 else 1 if i in square else -1 for i in range(q)]
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 0] = -1
    for i, j in itertools.product(range(q), repeat=2):
        matrix[1 + i, 1 + j] = character[(i - j) % q] + (i == j)
    return matrix / (q + 1) ** 0.5


def run(x, parts, factors_in, factors_out, int8=False, **second):
    q_in, q_out = (None if factors is None else Transform(factors) for factors in (factors_in, factors_out))
    m, n = len(parts["codes"]), x.shape[-1]
    vectors = x.numel() // n
    t = torch.full(cpu_many.rotated_shape(vectors, n, int8), -1, dtype=torch.int32)
    memory = torch.full((cpu_many.workspace(vectors, m, n),), torch.nan)
    layer = (parts["codes"], parts["su"], parts["sv"], parts["bias"], q_in, q_out)
    y = cpu_many.linear(x, *layer, t, False, memory, int8=int8, **second)
    again = cpu_many.linear(x, *layer, t, True, memory, int8=int8, **second)
    assert torch.equal(again.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0))
    return y


# Factors of every kind: none, Sylvester's of each remainder by four bits, signs (orders 32 to 128), other matrices of any
# order, several, and ones that act on neighbours or on few entries at a time.
FACTORS = [
    None,
    [sylvester(32)],
    [sylvester(64)],
    [sylvester(128)],
    [sylvester(256)],
    [sylvester(512)],
    [random_orthogonal(3), sylvester(32)],
    [random_orthogonal(5), sylvester(64)],
    [paley(11), sylvester(16)],
    [paley(43), sylvester(8)],
    [paley(31), sylvester(4)],
    [paley(127), sylvester(1)],
    [random_orthogonal(8), paley(31), sylvester(2)],
    [paley(31), random_orthogonal(3)],
    [random_orthogonal(7), random_orthogonal(32)],
    [signs(64), random_orthogonal(2), sylvester(4)],
    [random_orthogonal(160)],
]


@pytest.mark.parametrize(
    ("number", "vectors"), list(zip(range(len(FACTORS)), itertools.cycle([1, 16, 17, 33, 70]), strict=False))
)
@pytest.mark.parametrize("int8", [False, True])
def test_layer(number, vectors, int8):
    """Each kind of transform on the input side, the next one on the output side."""
    factors_in, factors_out = FACTORS[number], FACTORS[(number + 1) % len(FACTORS)]
    q_in, q_out = (torch.eye(96).double() if factors is None else kron(factors) for factors in (factors_in, factors_out))
    m, n = len(q_out), len(q_in)
    parts = truth.random_linear(m, n)
    x = torch.randn(vectors, n, generator=torch.Generator().manual_seed(n)).bfloat16()
    expected = (x.double() * parts["su"].double()) @ q_in @ truth.decode(parts["codes"], n).T
    expected = expected @ q_out.T * parts["sv"].double() + parts["bias"].double()
    y = run(x, parts, factors_in, factors_out, int8)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < (ACCURACY_INT8 if int8 else ACCURACY)
    # no entry differs by more than rounding: a wrong one would show
    assert (y.double() - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("number", range(1, len(FACTORS)))
def test_transforms_alone_are_exact_but_for_rounding(number):
    """Vectors of one entry times a weight of one row: rotated inputs are the columns of the transform, rounded once."""
    q = kron(FACTORS[number])
    n = len(q)
    parts = {**truth.random_linear(32, n), "su": None, "sv": None, "bias": None}
    x, transform = torch.eye(n).bfloat16(), Transform(FACTORS[number])
    t = torch.zeros(cpu_many.rotated_shape(n, n), dtype=torch.int32)
    memory = torch.empty(cpu_many.workspace(n, 32, n))
    cpu_many.linear(x, parts["codes"], None, None, None, transform, None, t, False, memory)
    found = t.view(torch.bfloat16).reshape(-1, n // 2, 16, 2).permute(0, 2, 1, 3).reshape(-1, n)
    torch.testing.assert_close(found[:n].double(), q, rtol=2**-8, atol=1e-6)
    assert not found[n:].any()


@pytest.mark.parametrize("number", range(len(FACTORS)))
def test_inputs_in_int8_are_the_nearest_ones(number):
    """Rotated inputs are rounded in units of a 127th of the largest; the rest of the tiles is zero."""
    q = torch.eye(96).double() if FACTORS[number] is None else kron(FACTORS[number])
    n = len(q)
    parts = {**truth.random_linear(32, n), "sv": None, "bias": None}
    x = torch.randn(37, n, generator=torch.Generator().manual_seed(n)).bfloat16()
    x[5] = 0
    transform = None if FACTORS[number] is None else Transform(FACTORS[number])
    t = torch.full(cpu_many.rotated_shape(37, n, True), -1, dtype=torch.int32)
    memory = torch.empty(cpu_many.workspace(37, 32, n))
    cpu_many.linear(x, parts["codes"], parts["su"], None, None, transform, None, t, False, memory, int8=True)
    assert t.shape == (4, -(-n // 64) * 16 + 1, 16)
    units = t[:, -1].contiguous().view(torch.float32).flatten().double()
    found = t[:, :-1].contiguous().view(torch.int8).reshape(4, -1, 16, 4).permute(0, 2, 1, 3).reshape(64, -1)
    expected = (x.double() * parts["su"].double()) @ q
    torch.testing.assert_close(units[:37] * 127, expected.abs().amax(1), rtol=1e-5, atol=1e-29)
    assert (found[:37, :n].double() * units[:37, None] - expected).abs().max() < 0.5001 * units.max()
    assert not found[37:].any()
    assert not found[5].any()
    assert not found[:, n:].any()


@pytest.mark.parametrize(("m", "n", "vectors"), [(32, 32, 1), (64, 96, 50), (544, 64, 40), (160, 1056, 600)])
def test_products_with_int8_are_exact(m, n, vectors):
    """Inputs that are integers, and as large as they may be, lose nothing; the result is rounded to bfloat16 alone."""
    parts = {**truth.random_linear(m, n), "su": None, "sv": None, "bias": None}
    x = torch.randint(-127, 128, (vectors, n), generator=torch.Generator().manual_seed(n)).bfloat16()
    x[:, 0] = 127
    expected = x.double() @ truth.decode(parts["codes"], n).T
    torch.testing.assert_close(run(x, parts, None, None, True).double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(("m", "n", "vectors"), [(32, 32, 1), (64, 96, 50), (544, 64, 40), (160, 1056, 600)])
@pytest.mark.parametrize("dtype", [None, torch.int16, torch.uint8])
def test_two_stages_and_shapes(m, n, vectors, dtype):
    parts = {**truth.random_linear(m, n), "su": None, "sv": None, "bias": None}
    x = torch.randn(vectors, n, generator=torch.Generator().manual_seed(n)).bfloat16()
    weight, second = truth.decode(parts["codes"], n), {}
    if dtype is not None:
        generator = torch.Generator().manual_seed(m)
        residual = torch.randint(-(2**15), 2**15, (m, n // 8), generator=generator).to(dtype)
        second = {"codes_residual": residual, "residual_scale": 0.25}
        points = truth.decode(residual, n) if dtype == torch.int16 else truth.e8_table()[residual.long()].reshape(m, n)
        weight = (weight + 0.25 * points).bfloat16().double()
    assert relative_error(run(x, parts, None, None, **second), x.double() @ weight.T) < ACCURACY


def test_views_and_leading_dimensions():
    parts = truth.random_linear(64, 96)
    x = torch.randn(6, 20, 200).bfloat16()
    expected = run(x[..., :96].contiguous(), parts, FACTORS[6], FACTORS[2])
    assert expected.shape == (6, 20, 64)
    assert torch.equal(run(x[..., :96], parts, FACTORS[6], FACTORS[2]), expected)
    assert torch.equal(run(x[:, 3, :96], parts, FACTORS[6], FACTORS[2]), expected[:, 3])
    assert torch.equal(run(x[0, :, :96].T.contiguous().T, parts, FACTORS[6], FACTORS[2]), expected[0])


def test_float16():
    """As bfloat16, but for more digits; numbers at the ends of its range are read and written as they are."""
    parts = truth.random_linear(64, 96)
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(2)).half()
    q_in, q_out = kron(FACTORS[6]), kron(FACTORS[2])
    expected = (x.double() * parts["su"].double()) @ q_in @ truth.decode(parts["codes"], 96).T
    expected = expected @ q_out.T * parts["sv"].double() + parts["bias"].double()
    y = run(x, parts, FACTORS[6], FACTORS[2], True)
    assert y.dtype == torch.float16
    assert relative_error(y, expected) < ACCURACY_INT8
    alone = {**truth.random_linear(32, 32), "su": None, "sv": None, "bias": None}
    weight = truth.decode(alone["codes"], 32)
    for power in (-20, 9):  # below the normal numbers of float16, and up to its largest and above
        x = torch.eye(32).half() * 2.0**power * 127
        expected = (x.double() @ weight.T).half()
        torch.testing.assert_close(run(x, alone, None, None, True), expected, rtol=2**-10, atol=2**-24)
    x = torch.full((1, 32), 65504.0).half()
    assert run(x, {**alone, "codes": torch.zeros_like(alone["codes"])}, None, None, True).isinf().all()


@pytest.mark.parametrize("int8", [False, True])
def test_neither_threads_nor_other_vectors_change_a_bit(int8):
    parts = truth.random_linear(576, 192)
    factors = [[random_orthogonal(3), sylvester(64)], [random_orthogonal(9), sylvester(64)]]
    x = torch.randn(600, 192).bfloat16()
    expected = run(x, parts, *factors, int8)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(run(x, parts, *factors, int8), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(run(x[37:60], parts, *factors, int8), expected[37:60])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_give_nan_for_their_vector_alone(value, int8):
    parts = truth.random_linear(64, 96)
    x = torch.randn(40, 96).bfloat16()
    expected = run(x, parts, FACTORS[6], FACTORS[2], int8)
    x[18, 50] = value
    y = run(x, parts, FACTORS[6], FACTORS[2], int8)
    others = torch.arange(40) != 18
    assert y[18].isnan().all()
    assert torch.equal(y[others], expected[others])


def test_dense_layers_go_on_working_between():
    """Tiles are configured and given back: PyTorch, which uses them too, finds them as it left them."""
    parts = truth.random_linear(64, 96)
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(128, 96).bfloat16()
    expected = torch.nn.functional.linear(x, weight), run(x, parts, None, None)
    for _ in range(3):
        assert torch.equal(torch.nn.functional.linear(x, weight), expected[0])
        assert torch.equal(run(x, parts, None, None), expected[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(40, 96)}, "x must be bfloat16"),
        ({"x": torch.zeros(40, 96).half()}, "x must be bfloat16, or float16 with int8, .* got torch.float16"),
        ({"x": torch.zeros(40, 80).bfloat16()}, "codes for 80 inputs"),
        ({"codes": torch.zeros(40, 12, dtype=torch.int16), "sv": None, "bias": None}, "multiples of 32, got .* 96 and 40"),
        ({"su": torch.zeros(95)}, r"su has shape \[95\]"),
        ({"transform_out": Transform([torch.ones(1, 1)])}, "a transform of size 1 was given for 64"),
        ({"rotated": torch.zeros(2, 48, 16, dtype=torch.int32)}, r"rotated must be contiguous torch.int32 \[4, 48, 16\]"),
        ({"memory": torch.zeros(7)}, "memory must be contiguous torch.float32"),
        ({"codes_residual": torch.zeros(64, 12)}, "codes_residual must be int16"),
        ({"codes_residual": torch.zeros(64, 12).short(), "int8": True}, "codes of one stage"),
        ({"int8": True}, r"rotated must be contiguous torch.int32 \[4, 33, 16\]"),
    ],
)
def test_refused(change, said):
    given = {
        **truth.random_linear(64, 96),
        "x": torch.zeros(40, 96).bfloat16(),
        "transform_in": None,
        "transform_out": None,
    }
    given |= {"rotated": torch.zeros(cpu_many.rotated_shape(40, 96), dtype=torch.int32), "is_rotated": False}
    with pytest.raises(ValueError, match=said):
        cpu_many.linear(**{**given, "memory": torch.zeros(cpu_many.workspace(40, 64, 96)), **change})


def test_another_level_is_without_it(monkeypatch):
    monkeypatch.setattr(cpu_many, "default_level", lambda: cpu_library.LEVELS.index("avx2"))
    assert not cpu_many.is_available()
    parts, t = truth.random_linear(64, 96), torch.zeros(cpu_many.rotated_shape(40, 96), dtype=torch.int32)
    memory = torch.zeros(cpu_many.workspace(40, 64, 96))
    with pytest.raises(ValueError, match="a processor with AMX"):
        cpu_many.linear(torch.zeros(40, 96).bfloat16(), *parts.values(), None, None, t, False, memory)
