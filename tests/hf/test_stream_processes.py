"""Several processes (Gloo, CPU) quantize a model to the bytes that one process makes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import transformers_quip
from tests.hf import stream_processes
from tests.models import save_tiny_model
from transformers_quip.calibration import processes
from transformers_quip.quantize.state import FOLDER

ROOT = Path(__file__).resolve().parents[2]


def launch(count, *arguments):
    paths = [str(ROOT), str(ROOT / "kernels/torch-ext"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = ["--nproc-per-node", count, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, stream_processes.__file__, *arguments]
    command = list(map(str, command))
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=400, check=False)


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).iterdir())
        if path.suffix in (".safetensors", ".json")
    }


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("dense"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_tiny_model("qwen2_moe", tmp_path_factory.mktemp("mixture"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", ["mixed", "self and average"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_bytes_of_one_process(dense, tmp_path, way, count):
    done = launch(count, dense, tmp_path / "together", way)
    assert done.returncode == 0, done.stderr[-4000:]
    transformers_quip.quantize(dense, tmp_path / "alone", stream_processes.config(way))
    assert hashes(tmp_path / "together") == hashes(tmp_path / "alone")
    assert not (tmp_path / "together" / FOLDER).exists()


@pytest.mark.parametrize("budget", ["", "40000"], ids=["one pass", "several passes"])
def test_experts(mixture, tmp_path, monkeypatch, budget):
    """Also where their Hessians need several passes over a block, because few fit into memory at once."""
    monkeypatch.setenv("BUDGET", budget)
    done = launch(2, mixture, tmp_path / "together", "experts")
    assert done.returncode == 0, done.stderr[-4000:]
    transformers_quip.quantize(mixture, tmp_path / "alone", stream_processes.config("experts"))
    assert hashes(tmp_path / "together") == hashes(tmp_path / "alone")


def test_a_process_that_dies_ends_all_and_another_number_resumes(dense, tmp_path):
    started = time.monotonic()
    done = launch(2, dense, tmp_path / "together", "killed")
    assert done.returncode != 0
    assert time.monotonic() - started < 90  # with the time to start
    assert [path.name for path in (tmp_path / "together").iterdir()] == [FOLDER]
    finished = json.loads((tmp_path / "together" / FOLDER / "state.json").read_text())["finished"]
    assert list(finished) == ["model.layers.0."]
    done = launch(3, dense, tmp_path / "together", "mixed")
    assert done.returncode == 0, done.stderr[-4000:]
    transformers_quip.quantize(dense, tmp_path / "alone", stream_processes.config("mixed"))
    assert hashes(tmp_path / "together") == hashes(tmp_path / "alone")


def test_what_several_processes_cannot_do(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    ids = {"dataset": stream_processes.IDS}
    for options, message in (
        ({"dataset": None, "bits": 4}, "dataset=None is for one process"),
        ({**ids, "tune": "blocks"}, "tune is for one process here"),
    ):
        with pytest.raises(ValueError, match=message):
            transformers_quip.quantize(dense, tmp_path / "out", transformers_quip.QuipConfig(**options))


def test_dealing():
    """Graham's rule, by hand: 5 | 4, then 3 to the second, 3 to the first."""
    found = {}
    original = processes.count
    try:
        processes.count = lambda: 2
        found = processes.dealt({"a": 3, "b": 5, "c": 4, "d": 3})
    finally:
        processes.count = original
    assert found == {"b": 0, "c": 1, "a": 1, "d": 0}
