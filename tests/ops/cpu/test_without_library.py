"""Where the C library was not built, or for another processor: PyTorch computes the same, and one line says so."""

import copy
import logging

import pytest
import torch

from quip_kernels import cpu_library
from tests import truth
from transformers_quip import QuipLinear, codebooks, incoherence, set_activations
from transformers_quip.ops import backend
from transformers_quip.ops.cpu import run as cpu


@pytest.fixture(params=["missing", "of another machine"])
def found(request, tmp_path, monkeypatch, caplog):
    """The reason why the library is missing."""
    path = tmp_path / "_cpu.so"
    if request.param != "missing":
        path.write_bytes(b"\x7fELF of something else")
    monkeypatch.setattr(cpu_library, "PATH", path)
    for function in (cpu_library.library, cpu._tell):
        function.cache_clear()
    for name in ("transformers_quip", "quip_kernels"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level(logging.INFO, name)
    with backend.overridden(backend="auto"):
        yield request.param
    cpu_library.library.cache_clear()


@pytest.mark.parametrize("activations", ["auto", "int8"])
@torch.no_grad()
def test_layers_are_exact_and_one_line_says_that_they_are_slower(found, activations, caplog):
    set_activations(activations)
    for codebook in ("e8p", "e8p-rvq3", "e8p-rvq4"):
        parts = truth.random_linear(24, 96, codebook=codebook)
        module = QuipLinear(96, 24, codebook=codebook)
        module.load_state_dict(parts)
        bias = parts.pop("bias")
        for vectors in (1, 80):
            x = torch.randn(vectors, 96)
            expected = x.double() @ truth.dense_weight(**parts, codebook=codebook).T + bias.double()
            torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-4)
            y = copy.deepcopy(module).bfloat16()(x.bfloat16())
            assert y.dtype == torch.bfloat16
            assert (y.double() - expected).norm() < 2e-2 * expected.norm()
    name = "trellis:mul1:k2:exl3"
    book, names = codebooks.get(name), (name, "hadamard", "hadamard", 0)
    codes = torch.randint(-(2**15), 2**15, book.tensors(32, 96)["codes"].shape).to(torch.int16)
    x, su, sv = torch.randn(2, 96), torch.randn(96), torch.randn(32)
    q_in, q_out = (incoherence.get("hadamard", size, 0).matrix() for size in (96, 32))
    y = torch.ops.quip.linear(x, [codes], su, sv, None, *names)
    inner = (x.double() * su.double()) @ q_in @ book.decode({"codes": codes}, 96, torch.float64).T
    torch.testing.assert_close(y.double(), inner @ q_out.T * sv.double(), rtol=1e-5, atol=1e-4)
    lines = [record for record in caplog.records if record.name.startswith(("transformers_quip", "quip_kernels"))]
    told = [record.getMessage() for record in lines if record.levelno == logging.INFO]
    assert len(told) == 1
    assert "the compiled CPU library is missing" in told[0]
    warnings = [record.getMessage() for record in lines if record.levelno > logging.INFO]
    assert len(warnings) == (found != "missing")
    assert all("does not load" in line for line in warnings)
