"""The plan: which weights are quantized, why others are not, and the numbers of the coverage report."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.models import ARCHITECTURES, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.nn.replace import weight_of
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
    "mixtral": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.experts.gate_up_proj "
    "mlp.experts.down_proj",
}
BLOCKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}


@pytest.mark.parametrize("config", [CALIBRATED, UNCALIBRATED], ids=["calibrated", "uncalibrated"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_linears_of_the_blocks_are_quantized_and_every_parameter_is_counted(arch, config):
    model = tiny_model(arch)
    plan = make_plan(model, config)
    blocks = BLOCKS.get(arch, "model.layers")
    assert set(plan.names) == {f"{blocks}.{i}.{name}" for i in (0, 1) for name in LINEARS[arch].split()}
    assert plan.stacks == tuple(name for name in plan.names if ".experts." in name)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    quantized = sum(weight_of(model, name).numel() for name in plan.names)
    assert plan.share == pytest.approx(quantized / plan.parameters)
    bits = 0
    for name in plan.names:
        experts = 1
        if name in plan.stacks:
            experts, m, n = model.get_parameter(name).shape
        else:
            m, n = model.get_submodule(name).weight.shape
            if isinstance(model.get_submodule(name), Conv1D):
                m, n = n, m
        bits += experts * (m * -(-n // 8) * 16 + 32 * (m + n))
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
    assert "8 of 9 linear layers and 4 stacks of experts, 90.9% of 189.2k parameters" in text
    assert "bits per weight (codebook e8p)" in text
    assert "lm_head (output embeddings)" in text
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
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    """A subclass that computes the same in other words."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Odd(nn.Module):
    """One block list, and beside it every kind of linear that must not be touched."""

    _keep_in_fp32_modules = ("precise",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(16, 16)}) for _ in range(2))
        self.outside = nn.Linear(16, 8)
        self.precise = nn.Linear(16, 16)
        self.special = Special(16, 16)
        self.spelled = Spelled(16, 16)
        self.twice = nn.Linear(16, 16)
        self.again = self.twice
        self.embedding = nn.Embedding(4, 16)
        self.tied = nn.Linear(16, 4, bias=False)
        self.tied.weight = self.embedding.weight
        self.conv = nn.Conv1d(16, 16, 3)
        self.experts = nn.ParameterList([nn.Parameter(torch.zeros(2, 16, 16))])


def test_reasons():
    plan = make_plan(Odd(), UNCALIBRATED)
    assert set(plan.names) == {"blocks.0.fc", "blocks.1.fc", "outside", "spelled"}
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
    outside = [entry.name for entry in calibrated.left_dense()["outside the decoder blocks"]]
    assert outside == ["outside", "spelled"]


def test_a_model_without_linears():
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear"):
        make_plan(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)), UNCALIBRATED)


def test_a_model_of_which_everything_is_left_out():
    with pytest.raises(ValueError, match=r"Nothing of LlamaForCausalLM would be quantized \(model\.layers\.0"):
        make_plan(tiny_model("llama"), QuipConfig(modules_to_not_convert=["model"]))


def test_the_error_names_weights_of_other_classes():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, 16))

    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "own": Other(), "norm": nn.LayerNorm(8)})
    with pytest.raises(ValueError, match=r"\(fc: in modules_to_not_convert; own\.weight: a weight of Other, which is"):
        make_plan(model, QuipConfig(dataset=None, modules_to_not_convert=["fc"]))


def test_an_empty_weight_stays_as_it_is():
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "none": nn.Linear(8, 0)})
    plan = make_plan(model, UNCALIBRATED)
    assert plan.names == ("fc",)
    assert [entry.name for entry in plan.left_dense()["it has no numbers"]] == ["none"]


def test_experts_stay_dense_as_a_whole():
    for pattern in ("experts", "down_proj", r".*\.0\.mlp\.experts\.gate_up_proj"):
        plan = make_plan(tiny_model("mixtral"), QuipConfig(dataset=None, modules_to_not_convert=[pattern]))
        left = {entry.name for entry in plan.left_dense()["in modules_to_not_convert"]}
        layers = (0,) if "0" in pattern else (0, 1)
        assert left == {f"model.layers.{i}.mlp.experts.{name}" for i in layers for name in ("gate_up_proj", "down_proj")}
        assert not unmatched_patterns(tiny_model("mixtral"), QuipConfig(modules_to_not_convert=[pattern]))


def test_options_that_experts_cannot_have():
    for options, said in (
        ({"rounding": "yaqa"}, "experts.gate_up_proj: rounding='yaqa' needs Hessians of both sides"),
        ({"modules": {"experts.*": {"incoherence": "hadamard-256"}}}, "experts.gate_up_proj has shape"),
    ):
        with pytest.raises(ValueError, match=said):
            make_plan(tiny_model("mixtral"), QuipConfig(**options))


class Mixture(nn.Module):
    """A block with experts, and linears around them that choose among them."""

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict(
            {
                "attention": nn.ModuleDict({"gate": nn.Linear(16, 16), "value_router": nn.Linear(16, 2)}),
                "mlp": nn.ModuleDict(
                    {
                        "experts": nn.ModuleDict({"expert_0": nn.Linear(16, 16)}),
                        "gate": nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)),
                        "gate_proj": nn.Linear(16, 16),
                        "shared_expert_gate": nn.Linear(16, 1),
                        "router": nn.ModuleDict({"layer": nn.Linear(16, 4)}),
                        "classifier": nn.Linear(16, 4),
                    }
                ),
                "score": nn.Linear(16, 1),
            }
        )
        self.blocks = nn.ModuleList([block])


@pytest.mark.parametrize("config", [CALIBRATED, UNCALIBRATED], ids=["calibrated", "uncalibrated"])
def test_routers_and_gates_of_one_output_stay_dense(config):
    plan = make_plan(Mixture(), config)
    assert set(plan.names) == {f"blocks.0.{n}" for n in ("attention.gate", "mlp.experts.expert_0", "mlp.gate_proj")}
    routers = {entry.name.removeprefix("blocks.0.") for entry in plan.left_dense()["a router, or a gate of one output"]}
    inside = {f"mlp.{n}" for n in ("gate.0", "gate.1", "shared_expert_gate", "router.layer", "classifier")}
    assert routers == {"attention.value_router", "score", *inside}
    asked = make_plan(Mixture(), QuipConfig(dataset=None, modules={"*.classifier": {"bits": 4}}))
    assert set(asked.names) - set(plan.names) == {"blocks.0.mlp.classifier"}


def test_a_warning_if_much_stays_dense():
    assert make_plan(tiny_model("llama"), UNCALIBRATED).coverage_warning() == ""
    assert make_plan(tiny_model("mixtral"), CALIBRATED).coverage_warning() == ""
    without = QuipConfig(dataset=None, modules_to_not_convert=["experts"])
    assert make_plan(tiny_model("mixtral"), without).coverage_warning() == ""  # that was asked for
    text = make_plan(Odd(), CALIBRATED).coverage_warning()
    total = sum(p.numel() for p in Odd().parameters()) - 4 * 16  # without the embedding, to which the head is tied
    assert f"{(total - 2 * 256) / total:.0%} of the weights outside the embeddings and the head stay dense" in text
    assert "conv.weight" in text
    assert "modules_to_not_convert" in text
