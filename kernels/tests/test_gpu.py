"""The Triton kernels on a device, against the reference in float64 on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from quip_kernels import e8p, layout
from tests import truth
from tests.rehearsal import sized
from transformers_quip import QuipLinear, codebooks, incoherence, set_activations
from transformers_quip.ops import backend
from transformers_quip.ops.same_input import SameInput
from transformers_quip.ops.triton import run as ops

pytestmark = pytest.mark.gpu

SHAPES = [(96, 100), (8, 8), (576, 1536), (4096, 4096), (1024, 14336), (14336, 4096), (516, 4048), (64, 16384)]
BATCHES = sized([1, 2, 3, 4, 5, 8, 16, 33, 64, 65, 300], [1, 5, 65])
LARGE, LONG = sized((1024, 4096), (24, 576)), sized((333, 1056), (40, 136))
# the interpreter cuts numbers to bfloat16 instead of rounding them
ERROR = {torch.float32: 3e-6, torch.float16: 8e-4, torch.bfloat16: sized(4e-3, 8e-3)}


def relative(value, expected):
    return float((value.double().cpu() - expected).norm() / expected.norm())


def arguments(m, n, batch, dtype, device, bias=True, codebook="e8p"):
    parts = {name: part.to(device) for name, part in truth.random_linear(m, n, dtype=dtype, codebook=codebook).items()}
    return [
        torch.randn(batch, n, generator=torch.Generator().manual_seed(9)).to(dtype).to(device) / 16,
        truth.weight(parts),
        parts["su"],
        parts["sv"],
        parts["bias"] if bias else None,
        codebook,
        "hadamard",
        "hadamard",
        0,
    ]


def expected(x, stored, su, sv, bias, codebook, name, _, seed, weight=None):
    """In float64: transforms on the CPU, the product on the device, by its library. weight: decoded already."""
    device, x, su, sv = x.device, x.double().cpu(), su.double().cpu(), sv.double().cpu()
    q_in, q_out = (incoherence.get(name, len(v), seed) for v in (su, sv))
    if weight is None:
        tensors = dict(zip(truth.STORED, (tensor.cpu() for tensor in stored), strict=False))
        weight = truth.decode(**tensors, columns=len(su), codebook=codebook)
    y = q_out.apply((q_in.apply_transpose(x * su).to(device) @ weight.to(device).T).cpu()) * sv
    return y if bias is None else y + bias.double().cpu()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_linear(m, n, device):
    codes = truth.random_linear(m, n)["codes"]
    weight, planes = truth.decode(codes, n).to(device), e8p.pack(codes).to(device)
    for dtype in ERROR:
        args = arguments(m, n, max(BATCHES), dtype, device)
        assert torch.equal(args[1][0].cpu(), codes)
        wanted = expected(*args, weight=weight)
        args[1] = [planes]
        for batch in BATCHES:
            y = torch.ops.quip.linear(args[0][:batch], *args[1:])
            assert y.dtype == dtype
            assert relative(y, wanted[:batch]) < ERROR[dtype], (batch, dtype)


@pytest.mark.parametrize("codebook", ["e8p-rvq3", "e8p-rvq4"])
@pytest.mark.parametrize(("m", "n"), [(96, 100), (576, 1536), (1024, 4096)])
def test_linear_of_two_stages(m, n, codebook, device):
    for dtype in ERROR:
        args = arguments(m, n, 80, dtype, device, codebook=codebook)
        wanted = expected(*args)
        args[1] = [layout.pack(codes) for codes in args[1]]
        for batch in sized((1, 3, 16, 80), (1, 80)):
            y = torch.ops.quip.linear(args[0][:batch], *args[1:])
            assert relative(y, wanted[:batch]) < ERROR[dtype], (batch, dtype)


def test_linear_takes_either_layout(device):
    args = arguments(192, 576, 3, torch.bfloat16, device)
    logical = torch.ops.quip.linear(*args)
    args[1] = [e8p.pack(args[1][0])]
    assert torch.equal(torch.ops.quip.linear(*args), logical)


def test_linear_is_the_same_each_time(device):
    args = arguments(*sized((4096, 4096), LARGE), 1, torch.float16, device)
    args[1] = [e8p.pack(args[1][0])]
    first = torch.ops.quip.linear(*args)
    assert all(torch.equal(torch.ops.quip.linear(*args), first) for _ in range(sized(20, 2)))


def test_int8_activations(device):
    args = arguments(*LARGE, 1, torch.float16, device)
    set_activations("int8")
    try:
        assert 1e-3 < relative(torch.ops.quip.linear(*args), expected(*args)) < 2e-2
    finally:
        set_activations("exact")


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_every_instruction_of_matvec_is_exact_in_integers(digits, gather, device):
    """Inline assembly, which the interpreter cannot run, against integers that the digits represent exactly."""
    from quip_kernels.gpu import matvec, quantize

    limit = {1: 127, 2: 32639, 3: 8355000}[digits]
    codes = truth.random_linear(*LONG)["codes"]
    x = torch.randint(-limit, limit + 1, (8, LONG[1]), generator=torch.Generator().manual_seed(2)).float()
    x[:, 0] = limit
    for batch in sized((1, 2, 3, 4, 8), (1, 8)):
        digits_of_x = quantize.quantize(x[:batch].to(device), digits)
        y = matvec.matvec(digits_of_x, e8p.pack(codes).to(device), LONG[1], gather=gather)
        assert relative(y.sum(0), x[:batch].double() @ truth.decode(codes, LONG[1]).T) < 3e-7


@pytest.mark.parametrize("second", [torch.uint8, torch.int16])
def test_kernels_of_two_stages(second, device):
    from quip_kernels.gpu import dequantize, matvec, quantize, small_batch

    codes, residual = truth.random_linear(*LONG)["codes"], truth.random_residual(*LONG, second)
    weight = truth.decode(codes, LONG[1]) + 0.25 * truth.decode_residual(residual, LONG[1])
    stages = layout.pack(codes).to(device), LONG[1], layout.pack(residual).to(device), 0.25
    x = torch.randn(33, LONG[1], generator=torch.Generator().manual_seed(2))
    wanted = x.double() @ weight.T
    y = matvec.matvec(quantize.quantize(x[:3].to(device), 3), *stages)
    assert relative(y.sum(0), wanted[:3]) < 1e-6
    y = small_batch.small_batch(small_batch.halves(x.to(device), 2), *stages)
    assert relative(y.sum(0), wanted) < 2e-6
    planes, columns, *second_stage = stages
    for dtype in ERROR:
        dense = dequantize.dequantize(planes, columns, dtype, *second_stage)
        assert torch.equal(dense.cpu(), weight.to(dtype))


def test_tiles_are_measured_once_and_remembered(device, monkeypatch, tmp_path):
    from quip_kernels.gpu import cache, matvec, quantize, tune

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tune, "_answers", {})
    monkeypatch.setattr(tune, "_spent", 0.0)
    codes, x = truth.random_linear(512, 1024)["codes"], torch.randn(1, 1024)
    y = matvec.matvec(quantize.quantize(x.to(device), 2), e8p.pack(codes).to(device), 1024)
    assert relative(y.sum(0), x.double() @ truth.decode(codes, 1024).T) < 5e-5
    (file,) = tmp_path.iterdir()
    assert "matvec e8p 1x2 512x32" in file.read_text()
    assert 0 < tune._spent < 60
    monkeypatch.setattr(tune, "milliseconds", None)  # nothing is measured again
    matvec.matvec(quantize.quantize(x.to(device), 2), e8p.pack(codes).to(device), 1024)


def test_a_module_packs_its_codes_where_they_run(device):
    parts = truth.random_linear(96, 256)
    module = QuipLinear(256, 96)
    module.load_state_dict(parts)
    module.to(device)
    assert not module.is_packed
    x = torch.randn(2, 256, device=device)
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        y = module(x)
        assert module.is_packed
        assert torch.equal(compiled(x), y)
    wanted = x.double().cpu() @ truth.dense_weight(parts["codes"], parts["su"], parts["sv"]).T + parts["bias"].double()
    assert relative(y, wanted) < 3e-6
    resident = sum(codes.numel() * codes.element_size() for codes in (module.codes, module.su, module.sv))
    assert resident <= 1.15 * module.packed_bytes
    assert torch.equal(module.state_dict()["codes"].cpu(), parts["codes"])
    assert relative(module.dequantize(), truth.dense_weight(parts["codes"], parts["su"], parts["sv"])) < 1e-6
    assert torch.equal(module.cpu().codes, parts["codes"])


def test_decode(device):
    codes = truth.random_linear(65, 600)["codes"]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        weight = torch.ops.quip.decode([e8p.pack(codes).to(device)], "e8p", 65, 597, dtype)
        assert torch.equal(weight.double().cpu(), truth.decode(codes, 597))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("size", [576, 1, 7, 12, 100, 258, 2048, 4096, 14336, 28672])
def test_transform(size, transpose, device):
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(1))
    q = incoherence.get("hadamard", size, 0)
    wanted = (q.apply_transpose if transpose else q.apply)(x.double())
    assert relative(ops.transform(x.to(device), "hadamard", 0, transpose), wanted) < 1e-6


def test_opcheck(device):
    args = arguments(96, 64, 2, torch.float32, device)
    torch.library.opcheck(torch.ops.quip.linear.default, args)
    args[1] = [e8p.pack(args[1][0])]
    torch.library.opcheck(torch.ops.quip.linear.default, args)
    torch.library.opcheck(torch.ops.quip.decode.default, (args[1], "e8p", 96, 64, torch.float16))


@pytest.mark.parametrize("dtype", list(ERROR))
def test_modules_eager_compiled_and_as_a_graph(dtype, device):
    """Linears that read one input, by each kernel."""
    linears = []
    for seed in range(3):
        linears.append(QuipLinear(576, 256))
        linears[-1].load_state_dict({**truth.random_linear(256, 576, seed), "su": truth.random_linear(8, 576)["su"]})
        linears[-1].to(device, dtype)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: [linear(x) for linear in linears], fullgraph=True, mode="reduce-overhead")
        for vectors in (1, 4, 5, 64, 65):
            x = torch.randn(vectors, 576, device=device, dtype=dtype) / 16
            eager = [linear(x) for linear in linears]
            assert all(linear.is_packed for linear in linears)
            for found in [eager] + [[y.clone() for y in compiled(x)] for _ in range(4)]:
                for y, linear in zip(found, linears, strict=True):
                    assert torch.equal(y, torch.ops.quip.linear(x, *linear.layer())), vectors


def test_the_same_input_is_compared_on_the_device(device):
    for write in (None, torch.Tensor.zero_, lambda x: x.data.zero_(), lambda x: torch.from_dlpack(x).zero_()):
        x = torch.randn(3, 8, device=device)
        shared = SameInput()
        assert shared.take("q", (x,), "key") is None
        shared.keep("q", (x,), "key", "result")
        if write is not None:
            write(x)
        assert shared.take("k", (x,), "key") == ("result" if write is None else None)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_equals_eager(mode, device):
    args = arguments(256, 512, 1, torch.bfloat16, device)
    args[1] = [e8p.pack(args[1][0])]
    with torch.no_grad():
        wanted = torch.ops.quip.linear(*args)
        compiled = torch.compile(lambda *a: torch.ops.quip.linear(*a) * 1.0, fullgraph=True, mode=mode)
        for _ in range(4):
            y = compiled(*args).clone()
    assert torch.equal(y, wanted)


TRELLIS = (
    "1mad:k2:rows 2mad:k4:qtip 3inst:k3:exl3 mcg:k1:exl3 mul1:k2:exl3 mul1:k5:exl3 mul1:k8:exl3 hyb-q9v2:k2:qtip "
    "mul1:k1.5:exl3 mul1:k2.5:exl3 mul1:k3.5:exl3 quantlut-q10v1:k4:rows lut-q16v2:k3:rows"
)


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", TRELLIS.split())
def test_trellis(name, table_dtype, device):
    """Weights are those of the reference to the bit; layers agree with it for every number of vectors."""
    (m, n), name = sized((272, 1056), (32, 96)), f"trellis:{name}"
    book = codebooks.get(name)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**15), 2**15, book.tensors(m, n)["codes"].shape, generator=generator).to(torch.int16)
    table = None if book.table_shape is None else torch.randn(book.table_shape, generator=generator).half().to(table_dtype)
    su, sv = torch.randn(n, generator=generator), torch.randn(m, generator=generator)
    stored = {"codes": codes} if table is None else {"codes": codes, "table": table}
    weight_on_device = [tensor.to(device) for tensor in stored.values()]
    for dtype in sized((torch.float32, torch.float16, torch.bfloat16), (torch.float32, torch.float16)):
        weight = ops.decode(weight_on_device, name, m, n, dtype)
        assert torch.equal(weight.cpu(), book.decode(stored, n, dtype))
    inner = book.decode(stored, n, torch.float64)
    q_in, q_out = (incoherence.get("hadamard", size, 0) for size in (n, m))
    for batch, (dtype, error) in itertools.product(sized((1, 2, 3, 5, 8, 9, 70), (1, 9)), ERROR.items()):
        x = torch.randn(batch, n, generator=generator).to(dtype)
        y = q_out.apply(q_in.apply_transpose(x.double() * su) @ inner.T) * sv
        names = (name, "hadamard", "hadamard", 0)
        found = ops.linear(x.to(device), weight_on_device, su.to(device), sv.to(device), None, *names)
        assert relative(found, y) < error


@pytest.mark.parametrize("name", ["mul1:k2:exl3", "mul1:k2.5:exl3", "3inst:k1:rows", "mcg:k8:exl3", "hyb-q9v2:k4:qtip"])
def test_trellis_encoder(name, device):
    """Without and with the Triton kernel, a GPU finds the codes that the CPU finds."""
    book = codebooks.get(f"trellis:{name}")
    tiles = torch.randn(sized(40, 1), 256, generator=torch.Generator().manual_seed(0)) * book.gaussian_scale
    codes, points = book.encode(tiles)
    for implementation in ("reference", "triton"):
        with backend.overridden(devices={device.type: implementation}):
            found, values = book.encode(tiles.to(device))
        assert torch.equal(found.cpu(), codes)
        assert torch.equal(values.cpu(), points)
