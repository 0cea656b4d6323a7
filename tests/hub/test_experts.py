"""A mixture of experts, pushed in shards and loaded from the Hub: the stacked codes keep their names and their bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from tests.hub import client as run
from tests.models import save_tiny_model
from transformers_quip import QuipConfig
from transformers_quip.checkpoints.headers import read_headers

IDS = [[5, 6, 7, 8, 9, 10]]


def _tensors(files: list[bytes]) -> dict[str, torch.Tensor]:
    """The tensors of all shards; shards, and the name of Mixtral's mixture, differ between versions of Transformers."""
    return {name.replace(".block_sparse_moe.", ".mlp."): tensor for raw in files for name, tensor in load(raw).items()}


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe"])
def test_stacked_codes_arrive_and_come_back(arch, hub, client, tmp_path):
    repo = f"owner/tiny-{arch}-2bit"
    save_tiny_model(arch, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=QuipConfig(dataset=None), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "quantized", max_shard_size="40KB")
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits
    client(run.push, str(tmp_path / "quantized"), repo, max_shard_size="40KB")
    stored = hub.files(repo)
    shards = [path.read_bytes() for path in Path(tmp_path / "quantized").glob("*.safetensors")]
    pushed = [raw for name, raw in stored.items() if name.endswith(".safetensors")]
    assert min(len(shards), len(pushed)) > 1
    before, after = (_tensors(files) for files in (shards, pushed))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    index = json.loads((tmp_path / "quantized" / "model.safetensors.index.json").read_text())["weight_map"]
    stacks = [name for name in index if name.endswith("_codes")]
    sparse = {"mixtral": 2, "qwen2_moe": 1}  # layers with experts
    assert len(stacks) == 2 * sparse[arch]
    experts = model.config.num_local_experts if arch == "mixtral" else model.config.num_experts
    for name in stacks:
        assert read_headers([tmp_path / "quantized" / index[name]])[name].shape[0] == experts
    torch.testing.assert_close(torch.tensor(client(run.logits, repo, IDS)), expected, atol=2e-5, rtol=1e-4)
