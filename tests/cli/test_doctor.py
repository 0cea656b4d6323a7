"""doctor: on this processor, and on a GPU that is played."""

from __future__ import annotations

import pytest
import torch

from quip_kernels import cpu_library
from tests.cli.test_cli import run
from transformers_quip import __version__
from transformers_quip.ops import backend
from transformers_quip.ops.cpu.route import Route


def test_this_processor(capsys):
    code, found, err = run(capsys, "doctor", "--json")
    assert code == 0, err
    assert found["versions"]["transformers-quip"] == __version__
    assert torch.__version__.startswith(found["versions"]["torch"])  # its own may name a build, too
    assert found["settings"] == {"backend": "auto", "activations": "auto"}
    cpu = found["devices"][0]
    assert cpu["name"] == "CPU"
    if cpu_library.library() is None:
        assert "missing" in cpu["about"]["compiled library"]
        return
    assert cpu["about"]["compiled library"] == f"for {cpu_library.LEVELS[cpu_library.default_level()]}"
    assert cpu["about"]["implementation"] == "cpu"
    assert cpu["routes"]["e8p"]["1"] == cpu["routes"]["trellis:mul1:k2:exl3"]["1"] == Route.FUSED.value
    assert set(cpu["routes"]["scalar2"].values()) == {Route.REFERENCE.value}


def test_the_users_choice(capsys):
    with backend.overridden(backend="reference"):
        _, found, _ = run(capsys, "doctor", "--json")
    assert found["settings"]["backend"] == "reference"
    assert found["devices"][0]["about"]["implementation"] == "reference"
    assert {way for ways in found["devices"][0]["routes"].values() for way in ways.values()} == {Route.REFERENCE.value}


def test_as_tables(capsys):
    code, shown, _ = run(capsys, "doctor")
    assert code == 0
    for part in ("Versions", __version__, "CPU", "bfloat16 layers", "TRANSFORMERS_QUIP_BACKEND=reference"):
        assert part in shown


def test_a_gpu(monkeypatch, capsys):
    pytest.importorskip("triton", reason="the package triton is not installed")
    from quip_kernels.gpu import cache
    from transformers_quip.ops.triton import self_check
    from transformers_quip.ops.triton.route import Route

    verdicts = dict.fromkeys(self_check.names()) | {"matvec": "ArithmeticError: e8p: relative error 0.5"}
    encoders = dict.fromkeys(self_check.names(self_check.ENCODE))
    known = {("Test GPU", self_check.RUN): verdicts, ("Test GPU", self_check.ENCODE): encoders}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cache, "device_name", lambda device: "Test GPU")
    monkeypatch.setattr(self_check, "_known", known)
    monkeypatch.setattr(self_check, "_trusted", {})
    _, found, _ = run(capsys, "doctor", "--json")
    gpu = found["devices"][1]
    assert (gpu["name"], gpu["about"]["device"], gpu["kernels"]) == ("cuda:0", "Test GPU", verdicts | encoders)
    assert gpu["routes"]["e8p"] == {"1": Route.REFERENCE.value, "5": Route.HALVES.value, "65": Route.DENSE_HALF.value}
    assert gpu["routes"]["trellis:mul1:k2:exl3"]["1"] == Route.TRELLIS.value
    _, shown, _ = run(capsys, "doctor")
    assert "ArithmeticError: e8p: relative error 0.5" in shown
