"""Sums of gradients on the disk: a run that was stopped goes on, and its sums are those of a whole run."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny_ids, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.calibration import curvature
from transformers_quip.calibration.curvature import collect_curvature
from transformers_quip.quantize.gradients import KeptSums, seconds_and_bytes

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj")


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("budget", "sketch"), [(1, "A"), (curvature.BUDGET, "outputs")])
@pytest.mark.parametrize("stop", [1, 3, 4, 7, 10])
def test_a_stopped_run_goes_on(stop, budget, sketch, tmp_path, monkeypatch):
    model, ids = tiny_model("llama"), tiny_ids(4, 8)
    options = {"seed": 5, "progress": False, "budget": budget, "sketch": sketch}
    whole = collect_curvature(model, NAMES, ids, **options)
    real, calls = curvature._backward, []

    def stopping(*arguments):
        if len(calls) == stop:
            raise Stopped
        calls.append(arguments)
        real(*arguments)

    monkeypatch.setattr(curvature, "_backward", stopping)
    monkeypatch.setattr("time.monotonic", lambda: 0.0)  # then a write takes no time, and each one is due
    passes = 3 if budget == 1 else 1
    if stop < 4 * passes:
        with pytest.raises(Stopped):
            collect_curvature(model, NAMES, ids, **options, kept=KeptSums(tmp_path / "sums", every=0.0))
    first, stop = len(calls), 10**6
    calls.clear()
    found = collect_curvature(model, NAMES, ids, **options, kept=KeptSums(tmp_path / "sums", every=0.0))
    assert len(calls) == (4 * passes - first if first else 4 * passes)
    for name in NAMES:
        assert sketch == "outputs" or torch.equal(found[name].hessian_in, whole[name].hessian_in)
        assert torch.equal(found[name].hessian_out, whole[name].hessian_out)
        assert found[name].sequences == 4
    calls.clear()
    again = collect_curvature(model, NAMES, ids, **options, kept=KeptSums(tmp_path / "sums"))
    assert not calls
    assert all(torch.equal(again[name].hessian_out, whole[name].hessian_out) for name in NAMES)


def test_files_are_written_from_time_to_time_and_at_the_end(tmp_path):
    sums = {"fc": curvature.Curvature.empty(3, 4, "A")}
    kept = KeptSums(tmp_path / "sums", every=1e6)
    kept.keep(0, sums, 1, last=False)
    assert not list(tmp_path.iterdir())
    kept.keep(0, sums, 2, last=True)
    assert [path.name for path in tmp_path.iterdir()] == ["sums-0.safetensors"]


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", None])
def test_damaged_files_are_named(content, tmp_path):
    kept = KeptSums(tmp_path / "sums")
    if content is None:  # of another model
        kept.keep(0, {"fc": curvature.Curvature.empty(3, 5, "A")}, 1, last=True)
    else:
        (tmp_path / "sums-0.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"sums-0.safetensors is damaged .*--fresh"):
        kept.read(0, {"fc": curvature.Curvature.empty(3, 4, "A")})


@pytest.mark.parametrize(
    ("sketch", "products", "numbers"),
    [
        ("outputs", 10 * (9 + 25), 9 + 25),
        ("A", 10 * (9 + 16 + 25 + 4), 9 + 16 + 25 + 4),
        ("B", 12 * 17 + 10 * 17, 9 + 16 + 25 + 4),
    ],
)
def test_costs(sketch, products, numbers):
    config = QuipConfig(sketch=sketch, sketch_samples=7)
    seconds, size = seconds_and_bytes([(3, 4), (5, 2)], config, tokens=10, forward=0.5, multiply=0.25)
    assert size == 4 * numbers
    assert seconds == pytest.approx(7 * (2 * 0.5 + 0.25 * products))
