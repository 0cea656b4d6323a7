"""Every kind of bad input is one clear error, raised before the long work begins."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from transformers_quip import QuipConfig
from transformers_quip.hf import modes, quantize_weight

UNCALIBRATED = QuipConfig(dataset=None)


@pytest.fixture(autouse=True)
def _no_work(monkeypatch, quantized):
    """Fail if any weight is quantized (the folder that tests damage is made before)."""
    quantized("llama")

    def refuse(*args, **kwargs):
        raise AssertionError("the error came too late: quantizing had begun")

    monkeypatch.setattr(quantize_weight.QuantizeWeight, "convert", refuse)
    monkeypatch.setattr(modes.Calibrated, "finish", refuse)


@pytest.fixture
def damaged(quantized, tmp_path):
    """Copies the quantized model; damaged(tensors=function, config=function) changes it and returns the folder."""

    def folder(tensors=None, config=None) -> Path:
        shutil.copytree(quantized("llama"), tmp_path, dirs_exist_ok=True)
        if tensors is not None:
            file = tmp_path / "model.safetensors"
            values = load_file(file)
            tensors(values)
            save_file(values, file, metadata={"format": "pt"})
        if config is not None:
            file = tmp_path / "config.json"
            values = json.loads(file.read_text())
            config(values["quantization_config"])
            file.write_text(json.dumps(values))
        return tmp_path

    return folder


CODES = "model.layers.1.mlp.up_proj.codes"


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}, {"device_map": "auto"}])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(CODES), r"model\.layers\.1\.mlp\.up_proj\.codes is missing"),
        (lambda t: t.pop(CODES.replace("codes", "sv")), r"model\.layers\.1\.mlp\.up_proj\.sv is missing"),
        (lambda t: t.update({CODES: t[CODES][:-1].contiguous()}), r"codes has shape \[95, 8\] instead of \[96, 8\]"),
        (lambda t: t.update({CODES: t[CODES].int()}), "codes has type I32 instead of I16"),
        (lambda t: t.update({CODES: t[CODES].float()}), "codes has type F32 instead of I16"),
    ],
    ids=["no codes", "no sv", "shape", "int32", "float"],
)
def test_damaged_tensors(damaged, change, said, options):
    with pytest.raises(ValueError, match=said) as error:
        AutoModelForCausalLM.from_pretrained(damaged(tensors=change), **options)
    assert "download or save the model again" in str(error.value)


def test_truncated_file(damaged):
    folder = damaged()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .* download or save the model again"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format_version=7), r"format_version=7; .*reads version 1: .*newer transformers-quip"),
        (lambda c: c.update(codebook="e9"), r"codebook='e9' must be one of 'e8p'.*newer transformers-quip"),
        (lambda c: c.update(incoherence="dct"), r"incoherence='dct' must be one of 'hadamard'.*newer transformers-quip"),
        (lambda c: c.update(group_size=64), r"'group_size', which format version 1 does not have"),
        (lambda c: c.pop("format_version"), "no format_version"),
        (lambda c: c.pop("quantized_modules"), "names no quantized_modules"),
        (lambda c: c.update(quantized_modules=["model.layers.0.mlp.up_proj"]), "codes exists, but config.json does not"),
        (lambda c: c.update(quantized_modules=["h.{0-1}.fc"]), r"None of the quantized modules .*h\.0\.fc"),
    ],
)
def test_damaged_config(damaged, change, said):
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_pretrained(damaged(config=change))


def test_a_folder_of_another_method_that_transformers_knows(damaged):
    folder = damaged(config=lambda c: (c.clear(), c.update(quant_method="bitnet")))
    with pytest.raises(ValueError, match="is quantized with BitNetQuantConfig but you are passing a QuipConfig"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=UNCALIBRATED)


@pytest.mark.parametrize("config", [UNCALIBRATED, QuipConfig()], ids=["uncalibrated", "calibrated"])
def test_a_folder_of_another_method_that_transformers_does_not_know(damaged, config):
    """Transformers ignores such a quantization_config; the checkpoint has no weights to quantize."""
    folder = damaged(
        config=lambda c: (c.clear(), c.update(quant_method="other")),
        tensors=lambda t: [t.update({k.replace("codes", "qweight"): t.pop(k)}) for k in list(t) if k.endswith("codes")],
    )
    with pytest.raises(ValueError, match=r"down_proj\.weight to quantize .*qweight.* quantized by another method"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@torch.no_grad()
def test_a_quip_folder_is_loaded_as_it_is(quantized, ids):
    """Transformers says (in a warning) that the folder's own config is used."""
    logits = AutoModelForCausalLM.from_pretrained(quantized("llama"))(ids).logits
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(quantized("llama"), quantization_config=QuipConfig(seed=9))
    assert torch.equal(model(ids).logits, logits)
    assert model.config.quantization_config.seed == 0


def test_calibration_of_a_model_that_is_not_causal(dense, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"LlamaModel cannot be calibrated on text that it writes itself.*Give texts.*dataset=None",
    ):
        AutoModel.from_pretrained(dense("llama"), quantization_config=QuipConfig())
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
    BertForMaskedLM(BertConfig(**small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="BertForMaskedLM cannot be calibrated on text that it writes itself"):
        BertForMaskedLM.from_pretrained(tmp_path / "bert", quantization_config=QuipConfig())
    t5 = T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=40)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="T5ForConditionalGeneration cannot be calibrated on text that it writes"):
        T5ForConditionalGeneration.from_pretrained(tmp_path / "t5", quantization_config=QuipConfig())


@pytest.mark.parametrize("config", [UNCALIBRATED, QuipConfig()], ids=["uncalibrated", "calibrated"])
def test_nothing_to_quantize(dense, config):
    options = {**config.to_dict(), "modules_to_not_convert": ["model"]}
    with pytest.raises(ValueError, match="Nothing of LlamaForCausalLM would be quantized"):
        AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=QuipConfig.from_dict(options))


def test_calibration_of_an_offloaded_model(dense, tmp_path):
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    with pytest.raises(ValueError, match=r"device_map offloads .*'disk'.* needs it in memory.*dataset=None"):
        AutoModelForCausalLM.from_pretrained(
            dense("llama"),
            quantization_config=QuipConfig(),
            device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"},
            offload_folder=tmp_path,
        )
