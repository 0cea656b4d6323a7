"""Expert parallelism: two processes hold half of the codes each, and compute what one computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

from transformers_quip.hf.parallel import update_plan

SCRIPT = Path(__file__).with_name("two_expert_processes.py")
needs_plans = pytest.mark.skipif(
    not hasattr(HfQuantizer, "update_parallel_plan"), reason="this Transformers has no plans that a quantizer can change"
)


@needs_plans
def test_two_processes_compute_the_same(quantized, tmp_path):
    folder = quantized("mixtral")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    done = subprocess.run([*command, folder, tmp_path], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-4, atol=1e-4)
        assert found["experts"] == 2
        assert {shape[0] for shape in found["shards"].values()} == {2}
        assert found["shards"]["gate_up_proj_codes"] == [2, 192, 8]
        assert [text for text in found["warned"] if "Tensor parallelism cannot split the codes" in text]


@needs_plans
def test_the_plans(quantized):
    model = AutoModelForCausalLM.from_pretrained(quantized("mixtral"))
    kind = "model.layers.*.mlp.experts"
    tensors = {f"{kind}.{stack}_{key}" for stack in ("gate_up_proj", "down_proj") for key in ("codes", "su", "sv")}
    experts = {f"{kind}.gate_up_proj": "grouped_gemm", f"{kind}.down_proj": "grouped_gemm", kind: "ep_dispatch_experts"}
    update_plan(model, experts)
    assert {key for key, style in experts.items() if style == "grouped_gemm"} >= tensors
    assert experts[kind] == "ep_dispatch_experts"
    tensor = {f"{kind}.gate_up_proj": "packed_colwise", f"{kind}.down_proj": "rowwise", kind: "moe_tp_experts"}
    tensor |= {"model.layers.*.self_attn.q_proj": "colwise", "lm_head": "colwise_gather_output"}
    update_plan(model, tensor)
    assert tensor == {"model.layers.*.self_attn.q_proj": "quip_colwise", "lm_head": "colwise_gather_output"}
    update_plan(model, None)
