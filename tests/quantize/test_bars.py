"""The progress bars of both ways to quantize: block, module, error, mean, and how many are left."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model, tiny_ids
from transformers_quip import QuipConfig

_LINE = re.compile(
    r"Block (\d) of (\d)(?:, \d+ s left)?: .* (\d+)/(\d+) .*, (\w+): relative error ([\d.]+), mean ([\d.]+)\]"
)


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "while loading"])
def test_a_line_for_every_layer(tmp_path, capfd, monkeypatch, calibrated):
    # all of every line, however narrow the terminal is
    every_line = functools.partialmethod(tqdm.__init__, mininterval=0, ncols=200)
    monkeypatch.setattr(tqdm, "__init__", every_line)
    folder = save_tiny_model("llama", tmp_path)
    dataset = tiny_ids(4, 16, seed=5) if calibrated else None
    config = QuipConfig(dataset=dataset, num_samples=4, sequence_length=16, refinement_sweeps=1)
    capfd.readouterr()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    lines = [match.groups() for match in map(_LINE.search, re.split(r"[\r\n]", capfd.readouterr().err)) if match]
    last = {int(number): line for line in lines for number in [line[2]]}
    assert max(last) == 14
    assert {line[3] for line in lines} == {"14"}
    block, blocks, *_, mean = last[14]
    assert block == blocks == "2"
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if calibrated:
        errors = [record["relative_error"] for record in model.hf_quantizer.report.modules]
    else:  # ‖W - Ŵ‖² / ‖W‖², from the dense weights
        pairs = [(dense.get_submodule(n).weight, m.dequantize()) for n, m in model.named_modules() if hasattr(m, "codes")]
        errors = [((w - q).norm() ** 2 / w.norm() ** 2).item() for w, q in pairs]
    assert len(errors) == 14
    assert float(mean) == pytest.approx(sum(errors) / 14, abs=2e-3)
    assert copy.deepcopy(model) is not model  # it holds no bar
