"""Bad weights, which only show while quantizing."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import tiny_model
from transformers_quip import QuipConfig
from transformers_quip.hf import quantize_weight

UNCALIBRATED = QuipConfig(dataset=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stop_the_run_at_once(tmp_path, value, monkeypatch):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[3, 4] = value
    model.save_pretrained(tmp_path)
    seen = []
    convert = quantize_weight.QuantizeWeight.convert
    monkeypatch.setattr(
        quantize_weight.QuantizeWeight,
        "convert",
        lambda self, *args, **kwargs: seen.append(kwargs["full_layer_name"]) or convert(self, *args, **kwargs),
    )
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.v_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=UNCALIBRATED)
    assert seen[-1] == "model.layers.0.self_attn.v_proj.weight"
    assert len(seen) < 14


def test_a_missing_quantized_weight_in_a_state_dict_is_an_error():
    model = tiny_model("llama")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"1 weights .* not in the checkpoint: model\.layers\.1\.mlp\.up_proj"):
        type(model).from_pretrained(None, config=model.config, state_dict=state, quantization_config=UNCALIBRATED)
