"""Tensor parallelism is refused before weights are read, with the ways that there are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import save_tiny_model
from transformers_quip import QuipConfig


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_tensor_parallelism_is_refused(tmp_path, pre_quantized):
    folder = save_tiny_model("llama", tmp_path / "dense")
    options = {"quantization_config": QuipConfig(bits=4, dataset=None)}
    if pre_quantized:
        AutoModelForCausalLM.from_pretrained(folder, **options).save_pretrained(tmp_path / "quantized")
        folder, options = tmp_path / "quantized", {}
    config = AutoConfig.from_pretrained(folder)
    config.distributed_config = SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match=r"Tensor parallelism \(tp_size=2\) is not available .* device_map='auto'"):
        AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    config.distributed_config = SimpleNamespace(tp_size=1)
    AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
