"""Loading is complete or refused: tensors without a module, weights missing from the files, scales that are NaN."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tests import foreign
from tests.models import save_tiny_model, tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.hf.convert import convert

UP = "model.layers.1.mlp.up_proj"


def renamed(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def removed(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def filled(name, number):
    def change(tensors):
        tensors[name].view(-1)[0] = number

    return change


def unlisted(name):
    return lambda config: config["quantization_config"]["quantized_modules"].remove(name)


def refuses(folder, said, load=AutoModelForCausalLM.from_pretrained, **options):
    with pytest.raises(ValueError, match=said):
        load(folder, **options)


# Tensors of a quantizer that nothing takes


@pytest.fixture(scope="module")
def fused(tmp_path_factory, golden):
    """A native checkpoint whose projections are fused, as QuIP# has them."""
    target = tmp_path_factory.mktemp("fused") / "native"
    convert(golden / "qs_E8P12_t128", target)
    return target


def test_a_fused_linear_that_config_json_does_not_list(fused, changed):
    folder = changed(fused, config=unlisted("model.layers.{0-1}.self_attn.qkv_proj"))
    refuses(folder, r"model\.layers\.0\.self_attn\.qkv_proj\.codes belongs to no module of LlamaForCausalLM")


def test_a_config_without_its_record_of_fused_linears(fused, changed):
    folder = changed(fused, config=lambda config: config["quantization_config"].pop("layout"))
    refuses(folder, r"qkv_proj\.\w+ belongs to no module|qkv_proj fuses")


@pytest.mark.parametrize("kind", ["parts", "experts"])
def test_parts_and_experts_that_config_json_does_not_list(kind, tmp_path, changed):
    arch, rename = {"parts": "phi3", "experts": "mixtral"}[kind], None
    if kind == "parts":
        rename = {"qkv_proj": ("q_proj:64", "k_proj:32", "v_proj:32"), "gate_up_proj": ("gate_proj:96", "up_proj:96")}
    config = {"quantization_config": {"quant_method": "exl3"}}
    foreign_folder, _ = foreign.write_checkpoints(arch, tmp_path, foreign.exl3(), config, rename)
    convert(foreign_folder, tmp_path / "native")
    kept = "o_proj"

    def unlist(config):
        names = config["quantization_config"]["quantized_modules"]
        names[:] = [name for name in names if name.endswith(kept)]

    refuses(changed(tmp_path / "native", config=unlist), r"\.codes (belongs to no module of|exists, but config\.json)")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed(f"{UP}.su", f"{UP}.sx"), rf"{UP}\.su is missing"),
        (lambda t: t.update({"model.layers.1.mlp.up_pruj.su": torch.ones(64)}), r"up_pruj\.su belongs to no module"),
        (lambda t: t.update({"mqdel.layers.1.mlp.up_proj.sv": torch.ones(64)}), r"mqdel\..*\.sv belongs to no module"),
        (lambda t: t.update({f"{UP}.extra": torch.ones(64)}), rf"{UP}\.extra belongs to no module"),
        (lambda t: t.update({f"{UP}.weight": torch.ones(96, 64)}), rf"{UP}\.weight belongs to no module"),
        (lambda t: t.update({f"{UP}.bias": torch.ones(96)}), rf"{UP}\.bias belongs to no module"),
        (lambda t: t.update({"model.layers.9.mlp.up_proj.codes": torch.ones(2)}), r"layers\.9.*codes belongs to no module"),
    ],
)
def test_native_tensors_that_nothing_takes(change, said, quantized, changed):
    refuses(changed(quantized("llama"), tensors=change), said)


K = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("exl3_mcg_k4", renamed(f"{K}.mcg", f"{K.replace('k_proj', 'k_prqj')}.mcg"), r"k_prqj\.mcg belongs to no module"),
        ("exl3_mcg_k4", renamed(f"{K}.mcg", f"{K}.mcq"), rf"{K}\.mcq belongs to no module"),
        ("exl3_mul1_k2", renamed(f"{K}.mul1", f"n{K}.mul1"), r"nmodel.*mul1 belongs to no module"),
        ("exl3_mul1_k2", renamed(f"{K}.mul1", f"{K[:-1]}.mul1"), r"mul1 belongs to no module"),
        (
            "qtip_hyb_k2_tp8",
            renamed(f"{K}.rcp", "model.layers.0.self_attn.k_proh.rcp"),
            r"k_proh\.rcp belongs to no module",
        ),
        (
            "qfa_E8P12_had_t128",
            lambda t: t.update({"model.layers.7.x.SU": torch.ones(3)}),
            r"7\.x\.SU belongs to no module",
        ),
    ],
)
def test_foreign_tensors_that_nothing_takes(name, change, said, golden, changed, tmp_path):
    """A lost marker means another code, a lost rcp another transform: without them the linear would be decoded wrongly."""
    folder = changed(golden / name, tensors=change)
    refuses(folder, said)
    refuses(folder, said, load=convert, destination=tmp_path / "native")
    assert not (tmp_path / "native").exists()


# Weights that nothing gives

WEIGHTS = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.1.input_layernorm.weight",
)


@pytest.mark.parametrize("name", WEIGHTS)
def test_native_weights_that_are_missing(name, quantized, changed):
    folder = changed(quantized("llama"), tensors=removed(name))
    refuses(folder, rf"does not fit the model: {name} is missing")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kind", ["exl3_mcg_k2_padded", "qs_E8P12_t128", "qfa_D4_had_t128", "qtip_1mad_k2"])
def test_foreign_weights_that_are_missing(name, kind, golden, changed, tmp_path):
    stored = load_file(golden / kind / "model.safetensors")
    if name not in stored:
        assert name == "lm_head.weight"  # quantized here
        name = "model.layers.0.post_attention_layernorm.weight"
    folder = changed(golden / kind, tensors=removed(name))
    refuses(folder, rf"{name} is missing|neither codes nor a weight for {name.removesuffix('.weight')}")
    refuses(folder, "is missing|neither codes nor", load=convert, destination=tmp_path / "native")


@pytest.mark.parametrize("arch", ["gpt2", "opt", "gpt_neox", "qwen3", "gemma3", "phi3", "mixtral", "qwen2_moe"])
@torch.no_grad()
def test_each_dense_weight_of_each_architecture(arch, tmp_path):
    """Whatever a saved model has, loading without it is an error; tied weights are given once, and that is enough."""
    config = QuipConfig(dataset=None)
    dense = save_tiny_model(arch, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(tmp_path / "whole")
    expected = model(tiny_ids()).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(tiny_ids()).logits, expected)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    shutil.copytree(tmp_path / "whole", tmp_path / "less")
    for name in list(tensors):
        if ".1." in name and ".layers.0." in name:
            continue  # the same again
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file(rest, tmp_path / "less" / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="is missing|has no ") as caught:
            AutoModelForCausalLM.from_pretrained(tmp_path / "less", ignore_mismatched_sizes=True)
        known = name.replace("embed_out.weight", "lm_head.weight")  # as the module is called here
        known = known.replace("block_sparse_moe.", "mlp.")
        assert known in str(caught.value), (name, caught.value)


def test_heads_that_are_new_and_heads_that_are_lost(quantized, changed, tmp_path, caplog):
    """A task's new head comes with Transformers' warning; a head of the class that was saved must be in the file."""
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model, info = auto.from_pretrained(quantized("llama"), num_labels=3, output_loading_info=True)
        assert info["missing_keys"] <= {"score.weight", "score.bias"}
        assert "score.weight" in info["missing_keys"]
    model.save_pretrained(tmp_path / "tagger")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "tagger")
    assert torch.equal(again.score.weight, model.score.weight)
    lost = changed(tmp_path / "tagger", tensors=removed("score.weight"))
    refuses(lost, r"score\.weight is missing", load=AutoModelForTokenClassification.from_pretrained)
    # what is not of the base model is left out of it
    assert AutoModel.from_pretrained(lost).layers[0].mlp.up_proj.codes.any()


def test_a_new_head_does_not_excuse_the_base_model(quantized, changed):
    folder = changed(quantized("llama"), tensors=removed("model.norm.weight"))
    refuses(folder, r"model\.norm\.weight is missing", load=AutoModelForSequenceClassification.from_pretrained)
    refuses(folder, r"[^.]norm\.weight is missing", load=AutoModel.from_pretrained)


def test_a_quantized_head_and_a_base_model(dense, changed, tmp_path):
    """A model without a head ignores the codes of a head."""
    config = QuipConfig(dataset=None, modules={"lm_head": {"bits": 4}, "embed_tokens": {"bits": 4}})
    AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config).save_pretrained(tmp_path / "q")
    base = AutoModel.from_pretrained(tmp_path / "q")
    assert type(base.embed_tokens).__name__ == "QuipEmbedding"
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "q")
    refuses(changed(tmp_path / "q", tensors=removed("lm_head.codes")), r"lm_head\.codes is missing")


def test_a_head_without_architectures(quantized, changed):
    folder = changed(
        quantized("llama"), tensors=removed("lm_head.weight"), config=lambda config: config.pop("architectures")
    )
    refuses(folder, r"lm_head\.weight is missing")


# Numbers that are none


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["su", "sv"])
def test_native_scales(kind, number, quantized, changed):
    folder = changed(quantized("llama"), tensors=filled(f"{UP}.{kind}", number))
    refuses(folder, rf"{UP}\.{kind} has numbers that are not finite")
    refuses(folder, rf"{UP}\.{kind} has numbers that are not finite", dtype=torch.bfloat16, device_map="auto")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qtip_hyb_k2", "table"),
        ("qfa_E8P12_rand_t128", "factor_in"),
        ("qfa_D4_rand_t128", "sv"),
        ("exl3_mul1_k1_bias", "bias"),
    ],
)
def test_other_small_tensors(name, kind, golden, changed, tmp_path):
    convert(golden / name, tmp_path / "native")
    tensors = load_file(tmp_path / "native" / "model.safetensors")
    key = next(key for key in tensors if key.endswith(f".{kind}") and f"{key.rpartition('.')[0]}.codes" in tensors)
    refuses(changed(tmp_path / "native", tensors=filled(key, float("nan"))), rf"{key} has numbers that are not finite")


def test_scales_of_a_quantized_embedding(dense, changed, tmp_path):
    config = QuipConfig(dataset=None, modules={"embed_tokens": {"bits": 4}})
    AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config).save_pretrained(tmp_path / "q")
    folder = changed(tmp_path / "q", tensors=filled("model.embed_tokens.sv", float("inf")))
    refuses(folder, r"model\.embed_tokens\.sv has numbers that are not finite")


def test_a_scale_that_the_dtype_cannot_hold(quantized, changed):
    folder = changed(quantized("llama"), tensors=filled(f"{UP}.sv", 1e5))
    refuses(folder, rf"{UP}\.sv has numbers up to 1e\+05, which torch\.float16 cannot hold", dtype=torch.float16)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


# Files outside


@pytest.mark.parametrize("place", ["../outside.safetensors", "absolute", "x/../../outside.safetensors"])
def test_an_index_that_leaves_the_folder(place, quantized, tmp_path):
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(quantized("llama")).save_pretrained(folder, max_shard_size="60KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    (folder / first).rename(tmp_path / "outside.safetensors")
    place = str(tmp_path / "outside.safetensors") if place == "absolute" else place
    index["weight_map"] = {key: place if file == first else file for key, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder, "outside.safetensors, which is not in")
    refuses(folder, "outside.safetensors, which is not in", quantization_config=QuipConfig(dataset=None))


@pytest.mark.parametrize("file", [5, None, [], {}])
def test_an_index_of_other_things_than_names(file, quantized, tmp_path):
    AutoModelForCausalLM.from_pretrained(quantized("llama")).save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(tmp_path, r"model\.safetensors\.index\.json has no weight_map from tensors to files")


def test_names_that_would_be_expanded_without_bound(quantized, changed, caplog):
    logging.disable(logging.NOTSET)
    for names in (["{0-99999999999}"], ["{0-999}.{0-999}.{0-999}"]):
        folder = changed(
            quantized("llama"),
            config=lambda config, names=names: config["quantization_config"].update(quantized_modules=names),
        )
        refuses(folder, "mean more than 1,000,000 modules|not a range of numbers")
        shutil.rmtree(folder)


# What config.json calls the method


@pytest.mark.parametrize("method", [True, 255, -0.0, "", " ", ["a"], {}, None])
@pytest.mark.parametrize("kind", ["native", "exl3_mcg_k4", "qfa_D4_had_t128"])
def test_a_method_that_is_not_a_name(kind, method, quantized, golden, changed):
    """Transformers would load it as a model that is not quantized, with random weights."""
    folder = quantized("llama") if kind == "native" else golden / kind
    folder = changed(folder, config=lambda config: config["quantization_config"].update(quant_method=method))
    refuses(folder, "quant_method=.*must be the name of a method")


@pytest.mark.parametrize(
    ("kind", "method", "key"),
    [("native", "quap", "codes"), ("exl3_mcg_k4", "exl4", "trellis"), ("qfa_D4_had_t128", "QUIP", "Qidxs")],
)
def test_a_method_that_nobody_knows(kind, method, key, quantized, golden, changed):
    folder = quantized("llama") if kind == "native" else golden / kind
    folder = changed(folder, config=lambda config: config["quantization_config"].update(quant_method=method))
    refuses(folder, rf"quant_method='{method}', which nobody knows, and the files have .*\.{key}")


def test_a_method_of_others_is_none_of_our_business(dense, changed):
    """As in Transformers: a warning, and the weights as they are."""
    folder = changed(dense("llama"), config=lambda config: config.update(quantization_config={"quant_method": "other"}))
    assert type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_two_methods(quantized, changed):
    folder = changed(quantized("llama"), config=lambda config: config["quantization_config"].update(load_in_4bit=-7))
    refuses(folder, "quant_method='quip' and load_in_4bit")


# Types of one size


@pytest.mark.parametrize(("name", "kind"), [("exl3_3inst_k2", "svh"), ("exl3_3inst_k2", "suh"), ("qs_E8P12_t128", "SU")])
def test_a_scale_of_another_type_of_the_same_size(name, kind, golden, changed, tmp_path):
    key = next(key for key in load_file(golden / name / "model.safetensors") if key.endswith(f".{kind}"))

    def change(tensors):
        tensors[key] = tensors[key].half().view(torch.bfloat16)

    tensors = load_file(golden / name / "model.safetensors")
    if tensors[key].dtype != torch.float16:
        pytest.skip("this checkpoint has scales of another size")
    folder = changed(golden / name, tensors=change)
    refuses(folder, rf"{key} has type BF16, and \d+ such tensors have type F16")
    refuses(folder, "has type BF16", load=convert, destination=tmp_path / "native")


def test_a_native_scale_of_another_type_of_the_same_size(dense, changed, tmp_path):
    AutoModelForCausalLM.from_pretrained(
        dense("llama"), quantization_config=QuipConfig(dataset=None), dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "q")

    def change(tensors):
        tensors[f"{UP}.su"] = tensors[f"{UP}.su"].view(torch.float16)

    refuses(changed(tmp_path / "q", tensors=change), rf"{UP}\.su has type F16, and 13 such tensors have type BF16")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index.pop("metadata"), "has no metadata, which Transformers needs"),
        (lambda index: index.update(metadata=[]), "has no metadata, which Transformers needs"),
        (lambda index: index.update(weight_map={}), "has an empty weight_map"),
        (lambda index: index["weight_map"].update({"lm_head.weight": ""}), "has no weight_map from tensors to files"),
    ],
)
def test_an_index_that_is_incomplete(change, said, quantized, tmp_path):
    AutoModelForCausalLM.from_pretrained(quantized("llama")).save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    change(index)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(tmp_path, said)
