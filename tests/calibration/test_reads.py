"""Which linears' weights a model reads without calling them."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.architectures.tiny import tiny_config
from tests.models import tiny_config as llama_config
from transformers_quip import QuipConfig
from transformers_quip.calibration.reads import kind_of, read_by_others
from transformers_quip.quantize.plan import make_plan


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("mamba", {"backbone.layers.*.mixer.dt_proj"}),  # it multiplies by the weight
        ("rwkv", {"rwkv.blocks.*.attention.output", "rwkv.blocks.*.feed_forward.value"}),  # it divides them
        ("phi3", set()),
        ("gpt2", set()),
    ],
)
def test_models(model_type, expected):
    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert read_by_others(model) == expected
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with torch.device("meta"):
        assert read_by_others(AutoModelForCausalLM.from_config(config)) == expected
    plan = make_plan(model, QuipConfig(dataset=None))
    assert {kind_of(e.name) for e in plan.left_dense().get("its weight is read by the model itself", [])} == expected


class Reading(LlamaForCausalLM):
    """Reads a weight in several ways, of which some need no values."""

    def forward(self, input_ids=None, **kwargs):
        first, second = self.model.layers[0].mlp, self.model.layers[1].self_attn
        assert first.up_proj.weight.dtype == self.lm_head.weight.dtype
        assert second.o_proj.weight.shape[0] == second.o_proj.weight.size(0)
        torch.cat([first.gate_proj.weight, first.gate_proj.weight])
        return super().forward(input_ids, **kwargs)


class Failing(Reading):
    """Its forward depends on numbers."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids, **kwargs)
        if out.logits.sum() > 0:
            return self.model.layers[0].self_attn.q_proj.weight.sum()
        return out


def test_metadata_is_not_a_value_and_a_forward_without_values_may_fail():
    config = llama_config("llama")
    assert isinstance(config, LlamaConfig)
    for cls in (Reading, Failing):
        assert read_by_others(cls(config)) == {"model.layers.*.mlp.gate_proj"}
    assert read_by_others(nn.Linear(2, 2)) == frozenset()
