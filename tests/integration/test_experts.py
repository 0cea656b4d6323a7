"""Models with experts through everything else that a user does: mixed bits, tuning, adapters, files, other codebooks."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.models import tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.calibration.experts import ExpertHessians
from transformers_quip.checkpoints.inventory import read_folder
from transformers_quip.hf.convert import convert
from transformers_quip.nn.experts import QuipExperts
from transformers_quip.nn.replace import quantized_modules, quantized_names

DATA = {"dataset": tiny_ids(4, 16, seed=5), "num_samples": 4, "sequence_length": 16, "refinement_sweeps": 1}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuipConfig(**options))


def error_of(model, dense, ids):
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense)(ids).logits
        return ((model(ids).logits - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("data", [DATA, {"dataset": None}], ids=["calibrated", "uncalibrated"])
def test_more_bits_are_better(data, dense, ids):
    errors = [error_of(load(dense("mixtral"), bits=bits, **data), dense("mixtral"), ids) for bits in (2, 4)]
    assert errors[1] < 0.7 * errors[0] < 0.7


def test_an_average_of_bits(dense, ids):
    model = load(dense("mixtral"), bits=2.5, **DATA)
    experts = {name: m for name, m in quantized_modules(model).items() if isinstance(m, QuipExperts)}
    assert len(experts) == 2
    bits = {form.codebook for module in experts.values() for form in module.forms.values()}
    assert bits <= {"e8p", "e8p-rvq3", "e8p-rvq4"}
    assert error_of(model, dense("mixtral"), ids) < 0.9


@pytest.mark.parametrize("options", [{"tune": "blocks"}, {"codebook": "trellis"}, {"rounding": "quantease"}, {"refit": 1}])
def test_other_options(options, dense, ids, tmp_path):
    config = {"modules_to_not_convert": [".*self_attn"], **options}
    model = load(dense("mixtral"), bits=2, **DATA, **config)
    assert quantized_names(model) == [
        f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    assert error_of(model, dense("mixtral"), ids) < 1.0
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_one_line_about_experts_with_few_tokens(dense, caplog):
    with caplog.at_level(logging.WARNING):
        load(dense("mixtral"), bits=2, **DATA)
    lines = [record.getMessage() for record in caplog.records if "experts" in record.getMessage()]
    assert len(lines) == 1
    assert "16 of 16 matrices of experts saw fewer calibration tokens than they have inputs" in lines[0]
    assert "raise num_samples" in lines[0]


def test_adapters_on_the_attention_are_trained_through_the_experts(quantized, ids):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(quantized("mixtral"))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 4
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


@torch.no_grad()
def test_offloaded_to_the_disk(dense, quantized, ids, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(quantized("mixtral"))(ids).logits
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places["model.layers.1"] = "disk"
    options = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    model = AutoModelForCausalLM.from_pretrained(quantized("mixtral"), **options)
    assert all(p.is_meta for p in model.model.layers[1].mlp.experts.parameters())
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, expected)
    options["offload_folder"] = tmp_path / "again"
    config = QuipConfig(dataset=None)
    model = AutoModelForCausalLM.from_pretrained(dense("mixtral"), quantization_config=config, **options)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_compiled_in_one_graph_and_with_a_static_cache(quantized, ids):
    model = AutoModelForCausalLM.from_pretrained(quantized("mixtral"))
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False}
    static = model.generate(ids[:, :8], cache_implementation="static", **options)
    assert torch.equal(static, model.generate(ids[:, :8], **options))


def test_files_and_their_inventory(quantized):
    folder = quantized("mixtral")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    assert "model.layers.{0-1}.mlp.experts.gate_up_proj" in config["quantization_config"]["quantized_modules"]
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "experts" in name]  # noqa: SIM118 - it is not a dict
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    assert len(shapes) == 2 * 6
    assert {tuple(shape[:1]) for shape in shapes.values()} == {(4,)}
    inventory = read_folder(folder)
    stacks = {linear.name: linear for linear in inventory.linears if "experts" in linear.name}
    assert len(stacks) == 4
    for name, linear in stacks.items():
        module = model.get_submodule(name.replace("block_sparse_moe", "mlp").rpartition(".")[0])
        projection = name.rpartition(".")[2]
        assert linear.bytes == module.packed_bytes(projection)
        assert linear.weights == module.stacks[projection].weights
        assert linear.shape == module.stacks[projection].shape
    dense = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).dequantize().parameters())
    assert inventory.parameters == dense


def test_exl3_has_no_form_of_stacked_experts(dense, tmp_path):
    options = {"codebook": "trellis:3inst:k2:exl3", "modules_to_not_convert": [".*self_attn"]}
    load(dense("mixtral"), dataset=None, **options).save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match=r"experts: these experts are quantized as stacks, .* for which EXL3 has no form"):
        convert(tmp_path / "native", tmp_path / "exl3", to="exl3")
    assert not (tmp_path / "exl3").exists()


def test_config_json_must_name_all_projections(quantized, changed):
    def less(config):
        names = config["quantization_config"]["quantized_modules"]
        names[:] = [name for name in names if "experts.down_proj" not in name]

    folder = changed(quantized("mixtral"), config=less)
    with pytest.raises(ValueError, match=r"mlp\.experts: config\.json lists gate_up_proj .* not down_proj: all or none"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("calibrate_on", ["mixed", "dense"])
def test_several_passes_read_what_the_first_one_read(calibrate_on, dense, monkeypatch):
    """Hidden states are replaced by outputs in the first pass; further passes for Hessians need the inputs."""
    once = load(dense("mixtral"), bits=2, calibrate_on=calibrate_on, **DATA).state_dict()
    monkeypatch.setattr(ExpertHessians.__init__, "__defaults__", ("", 40_000))
    found = load(dense("mixtral"), bits=2, calibrate_on=calibrate_on, **DATA).state_dict()
    assert found.keys() == once.keys()
    assert all(torch.equal(value, once[name]) for name, value in found.items())
