"""A module whose codes are expanded for AVX2: the same results to the bit, and everything that leaves it is codes."""

import copy
import io

import pytest
import torch
from torch import nn

from quip_kernels import cpu, cpu_library, cpu_nibbles
from tests import truth
from transformers_quip import QuipLinear, set_memory
from transformers_quip.nn import replace
from transformers_quip.ops import backend, packing, reference

pytestmark = pytest.mark.skipif(
    not cpu.is_available() or cpu_library.library().quip_cpu_level() < 1, reason="needs the CPU library and AVX2"
)
M, N = 48, 72


@pytest.fixture(autouse=True)
def avx2(monkeypatch):
    """Instructions that expanded codes are for, whatever this processor has; and as much memory as it takes."""
    monkeypatch.setenv(cpu_library.LEVEL_VARIABLE, "avx2")
    monkeypatch.setattr(packing, "free_memory", lambda device: 1 << 40)
    cpu_library.default_level.cache_clear()
    before = backend.get_memory()
    set_memory("auto")
    yield
    cpu_library.default_level.cache_clear()
    set_memory(before)


@pytest.fixture(params=["e8p", "e8p-rvq3", "e8p-rvq4"])
def codebook(request):
    return request.param


def linear(codebook="e8p", m=M, n=N):
    module = QuipLinear(n, m, codebook=codebook)
    module.load_state_dict(truth.random_linear(m, n, codebook=codebook))
    return module


def is_expanded(module):
    forms = {cpu_nibbles.is_nibbles(tensor) for tensor in module.weight_tensors()}
    assert len(forms) == 1
    return forms.pop()


def expanded(codebook="e8p"):
    module = linear(codebook)
    module.pack_if_wanted()
    assert is_expanded(module)
    return module


def same(state, other):
    assert state.keys() == other.keys()
    return all(torch.equal(state[name], other[name]) and state[name].dtype == other[name].dtype for name in state)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", [1, 5, 100])
def test_results_are_the_same_to_the_bit(codebook, dtype, vectors):
    module, x = linear(codebook), torch.randn(vectors, N).to(dtype)
    set_memory("compact")
    y = module(x)
    assert not is_expanded(module)
    set_memory("auto")
    assert torch.equal(module(x), y)
    assert is_expanded(module)
    assert torch.equal(module(x), y)  # prepared
    assert torch.equal(torch.ops.quip.linear(x, *module.layer()), y)
    set_memory("compact")
    assert torch.equal(module(x), y)
    assert not is_expanded(module)


def test_the_reference_and_gradients_take_the_form(codebook):
    module, x = expanded(codebook), torch.randn(3, N)
    layer = module.layer()
    assert truth.relative_error(reference.linear(x, *layer), linear(codebook)(x).double()) < 1e-5
    assert torch.equal(module.dequantize(), linear(codebook).dequantize())
    leaf = x.clone().requires_grad_()
    module(leaf).sum().backward()
    assert truth.relative_error(leaf.grad, module.dequantize().double().sum(0).expand(3, N)) < 1e-5


def test_codes_leave_in_the_stored_form(codebook):
    module, stored = expanded(codebook), linear(codebook).state_dict()
    assert module.packed_bytes == linear(codebook).packed_bytes
    assert same(module.state_dict(), stored)
    assert same({name: v.detach() for name, v in module.state_dict(keep_vars=True).items()}, stored)
    assert same(dict(copy.deepcopy(module).named_parameters()), stored)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert same(dict(torch.load(file, weights_only=False).named_parameters()), stored)
    assert is_expanded(module)


@torch.no_grad()
def test_loading_into_it(codebook):
    module, other = expanded(codebook), truth.random_linear(M, N, seed=5, codebook=codebook)
    x = torch.randn(2, N)
    module(x)
    module.load_state_dict(other)
    fresh = QuipLinear(N, M, codebook=codebook)
    fresh.load_state_dict(other)
    assert torch.equal(module(x), fresh(x))


@torch.no_grad()
def test_parameters_that_are_set_one_by_one():
    """A module between two forms computes, too."""
    module, parts = expanded("e8p-rvq4"), truth.random_linear(M, N, seed=5, codebook="e8p-rvq4")
    x = torch.randn(2, N)
    module.codes = nn.Parameter(parts["codes"], requires_grad=False)
    expected = linear("e8p-rvq4")
    expected.codes = module.codes
    assert torch.equal(torch.ops.quip.linear(x, *module.layer()), expected(x))
    assert torch.equal(module(x), expected(x))


def test_moving_keeps_the_form_where_it_is_of_use(codebook):
    module = expanded(codebook)
    assert is_expanded(module.to(torch.bfloat16))
    assert module.su.dtype == torch.bfloat16
    codes = linear(codebook).codes
    assert torch.equal(packing.stored(module.weight_tensors(), codebook, N)[0], codes)
    meta = module.to("meta")
    assert meta.codes.shape == codes.shape
    assert meta.codes.dtype == torch.int16


def test_where_codes_are_not_expanded(monkeypatch):
    model = nn.Sequential(linear(), linear(m=40))
    replace.pack(model)
    assert [is_expanded(module) for module in model] == [True, False]  # 40 rows are not whole tiles
    trellis = QuipLinear(64, 32, codebook="trellis:mul1:k2:exl3")
    trellis.pack_if_wanted()
    assert trellis.codes.dtype == torch.int16
    for level in ("plain", "avx512"):
        if level in cpu_library.LEVELS[: cpu_library.library().quip_cpu_level() + 1]:
            monkeypatch.setenv(cpu_library.LEVEL_VARIABLE, level)
            cpu_library.default_level.cache_clear()
            module = linear()
            module.pack_if_wanted()
            assert not is_expanded(module)


@pytest.mark.parametrize(("free", "wanted"), [(0, False), (packing.RESERVE + 4 * M * N // 4, True)])
def test_free_memory_decides_unless_it_is_told_to(monkeypatch, free, wanted):
    monkeypatch.setattr(packing, "free_memory", lambda device: free)
    module = linear()
    module.pack_if_wanted()
    assert is_expanded(module) == wanted
    set_memory("fast")
    module.pack_if_wanted()
    assert is_expanded(module)


def test_an_unknown_name():
    with pytest.raises(ValueError, match="memory='huge' is not known, choose one of 'auto', 'compact', 'fast'"):
        set_memory("huge")


def test_codes_expanded_in_inference_mode_can_be_used_outside_of_it():
    module, x = linear(), torch.randn(2, N, requires_grad=True)
    with torch.inference_mode():
        module(x)
    assert is_expanded(module)
    module(x).sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_compiled_code_takes_the_form():
    module, x = expanded(), torch.randn(2, N)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear()(x))


TRELLISES = ["trellis:mul1:k2:exl3", "trellis:hyb-q9v2:k2:qtip"]


def trellis(codebook, dtype=torch.bfloat16, seed=0):
    module = QuipLinear(96, 48, codebook=codebook).to(dtype)
    module.load_state_dict(truth.random_linear(48, 96, seed=seed, codebook=codebook))
    return module


def has_records(module):
    return packing.is_records(module.weight_tensors())


@torch.no_grad()
@pytest.mark.parametrize("codebook", TRELLISES)
@pytest.mark.parametrize("vectors", [1, 5, 100])
def test_trellis_codes_as_bytes(codebook, vectors):
    """Products differ by the rounding of weights to 8 bits. Exact activations, float32 and the reference do not see it."""
    module, x = trellis(codebook), torch.randn(vectors, 96).bfloat16()
    exact = reference.linear(x.double(), *trellis(codebook).layer())
    y = module(x)
    assert has_records(module)
    assert torch.equal(module(x), y)  # prepared
    assert torch.equal(torch.ops.quip.linear(x, *module.layer()), y)
    assert truth.relative_error(y, exact) < 1.4e-2
    assert torch.equal(reference.linear(x.double(), *module.layer()), exact)
    assert torch.equal(module.dequantize(), trellis(codebook).dequantize())
    with backend.overridden(activations="exact"):
        assert truth.relative_error(module(x), exact) < 5e-3
    assert truth.relative_error(module(x.float()), exact) < 1e-5
    set_memory("compact")
    assert truth.relative_error(module(x), exact) < 5e-3
    assert same(dict(module.named_parameters()), dict(trellis(codebook).named_parameters()))


@pytest.mark.parametrize("codebook", TRELLISES)
def test_trellis_codes_leave_in_the_stored_form(codebook):
    module, stored = trellis(codebook), trellis(codebook).state_dict()
    module.pack_if_wanted()
    assert has_records(module)
    assert module.packed_bytes == trellis(codebook).packed_bytes
    assert same(module.state_dict(), stored)
    assert same(dict(copy.deepcopy(module).named_parameters()), stored)
    assert has_records(module.to(torch.float16))
    assert not has_records(module.to(torch.float32))
    module = trellis(codebook)
    module.pack_if_wanted()
    module.load_state_dict(truth.random_linear(48, 96, seed=5, codebook=codebook))
    assert same(module.state_dict(), trellis(codebook, seed=5).state_dict())


@torch.no_grad()
@pytest.mark.parametrize("name", ["codes", "table"])
def test_a_part_of_trellis_codes_that_is_set_by_itself(name):
    """Records belong to a table: another one, or other codes, make others."""
    codebook, x = TRELLISES[1], torch.randn(2, 96).bfloat16()
    module, parts = trellis(codebook), truth.random_linear(48, 96, seed=5, codebook=codebook)
    module(x)
    assert has_records(module)
    expected = trellis(codebook)
    for changed in (module, expected):
        setattr(changed, name, nn.Parameter(parts[name], requires_grad=False))
    exact = reference.linear(x.double(), *expected.layer())
    assert truth.relative_error(torch.ops.quip.linear(x, *module.layer()), exact) < 3e-3
    assert same(module.state_dict(), expected.state_dict())
    assert truth.relative_error(module(x), exact) < 1.4e-2
    assert has_records(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "free_memory", lambda device: 0)
        setattr(module, name, nn.Parameter(parts[name].clone(), requires_grad=False))
        assert truth.relative_error(module(x), exact) < 3e-3
        assert packing.is_stored(module.weight_tensors(), codebook)


def test_trellis_codes_that_stay_as_they_are():
    for codebook, dtype in ((TRELLISES[0], torch.float32), ("trellis:mul1:k5:exl3", torch.bfloat16)):
        module = trellis(codebook, dtype)
        module.pack_if_wanted()
        assert not packing.is_expanded(module.weight_tensors())
    with backend.overridden(activations="exact"):
        module = trellis(TRELLISES[0])
        module.pack_if_wanted()
        assert not packing.is_expanded(module.weight_tensors())
    peaks = trellis(TRELLISES[1])
    peaks.table[0, 0] = 100.0
    peaks.pack_if_wanted()
    assert not packing.is_expanded(peaks.weight_tensors())


@torch.no_grad()
@pytest.mark.parametrize("codebook", ["e8p", TRELLISES[0]])
def test_free_memory_is_asked_for_once(monkeypatch, codebook):
    """A layer for which there was too little is looked up again for every prompt."""
    asked = []
    monkeypatch.setattr(packing, "free_memory", lambda device: asked.append(device) or 0)
    module = linear() if codebook == "e8p" else trellis(codebook)
    x = torch.randn(100, module.in_features).to(module.weight_dtype)
    for _ in range(3):
        module(x)
    assert len(asked) == 1
    set_memory("auto")  # other settings, though the same ones
    module(x)
    assert len(asked) == 2
