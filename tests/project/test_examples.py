"""The examples, run as a user runs them, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent

pytest.importorskip("gensim")


@pytest.fixture
def folder(tmp_path):
    """A dense tiny Llama that reads windows of 512 tokens, with its tokenizer."""
    path = tmp_path / "tiny"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run(*arguments):
    command = [sys.executable, *map(str, arguments)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels/torch-ext'}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("dataset", ["self", "none"])
def test_quantize_on_load(folder, dataset):
    options = ["--dataset", dataset, "--num-samples", 4, "--sequence-length", 64, "--windows", 1]
    output = run(ROOT / "examples/01_quantize_on_load.py", folder, *options)
    saved = folder.with_name("tiny-quip-2bit")
    assert "logits of the reloaded model: identical" in output
    assert re.search("it writes: ['\"]The three most important inventions", output)
    assert json.loads((saved / "config.json").read_text())["quantization_config"]["quant_method"] == "quip"
    assert not (saved / "probe.safetensors").exists()
    # on paper: 2 bits, and 32 bits for every input and output feature, over all linears of a block
    linears = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    bits = 2 + 32 * sum(m + n for m, n in linears) / sum(m * n for m, n in linears)
    assert float(re.search(r"linears: ([\d.]+)", output)[1]) == pytest.approx(bits, abs=5e-4)
    dense, packed = (float(size) for size in re.search(r"size on disk: ([\d.]+) MB -> ([\d.]+) MB", output).groups())
    assert packed < dense
