"""The plan: which weights are quantized, why others are not, and the numbers of the coverage report."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.models import ARCHITECTURES, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.quantize.plan import make_plan, unmatched_patterns

CALIBRATED, UNCALIBRATED = QuipConfig(), QuipConfig(dataset=None)
# What every architecture has in a block.
LINEARS = {
    "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    "qwen3": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    "gemma3": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    "phi3": "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj",
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "opt": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    "gpt_neox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "mixtral": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
}
BLOCKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}


@pytest.mark.parametrize("config", [CALIBRATED, UNCALIBRATED], ids=["calibrated", "uncalibrated"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_linears_of_the_blocks_are_quantized_and_every_parameter_is_counted(arch, config):
    model = tiny_model(arch)
    plan = make_plan(model, config)
    blocks = BLOCKS.get(arch, "model.layers")
    assert set(plan.names) == {f"{blocks}.{i}.{name}" for i in (0, 1) for name in LINEARS[arch].split()}
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    quantized = sum(model.get_submodule(name).weight.numel() for name in plan.names)
    assert plan.share == pytest.approx(quantized / plan.parameters)
    bits = 0
    for name in plan.names:
        weight = model.get_submodule(name).weight
        n = weight.shape[0] if isinstance(model.get_submodule(name), Conv1D) else weight.shape[1]
        bits += weight.numel() // n * -(-n // 8) * 16 + 32 * sum(weight.shape)
    assert plan.true_bits == pytest.approx(bits / quantized)
    assert any("output embeddings" in reason for reason in plan.left_dense())
    with torch.device("meta"):
        assert make_plan(type(model)(model.config), config) == plan


def test_half_precision_vectors_take_fewer_bits():
    plans = [make_plan(tiny_model("llama", dtype=dtype), UNCALIBRATED) for dtype in (torch.float32, torch.bfloat16)]
    assert 2 < plans[1].true_bits < plans[0].true_bits
    assert plans[0].true_bits - 2 == pytest.approx(2 * (plans[1].true_bits - 2))


def test_the_summary_says_how_much_and_what_not():
    text = make_plan(tiny_model("mixtral"), CALIBRATED).summary()
    assert "8 of 9 linear layers, 13.0% of 189.2k parameters" in text
    assert "3.167 bits per weight (codebook e8p)" in text
    assert "lm_head (output embeddings)" in text
    assert "model.layers.0.mlp.experts.gate_up_proj" in text
    assert "(fused 3-D experts are not supported yet)" in text
    assert "model.layers.0.mlp.gate.weight" in text
    assert "MixtralTopKRouter" in text
    assert "norms, biases and other vectors" in text


def test_modules_to_not_convert_adds_to_the_default():
    model = tiny_model("llama")
    config = QuipConfig(dataset=None, modules_to_not_convert=["up_proj", "model.layers.1", r".*\.0\.self_attn\.[qk]_proj"])
    plan = make_plan(model, config)
    assert set(plan.names) == {
        f"model.layers.0.{name}" for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    assert {entry.name for entry in plan.left_dense()["output embeddings"]} == {"lm_head"}
    assert len(plan.left_dense()["in modules_to_not_convert"]) == 10


def test_patterns_that_match_nothing_are_found():
    config = QuipConfig(modules_to_not_convert=["up_porj", "mlp.up_proj", "model.layers.7"])
    assert unmatched_patterns(tiny_model("llama"), config) == ["up_porj", "model.layers.7"]
    config = QuipConfig(modules={"*.up_proj": {"damping": 0.1}, "dwon_proj": {"damping": 0.1}})
    assert unmatched_patterns(tiny_model("llama"), config) == ["dwon_proj"]


def test_a_pattern_that_is_no_regular_expression():
    with pytest.raises(ValueError, match=r"modules_to_not_convert: 'layers\.\(' is not a regular expression"):
        make_plan(tiny_model("llama"), QuipConfig(modules_to_not_convert=["layers.("]))


class Special(nn.Linear):
    """A subclass may compute anything."""


class Odd(nn.Module):
    """One block list, and beside it every kind of linear that must not be touched."""

    _keep_in_fp32_modules = ("precise",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(16, 16)}) for _ in range(2))
        self.outside = nn.Linear(16, 8)
        self.precise = nn.Linear(16, 16)
        self.special = Special(16, 16)
        self.twice = nn.Linear(16, 16)
        self.again = self.twice
        self.embedding = nn.Embedding(4, 16)
        self.tied = nn.Linear(16, 4, bias=False)
        self.tied.weight = self.embedding.weight
        self.conv = nn.Conv1d(16, 16, 3)
        self.experts = nn.ParameterList([nn.Parameter(torch.zeros(2, 16, 16))])


def test_reasons():
    plan = make_plan(Odd(), UNCALIBRATED)
    assert set(plan.names) == {"blocks.0.fc", "blocks.1.fc", "outside"}
    reasons = {entry.name: entry.reason for entry in plan.entries if not entry.quantized}
    assert reasons["precise"] == "kept in float32 by the model"
    assert reasons["twice"] == "one module used in several places"
    assert reasons["tied"] == "tied to another weight"
    assert "Special is a subclass of nn.Linear" in reasons["special.weight"]
    assert reasons["embedding.weight"] == "embedding"
    assert reasons["conv.weight"] == "a weight of Conv1d, which is neither nn.Linear nor Conv1D"
    assert plan.parameters == sum(p.numel() for p in Odd().parameters())
    calibrated = make_plan(Odd(), CALIBRATED)
    assert set(calibrated.names) == {"blocks.0.fc", "blocks.1.fc"}
    assert [entry.name for entry in calibrated.left_dense()["outside the decoder blocks"]] == ["outside"]


def test_a_model_without_linears():
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear"):
        make_plan(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)), UNCALIBRATED)


def test_a_model_of_which_everything_is_left_out():
    with pytest.raises(ValueError, match=r"Nothing of LlamaForCausalLM would be quantized \(model\.layers\.0"):
        make_plan(tiny_model("llama"), QuipConfig(modules_to_not_convert=["model"]))


def test_an_empty_weight():
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "none": nn.Linear(8, 0)})
    with pytest.raises(ValueError, match=r"none has shape \[0, 8\]"):
        make_plan(model, UNCALIBRATED)
