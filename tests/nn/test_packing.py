"""A module whose codes are in the layout of the Triton kernels: everything that leaves it is in the logical one."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from quip_kernels import e8p
from tests import truth
from transformers_quip import QuipLinear
from transformers_quip.nn import replace
from transformers_quip.ops import backend


@pytest.fixture(params=["e8p", "e8p-rvq3", "e8p-rvq4"])
def codebook(request):
    return request.param


def packed(codebook="e8p", m=12, n=72):
    """The same module in either layout: logical, packed."""
    parts = truth.random_linear(m, n, codebook=codebook)
    logical = QuipLinear(n, m, codebook=codebook)
    logical.load_state_dict(parts)
    module = copy.deepcopy(logical)
    module.pack()
    return logical, module


def same_tensors(state, module):
    expected = module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) and state[name].dtype == expected[name].dtype for name in state)
    return True


def test_pack_replaces_the_codes(codebook):
    logical, module = packed(codebook)
    assert not logical.is_packed
    assert module.is_packed
    assert isinstance(module.codes, nn.Parameter)
    assert not module.codes.requires_grad
    assert torch.equal(module.codes, e8p.pack(logical.codes))
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in logical.named_parameters()]
    codes = module.codes
    module.pack()
    assert module.codes is codes
    module.unpack()
    assert same_tensors(dict(module.named_parameters()), logical)


def test_sizes_are_those_of_what_is_stored(codebook):
    logical, module = packed(codebook)
    assert module.packed_bytes == logical.packed_bytes
    assert repr(module) == repr(logical)
    logical, module = packed(codebook, 64, 576)
    resident = sum(p.numel() * p.element_size() for name, p in module.named_parameters() if name != "bias")
    assert resident <= 1.15 * module.packed_bytes


def test_what_it_computes_is_the_same(codebook):
    logical, module = packed(codebook)
    x = torch.randn(3, 72)
    assert torch.equal(module(x), logical(x))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(module.dequantize(dtype), logical.dequantize(dtype))
    assert torch.equal(replace.to_dense(module).weight, replace.to_dense(logical).weight)
    x.requires_grad_()
    gradients = [torch.autograd.grad(either(x).square().sum(), x)[0] for either in (logical, module)]
    assert torch.equal(*gradients)


def test_compile_without_graph_break():
    logical, module = packed()
    x = torch.randn(3, 72)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), logical(x))
    assert module.is_packed


def test_state_dict_is_logical_and_loads_into_either(codebook):
    logical, module = packed(codebook)
    assert same_tensors(module.state_dict(), logical)
    assert nn.Sequential(module).state_dict()["0.codes"].dtype == torch.int16
    assert module.is_packed
    kept = module.state_dict(keep_vars=True)
    assert isinstance(kept["codes"], nn.Parameter)
    other = truth.random_linear(12, 72, seed=5, codebook=codebook)
    for target in (logical, module):
        target.load_state_dict(other)
        assert all(torch.equal(target.state_dict()[name], value) for name, value in other.items())


def test_copies_are_logical(codebook):
    logical, module = packed(codebook)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        assert not other.is_packed
        assert same_tensors(other.state_dict(), logical)
        assert other.codes.data_ptr() != module.codes.data_ptr()
    assert module.is_packed


def test_off_the_gpu_it_is_logical(codebook):
    logical, module = packed(codebook)
    assert module.to("meta").codes.shape == logical.codes.shape
    _, module = packed(codebook)
    model = nn.Sequential(module).cpu()
    assert not model[0].is_packed
    assert same_tensors(module.state_dict(), logical)
    _, module = packed(codebook)
    assert not module.to(torch.bfloat16).is_packed
    assert torch.equal(module.codes, logical.codes)


@pytest.fixture
def on_a_gpu():
    """The CPU stands for a GPU that runs the Triton kernels."""
    with backend.overridden(devices={"cpu": "triton"}):
        yield


def test_a_model_is_packed_where_kernels_will_run(on_a_gpu):
    model = nn.Sequential(*(packed()[0] for _ in range(2)), nn.Linear(12, 12))
    replace.pack(model)
    assert model[0].is_packed
    assert model[1].is_packed
    assert model.to(torch.float64)[0].is_packed
    assert not QuipLinear(72, 12, device="meta").is_packed
    with backend.overridden(devices={}):
        module, _ = packed()
        module.pack_if_wanted()
        assert not module.is_packed


class Living(TorchDispatchMode):
    """The bytes of the tensors that operations made and that are still there, and the most there were at once."""

    def __init__(self):
        super().__init__()
        self.most, self.storages = 0, {}

    @property
    def bytes(self):
        self.storages = {key: both for key, both in self.storages.items() if not both[0].expired()}
        return sum(count for _, count in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and func.name() != "aten::detach":
                storage = tensor.untyped_storage()
                given = [arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)]
                if storage._cdata not in given:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.bytes)
        return result


@pytest.mark.parametrize("codebook", ["e8p", "e8p-rvq3"])
def test_a_model_is_packed_tensor_by_tensor(codebook, on_a_gpu):
    """Besides the packed model and the stored codes of one tensor, a fraction of that tensor's bytes is needed."""
    model = nn.Sequential(*(QuipLinear(1024, 2048, codebook=codebook) for _ in range(6)))
    stored = model[0].packed_bytes - 4 * (1024 + 2048)
    with Living() as living:
        replace.pack(model)
    assert all(linear.is_packed for linear in model)
    assert living.bytes == 6 * stored  # the packed form, which has replaced the stored one
    # what is made: the packed form of all, and parts of one first stage as 32-bit numbers
    assert living.most <= (6 + 0.4) * stored


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_a_module_is_packed_when_it_is_first_called(context):
    logical, _ = packed()
    x = torch.randn(3, 72)
    with backend.overridden(devices={"cpu": "reference"}), context():
        expected = logical(x)
        assert not logical.is_packed
    with backend.overridden(devices={"cpu": "triton"}), context():
        assert torch.equal(logical(x), expected)
        assert logical.is_packed


@pytest.mark.parametrize("hook", [SimpleNamespace(offload=True), SimpleNamespace(hooks=[SimpleNamespace(offload=True)])])
def test_offloaded_codes_stay_as_they_are_stored(hook, on_a_gpu):
    module, _ = packed()
    module._hf_hook = hook
    module.pack_if_wanted()
    assert not module.is_packed
    module._hf_hook = SimpleNamespace(offload=False)
    module.pack_if_wanted()
    assert module.is_packed
