"""What of benchmarks/gpu.py runs without a GPU."""

from __future__ import annotations

import gpu
import pytest
import torch

from tests import truth
from transformers_quip import QuipLinear


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err


def test_options():
    options = gpu.parse(["--only", "generate", "--layers", "4", "--minutes", "2.5"])
    assert (options.only, options.layers, options.minutes, options.tokens) == ("generate", 4, 2.5, 128)
    for wrong in (["--tokens", "1"], ["--layers", "0"], ["--minutes", "0"], ["--only", "nothing"]):
        with pytest.raises(SystemExit):
            gpu.parse(wrong)


def test_table_aligns_numbers():
    lines = gpu.table(("m", "time"), [(4096, 1.23456), (16, 1234.5)]).splitlines()
    assert lines == ["   m      time", "4096      1.23", "  16  1.23e+03"]


def test_random_linear_keeps_the_size_of_its_input():
    linear = gpu.random_linear(96, 256, torch.device("cpu"), torch.float32, packed=False)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    dense = truth.dense_weight(linear.codes, linear.su, linear.sv)
    torch.testing.assert_close(linear(x).double(), x.double() @ dense.T, rtol=1e-4, atol=1e-4)
    assert 0.3 < linear(x).std() / x.std() < 3
    assert gpu.random_linear(96, 256, torch.device("cpu"), torch.float32).codes.shape == (2, 96, 8)


def test_every_linear_of_the_blocks_is_replaced_and_the_model_generates():
    from transformers import AutoModelForCausalLM, LlamaConfig

    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "num_hidden_layers": 2,
    }
    config = LlamaConfig(**{**gpu.LLAMA_3_8B, **small}, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert gpu.quantize_randomly(model, packed=False) == 14
    assert sum(isinstance(module, QuipLinear) for module in model.modules()) == 14
    assert type(model.lm_head) is torch.nn.Linear
    ids = torch.tensor([[1, 2, 3]])
    new = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    assert new.shape == (1, 7)
