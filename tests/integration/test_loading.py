"""Ways to load: dtypes, device maps and offload, other heads, copies; always the same codes and logits."""

import copy
import gc
import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models import tiny_model
from transformers_quip import QuipConfig
from transformers_quip.nn.replace import quantized_linears

PARTS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
DISK = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes(dtype, dense, ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense("opt"), quantization_config=QuipConfig(dataset=None), dtype=dtype)
    linear = model.model.decoder.layers[0].fc1
    assert linear.su.dtype == linear.sv.dtype == linear.bias.dtype == linear.weight.dtype == dtype
    logits = model(ids).logits
    assert logits.dtype == dtype
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert reloaded.dtype == dtype
    assert torch.equal(reloaded(ids).logits, logits)
    # The codes do not depend on the dtype that a saved model is loaded in.
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.decoder.layers[0].fc1
    assert torch.equal(other.codes, linear.codes)
    assert torch.equal(other.su, linear.su.float())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, DISK], ids=["auto", "cpu", "dict", "disk"])
@torch.no_grad()
def test_device_maps(device_map, dense, quantized, ids, tmp_path):
    logits = AutoModelForCausalLM.from_pretrained(quantized("llama"))(ids).logits
    while_loading = AutoModelForCausalLM.from_pretrained(
        dense("llama"), quantization_config=QuipConfig(dataset=None), device_map=device_map, offload_folder=tmp_path / "a"
    )
    assert torch.equal(while_loading(ids).logits, logits)
    loaded = AutoModelForCausalLM.from_pretrained(quantized("llama"), device_map=device_map, offload_folder=tmp_path / "b")
    assert torch.equal(loaded(ids).logits, logits)
    if device_map is DISK:
        linear = while_loading.model.layers[1].mlp.up_proj
        assert all(parameter.is_meta for parameter in linear.parameters())
        with pytest.raises(ValueError, match="is offloaded"):
            while_loading.dequantize()
    while_loading.save_pretrained(tmp_path / "c")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "c")(ids).logits, logits)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
@torch.no_grad()
def test_device_maps_of_a_calibrated_run(device_map, dense, calibrated_config, ids):
    models = [
        AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=calibrated_config, device_map=placed)
        for placed in (None, device_map)
    ]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


@torch.no_grad()
def test_a_dict_of_options_as_quantization_config(dense, quantized, ids):
    options = {"quant_method": "quip", "bits": 2, "dataset": None}
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=options)
    expected = AutoModelForCausalLM.from_pretrained(quantized("llama"))
    assert torch.equal(model(ids).logits, expected(ids).logits)


@torch.no_grad()
def test_base_model_and_other_heads(dense, quantized, ids, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(quantized("llama"))
    base = AutoModel.from_pretrained(quantized("llama"))
    assert len(quantized_linears(base)) == 14
    hidden = whole.model(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, hidden)
    # A new head is dense, and new.
    classifier, info = AutoModelForSequenceClassification.from_pretrained(quantized("llama"), output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert type(classifier.score) is torch.nn.Linear
    assert torch.equal(classifier.model(ids).last_hidden_state, hidden)
    # A base model that was saved alone gets a head.
    AutoModel.from_pretrained(dense("llama"), quantization_config=QuipConfig(dataset=None)).save_pretrained(tmp_path)
    headed, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert torch.equal(headed.model(ids).last_hidden_state, hidden)


@torch.no_grad()
def test_copies(quantized, ids):
    model = AutoModelForCausalLM.from_pretrained(quantized("gpt2"))
    logits = model(ids).logits
    other = AutoModelForCausalLM.from_pretrained(quantized("gpt2"))
    for linear in quantized_linears(other).values():
        linear.codes.zero_()
    assert not torch.equal(other(ids).logits, logits)
    other.load_state_dict(model.state_dict())
    from_state = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, from_state):
        assert torch.equal(copied(ids).logits, logits)


def test_a_copy_of_a_model_does_not_copy_or_keep_the_data(dense, calibrated_config):
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=calibrated_config)
    data = calibrated_config.dataset
    gc.collect()
    holders = [o for o in gc.get_referrers(data) if isinstance(o, dict) and o is not vars(calibrated_config)]
    assert not [o for o in holders if "quant_method" in o]
    assert model.config.quantization_config is model.hf_quantizer.quantization_config


@torch.no_grad()
def test_weights_that_the_loader_fuses_or_renames(dense, ids, tmp_path):
    """Mixtral's experts are separate in the file and one tensor in the model; the router is renamed."""
    config = QuipConfig(dataset=None, modules_to_not_convert=["experts"])
    model = AutoModelForCausalLM.from_pretrained(dense("mixtral"), quantization_config=config)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    original = tiny_model("mixtral")
    for i in (0, 1):
        for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
            expected = original.model.layers[i].mlp.get_parameter(name)
            assert torch.equal(reloaded.model.layers[i].mlp.get_parameter(name), expected)
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


def test_float32_modules_of_a_half_model_stay_dense(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=50)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=QuipConfig(dataset=None), dtype=torch.float16
    )
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    assert type(feed_forward.wo) is torch.nn.Linear
    assert feed_forward.wo.weight.dtype == torch.float32
    assert feed_forward.wi.su.dtype == torch.float16
    assert torch.isfinite(model(input_ids=torch.ones(1, 4).long(), decoder_input_ids=torch.ones(1, 2).long()).logits).all()


@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_options_of_single_modules(calibrated, dense, ids, tmp_path):
    modules = {"down_proj": {"incoherence": ("hadamard", "none")}, "model.layers.0.*.q_proj": {"rounding": "nearest"}}
    config = QuipConfig(modules=modules, dataset=ids if calibrated else None, sequence_length=8)
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    block = model.model.layers[1]
    assert (block.mlp.down_proj.incoherence_in, block.mlp.down_proj.incoherence_out) == ("hadamard", "none")
    assert (block.mlp.up_proj.incoherence_in, block.mlp.up_proj.incoherence_out) == ("hadamard", "hadamard")
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.model.layers[0].mlp.down_proj.incoherence_out == "none"
    assert torch.equal(reloaded(ids).logits, logits)


@torch.no_grad()
def test_an_average_of_bits(dense, ids, tmp_path):
    config = QuipConfig(bits=2.5, modules={"v_proj": {"bits": 4}}, dataset=ids, sequence_length=8)
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    linears = quantized_linears(model)
    bits = {name: model.hf_quantizer.quantization_config.for_module(name).bits for name in linears}
    assert all(number == 4 for name, number in bits.items() if name.endswith("v_proj"))
    free = [name for name in linears if not name.endswith("v_proj")]
    sizes = {name: linears[name].in_features * linears[name].out_features for name in free}
    average = sum(sizes[name] * bits[name] for name in free) / sum(sizes.values())
    assert 2.4 < average <= 2.5
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    assert config.modules == {"v_proj": {"bits": 4}}  # the caller's own config is not written to


@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_output_embeddings_on_request(calibrated, dense, ids, tmp_path):
    config = QuipConfig(modules={"lm_head": {"bits": 4}}, dataset=ids if calibrated else None, sequence_length=8)
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    original = AutoModelForCausalLM.from_pretrained(dense("llama"))
    assert model.lm_head.codebook == QuipConfig(bits=4).codebook
    error = (model.lm_head.dequantize() - original.lm_head.weight).norm() / original.lm_head.weight.norm()
    assert 0.01 < error < 0.5  # few tokens: what they do not show is rounded freely
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)


def test_tied_output_embeddings_cannot_be_asked_for(dense):
    config = QuipConfig(modules={"lm_head": {"bits": 4}}, dataset=None)
    with pytest.raises(ValueError, match="modules names 'lm_head', but its weight is tied to another weight"):
        AutoModelForCausalLM.from_pretrained(dense("gemma3"), quantization_config=config)


@torch.no_grad()
def test_the_order_of_patterns_survives_saving(dense, ids, tmp_path):
    """The later of two patterns holds, although it is the first in config.json, where keys are sorted."""
    modules = {"up_proj": {"bits": 4}, "model.layers.0.*": {"bits": 3}, "down_proj": {"incoherence": "none"}}
    config = QuipConfig(modules=modules, dataset=None)
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    books = {name: (linear.codebook, linear.incoherence_in) for name, linear in quantized_linears(model).items()}
    assert books["model.layers.0.mlp.up_proj"][0] == books["model.layers.0.self_attn.q_proj"][0] == "e8p-rvq3"
    assert books["model.layers.1.mlp.up_proj"][0] == "e8p-rvq4"
    assert books["model.layers.0.mlp.down_proj"] == ("e8p-rvq3", "none")
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = quantized_linears(reloaded)
    assert {name: (linear.codebook, linear.incoherence_in) for name, linear in found.items()} == books
    assert torch.equal(reloaded(ids).logits, model(ids).logits)
