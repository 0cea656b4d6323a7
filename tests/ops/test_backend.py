"""The choice of a backend: by function, by environment variable, and what an unavailable one says."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import transformers_quip
from quip_kernels import cpu as cpu_kernels
from tests import truth
from transformers_quip.ops import backend, reference
from transformers_quip.ops.layer import Layer


@pytest.fixture(autouse=True)
def default_settings():
    yield
    transformers_quip.set_backend("auto")


def test_auto_is_the_default_and_reference_always_there():
    assert backend.get_backend() == "auto"
    transformers_quip.set_backend("reference")
    assert backend.get_backend() == "reference"


def test_an_unknown_name():
    with pytest.raises(ValueError, match="backend='cuda' is not known, choose one of 'auto', 'cpu', 'reference', 'triton'"):
        transformers_quip.set_backend("cuda")
    assert backend.get_backend() == "auto"


def test_cpu_without_the_library(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="'cpu' is not available here: it needs the compiled CPU library"):
        transformers_quip.set_backend("cpu")
    assert backend.get_backend() == "auto"


def test_triton_without_a_gpu(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="'triton' is not available here: it needs a GPU"):
        transformers_quip.set_backend("triton")


def test_triton_without_the_package(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="it needs the package triton"):
        transformers_quip.set_backend("triton")


@pytest.mark.parametrize("name", ["auto", "cpu", "reference"])
def test_mps_has_the_reference(name):
    with backend.overridden(backend=name):
        assert backend.for_device("mps") == "reference"


class NoFloat64(TorchDispatchMode):
    """Meta tensors stand for those of MPS, which cannot be float64."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                assert tensor.dtype != torch.float64, function
        return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codebook", [*truth.CODEBOOKS, "trellis:2mad:k2:rows", "trellis:hyb-q9v2:k2:qtip"])
def test_the_reference_needs_no_float64(codebook, dtype):
    """Which MPS lacks; that the same formulas are right is tested on the CPU."""
    m, n = 48, 96
    parts = truth.random_linear(m, n, dtype=dtype, codebook=codebook)
    weight = [tensor.to("meta") for tensor in truth.weight(parts)]
    su, sv, bias = (parts[name].to("meta") for name in ("su", "sv", "bias"))
    with NoFloat64(), pytest.raises(AssertionError):
        torch.zeros(1, dtype=torch.float64, device="meta") + 1
    with NoFloat64():
        layer = Layer(weight, su, sv, bias, codebook, "hadamard", "hadamard", 0)
        y = reference.linear(torch.zeros(3, n, dtype=dtype, device="meta"), *layer)
    assert (y.shape, y.dtype, y.device.type) == ((3, m), dtype, "meta")


def imported(**variables):
    code = "from transformers_quip.ops import backend; print(backend.get_backend(), backend.get_activations())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_environment_variables():
    run = imported(TRANSFORMERS_QUIP_BACKEND="reference", TRANSFORMERS_QUIP_ACTIVATIONS="int8")
    assert run.stdout.split() == ["reference", "int8"], run.stderr


def test_empty_environment_variables_say_nothing():
    run = imported(TRANSFORMERS_QUIP_BACKEND="", TRANSFORMERS_QUIP_ACTIVATIONS="")
    assert run.stdout.split() == ["auto", "auto"], run.stderr


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("TRANSFORMERS_QUIP_BACKEND", "fast", "backend='fast' is not known"),
        ("TRANSFORMERS_QUIP_BACKEND", "triton", "The backend 'triton' is not available here: it needs"),
        ("TRANSFORMERS_QUIP_ACTIVATIONS", "int4", "activations='int4' is not known"),
        ("TRANSFORMERS_QUIP_MEMORY", "tiny", "memory='tiny' is not known"),
    ],
)
def test_a_wrong_environment_variable_is_an_error_at_import_that_names_it(variable, value, said, monkeypatch):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    before = backend.settings()
    with pytest.raises((ValueError, RuntimeError), match=f"environment variable {variable}={value}: {said}"):
        backend.read_environment()
    assert backend.settings() == before
    if value == "fast":
        run = imported()
        assert run.returncode != 0
        assert f"environment variable {variable}={value}: {said}" in run.stderr


def test_for_device():
    for name, expected in (
        ("auto", ("cpu", "reference", "reference")),
        ("cpu", ("cpu", "reference", "reference")),
        ("reference", ("reference", "reference", "reference")),
        ("triton", ("reference", "triton", "reference")),
    ):
        with backend.overridden(backend=name):
            found = tuple(backend.for_device(device) for device in ("cpu", torch.device("cuda", 0), "meta"))
        assert found == expected, name


def test_overridden_settings_are_put_back():
    before = backend.settings()
    with backend.overridden(activations="int8", devices={"cpu": "triton"}):
        assert backend.get_activations() == "int8"
        assert backend.for_device("cpu") == "triton"
        transformers_quip.set_activations("exact")
    assert backend.settings() is before
