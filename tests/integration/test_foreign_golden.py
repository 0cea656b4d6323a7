"""Checkpoints that other packages have saved: the weights and logits that these give, packed, saved and loaded again.

Tolerances are relative, over all entries of a tensor. The expected logits of EXL3 come from a decoder that rounds to
float16; all other expected values are those of float32 or float64 computations.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_quip import QuipLinear, cli
from transformers_quip.hf.convert import convert
from transformers_quip.nn import QuipEmbedding
from transformers_quip.nn.fused import FusedRows

FOLDERS = (
    "qs_E8P12_t128",
    "qs_E8P12_rescaleWH_t128",
    "qs_E8P12RVQ3B_t128",
    "qs_E8P12RVQ4B_t128",
    "qfa_E8P12_had_t128",
    "qfa_E8P12_had_pad268",
    "qfa_E8P12_rand_t128",
    "qfa_E8P12_rand_t128_bin",
    "qfa_E8P12RVQ3B_rand_t128",
    "qfa_E8P12RVQ4B_had_t128",
    "qfa_D4_had_t128",
    "qfa_D4_rand_t128",
    "qfa_HI_had_t128",
    "qfa_HI_rand_t128",
    "qtip_1mad_k2",
    "qtip_3inst_k2",
    "qtip_hyb_k2",
    "qtip_hyb_k2_skip",
    "qtip_hyb_k2_tp8",
    "qtip_hyb_k4",
    "exl3_3inst_k2",
    "exl3_legacy_su_sv",
    "exl3_mcg_k2_padded",
    "exl3_mcg_k4",
    "exl3_mul1_k1_bias",
    "exl3_mul1_k2",
)
OF_1_6 = ("exl3_mul1_k2h", "exl3_mixed_half", "exl3_qemb")
CONVERTED = ("qs_E8P12_t128", "qfa_E8P12_rand_t128_bin", "qfa_E8P12_had_pad268", "qtip_hyb_k2_skip", "exl3_mcg_k2_padded")


def distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def dense_weight(module: torch.nn.Module) -> torch.Tensor:
    if isinstance(module, FusedRows):
        return module.fusion.linear.dequantize()[module.begin : module.end]
    return module.dequantize() if isinstance(module, QuipLinear | QuipEmbedding) else module.weight


def code_domain(module: QuipLinear) -> torch.Tensor:
    return module._decode(torch.float32)


@pytest.mark.parametrize("name", FOLDERS)
def test_golden(name, golden, tmp_path):
    compare(golden / name, tmp_path, 2e-3 if name.startswith("exl3") else 1e-4)


@pytest.mark.parametrize("name", OF_1_6)
def test_golden_of_exllamav3_1_6(name, golden_exl3_1_6, tmp_path):
    compare(golden_exl3_1_6 / name, tmp_path, 1e-5)


@torch.no_grad()
def compare(folder, saved, most):
    """Weights, outputs and logits (relative error below `most`) are the expected ones; also when saved and loaded."""
    tolerance = 1e-5
    expected = load_file(folder / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    compared = 0
    for key, value in expected.items():
        kind, _, module = key.partition("/") if "/" in key else (key.rpartition(".")[2], "", key.rpartition(".")[0])
        if kind in ("weight", "W"):
            assert distance(dense_weight(model.get_submodule(module)), value) < tolerance, key
        elif kind == "Wrows8":
            assert distance(dense_weight(model.get_submodule(module))[:8], value) < tolerance, key
        elif kind in ("hatW", "inner"):
            decoded = code_domain(model.get_submodule(module))
            assert torch.equal(decoded if kind == "hatW" else decoded.T, value.float()), key
        elif kind in ("probe_y", "y"):
            x = expected[f"{module}.probe_x" if kind == "probe_y" else f"x/{module}"]
            assert distance(model.get_submodule(module)(x), value) < tolerance, key
        else:
            continue
        compared += 1
    assert compared >= 14
    logits = model(expected["input_ids"]).logits
    assert distance(logits, expected["logits"]) < most

    model.save_pretrained(saved)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(saved)(expected["input_ids"]).logits, logits)


@pytest.mark.parametrize("name", CONVERTED)
@torch.no_grad()
def test_convert(name, golden, tmp_path):
    convert(golden / name, tmp_path / "native", shard_size=200_000)
    assert (tmp_path / "native" / "model.safetensors.index.json").is_file()
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(golden / name, dtype=torch.float32)
    ids = load_file(golden / name / "expected.safetensors")["input_ids"]
    assert torch.equal(native(ids).logits, loaded(ids).logits)
    assert native.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    with pytest.raises(ValueError, match="native format of transformers-quip already"):
        convert(tmp_path / "native", tmp_path / "again")
    with pytest.raises(ValueError, match="is not empty"):
        convert(golden / name, tmp_path / "native")


def test_convert_on_the_command_line(golden, tmp_path, capsys):
    assert cli.main(["convert", str(golden / "qs_E8P12_t128"), str(tmp_path / "native"), "--json"]) == 0
    # qkv, o, upgate and down in each of two layers
    assert json.loads(capsys.readouterr().out)["quantized_layers"] == 8
    assert cli.main(["inspect", str(tmp_path / "native")]) == 0
    # codes of 2 bits, su and sv in float32: outputs and inputs of each, twice
    sizes = ((256, 128), (128, 128), (768, 128), (128, 384))
    bits = 2 + 32 * sum(m + n for m, n in sizes) / sum(m * n for m, n in sizes)
    assert f"{bits:.3f}"[:4] in capsys.readouterr().out
    assert cli.main(["convert", str(golden / "qs_E8P12_t128"), str(tmp_path / "native")]) != 0
