"""Tensor parallelism is refused before weights are read where it is not available, with the remedy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

from tests.models import save_tiny_model, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.hf import parallel


def test_while_a_model_is_quantized(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "dense")
    config = AutoConfig.from_pretrained(folder)
    config.distributed_config = SimpleNamespace(tp_size=2)
    options = {"quantization_config": QuipConfig(bits=4, dataset=None)}
    with pytest.raises(
        ValueError, match=r"Tensor parallelism \(tp_size=2\) is not available while a model is quantized: .*"
    ):
        AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    config.distributed_config = SimpleNamespace(tp_size=1)
    AutoModelForCausalLM.from_pretrained(folder, config=config, **options)


def test_checkpoints_of_other_packages_and_old_releases(monkeypatch):
    model, config = tiny_model("llama"), QuipConfig(dataset=None)
    model.config.distributed_config = SimpleNamespace(tp_size=2)
    monkeypatch.setattr(HfQuantizer, "update_parallel_plan", lambda self, model, plan: None, raising=False)
    parallel.check(model, config, True)
    monkeypatch.delattr(HfQuantizer, "update_parallel_plan")
    with pytest.raises(ValueError, match="with this Transformers: pip install -U transformers"):
        parallel.check(model, config, True)
    config.foreign = {}
    with pytest.raises(ValueError, match="transformers-quip convert MODEL FOLDER"):
        parallel.check(model, config, True)
    model.config.distributed_config = SimpleNamespace(tp_size=2, ep_size=2)
    parallel.check(model, config, True)
