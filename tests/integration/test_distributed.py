"""Training in two processes on a CPU: the losses are those of one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration import two_processes
from transformers_quip.hf.patches import install
from transformers_quip.nn.collectives import as_bytes

pytest.importorskip("peft", reason="peft is not installed")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(quantized, tmp_path_factory):
    """What both processes found: a list of two dictionaries."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", two_processes.__file__, quantized("llama"), str(folder)]
    paths = [str(ROOT), str(ROOT / "kernels/torch-ext"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(quantized):
    """The losses of one process with all rows."""
    losses = two_processes.train(two_processes.adapted(quantized("llama")), two_processes.rows())
    assert losses[2] < losses[1] < losses[0]
    return losses


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "accelerate"])
def test_two_processes_train_as_one_with_the_whole_batch(found, alone, way):
    if way == "fsdp2" and found[0][way] is None:
        pytest.skip("this release of PyTorch cannot shard parameters of integers")
    mean = [sum(pair) / 2 for pair in zip(found[0][way], found[1][way], strict=True)]
    assert mean == pytest.approx(alone, rel=1e-5)
    assert found[0][way] != found[1][way]  # each has rows of its own


def test_trainer_in_two_processes(found, alone):
    if found[0]["trainer"] is None:
        pytest.skip("Trainer needs a newer accelerate")
    # what Trainer logs is the mean over the processes, rounded to four digits or more
    assert found[0]["trainer"] == pytest.approx(alone, rel=1e-4)


def test_ddp_gives_all_processes_the_codes_of_the_first(found):
    assert [one["codes differed"] for one in found] == [False, True]
    assert [one["codes differ after DDP"] for one in found] == [False, False]


@pytest.mark.parametrize("dtype", ["torch.int16", "torch.uint16"])
def test_types_that_gloo_does_not_have_are_broadcast(found, dtype):
    assert [one[dtype] for one in found] == [[300, 301, 302, 303, 304, 305]] * 2


def test_as_bytes_shares_memory_and_leaves_other_types_alone():
    codes = torch.nn.Parameter(torch.tensor([[1, 256], [-1, 0]], dtype=torch.int16), requires_grad=False)
    assert as_bytes(codes).tolist() == [1, 0, 0, 1, 255, 255, 0, 0]
    as_bytes(codes)[0] = 7
    assert codes[0, 0] == 7
    for other in (torch.zeros(2), torch.zeros(2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int16).T[:1]):
        assert as_bytes(other) is other


def test_installing_twice_wraps_once():
    install()
    wrapped = torch.distributed.broadcast
    install()
    assert torch.distributed.broadcast is wrapped


def test_fsdp1_is_refused_with_the_ways_out(quantized):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = two_processes.adapted(quantized("llama"))
    for part in (model, model.base_model.model.model.layers[0], model.base_model.model.model.layers[0].mlp.up_proj):
        with pytest.raises(ValueError, match=r"\(FSDP1\) joins all parameters .*Use FSDP2 .*DistributedDataParallel"):
            FullyShardedDataParallel(part)
    with pytest.raises(Exception) as error:  # no process group, no accelerator: what PyTorch itself says
        FullyShardedDataParallel(torch.nn.Linear(2, 2))
    assert "FSDP1" not in str(error.value)
