"""What of benchmarks/gpu.py runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_summary
import machine
import pytest
import torch

from tests import truth
from transformers_quip import QuipLinear

SCRIPT = Path(gpu.__file__).with_name("gpu_run.sh")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err


def test_options():
    options = gpu.parse(["--only", "generate", "--layers", "4", "--minutes", "2.5"])
    assert (options.only, options.layers, options.minutes, options.tokens) == ("generate", 4, 2.5, 128)
    assert gpu.parse(["--model", "smollm2-135m"]).layers == 30
    for wrong in (["--tokens", "1"], ["--layers", "0"], ["--minutes", "0"], ["--only", "nothing"]):
        with pytest.raises(SystemExit):
            gpu.parse(wrong)


def test_table_aligns_numbers():
    lines = gpu.table(("m", "time"), [(4096, 1.23456), (16, 1234.5)]).splitlines()
    assert lines == ["   m      time", "4096      1.23", "  16  1.23e+03"]


def test_random_linear_keeps_the_size_of_its_input():
    linear = gpu.random_linear(96, 256, torch.device("cpu"), torch.float32)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    dense = truth.dense_weight(linear.codes, linear.su, linear.sv)
    torch.testing.assert_close(linear(x).double(), x.double() @ dense.T, rtol=1e-4, atol=1e-4)
    assert 0.3 < linear(x).std() / x.std() < 3


SMALL = {
    **gpu.MODELS["llama-3-8b"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_hidden_layers": 2,
}


def test_every_linear_of_the_blocks_is_replaced_and_the_model_generates():
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SMALL, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert gpu.quantize_randomly(model) == 14
    assert sum(isinstance(module, QuipLinear) for module in model.modules()) == 14
    assert type(model.lm_head) is torch.nn.Linear
    ids = torch.tensor([[1, 2, 3]])
    new = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    assert new.shape == (1, 7)


def test_values_are_checked_and_a_wrong_layer_is_an_error(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    assert 0 < gpu.check_values((96, 128)) < 1e-2
    forward = QuipLinear.forward
    monkeypatch.setattr(QuipLinear, "forward", lambda self, x: forward(self, x) * (1.125 if len(x) == 16 else 1))
    with pytest.raises(RuntimeError, match="e8p is wrong here for 16 vectors: relative error 1.2"):
        gpu.check_values((96, 128))


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """The CPU stands for a GPU on which everything takes one microsecond; results go to a folder of their own."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    from quip_kernels.gpu import quantize, tune

    monkeypatch.setattr(tune, "SECONDS", tune.SECONDS)  # what the benchmark sets is taken back
    properties = SimpleNamespace(name="Test GPU", multi_processor_count=3, total_memory=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(quantize, "quantize", lambda x, digits: x)
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks").mkdir()
    for name, value in {
        "DEVICE": torch.device("cpu"),
        "SHAPES": ((48, 64),),
        "EXPERT_SHAPES": ((16, 24),),
        "EXPERTS": 6,
        "ROTATED_BYTES": 1 << 12,
        "MODELS": {"llama-3-8b": SMALL, "smollm2-135m": SMALL},
        "set_backend": lambda name: None,
        "copy_bandwidth": lambda: 1e9,
        "check_values": lambda: 1e-6,
        "seconds": lambda calls: 1e-6,
    }.items():
        monkeypatch.setattr(gpu, name, value)
    speeds = iter([{"tokens_per_second": speed, "first_calls_seconds": 60.0} for speed in (100.0, 80.0, 250.0, 40.0)])
    monkeypatch.setattr(gpu, "tokens_per_second", lambda model, tokens, compiled: next(speeds))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    return machine.RESULTS / "gpu.json"


def test_the_whole_run(fake_gpu, capsys):
    assert gpu.main(["--layers", "1", "--tokens", "2"]) == 0
    results = json.loads(fake_gpu.read_text())
    assert (results["gpu"], results["copy_bandwidth"]) == ("Test GPU", 1e9)
    assert 0 < results["seconds"] < 420
    assert [layer["bits"] for layer in results["layers"]] == [2, 3, 4]
    assert [layer["packed_bytes"] for layer in results["layers"]] == [48 * 64 * bits // 8 for bits in (2, 3, 4)]
    layer = results["layers"][0]
    # codes of 48·64 weights in one microsecond, at 1 GB/s
    assert layer["matvec_exact_share"] == pytest.approx(48 * 64 / 4 / 1000)
    assert layer["layer_speedup"] == 1
    experts = [(row["m"], row["n"], row["tokens"], row["speedup"]) for row in results["experts"]]
    assert experts == [(16, 24, 1, 1.0), (16, 24, 16, 1.0)]
    assert results["generate"]["speedup"] == {"eager": 2.5, "compiled": 0.5}
    assert results["generate"]["replaced"] == 7
    assert [row["rows"] for row in results["quantize"]] == [[32, 16, 16], [32], [48, 48], [32]]
    assert all(0 < row["relative_error"] < 0.2 and row["seconds"] > 0 for row in results["quantize"])
    printed = capsys.readouterr().out
    assert "matvec_exact_share" in printed
    assert "2.50 times" in printed


def test_both_sides_of_the_experts_compute_all_tokens(fake_gpu, monkeypatch):
    rows = []

    def seconds(calls):
        found = [call() for call in calls]
        rows.append({len(y) if isinstance(y, torch.Tensor) else sum(map(len, y)) for y in found})
        return float(len(rows))

    monkeypatch.setattr(gpu, "seconds", seconds)
    result = []
    gpu.measure_experts(result, float("inf"))
    assert rows == [{4}, {4}, {64}, {64}]  # of one token and of 16, four experts each
    assert [row["speedup"] for row in result] == [2.0, 4 / 3]


def test_what_does_not_fit_into_the_time_is_left_out_and_named(fake_gpu, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def taking(seconds, result):
        now[0] += seconds
        return result

    layer = dict.fromkeys(gpu.COLUMNS, 1.0)
    monkeypatch.setattr(gpu, "measure_layer", lambda m, n, bits, bandwidth: taking(40, {**layer, "bits": bits}))
    monkeypatch.setattr(gpu, "tokens_per_second", lambda *_: taking(70, {"tokens_per_second": 100.0}))
    assert gpu.main(["--layers", "1", "--tokens", "2", "--minutes", "2"]) == 0
    results = json.loads(fake_gpu.read_text())
    # two shapes begin before 0.4 · 120 seconds and end after the time for rounding; the quantized model would end too late
    assert [layer["bits"] for layer in results["layers"]] == [2, 3]
    assert results["quantize"] == []
    assert results["generate"]["dense"] == {kind: {"tokens_per_second": 100} for kind in ("eager", "compiled")}
    assert results["generate"]["quip"] == {}
    assert results["seconds"] == 220
    printed = capsys.readouterr().out
    assert "no time is left for [48, 64] with 4 bits" in printed
    assert "no time is left for the quantized model" in printed


def test_a_part_that_fails_leaves_the_others(fake_gpu, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    first = gpu.measure_layer
    monkeypatch.setattr(gpu, "measure_layer", lambda m, n, bits, bandwidth: (fail if bits == 3 else first)(m, n, bits, 1e9))
    monkeypatch.setattr(gpu, "check_values", fail)
    assert gpu.main(["--layers", "1", "--tokens", "2"]) == 1
    results = json.loads(fake_gpu.read_text())
    assert results["errors"] == dict.fromkeys(("values", "layers"), "OutOfMemoryError: no memory")
    assert [layer["bits"] for layer in results["layers"]] == [2]
    assert results["generate"]["speedup"] == {"eager": 2.5, "compiled": 0.5}
    assert len(results["quantize"]) == 4
    assert "FAILED layers: OutOfMemoryError" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "tokens_per_second", fail)
    assert gpu.main(["--layers", "1", "--tokens", "2", "--only", "generate"]) == 1
    found = json.loads(fake_gpu.read_text())["generate"]
    assert (found["model"], found["dense"], found["quip"]) == ("llama-3-8b", {}, {})


FAKE_PYTHON = """#!/bin/bash
echo "$*" >> {log}
case "$*" in
*--collect-only*) for test in a[1] a[2] b; do echo "kernels/tests/test_gpu.py::test_$test"; done ;;
*test_b*) echo 'E  wrong'; exit 1 ;;
*gpu_summary*) exec {python} "$@" ;;
*"--only layers"*)
    echo '{{"gpu": "Test GPU", "errors": {{"copy": "no memory"}}}}' > "$BENCHMARK_RESULTS/gpu-layers.json"
    exit 1
    ;;
esac
"""


@pytest.fixture
def run_script(tmp_path):
    """Run benchmarks/gpu_run.sh with a Python that only notes how it is called; its calls, and the finished process."""
    log, program = tmp_path / "calls", tmp_path / "python"
    program.write_text(FAKE_PYTHON.format(log=log, python=sys.executable))
    program.chmod(0o755)

    def run(*arguments):
        log.write_text("")
        environment = os.environ | {"PYTHON": str(program), "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=300)
        return log.read_text().splitlines(), done

    return run


def test_the_script_does_every_step_whatever_fails(run_script, tmp_path):
    calls, done = run_script()
    assert done.returncode == 2, done.stdout + done.stderr
    starts = ["-m transformers_quip doctor", "-m pytest --collect-only", "-m pytest -q", "-m pytest -q"]
    starts += [
        "benchmarks/gpu.py --only " + part for part in ("layers", "experts", "generate", "generate", "quantize", "quantize")
    ]
    starts += ["benchmarks/gpu_summary.py"]
    assert [call[: len(start)] for call, start in zip(calls, starts, strict=True)] == starts
    assert [call.split()[-1] for call in calls[2:4]] == [f"kernels/tests/test_gpu.py::test_{name}" for name in "ab"]
    assert "FAILED with code 1" in (tmp_path / "out" / "gpu-test-2.log").read_text()
    assert "FAILED copy: no memory" in (tmp_path / "out" / "gpu-summary.log").read_text()
    assert "2 failed" in done.stdout


def test_the_script_ends_in_time(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMIT", "17")  # two seconds, and those for the summary
    calls, _ = run_script("--from", "layers")
    assert [call.split()[0] for call in calls] == ["benchmarks/gpu_summary.py"]
    assert "no time is left for" in (tmp_path / "out" / "gpu-layers.log").read_text()


def test_the_script_begins_at_a_later_step(run_script):
    calls, done = run_script("--from", "quantize")
    assert [call.split()[0] for call in calls] == ["benchmarks/gpu.py", "benchmarks/gpu.py", "benchmarks/gpu_summary.py"]
    for wrong in (["--from", "nothing"], ["--from"], ["now"]):
        calls, done = run_script(*wrong)
        assert (calls, done.returncode) == ([], 2)
        assert "usage: benchmarks/gpu_run.sh" in done.stderr


def test_a_rehearsal_runs_every_step_through_the_stand_in(run_script, tmp_path):
    calls, done = run_script("--rehearse", "--from", "layers")
    assert done.returncode == 1
    assert {call.split()[0] for call in calls} == {"benchmarks/rehearse.py"}
    assert calls[0] == "benchmarks/rehearse.py benchmarks/gpu.py --only layers --minutes 1.2 --name gpu-layers"
    assert calls[-1] == "benchmarks/rehearse.py benchmarks/gpu_summary.py"
    assert f"results go to {tmp_path / 'out'}" in done.stdout


def test_a_rehearsal_computes_by_the_kernels(tmp_path):
    pytest.importorskip("triton", reason="the package triton is not installed")
    paths = [str(SCRIPT.parents[1] / "kernels" / "tests"), *sys.path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "BENCHMARK_RESULTS": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SCRIPT.with_name("rehearse.py"))]
    arguments = ["benchmarks/gpu.py", "--only", "experts", "--name", "gpu-experts"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-experts.json").read_text())
    assert found["gpu"] == "no GPU: Triton's interpreter"
    assert found["relative_error"] < 1e-2
    assert [(row["m"], row["n"], row["tokens"]) for row in found["experts"]] == [(16, 24, 1), (16, 24, 16)]
    done = subprocess.run([*command, "other.py"], env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (2, "")


def test_the_summary_compares_with_the_targets(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    assert gpu_summary.main() == 1
    layer = dict.fromkeys(gpu.COLUMNS, 1.0) | {"bits": 2, "m": 4096, "n": 14336, "matvec_int8_share": 0.7}
    small = layer | {"m": 64, "matvec_int8_share": 0.1}
    content = {"gpu": "Test GPU", "relative_error": 0.003, "layers": [small, layer]}
    (tmp_path / "gpu-layers.json").write_text(json.dumps(content))
    content = {"gpu": "Test GPU", "quantize": [{"seconds": 1.25}, {"seconds": 2.0}]}
    (tmp_path / "gpu-quantize-8b.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert gpu_summary.main() == 0
    printed = capsys.readouterr().out
    assert "matvec_int8_share: 0.70 at the least, 0.8 is wanted" in printed
    assert "one block is rounded in 3.25 s" in printed
