"""Damage that a mutated checkpoint loaded with (tests/fuzz): each kind is one clear error."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests import foreign
from tests.integration.test_complete import UP, K, filled, refuses, removed, renamed
from transformers_quip import QuipConfig
from transformers_quip.hf.convert import convert

# Numbers of dense vectors


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_norms(name, number, quantized, changed):
    refuses(changed(quantized("llama"), tensors=filled(name, number)), f"{name} has numbers that are not finite")


def test_norms_and_biases_of_foreign_files(tmp_path, changed):
    folder, _ = foreign.write_checkpoints(
        "gpt2", tmp_path, foreign.quip_for_all(), foreign.quip_for_all_config(use_rand=False)
    )
    for name in ("transformer.h.0.ln_1.bias", "transformer.h.1.mlp.c_fc.bias"):
        damaged = changed(folder, tensors=filled(name, float("nan")))
        refuses(damaged, rf"{name} has numbers that are not finite")
        shutil.rmtree(damaged)


# Tensors that are there twice, and descriptions that are not there


@pytest.mark.parametrize("kind", ["su", "codes"])
def test_a_native_tensor_beside_the_foreign_ones_that_it_is_made_of(kind, tmp_path, changed):
    folder, _ = foreign.write_checkpoints("llama", tmp_path, foreign.qtip("3inst", 2), foreign.qtip_config("3inst", 2))
    damaged = changed(folder, tensors=renamed(f"{UP}.rcp", f"{UP}.{kind}"))
    said = rf"{UP}\.{kind} is there, and is also made of other tensors"
    refuses(damaged, said)
    refuses(damaged, said, load=convert, destination=tmp_path / "native")


@pytest.mark.parametrize("kind", ["mcg", "mul1"])
def test_a_lost_code_of_exl3(kind, golden, changed, tmp_path):
    """The list beside the files has it; without the list the linear would be decoded by a third code."""
    folder = changed(golden / {"mcg": "exl3_mcg_k4", "mul1": "exl3_mul1_k2"}[kind], tensors=removed(f"{K}.{kind}"))
    said = rf"{K}\.{kind} is missing, which .*quantization_config\.json lists"
    refuses(folder, said)
    refuses(folder, said, load=convert, destination=tmp_path / "native")


def test_a_list_of_exl3_that_says_another_code(golden, changed):
    """Somebody has taken one linear from another checkpoint: the tensors decide, as in the package."""
    other = torch.tensor(-2082680531, dtype=torch.int32)

    def change(tensors):
        del tensors[f"{K}.mcg"]
        tensors[f"{K}.mul1"] = other

    model = AutoModelForCausalLM.from_pretrained(changed(golden / "exl3_mcg_k4", tensors=change))
    assert model.get_submodule(K).codebook.startswith("trellis:mul1")


@pytest.mark.parametrize("method", [None, "qu5p", "", "exl4"])
@pytest.mark.parametrize("family", ["native", "exl3", "qtip"])
def test_quantized_weights_that_config_json_does_not_describe(family, method, quantized, changed, tmp_path):
    """Transformers builds a dense model then, and gives it random weights."""
    if family == "native":
        folder = quantized("llama")
    else:
        make = {"exl3": foreign.exl3, "qtip": lambda: foreign.qtip("3inst", 2)}
        folder, _ = foreign.write_checkpoints("llama", tmp_path, make[family](), {})

    def config(values):
        values.pop("quantization_config", None)
        if method is not None:
            values["quantization_config"] = {"quant_method": method}

    folder = changed(folder, config=config)
    said = r"has quantized weights \(.* and \d+ others\), but the quantization_config of its config\.json is missing"
    if method is not None:
        said = "which nobody knows, and the files have model|which must be the name of a method"
    refuses(folder, said)
    refuses(folder, said, output_loading_info=True)


def test_dense_models_load_as_ever(dense):
    """Also where they miss weights, or have too many: that is Transformers' to say."""
    model, info = AutoModelForSequenceClassification.from_pretrained(dense("llama"), output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert type(AutoModelForCausalLM.from_pretrained(dense("llama"))) is not tuple
    assert model.config.num_labels == 2


@pytest.mark.parametrize("kind", ["hadamard-128", ["hadamard", "hadamard-128"], ["hadamard-128", "none"]])
def test_a_transform_that_there_is_not_for_a_size(kind, quantized, changed):
    """The message names the module, and comes before a forward needs the transform."""
    folder = changed(quantized("llama"), config=lambda config: config["quantization_config"].update(incoherence=kind))
    refuses(folder, r"model\.layers\.0\.\S+: the transform hadamard-128 needs a multiple of 128 numbers, and there are")


def test_a_scale_that_is_not_a_float(quantized, changed):
    folder = changed(quantized("llama"), config=lambda config: config["quantization_config"].update(residual_scale=10**400))
    refuses(folder, "residual_scale=10+.* must be None or a finite number other than 0")


@pytest.mark.parametrize("name", ["bits", "codebook", "incoherence", "seed", "residual_scale"])
def test_a_description_without_what_the_codes_mean(name, quantized, changed):
    """The default would be taken, and decode other numbers."""
    folder = changed(quantized("llama"), config=lambda config: config["quantization_config"].pop(name))
    refuses(folder, f"The saved quantization_config has no {name}, so its codes have no meaning")


def test_a_number_of_layers_that_no_model_has(quantized, changed, tmp_path):
    folder = changed(quantized("llama"), config=lambda config: config.update(num_hidden_layers=2**63))
    refuses(folder, "config.json has num_hidden_layers=9223372036854775808, more than any model")
    work = tmp_path / "foreign"
    work.mkdir()
    other, _ = foreign.write_checkpoints("llama", work, foreign.exl3(), {"quantization_config": {"quant_method": "exl3"}})
    values = json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 2**63}
    (other / "config.json").write_text(json.dumps(values))
    refuses(other, "more than any model", load=convert, destination=tmp_path / "native")


@pytest.mark.parametrize("count", [10**6, 2**31])
def test_a_number_of_experts_that_no_model_has(count, changed, tmp_path):
    """Found by the names in the files, and not by a list of all names that there should be."""
    config = {"quantization_config": {"quant_method": "exl3"}}
    folder, _ = foreign.write_checkpoints("mixtral", tmp_path, foreign.exl3(), config)
    folder = changed(folder, config=lambda config: config.update(num_local_experts=count))
    begin = time.process_time()
    refuses(folder, rf"experts has {count} experts, of which only some linears are quantized \(not 4\.w1\)")
    refuses(folder, f"experts has {count} experts", load=convert, destination=tmp_path / "native")
    assert time.process_time() - begin < 5


def test_a_number_of_dense_experts_that_no_model_has(dense, changed, tmp_path):
    """Transformers stacks those that it finds."""
    config = QuipConfig(dataset=None, modules_to_not_convert=["experts"])
    model = AutoModelForCausalLM.from_pretrained(dense("mixtral"), quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    folder = changed(tmp_path / "quantized", config=lambda config: config.update(num_local_experts=2**31))
    begin = time.process_time()
    refuses(folder, r"has no \S+experts\.4\.w\d\.weight, one of 2147483648 that the model stacks")
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_dense_tensor_of_another_shape(name, quantized, changed, golden, tmp_path):
    """Transformers says so after it has read everything, in a log; `convert` would write it."""

    def change(tensors):
        tensors[name] = tensors[name][:-1].clone()

    said = rf"{name} has shape \[\d+(, \d+)?\] instead of \[\d+(, \d+)?\]"
    refuses(changed(quantized("llama"), tensors=change), said)
    shutil.rmtree(tmp_path / "changed")
    if name != "lm_head.weight":
        folder = changed(golden / "qtip_3inst_k2", tensors=change)
        refuses(folder, said)
        refuses(folder, said, load=convert, destination=tmp_path / "native")
        assert not (tmp_path / "native").exists()


def test_a_head_that_the_caller_lets_have_another_shape(dense, tmp_path):
    """As for any model: with ignore_mismatched_sizes it is made anew."""
    config = QuipConfig(dataset=None)
    load = AutoModelForSequenceClassification.from_pretrained
    load(dense("llama"), num_labels=2).save_pretrained(tmp_path / "dense")
    load(tmp_path / "dense", quantization_config=config).save_pretrained(tmp_path / "q")
    refuses(tmp_path / "q", r"score\.weight has shape \[2, 64\] instead of \[3, 64\]", load=load, num_labels=3)
    for folder, options in ((tmp_path / "q", {}), (tmp_path / "dense", {"quantization_config": config})):
        model = load(folder, num_labels=3, ignore_mismatched_sizes=True, **options)
        assert model.score.weight.shape == (3, 64)
        assert 0 < model.score.weight.std() < 1  # initialised


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_integers_in_the_place_of_floating_point_numbers(name, quantized, changed, golden, tmp_path):
    """A type of the same size in a header: the bytes would be read as other numbers."""

    def change(tensors):
        tensors[name] = tensors[name].half().view(torch.int16)

    said = rf"{name} has the type I16 instead of a floating one"
    refuses(changed(quantized("llama"), tensors=change), said)
    if name == "model.norm.weight":
        shutil.rmtree(tmp_path / "changed")
        folder = changed(golden / "exl3_mul1_k2", tensors=change)
        refuses(folder, said)
        refuses(folder, said, load=convert, destination=tmp_path / "native")


def test_padded_sizes_that_no_model_has(quantized, changed):
    layout = {"*.down_proj": {"padded": [2**40, 2**40]}}
    folder = changed(quantized("llama"), config=lambda config: config["quantization_config"].update(layout=layout))
    refuses(folder, r"padded=\[1099511627776, 1099511627776\] must be two positive integers up to 100,000,000")


@pytest.mark.parametrize("values", [{"model_type": "/etc/passwd"}, {"hidden_size": "x"}, {"dtype": "float99"}])
def test_a_config_of_no_model(values, golden, changed, tmp_path):
    """Transformers' own errors do not name the file."""
    folder = changed(golden / "qs_E8P12_t128", config=lambda config: config.update(values))
    refuses(folder, rf"{folder / 'config.json'} cannot be used", load=convert, destination=tmp_path / "native")
