"""tensor_parallel=N: N blocks on the side that Transformers' plan divides, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model, tiny_model
from transformers_quip import QuipConfig, QuipLinear
from transformers_quip.nn.shares import Scheme, of_inputs, of_outputs
from transformers_quip.ops.bundle import Form
from transformers_quip.quantize.plan import make_plan
from transformers_quip.quantize.tensor_parallel import settle_transforms

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def settled(arch="llama", fields=None, **options):
    model = tiny_model(arch, **fields or {})
    config = QuipConfig(dataset=None, **options)
    before = config.to_dict()
    found = settle_transforms(model, config, make_plan(model, config))
    assert config.to_dict() == before
    return found


def sides(config, name):
    return config.for_module(name).incoherence


def test_blocks_are_on_the_side_that_is_divided():
    config = settled(tensor_parallel=4, modules={"lm_head": {"bits": 4}})
    for layer in ("model.layers.0", "model.layers.1"):
        for name in BY_OUTPUTS:
            owner = "mlp" if name in ("gate_proj", "up_proj") else "self_attn"
            assert sides(config, f"{layer}.{owner}.{name}") == ["hadamard", "hadamard/4"]
        assert sides(config, f"{layer}.self_attn.o_proj") == ["hadamard/4", "hadamard"]
        assert sides(config, f"{layer}.mlp.down_proj") == ["hadamard/4", "hadamard"]
    # its outputs are gathered in any case
    assert (sides(config, "lm_head"), config.for_module("lm_head").bits) == ("hadamard", 4)
    assert len(config.modules) == 8  # one pattern for each kind of linear
    assert settled().modules is None


def test_experts_and_what_the_plan_does_not_name_keep_the_usual_transform():
    config = settled("mixtral", tensor_parallel=2)
    assert sides(config, "model.layers.0.self_attn.v_proj") == ["hadamard", "hadamard/2"]
    for name in ("model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"):
        assert sides(config, name) == "hadamard"
    # q, k and v in one weight: their outputs are gathered
    config = settled("phi3", tensor_parallel=2)
    assert sides(config, "model.layers.0.self_attn.qkv_proj") == "hadamard"
    assert sides(config, "model.layers.0.self_attn.o_proj") == ["hadamard/2", "hadamard"]


def test_the_callers_modules_win():
    one = "model.layers.1.self_attn.q_proj"
    modules = {"down_proj": {"incoherence": "kronecker"}, one: {"bits": 4}, "layers.0.mlp.up_proj": {"incoherence": "none"}}
    config = settled(tensor_parallel=2, modules=modules)
    for layer in (0, 1):
        assert sides(config, f"model.layers.{layer}.mlp.down_proj") == "kronecker"
    assert sides(config, "model.layers.0.mlp.up_proj") == "none"
    assert sides(config, "model.layers.1.mlp.up_proj") == ["hadamard", "hadamard/2"]
    assert (sides(config, one), config.for_module(one).bits) == (["hadamard", "hadamard/2"], 4)
    model = tiny_model("llama")
    assert settle_transforms(model, config, make_plan(model, config)) == config
    # a linear that is left dense may have any width
    left = settled(fields={"intermediate_size": 100}, tensor_parallel=8, modules_to_not_convert=[".*mlp"])
    assert sides(left, "model.layers.0.self_attn.q_proj") == ["hadamard", "hadamard/8"]


@pytest.mark.parametrize(
    ("arch", "fields", "options", "said"),
    [
        (
            "llama",
            {"intermediate_size": 100},
            {"tensor_parallel": 8},
            r"model\.layers\.0\.mlp\.gate_proj has 100 outputs, which 8 does not divide; .*up_proj has 100 .*down_proj has "
            r"100 inputs, .*modules=\{'gate_proj': \{'incoherence': 'hadamard'\}, 'up_proj': .*, 'down_proj': ",
        ),
        (
            "llama",
            {},
            {"tensor_parallel": 16},
            r"down_proj has 96 inputs, 6 for each of 16 devices, and .* codes 8 together",
        ),
        (
            "llama",
            {},
            {"tensor_parallel": 4, "codebook": "trellis"},
            r"k_proj has 32 outputs, 8 for each of 4 devices, and its codebook codes 16 together.*modules=\{'k_proj': ",
        ),
        ("gpt2", {}, {"tensor_parallel": 2}, r"GPT2LMHeadModel .*no tp_plan.*\['hadamard', 'hadamard/2'\]"),
    ],
)
def test_what_cannot_be_divided_is_an_error_before_the_work(arch, fields, options, said):
    with pytest.raises(ValueError, match=f"tensor_parallel={options['tensor_parallel']}: .*{said}"):
        settled(arch, fields, **options)


def test_the_remedies_of_the_error_work():
    modules = {name: {"incoherence": "hadamard"} for name in ("gate_proj", "up_proj", "down_proj")}
    config = settled(fields={"intermediate_size": 100}, tensor_parallel=8, modules=modules)
    assert sides(config, "model.layers.0.self_attn.k_proj") == ["hadamard", "hadamard/8"]
    assert sides(config, "model.layers.0.mlp.down_proj") == "hadamard"


@pytest.mark.parametrize("incoherence", ["kronecker", "hadamard-16", ["hadamard", "none"]])
def test_a_transform_for_all_contradicts_it(incoherence):
    with pytest.raises(ValueError, match="tensor_parallel=2 chooses the transforms .*leave one of the two out"):
        QuipConfig(tensor_parallel=2, incoherence=incoherence)
    for number in (0, 1, 2.0, True, "2", 1025):
        with pytest.raises(ValueError, match=r"tensor_parallel=.* must be an integer of at least 2 .*or None"):
            QuipConfig(tensor_parallel=number)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_saved_model_can_be_cut_into_blocks(tmp_path, calibrated):
    dense = save_tiny_model("llama", tmp_path / "dense")
    ids = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    config = QuipConfig(tensor_parallel=4, dataset=ids if calibrated else None, num_samples=4, sequence_length=16)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert loaded.config.quantization_config.tensor_parallel == 4
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    linears = {name: module for name, module in loaded.named_modules() if isinstance(module, QuipLinear)}
    assert len(linears) == 14
    for name, module in linears.items():
        form = Form(module.codebook, module.incoherence_in, module.incoherence_out, module.seed)
        m, n = module.out_features, module.in_features
        for count in (2, 4):
            if name.endswith(BY_OUTPUTS):
                share = of_outputs(form, m, n, 1, count, [(m // count, 2 * m // count)])
            else:
                share = of_inputs(form, m, n, 1, count)
            assert share.scheme is Scheme.BLOCKS, name
