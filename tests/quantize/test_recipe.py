"""The recipe over a model, against Hessians that this test collects with hooks on the whole model."""

import copy
import logging
from contextlib import nullcontext

import pytest
import torch

from tests.models import tiny_ids, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.nn import QuipLinear, replace
from transformers_quip.quantize import mixed_bits
from transformers_quip.quantize.allocate import allocate, measure_sensitivities
from transformers_quip.quantize.layer import loss_of_rounding, quantize_weight, quantize_weights
from transformers_quip.quantize.recipe import quantize_model

GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(3, 128, (12, 24), generator=GENERATOR)


def options(**changes):
    return QuipConfig(bits=2, dataset=IDS, sequence_length=24, num_samples=12, batch_size=5, **changes)


def moments(model, names, ids):
    """Σ x xᵀ of the inputs of the named linears in a plain forward of the whole model, in float64."""
    sums, hooks = dict.fromkeys(names, 0), []
    for name in names:

        def hook(module, args, name=name):
            x = args[0].double().flatten(0, -2)
            sums[name] = sums[name] + x.T @ x

        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return sums


def same_codes(a, b):
    return (a == b).float().mean().item()


@pytest.mark.parametrize("calibrate_on", ["quantized", "dense", "mixed"])
def test_second_block_is_calibrated_on_what_the_option_says(calibrate_on, monkeypatch):
    for module in ("block", "recipe"):
        monkeypatch.setattr(f"transformers_quip.quantize.{module}.calibration_autocast", lambda block: nullcontext())
    dense = tiny_model("llama")
    model = copy.deepcopy(dense)
    config = options(calibrate_on=calibrate_on)
    quantize_model(model, config)
    last = "model.layers.1.mlp.down_proj"
    names = ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.gate_proj", last]
    half = copy.deepcopy(dense)
    half.model.layers[0] = copy.deepcopy(model.model.layers[0])
    batches = IDS.split(5)
    followed = {"quantized": [half] * 3, "dense": [dense] * 3, "mixed": [half, dense, half]}[calibrate_on]
    parts = [moments(one, names, batch) for one, batch in zip(followed, batches, strict=True)]
    hessians = {name: (sum(part[name] for part in parts) / IDS.numel()).float() for name in names}
    for name in names:
        weight = {name: dense.get_submodule(name).weight.data}
        if name.endswith("gate_proj"):
            weight[name.replace("gate", "up")] = dense.get_submodule(name.replace("gate", "up")).weight.data
        wanted = quantize_weights(weight, hessians[name], config)
        for member, result in wanted.items():
            # Sums in another order move a Hessian by 1e-7, and now and then a code.
            assert same_codes(result.tensors["codes"], model.get_submodule(member).codes) > 0.97
            torch.testing.assert_close(model.get_submodule(member).su, result.su, rtol=1e-4, atol=1e-5)


def test_report_and_record():
    model = tiny_model("llama")
    config = options()
    report = quantize_model(model, config)
    linears = replace.quantized_linears(model)
    assert sorted(record["name"] for record in report.modules) == sorted(linears)
    assert len(linears) == 14
    for record in report.modules:
        assert 0 < record["relative_error"] < 0.2
        assert record["shape"] == [linears[record["name"]].out_features, linears[record["name"]].in_features]
    assert report.tokens == IDS.numel()
    calibration = report.config.calibration
    assert calibration["tokens"] == IDS.numel()
    assert calibration["sequences"] == len(IDS)
    assert calibration["mean_relative_error"] == pytest.approx(report.mean_relative_error, abs=1e-6)
    assert {"data", "capture", "observe", "round", "replay"} <= report.seconds.keys()


def test_linears_of_one_input_share_su():
    model = tiny_model("llama")
    quantize_model(model, options())
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert torch.equal(attention.q_proj.su, attention.k_proj.su)
        assert torch.equal(attention.q_proj.su, attention.v_proj.su)
        assert torch.equal(mlp.gate_proj.su, mlp.up_proj.su)
        assert not torch.equal(attention.q_proj.su.abs(), attention.o_proj.su.abs())


def test_same_seed_same_model_and_other_seed_another():
    models = []
    for seed in (0, 0, 1):
        models.append(tiny_model("llama"))
        quantize_model(models[-1], options(seed=seed))
    codes = [model.model.layers[1].mlp.up_proj.codes for model in models]
    assert torch.equal(codes[0], codes[1])
    assert same_codes(codes[0], codes[2]) < 0.1


def test_modules_left_out_stay_as_they_are():
    dense, model = tiny_model("llama"), tiny_model("llama")
    quantize_model(model, options(modules_to_not_convert=["down_proj"]))
    for index, layer in enumerate(model.model.layers):
        assert torch.equal(layer.mlp.down_proj.weight, dense.model.layers[index].mlp.down_proj.weight)
        assert isinstance(layer.mlp.up_proj, QuipLinear)


def test_global_precision_settings_do_not_reach_the_rounding():
    """A Hessian rotated with bfloat16 products would no longer be positive definite."""
    reference = tiny_model("llama")
    quantize_model(reference, options())
    model, setting = tiny_model("llama"), torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "bf16"
        quantize_model(model, options())
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
    for a, b in zip(replace.quantized_linears(model).values(), replace.quantized_linears(reference).values(), strict=True):
        assert torch.equal(a.codes, b.codes)


def test_activations_that_overflow_name_the_module():
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm.weight.data[5] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj hold NaN or Inf"):
        quantize_model(model, options())


def test_too_few_tokens_are_named(caplog):
    """72 tokens are enough for 64 columns, but not for the 96 of down_proj."""
    with caplog.at_level(logging.WARNING):
        quantize_model(tiny_model("llama"), QuipConfig(bits=2, dataset=IDS[:3], num_samples=3, sequence_length=24))
    assert "model.layers.1.mlp.down_proj: 72 calibration tokens are too few for its 96 inputs" in caplog.text
    assert "gate_proj" not in caplog.text


def test_a_linear_that_no_token_reaches_is_named(caplog):
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.unused = torch.nn.Linear(64, 32, bias=False)
    with caplog.at_level(logging.WARNING):
        report = quantize_model(model, options())
    assert "model.layers.0.self_attn.unused: no calibration token reached it" in caplog.text
    assert isinstance(attention.unused, QuipLinear)
    assert "model.layers.0.self_attn.unused" in {record["name"] for record in report.modules}


def test_calibration_pays():
    """On its own tokens; random weights have no others that would be typical."""
    dense, calibrated, nearest = tiny_model("llama"), tiny_model("llama"), tiny_model("llama")
    quantize_model(calibrated, options())
    for name, module in list(nearest.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            result = quantize_weight(module.weight.data, options(), name)
            replace.replace_linear(nearest.model.layers, name, result, options())
    with torch.no_grad():
        wanted = dense(IDS).logits
        errors = [(model(IDS).logits - wanted).square().sum().item() for model in (calibrated, nearest)]
    assert errors[0] < 0.9 * errors[1]


@torch.no_grad()
def test_bits_are_chosen_by_what_feedback_leaves_of_the_loss(monkeypatch):
    names = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    ids, dense = tiny_ids(4, 96, seed=4), tiny_model("llama")  # all of which noise is measured on
    inputs = {}
    for name in names:
        dense.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: inputs.update({name: x[0].flatten(0, 1)})
        )
    dense(ids)
    given = {}

    def remember(sizes, sensitivities, errors, bits):
        given.update(sensitivities)
        return allocate(sizes, sensitivities, errors, bits)

    monkeypatch.setattr(mixed_bits, "allocate", remember)
    options = {"dataset": ids, "num_samples": 4, "sequence_length": 96, "refinement_sweeps": 0}
    config = QuipConfig(bits=2.5, modules={"lm_head": {"damping": 0.01}}, **options)
    model = tiny_model("llama")
    quantize_model(model, config)
    noise = measure_sensitivities(dense, list(given), ids, config.seed)
    for name in names:
        x = inputs[name].double()
        weight = {name: dense.get_submodule(name).weight}
        if name.endswith("v_proj"):  # q and k read the same input, and share su
            attention = dense.model.layers[0].self_attn
            weight = {"q": attention.q_proj.weight, "k": attention.k_proj.weight, **weight}
        ratio = loss_of_rounding(weight, (x.T @ x / len(x)).float(), QuipConfig(bits=2))[name]
        assert given[name] == pytest.approx(noise[name] * ratio, rel=0.03)  # it calibrates with bfloat16 products
    bits = [module.true_bits for module in replace.quantized_linears(model).values()]
    assert len({round(b) for b in bits}) > 1
