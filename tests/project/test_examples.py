"""The examples, run as a user runs them, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.loopback_hub import TOKEN, LoopbackHub
from tests.models import tiny_model, tiny_tokenizer
from transformers_quip import QuipConfig

ROOT = Path(__file__).resolve().parent.parent.parent

pytest.importorskip("gensim")


@pytest.fixture
def folder(tmp_path):
    """A dense tiny Llama that reads windows of 512 tokens, with its tokenizer."""
    path = tmp_path / "tiny"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def environment(**variables):
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels/torch-ext'}", "OMP_NUM_THREADS": "1", **variables}


def run(*arguments, variables=()):
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(**dict(variables)))
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("dataset", ["self", "none"])
def test_quantize_on_load(folder, dataset):
    options = ["--dataset", dataset, "--num-samples", 4, "--sequence-length", 64, "--windows", 1]
    alone = shutil.copy(ROOT / "examples/01_quantize_on_load.py", folder.parent / "alone.py")  # it needs no other file
    output = run(alone, folder, *options)
    saved = folder.with_name("tiny-quip-2bit")
    assert "logits of the reloaded model: identical" in output
    assert ("KL divergence to the dense model" in output) == (dataset != "none")
    assert re.search("it writes: ['\"]The three most important inventions", output)
    assert json.loads((saved / "config.json").read_text())["quantization_config"]["quant_method"] == "quip"
    assert not (saved / "probe.safetensors").exists()
    # on paper: 2 bits, and 32 bits for every input and output feature, over all linears of a block
    linears = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    bits = 2 + 32 * sum(m + n for m, n in linears) / sum(m * n for m, n in linears)
    assert float(re.search(r"linears: ([\d.]+)", output)[1]) == pytest.approx(bits, abs=5e-4)
    dense, packed = (float(size) for size in re.search(r"size on disk: ([\d.]+) MB -> ([\d.]+) MB", output).groups())
    assert packed < dense


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A quantized tiny Llama with its tokenizer."""
    root = tmp_path_factory.mktemp("examples")
    tiny_model("llama", max_position_embeddings=512).save_pretrained(root / "tiny")
    model = AutoModelForCausalLM.from_pretrained(root / "tiny", quantization_config=QuipConfig(dataset=None))
    model.save_pretrained(root / "tiny-2bit")
    tiny_tokenizer().save_pretrained(root / "tiny-2bit")
    return root / "tiny-2bit"


def test_push_and_pull(quantized, tmp_path):
    with LoopbackHub() as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        variables["HF_HOME"] = str(tmp_path)
        script = ROOT / "examples/02_push_and_pull.py"
        output = run(script, quantized, "owner/tiny-2bit", "--private", "--shard-size", "40KB", variables=variables)
        assert hub.repos["owner/tiny-2bit"].private
        shards = [name for name in hub.files("owner/tiny-2bit") if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert all(name in output for name in shards)
    assert "every byte is the same" in output
    assert "logits: identical" in output


def test_load_community_checkpoint(golden, tmp_path):
    output = run(ROOT / "examples/03_load_community_checkpoint.py", golden / "qs_E8P12_t128", tmp_path / "native")
    assert "logits of the native copy: identical" in output
    config = json.loads((tmp_path / "native/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quip"
    assert config["codebook"] == "e8p"


@pytest.mark.parametrize("begin", ["zero", "error"])
def test_lora(quantized, folder, begin):
    dense = ["--dense", folder] if begin == "error" else []
    output = run(ROOT / "examples/04_lora_on_two_bits.py", quantized, "--steps", 20, *dense)
    first, *_, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", output))
    assert last < first - 0.5
    assert "reloaded: the same logits" in output
    assert (quantized.with_name("tiny-2bit-lora") / "adapter_model.safetensors").exists()


def test_compare_methods(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps for a while. " * 8)
    options = ["--text", text, "--num-samples", 4, "--sequence-length", 64]
    output = run(ROOT / "examples/05_compare_methods.py", folder, *options)
    errors = {line[:30].strip(): float(line[41:57]) for line in output.splitlines() if line.startswith(("nearest", "LDLQ"))}
    assert len(errors) == 5
    assert errors["LDLQ, Hadamard, 10 sweeps"] < errors["LDLQ, Hadamard"] < errors["nearest, Hadamard"]


def test_serve_with_pipeline(quantized):
    command = [sys.executable, ROOT / "examples/06_serve_with_pipeline.py", quantized, "--port", 0, "--requests", 2]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    line = process.stdout.readline()
    url = line.split()[-1]
    assert url.startswith("http://127.0.0.1:"), line
    body = json.dumps({"prompt": "Two bits", "max_new_tokens": 3}).encode()
    reply = json.load(urllib.request.urlopen(urllib.request.Request(url, body)))
    model = AutoModelForCausalLM.from_pretrained(quantized)
    ids = tiny_tokenizer()("Two bits", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=3, do_sample=False)[0, 8:]
    assert reply["text"] == tiny_tokenizer().decode(written, skip_special_tokens=True)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(url, b"{}"))
    assert process.wait(timeout=60) == 0
    process.communicate()


def test_generate_on_a_gpu_also_runs_on_a_cpu(quantized):
    output = run(ROOT / "examples/08_generate_on_a_gpu.py", quantized, "--tokens", 6, "--any-device")
    assert re.search(r"compiled, static cache: [\d.]+ tokens/s, after [\d.]+ s for the first call", output)
    assert "the same tokens: yes" in output


def test_choose_bits(folder):
    script = ROOT / "examples/07_choose_bits.py"
    output = run(script, folder, "--memory", "1MB", "--context", 16, "--dtype", "float32")
    # on paper: e8p's codes, su and sv in 32 bits, and the rest of the model
    linears = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    packed = 2 * sum(m * n / 4 + 4 * (m + n) for m, n in linears)
    dense = 4 * (2 * 128 * 64 + 5 * 64)
    cache = 2 * 2 * 2 * 16 * 2 * 16
    row = next(line for line in output.splitlines() if line.startswith("   2  e8p "))
    assert f"{(packed + dense) / 1e6:.3f} MB" in row
    assert row.endswith("fits")
    assert "choose: QuipConfig(bits=4)" in output
    between = (packed + dense + 0.55 * sum(m * n for m, n in linears) * 2 / 8 + cache) / 1e3
    output = run(script, folder, "--memory", f"{between:.3f}kB", "--context", 16, "--dtype", "float32")
    assert "choose: QuipConfig(bits=2.5)" in output
    result = subprocess.run(
        [sys.executable, script, folder, "--memory", "1kB"], env=environment(), capture_output=True, text=True, check=False
    )
    assert "nothing fits into 0.001 MB" in result.stderr
