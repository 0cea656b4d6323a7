"""The Triton kernels and the ops made of them against float64, in Triton's interpreter. Run by test_gpu_interpreted.py."""

from __future__ import annotations

import pytest
import torch

from quip_kernels import e8p, layout
from quip_kernels.gpu import dequantize, launch, matvec, quantize, small_batch, transform
from tests import truth
from tests.no_sync import forbidden_synchronisation
from transformers_quip import incoherence, set_activations
from transformers_quip.ops import backend
from transformers_quip.ops.bundle import Form, described
from transformers_quip.ops.triton import run as ops

if not launch.interpreted():
    raise RuntimeError("run test_gpu_interpreted.py, which starts these tests with Triton's interpreter")


@pytest.fixture(autouse=True)
def kernels_are_asked_for():
    """`set_backend("triton")` would miss the GPU; here the kernels compute on the CPU."""
    with backend.overridden(devices={"cpu": "triton"}):
        yield


DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def relative(value, expected):
    return float((value.double() - expected).norm() / expected.norm())


def vectors(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("m", "n", "dtype"), list(zip((3, 20, 17), (8, 100, 520), DTYPES, strict=True)))
def test_dequantize_is_exact(m, n, dtype):
    codes = truth.random_linear(m, n)["codes"]
    weight = dequantize.dequantize(e8p.pack(codes), n, dtype)
    assert weight.dtype == dtype
    assert torch.equal(weight.double(), truth.decode(codes, n))


@pytest.mark.slow
def test_dequantize_of_every_code():
    codes = torch.arange(65536).to(torch.int16).view(256, 256)
    assert torch.equal(dequantize.dequantize(e8p.pack(codes), 2048, torch.float16).double(), truth.decode(codes, 2048))


@pytest.mark.parametrize(("m", "n", "second"), [(3, 8, torch.uint8), (20, 140, torch.int16)])
def test_dequantize_of_two_stages_is_rounded_once(m, n, second):
    codes, residual = truth.random_linear(m, n)["codes"], truth.random_residual(m, n, second)
    expected = truth.decode(codes, n) + 0.25 * truth.decode_residual(residual, n)  # exact in float32
    planes = layout.pack(codes), layout.pack(residual)
    for dtype in DTYPES:
        weight = dequantize.dequantize(planes[0], n, dtype, planes[1], 0.25)
        assert torch.equal(weight, expected.to(dtype))


@pytest.mark.parametrize(("digits", "columns"), [(1, 64), (2, 5), (2, 300), (3, 300)])
def test_digits_are_the_nearest_integers(columns, digits):
    x = vectors(3, columns) * torch.tensor([[1e-6], [1.0], [1e6]])
    result = quantize.quantize(x, digits)
    limit = {1: 127, 2: 32639, 3: 8355000}[digits]
    torch.testing.assert_close(result.scales, x.abs().amax(1) / limit)
    # bytes b of [m, d, g, w] is digit d of x[m, 32w + 4g + b]
    parts = result.bytes.view(torch.int8).view(3, digits, 8, -1, 4).permute(0, 1, 3, 2, 4).reshape(3, digits, -1).long()
    assert not parts[..., columns:].any()
    assert torch.equal(parts.sum(2), result.sums.long())
    integers = sum(parts[:, d, :columns] * 256**d for d in range(digits))
    # half a step, and the rounding of x/scale in float32
    assert ((integers * result.scales.double()[:, None] - x).abs() <= result.scales[:, None] * (0.5 + limit * 2**-23)).all()


def test_digits_of_zero_and_of_what_is_not_finite():
    x = vectors(3, 64)
    x[0] = 0
    x[1, 5] = float("nan")
    x[2, 63] = float("inf")
    result = quantize.quantize(x, 2)
    assert not result.bytes[0].any()
    assert result.scales[0] == 0
    assert result.scales[1:].isnan().all()


@pytest.mark.parametrize(
    ("m", "n", "batch", "digits", "gather"),
    [(3, 8, 1, 1, False), (33, 136, 1, 2, True), (33, 136, 2, 3, False), (17, 100, 5, 2, False), (17, 100, 3, 3, True)],
)
def test_matvec(m, n, batch, digits, gather):
    codes, x = truth.random_linear(m, n)["codes"], vectors(batch, n)
    quantized = quantize.quantize(x, digits)
    y = matvec.matvec(quantized, e8p.pack(codes), n, gather=gather)
    assert y.dtype == torch.float32
    weight = truth.decode(codes, n)
    # every x was moved by half a step at most (and by the rounding of float32), the sums are exact
    bound = (quantized.scales[:, None] / 2 + x.abs().amax(1, keepdim=True) * 2**-22) * weight.abs().sum(1)
    assert ((y.sum(0) - x.double() @ weight.T).abs() <= bound).all()


@pytest.mark.parametrize(("second", "gather"), [(torch.uint8, True), (torch.uint8, False), (torch.int16, False)])
def test_matvec_of_two_stages(second, gather):
    codes, residual = truth.random_linear(33, 264)["codes"], truth.random_residual(33, 264, second)
    x = torch.randint(-32639, 32640, (2, 264), generator=torch.Generator().manual_seed(2)).float()
    x[:, 0] = 32639  # integers that the digits represent exactly
    planes = layout.pack(codes), layout.pack(residual)
    y = matvec.matvec(quantize.quantize(x, 2), planes[0], 264, planes[1], -0.3, gather)
    weight = truth.decode(codes, 264) - 0.3 * truth.decode_residual(residual, 264)
    assert relative(y.sum(0), x.double() @ weight.T) < 3e-7


def test_every_tile_computes_the_same(monkeypatch):
    codes, x = truth.random_linear(20, 264)["codes"], vectors(1, 264)
    expected = x.double() @ truth.decode(codes, 264).T
    candidates = matvec.tiles(1, 2, "cuda")
    assert len(candidates) > 2
    for tile in candidates:
        monkeypatch.setattr(matvec, "tiles", lambda *_, tile=tile: [tile])
        y = matvec.matvec(quantize.quantize(x, 2), e8p.pack(codes), 264)
        assert relative(y.sum(0), expected) < 5e-5


def test_matvec_in_parts_with_a_short_last_one(monkeypatch):
    monkeypatch.setattr(matvec, "processors", lambda device: 1)
    codes = truth.random_linear(5, 9000)["codes"]
    y = matvec.matvec(quantize.quantize(vectors(1, 9000), 2), e8p.pack(codes), 9000)
    assert y.shape == (3, 1, 5)
    assert relative(y.sum(0), vectors(1, 9000).double() @ truth.decode(codes, 9000).T) < 5e-5


def test_matvec_is_exact_in_integers():
    """Integers that the digits represent exactly: nothing may be lost."""
    codes = truth.random_linear(33, 256)["codes"]
    x = torch.randint(-32639, 32640, (1, 256), generator=torch.Generator().manual_seed(2)).float()
    x[0, 0] = 32639
    y = matvec.matvec(quantize.quantize(x, 2), e8p.pack(codes), 256)
    torch.testing.assert_close(y[0].double(), x.double() @ truth.decode(codes, 256).T, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("m", "n", "batch", "terms", "gather"),
    [(3, 8, 1, 1, False), (70, 100, 9, 2, True), (65, 1200, 17, 1, True), (5, 136, 64, 2, False)],
)
def test_small_batch(m, n, batch, terms, gather):
    codes = truth.random_linear(m, n)["codes"]
    x = vectors(batch, n) * 1e5  # beyond float16
    y = small_batch.small_batch(small_batch.halves(x, terms), e8p.pack(codes), n, gather=gather)
    assert relative(y.sum(0), x.double() @ truth.decode(codes, n).T) < (1e-3 if terms == 1 else 1e-6)


@pytest.mark.parametrize("second", [torch.uint8, torch.int16])
def test_small_batch_of_two_stages(second):
    codes, residual = truth.random_linear(70, 300)["codes"], truth.random_residual(70, 300, second)
    x, planes = vectors(9, 300), (layout.pack(codes), layout.pack(residual))
    y = small_batch.small_batch(small_batch.halves(x, 2), planes[0], 300, planes[1], 0.3)
    weight = truth.decode(codes, 300) + 0.3 * truth.decode_residual(residual, 300)
    assert relative(y.sum(0), x.double() @ weight.T) < 1e-6


SIZES = [1, 2, 7, 12, 16, 64, 100, 128, 258, 512, 576, 1536, 4096]


# Sylvester's matrices are symmetric
@pytest.mark.parametrize(("size", "transpose"), [*((size, size % 3 > 0) for size in SIZES), (12, True), (100, False)])
def test_transform(size, transpose):
    q = incoherence.get("hadamard", size, 3)
    plan = transform.make_plan(size, q.dense_factors, torch.device("cpu"))
    parts, row_scale = torch.stack([vectors(2, size, 1), vectors(2, size, 2)]), torch.tensor([0.5, 3.0])
    pre, post, bias = vectors(3, size, 4)
    y = transform.transform(parts, plan, transpose, torch.float32, pre=pre, row_scale=row_scale, post=post, bias=bias)
    scaled = parts.double().sum(0) * pre * row_scale[:, None]
    expected = (q.apply_transpose if transpose else q.apply)(scaled) * post + bias
    assert relative(y, expected) < 5e-7


@pytest.mark.parametrize(("size", "dtype"), [(96, torch.float16), (96, torch.bfloat16), (1024, torch.float16)])
def test_transform_rounds_once(size, dtype):
    q = incoherence.get("hadamard", size, 0)
    plan = transform.make_plan(size, q.dense_factors, torch.device("cpu"))
    x = vectors(2, size).to(dtype)
    y = transform.transform(x, plan, False, dtype)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() @ q.matrix().T, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("size", [256, 2048])
def test_fused_quantization_is_that_of_the_transform(size):
    q = incoherence.get("hadamard", size, 0)
    plan = transform.make_plan(size, q.dense_factors, torch.device("cpu"))
    su, x = vectors(2, size, 5)
    fused = transform.transform_quantize(x[None], plan, su, 2)
    apart = quantize.quantize(q.apply_transpose((su * x).double()[None]).float(), 2)
    torch.testing.assert_close(fused.scales, apart.scales, rtol=1e-6, atol=0)
    digits = [part.bytes.view(torch.int8).view(2, 8, -1, 4).long() for part in (fused, apart)]
    integers = [part[0] + 256 * part[1] for part in digits]
    assert (integers[0] - integers[1]).abs().max() <= 1
    assert torch.equal(digits[0].flatten(1).sum(1), fused.sums[0].long())


def arguments(m, n, batch, dtype, bias=True, codebook="e8p"):
    parts = truth.random_linear(m, n, dtype=dtype, codebook=codebook)
    return [
        vectors(batch, n, 9).to(dtype) / 16,
        truth.weight(parts),
        parts["su"],
        parts["sv"],
        parts["bias"] if bias else None,
        codebook,
        "hadamard",
        "hadamard",
        0,
    ]


def expected(x, weight, su, sv, bias, codebook, name_in, name_out, seed):
    q_in, q_out = (incoherence.get(*side, seed).matrix() for side in ((name_in, len(su)), (name_out, len(sv))))
    weight = truth.decode(**dict(zip(truth.STORED, weight, strict=False)), columns=len(su), codebook=codebook)
    weight = sv.double()[:, None] * (q_out @ weight @ q_in.T) * su.double()
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize(
    ("m", "n", "batch", "dtype"),
    [
        *((96, 100, batch, dtype) for batch, dtype in zip((1, 4, 5), DTYPES, strict=True)),
        *((7, 258, batch, dtype) for batch, dtype in zip((2, 9, 65), reversed(DTYPES), strict=True)),
        (7, 258, 65, torch.float32),
        (7, 258, 1, torch.float32),
    ],
)
def test_linear(m, n, batch, dtype):
    args = arguments(m, n, batch, dtype)
    y = ops.linear(*args)
    assert y.dtype == dtype
    error = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative(y, expected(*args)) < error


@pytest.mark.parametrize(
    ("codebook", "m", "n", "batch", "dtype"),
    [
        ("e8p-rvq3", 24, 100, 1, torch.float16),
        ("e8p-rvq3", 7, 44, 5, torch.float32),
        ("e8p-rvq3", 24, 100, 65, torch.bfloat16),
        ("e8p-rvq4", 7, 44, 2, torch.bfloat16),
        ("e8p-rvq4@0.2", 24, 100, 9, torch.float16),
        ("e8p-rvq4", 24, 100, 65, torch.float32),
    ],
)
def test_linear_of_two_stages(codebook, m, n, batch, dtype):
    args = arguments(m, n, batch, dtype, True, codebook)
    wanted, codes = expected(*args), args[1]
    args[1] = [layout.pack(stage) for stage in codes]
    assert relative(ops.linear(*args), wanted) < {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    weight = ops.decode(args[1], codebook, m, n - 3, torch.float32)
    assert relative(weight, truth.decode(codes[0], n - 3, codebook, codes[1])) < 1e-7


@pytest.mark.parametrize(("codebook", "batch"), [("e8p", 3), ("e8p-rvq3", 1), ("e8p-rvq4", 1)])
def test_linear_takes_either_layout_other_strides_and_any_leading_dimensions(codebook, batch):
    args = arguments(24, 64, 2 * batch, torch.float32, False, codebook)
    x = args[0].view(2, batch, 64)
    wanted = expected(*args).view(2, batch, 24).float()
    args[0] = x
    torch.testing.assert_close(ops.linear(*args), wanted, rtol=1e-5, atol=1e-5)
    args[1] = [layout.pack(codes) for codes in args[1]]
    wide = torch.empty(batch, 2, 128)[..., ::2].transpose(0, 1).copy_(x)
    assert not wide.is_contiguous()
    torch.testing.assert_close(ops.linear(wide, *args[1:]), wanted, rtol=1e-5, atol=1e-5)
    assert ops.linear(x[:, :0], *args[1:]).shape == (2, 0, 24)
    assert ops.linear(x[0, 0], *args[1:]).shape == (24,)


@pytest.mark.parametrize("batch", [1, 5])
def test_bundle_rotates_once_for_equal_su(batch, monkeypatch):
    parts = [arguments(m, 64, batch, torch.float32, False) for m in (24, 8)]
    parts[1][2] = parts[0][2]
    x, rotated, original = parts[0][0], [], ops.rotate
    monkeypatch.setattr(ops, "rotate", lambda *a: rotated.append(1) or original(*a))
    linears = described([Form("e8p", "hadamard", "hadamard", 0)] * 2)
    y = ops.bundle(x, [part[1][0] for part in parts], [parts[0][2]] * 2, [part[3] for part in parts], linears)
    assert relative(y, torch.cat([expected(x, *part[1:]) for part in parts], -1)) < 2e-6
    assert len(rotated) == 1


@pytest.mark.parametrize("codebook", ["e8p", "e8p-rvq3", "trellis:mul1:k2:exl3"])
def test_linear_makes_the_host_wait_for_nothing(codebook):
    """So a CUDA graph can hold it: every way, with packed codes."""
    args = arguments(32, 96, 65, torch.float16, True, codebook)
    if codebook.startswith("e8p"):
        args[1] = [layout.pack(codes) for codes in args[1]]
    for batch in (1, 5, 65):
        wanted = ops.linear(args[0][:batch], *args[1:])  # makes the tables
        with forbidden_synchronisation():
            found = ops.linear(args[0][:batch], *args[1:])
        assert torch.equal(found, wanted)


def test_linear_with_int8_activations():
    args = arguments(48, 512, 1, torch.float32)
    set_activations("int8")
    try:
        assert 1e-3 < relative(ops.linear(*args), expected(*args)) < 2e-2
    finally:
        set_activations("exact")


@pytest.mark.parametrize("name", ["none", "hadamard"])
@pytest.mark.parametrize("size", [257, 40])  # 257 is a transform without matrices
def test_linear_where_kernels_do_not_reach(size, name):
    args = arguments(size, 16, 2, torch.float32)
    args[6] = name
    assert relative(ops.linear(*args), expected(*args)) < 2e-6
    args[0], wanted = args[0].double(), expected(*args)
    args[1] = [e8p.pack(args[1][0])]
    assert relative(ops.linear(*args), wanted) < 1e-12


def test_decode_of_either_layout():
    codes = truth.random_linear(9, 40)["codes"]
    for dtype in (*DTYPES, torch.float64):
        for either in (codes, e8p.pack(codes)):
            assert torch.equal(ops.decode([either], "e8p", 9, 37, dtype).double(), truth.decode(codes, 37))


def test_transform_op():
    x = vectors(6, 96).view(2, 3, 96)
    y = ops.transform(x.transpose(0, 1), "hadamard", 0, True)
    assert relative(y, x.transpose(0, 1).double() @ truth.hadamard(96)) < 5e-7


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(("m", "n"), [(576, 1536), (14336, 512), (1024, 4096), (128, 14336), (64, 16384)])
def test_linear_at_the_shapes_of_models(m, n, batch):
    args = arguments(m, n, batch, torch.bfloat16)
    y = ops.linear(*args)
    weight = truth.decode(*args[1], n)
    inner = incoherence.get("hadamard", n, 0).apply_transpose(args[0].double() * args[2].double())
    y_true = incoherence.get("hadamard", m, 0).apply(inner @ weight.T) * args[3].double() + args[4].double()
    assert relative(y, y_true) < 4e-3
