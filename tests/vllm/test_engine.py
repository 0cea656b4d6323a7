"""vLLM's engine and server with tiny quantized models: the tokens of Transformers' `generate`, in float32."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm runs these tests)")

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model, tiny_tokenizer
from tests.vllm.engine import TOKENS
from transformers_quip import QuipConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 9, 20, 33], [7, 8], [100, 99, 98, 97, 96, 95, 94]]
# every family of codebooks, different ones in the parts of a fused layer, and parts that stay dense
MODULES = {
    "k_proj": {"codebook": "e8p-rvq4"},
    "v_proj": {"codebook": "scalar3"},
    "o_proj": {"codebook": "trellis:mul1:k3:exl3", "incoherence": "hadamard-16"},
    "gate_proj": {"codebook": "trellis:3inst:k2:qtip"},
    "down_proj": {"codebook": "d4"},
    "lm_head": {"bits": 4},
    "embed_tokens": {"bits": 3},
}
RANK, SCALE, ADAPTED = 4, 2.0, {"self_attn.q_proj": (128, 128), "self_attn.v_proj": (64, 128), "mlp.down_proj": (128, 192)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    dense = save_tiny_model("llama", path / "dense", hidden_size=128, intermediate_size=192)
    config = QuipConfig(bits=2, dataset=None, modules=MODULES, modules_to_not_convert=["layers.1.mlp.up_proj"])
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(path / "quantized")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path / "quantized")
    return str(path / "quantized")


@pytest.fixture(scope="module")
def adapter(folder):
    """A LoRA adapter as PEFT saves it."""
    path = Path(folder).with_name("adapter")
    path.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK * SCALE, "bias": "none"}
    config |= {"target_modules": sorted(name.rpartition(".")[2] for name in ADAPTED), "base_model_name_or_path": folder}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for layer in range(2):
        for name, (rows, columns) in ADAPTED.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    save_file(tensors, path / "adapter_model.safetensors")
    return str(path)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Experts and a shared one, after a dense layer."""
    path = tmp_path_factory.mktemp("mixture")
    sizes = {"hidden_size": 128, "intermediate_size": 192}
    dense = save_tiny_model("qwen2_moe", path / "dense", num_key_value_heads=4, **sizes)
    config = QuipConfig(bits=4, dataset=None, modules={"experts.down_proj": {"codebook": "scalar3"}})
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(path / "quantized")
    return str(path / "quantized")


def expected(folder, adapter=None):
    """The tokens of Transformers; an adapter is added to the outputs of its modules by its formula."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        from safetensors.torch import load_file

        tensors = load_file(f"{adapter}/adapter_model.safetensors")
        for key in {key.rpartition(".lora_")[0] for key in tensors}:
            a, b = (tensors[f"{key}.lora_{side}.weight"] for side in "AB")
            module = model.get_submodule(key.removeprefix("base_model.model."))
            module.register_forward_hook(lambda m, args, y, a=a, b=b: y + SCALE * (args[0] @ a.T @ b.T))
    found = []
    for ids in PROMPTS:
        x = torch.tensor([ids])
        y = model.generate(
            x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        )
        found.append(y[0, len(ids) :].tolist())
    return found


def environment(**variables):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels/torch-ext")])
    names = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # vLLM would bind each rank to a NUMA node of its own
    return {**os.environ, **names, "VLLM_CPU_OMP_THREADS_BIND": "nobind", **variables}


def generated(folder, out, *options, **variables):
    command = [sys.executable, "-m", "tests.vllm.engine", folder, json.dumps(PROMPTS), str(out), *options]
    result = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(out.read_text())


ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_tokens_are_those_of_transformers(eager, folder, tmp_path):
    assert generated(folder, tmp_path / "out", f"enforce_eager={eager}", **ONE_PROCESS) == expected(folder)


def test_models_of_transformers_in_vllm(folder, tmp_path):
    """Architectures that vLLM does not have itself run Transformers' modules."""
    assert generated(folder, tmp_path / "out", "model_impl='transformers'", **ONE_PROCESS) == expected(folder)


def test_two_processes(folder, tmp_path):
    assert generated(folder, tmp_path / "out", "tensor_parallel_size=2") == expected(folder)


def test_experts(mixture, tmp_path):
    assert generated(mixture, tmp_path / "out", **ONE_PROCESS) == expected(mixture)


def test_an_adapter(folder, adapter, tmp_path):
    options = ["enable_lora=True", f"max_lora_rank={2 * RANK}", f"adapter={adapter!r}"]
    wanted = expected(folder, adapter)
    assert wanted != expected(folder)
    assert generated(folder, tmp_path / "out", *options, **ONE_PROCESS) == wanted


def test_the_server(folder):
    """The example: a chat, and completions at once."""
    command = [
        sys.executable,
        "examples/09_serve_with_vllm.py",
        folder,
        "--requests",
        "4",
        "--tokens",
        "8",
        "--port",
        "8765",
    ]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--kv-cache-memory-bytes", str(64 << 20)]
    result = subprocess.run([*command, *options], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-4000:]
    found = re.findall(r"^(chat|completion \d): ?(.*)$", result.stdout, re.MULTILINE)
    assert [name for name, _ in found] == ["chat", *(f"completion {number}" for number in range(1, 5))]
    assert re.search(r"4 completions, \d+ tokens in .* tokens per second", result.stdout)
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    x = tokenizer("What is the capital of France?", return_tensors="pt")
    y = model.generate(**x, do_sample=False, max_new_tokens=8)[0, x.input_ids.shape[1] :]
    assert dict(found)["chat"] == tokenizer.decode(y, skip_special_tokens=True).splitlines()[0]
