"""Layers of trellis codes: the ops with and without the compiled library, the module, the config."""

import pytest
import torch

from quip_kernels import cpu as cpu_kernels
from tests import truth
from transformers_quip import QuipConfig, codebooks, set_backend
from transformers_quip.nn.linear import QuipLinear
from transformers_quip.ops.cpu import run as cpu
from transformers_quip.ops.cpu.route import MOST_VECTORS

M, N = 48, 96
MANY = MOST_VECTORS["trellis"][3] + 3
NAMES = ["trellis:mul1:k2:exl3", "trellis:mul1:k2.5:exl3", "trellis:1mad:k3:rows", "trellis:hyb-q9v2:k2:qtip"]
# Relative to the size of the output. Products with decoded weights are in the dtype of x if that is bfloat16.
ACCURACY = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(params=["library", "reference"])
def backend(request):
    if request.param == "library" and not cpu_kernels.is_available():
        pytest.skip("the CPU library was not compiled")
    set_backend("auto" if request.param == "library" else "reference")
    yield
    set_backend("auto")


def tensors(name, dtype=torch.float32):
    """Stored tensors, su, sv and bias of a random layer, and its weight by the definition, in float64."""
    book, generator = codebooks.get(name), torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**15), 2**15, book.tensors(M, N)["codes"].shape, generator=generator).to(torch.int16)
    su, sv, bias = (torch.randn(size, generator=generator).to(dtype) for size in (N, M, M))
    table = None if book.table_shape is None else torch.randn(book.table_shape, generator=generator).half()
    stored = {"codes": codes} if table is None else {"codes": codes, "table": table}
    inner = book.decode(stored, N, torch.float64)
    weight = sv.double()[:, None] * (truth.hadamard(M) @ inner @ truth.hadamard(N).T) * su.double()
    return stored, su, sv, bias, weight


def arguments(name, x, dtype=torch.float32):
    stored, su, sv, bias, weight = tensors(name, dtype)
    return [x.to(dtype), list(stored.values()), su, sv, bias, name, "hadamard", "hadamard", 0], weight


def vectors(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def relative(value, expected):
    return ((value.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", ACCURACY)
@pytest.mark.parametrize("batch", [1, 3, MANY])
@pytest.mark.parametrize("name", NAMES)
def test_linear(name, batch, dtype, backend):
    args, weight = arguments(name, vectors(batch, N), dtype)
    y = torch.ops.quip.linear(*args)
    assert y.dtype == dtype
    assert relative(y, args[0].double() @ weight.T + args[4].double()) < ACCURACY[dtype]


def test_many_vectors_in_blocks_of_rows(monkeypatch):
    args, weight = arguments(NAMES[0], vectors(MANY, N))
    monkeypatch.setattr(cpu, "DECODED_WEIGHTS", 33 * N)  # 32 rows, then the last 16
    assert relative(cpu.linear(*args), args[0].double() @ weight.T + args[4].double()) < 1e-6


def test_linear_with_float64_and_without_transforms(backend):
    args, _ = arguments(NAMES[3], vectors(2, 5, N), torch.float64)
    args[6:8] = "none", "none"
    inner = codebooks.get(NAMES[3]).decode(tensors(NAMES[3])[0], N, torch.float64)
    expected = (args[0] * args[2]) @ inner.T * args[3] + args[4]
    assert relative(torch.ops.quip.linear(*args), expected) < 1e-12
    assert torch.ops.quip.linear(args[0][:, :0], *args[1:]).shape == (2, 0, M)


@pytest.mark.parametrize("name", NAMES)
def test_decode(name, backend):
    stored, *_ = tensors(name)
    expected = codebooks.get(name).decode(stored, N)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        weight = torch.ops.quip.decode(list(stored.values()), name, M, N, dtype)
        assert torch.equal(weight, expected.to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_schema_fake_and_derivatives(name):
    args, weight = arguments(name, vectors(2, N), torch.float64)
    for i in (0, 2, 3, 4):
        args[i].requires_grad_()
    torch.library.opcheck(torch.ops.quip.linear, tuple(args))
    torch.library.opcheck(torch.ops.quip.decode, (args[1], name, M, N, torch.float32))
    grad = vectors(2, M).double()
    found = torch.autograd.grad(torch.ops.quip.linear(*args), [args[i] for i in (0, 2, 3, 4)], grad)
    x, su, sv, bias = (args[i].detach() for i in (0, 2, 3, 4))
    inner = weight / sv[:, None] / su
    expected = (
        grad @ weight,
        ((grad * sv) @ inner * x).sum(0),
        (grad * ((x * su) @ inner.T)).sum(0),
        grad.sum(0).expand_as(bias),
    )
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)


def test_codes_and_tables_that_do_not_fit_are_refused(backend):
    args, _ = arguments(NAMES[3], vectors(1, N))
    codes, table = args[1]
    for name, weight, message in (
        (NAMES[3], [codes], r"stores codes, table, got 1 tensors"),
        (NAMES[3], [codes, torch.zeros(256, 2)], r"table .* must be floating point \[512, 2\], got .* \[256, 2\]"),
        (NAMES[3], [codes[:, :5], table], r"must be torch.int16 \[48, 12\], got torch.int16 \[48, 5\]"),
        (NAMES[3], [codes, codes], r"table .* must be floating point \[512, 2\], got torch.int16"),
        (NAMES[0], [codes, table], r"stores codes, got 2 tensors"),
        ("e8p", [torch.zeros(M, 12).short(), table], "'e8p' stores codes, got 2 tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.quip.linear(args[0], weight, *args[2:5], name, *args[6:])


@pytest.mark.parametrize("name", NAMES)
def test_module(name):
    stored, su, sv, bias, weight = tensors(name)
    module = QuipLinear(N, M, codebook=name)
    table = stored.get("table")
    state = {**stored, "su": su, "sv": sv, "bias": bias}
    assert set(module.state_dict()) == set(state)
    module.load_state_dict(state)
    x = vectors(3, N)
    assert relative(module(x), x.double() @ weight.T + bias.double()) < 1e-6
    with torch.no_grad():
        assert relative(module(x), x.double() @ weight.T + bias.double()) < 1e-6
    assert relative(module.dequantize(), weight) < 1e-6
    tables = 0 if table is None else table.numel() * 4
    assert module.packed_bytes == M * N * codebooks.get(name).k / 8 + (M + N) * 4 + tables
    with pytest.raises(ValueError, match="multiples of 16"):
        QuipLinear(N, 40, codebook=name)


def test_config_reads_trellis_codebooks():
    config = QuipConfig(codebook="trellis:mul1:k5:exl3", modules={"down_proj": {"codebook": "trellis:mul1:k6:exl3"}})
    assert config.bits == 5
    assert config.for_module("model.layers.0.mlp.down_proj").bits == 6
    assert QuipConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="'trellis:mul1:k9:exl3' is not a codebook: a trellis codebook is called"):
        QuipConfig(codebook="trellis:mul1:k9:exl3")
    with pytest.raises(ValueError, match="contradict"):
        QuipConfig(bits=2, codebook="trellis:mul1:k5:exl3")


@pytest.mark.skipif(not cpu_kernels.is_available(), reason="the CPU library was not compiled")
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_prepared_once(name):
    """Few vectors are looked up once; another table, more vectors and another backend are seen."""
    stored, su, sv, bias, weight = tensors(name)
    module, table = QuipLinear(N, M, codebook=name), stored.get("table")
    module.load_state_dict({**stored, "su": su, "sv": sv, "bias": bias})
    for batch in (3, 3, 1, MANY, MOST_VECTORS["trellis"][3], 2):
        x = vectors(batch, N)
        assert relative(module(x), x.double() @ weight.T + bias.double()) < 1e-6
        is_prepared = module._prepared(x, module._parameters) is not None
        assert is_prepared == (batch <= MOST_VECTORS["trellis"][3])
    x = vectors(2, N)
    assert relative(module(x.half()), x.half().double() @ weight.T + bias.double()) < 5e-4
    assert module(vectors(2, 1, N).double()).dtype == torch.float64
    if table is not None:
        before = module(x)
        module.table.mul_(2)
        inner = before - bias
        torch.testing.assert_close(module(x) - bias, 2 * inner)
        module.table = torch.nn.Parameter(module.table.half(), requires_grad=False)
        torch.testing.assert_close(module(x) - bias, 2 * inner)
    codes, backend = module.codes.clone(), module(x)
    module.codes.zero_()
    assert not torch.allclose(module(x), backend)
    module.codes.copy_(codes)
    try:
        set_backend("reference")
        torch.testing.assert_close(module(x), backend)
    finally:
        set_backend("auto")
