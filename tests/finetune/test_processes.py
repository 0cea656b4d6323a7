"""Tuning in two processes (Gloo, CPU) gives what one process gives with the whole batch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.finetune import two_processes
from tests.finetune.conftest import IDS, pair
from tests.models import save_tiny_model, tiny_tokenizer
from transformers_quip import QuipConfig, cli
from transformers_quip.finetune import processes, record, tune_vectors

ROOT = Path(__file__).resolve().parents[2]


def launch(*command) -> subprocess.CompletedProcess:
    paths = [str(ROOT), str(ROOT / "kernels/torch-ext"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, env=os.environ | variables, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found: a list of two dictionaries."""
    folder = tmp_path_factory.mktemp("two")
    options = ["--nproc-per-node", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = launch("-m", "torch.distributed.run", *options, two_processes.__file__, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def alone():
    return two_processes.tune()


@pytest.mark.parametrize("way", [*two_processes.WAYS, "resumed", "resumed again"])
def test_two_processes_tune_as_one(found, alone, way):
    assert alone["kept"]
    for one in (process[way] for process in found):
        for key in ("train", "held_out", "before", "after"):
            assert one[key] == pytest.approx(alone[key], rel=1e-4), key
        for name, vector in alone["vectors"].items():
            assert one["vectors"][name] == pytest.approx(vector, rel=2e-3, abs=1e-4), name
    assert found[0][way] == found[1][way]


def test_the_first_writes_the_state(found):
    assert [one["files"] for one in found] == [["tuning.safetensors"]] * 2


def test_sharing_out(found):
    assert [one["mine"] for one in found] == [[1, 2, 3], [4, 5, 5]]
    assert [one["joined"] for one in found] == [[1, 2, 3, 4, 5]] * 2
    assert [one["from first"] for one in found] == ["first", "first"]
    assert [one["marker was there"] for one in found] == [False, True]


def test_a_process_that_was_started_alone():
    assert processes.join() is None
    assert processes.is_first()
    assert processes.mine([1, 2, 3]) == [1, 2, 3]
    assert processes.from_first(lambda: 7) == processes.first_before_others(lambda: 7) == 7


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("false", False), ("true", True), ("1", True)])
def test_accelerate_asks_for_fsdp(monkeypatch, value, expected):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if value is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    assert processes.wants_sharding() is expected


def test_autocast_around_it_changes_nothing():
    results = []
    for enabled in (False, True):
        dense, model = pair("llama")
        teacher = record(dense, IDS[:21], progress=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            tune_vectors(model, teacher, two_processes.OPTIONS, progress=False)
        results.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_command_under_accelerate(tmp_path):
    """The first process writes a model that is what one process writes."""
    dense, quantized, text = tmp_path / "dense", tmp_path / "quantized", tmp_path / "text.txt"
    save_tiny_model("llama", dense)
    tiny_tokenizer().save_pretrained(dense)
    config = QuipConfig(dataset=IDS[:8], sequence_length=20, num_samples=8, batch_size=4, refinement_sweeps=1)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(quantized)
    tiny_tokenizer().save_pretrained(quantized)
    text.write_text("\n\n".join(f"the {n}th of many short texts about nothing" for n in range(40)))
    options = ["--dense", dense, "--dataset", text, "--num-samples", 16, "--sequence-length", 16, "--held-out", 6]
    options += ["--epochs", 4, "--learning-rate", 0.02, "--dtype", "float32", "--json"]
    results = []
    has_fsdp2 = "fsdp_version" in {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
    sharded = [["--use_fsdp", "--fsdp_version", 2]] if has_fsdp2 else []  # earlier releases have FSDP1 only
    for count, device in ((1, []), *((2, kind) for kind in (["--cpu"], *sharded))):
        out, state = tmp_path / f"out{len(results)}", tmp_path / f"state{len(results)}"
        program = ["-m", "transformers_quip", "tune", quantized, out, "--state", state, *options]
        launcher = ["-m", "accelerate.commands.launch", "--num_processes", 2, "--num_machines", 1, *device]
        done = launch(*([] if count == 1 else launcher), *program)
        assert done.returncode == 0, done.stderr[-4000:]
        results.append((json.loads(done.stdout[done.stdout.index("{") :]), load_file(out / "model.safetensors")))
        assert {path.name for path in state.iterdir()} == {"teacher.bin", "teacher.json", "tuning.safetensors"}
    (alone, expected), *others = results
    assert alone["kept"]
    for found, tensors in others:
        assert found["held_out_after"] == pytest.approx(alone["held_out_after"], rel=0.02)
        for name, value in tensors.items():
            torch.testing.assert_close(value.float(), expected[name].float(), rtol=0.02, atol=0.02, msg=name)


def test_several_processes_need_a_state(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(processes, "join", lambda: object())
    for name, content in (("model", {"quantization_config": {"quant_method": "quip"}}), ("dense", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    command = ["tune", str(tmp_path / "model"), str(tmp_path / "out"), "--dense", str(tmp_path / "dense")]
    assert cli.main(command) == cli.USAGE
    assert "--state names a folder" in capsys.readouterr().err
