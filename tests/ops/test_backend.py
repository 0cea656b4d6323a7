"""The choice of a backend: by function, by environment variable, and what an unavailable one says."""

import os
import subprocess
import sys

import pytest
import torch

import transformers_quip
from quip_kernels import cpu as cpu_kernels
from transformers_quip.ops import backend


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
