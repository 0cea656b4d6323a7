"""Transformers' tp_plan="auto": two processes hold a part of every linear, and compute what one computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

from tests.models import save_tiny_model
from transformers_quip import QuipConfig

SCRIPT = Path(__file__).with_name("two_tensor_processes.py")
MODULES = {
    "q_proj": {"incoherence": ["hadamard", "hadamard-16"]},  # blocks of outputs, with a bias
    "v_proj": {"bits": 4},
    "o_proj": {"codebook": "trellis:3inst:k2:qtip", "incoherence": ["hadamard-16", "hadamard"]},
    "down_proj": {"incoherence": ["hadamard/2", "hadamard"]},  # blocks of inputs
    "lm_head": {"bits": 4},
}


@pytest.mark.skipif(not hasattr(HfQuantizer, "update_parallel_plan"), reason="this Transformers has no plans to change")
def test_two_processes_compute_the_same(tmp_path):
    dense = save_tiny_model("qwen2", tmp_path / "dense", tie_word_embeddings=False)
    config = QuipConfig(bits=2, dataset=None, modules=MODULES, modules_to_not_convert=["layers.1.mlp.up_proj"])
    folder = tmp_path / "quantized"
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    done = subprocess.run([*command, folder, tmp_path], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(ids).logits
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, min_new_tokens=8)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-4, atol=1e-4)
        assert found["tokens"] == tokens.tolist()
        assert "have no gradients" in found["said"]
        attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
        shapes = found["shapes"]
        # rows: half of the codes, all of su and sv
        assert [shapes[f"{attention}.k_proj.{name}"] for name in ("codes", "su", "sv")] == [[16, 8], [64], [32]]
        assert [shapes[f"{mlp}.gate_proj.{name}"] for name in ("codes", "su", "sv")] == [[48, 8], [64], [96]]
        assert [shapes[f"{attention}.o_proj.{name}"] for name in ("codes", "su", "sv")] == [[32, 8], [64], [64]]
        assert [shapes[f"lm_head.{name}"] for name in ("codes", "codes_residual", "sv")] == [[64, 8], [64, 8], [128]]
        # blocks: half of sv or su, too
        assert [shapes[f"{attention}.q_proj.{name}"] for name in ("codes", "su", "sv")] == [[32, 8], [64], [32]]
        assert [shapes[f"{mlp}.down_proj.{name}"] for name in ("codes", "su", "sv")] == [[64, 6], [48], [64]]
        # left dense
        assert shapes["model.layers.1.mlp.up_proj.weight"] == [48, 64]
