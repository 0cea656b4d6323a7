"""`convert(…, to="exl3")`: EXL3's own files come back byte for byte, and other models as the format's description says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import foreign, truth
from tests.models import save_tiny_model, tiny_config, tiny_ids, tiny_model
from transformers_quip import QuipConfig, cli
from transformers_quip.checkpoints.convert_exl3 import exl3_modules
from transformers_quip.checkpoints.foreign import trellis_bits
from transformers_quip.hf.convert import convert
from transformers_quip.nn.replace import quantized_modules, replace_by_empty

GOLDEN = ("exl3_3inst_k2", "exl3_mcg_k2_padded", "exl3_mul1_k1_bias")
OF_1_6 = ("exl3_mul1_k2h", "exl3_mixed_half", "exl3_qemb")
TRELLIS = {"codebook": "trellis:mul1:k2:exl3", "incoherence": "hadamard-128"}
UP = "model.layers.0.mlp.up_proj"


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def back_and_forth(folder, tmp_path):
    """The tensors and both descriptions are those of the first file, but for what calibrated it."""
    convert(folder, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "exl3", to="exl3")
    first, second = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "exl3"))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert torch.equal(value, second[key]), key
    written, config = (read(tmp_path / "exl3", name) for name in ("quantization_config.json", "config.json"))
    assert written["tensor_storage"] == read(folder, "quantization_config.json")["tensor_storage"]
    known = read(folder)["quantization_config"]
    assert config["quantization_config"] == {key: value for key, value in written.items() if key != "tensor_storage"}
    assert config["quantization_config"].keys() == known.keys() - {"calibration", "out_scales"}
    for key in ("quant_method", "head_bits", "codebook"):
        assert config["quantization_config"].get(key) == known.get(key)
    assert abs(written["bits"] - known["bits"]) < 0.1  # the converter writes the target
    assert (config["architectures"], config["tie_word_embeddings"]) == (["LlamaForCausalLM"], False)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, golden, tmp_path):
    back_and_forth(golden / name, tmp_path)


@pytest.mark.parametrize("name", OF_1_6)
def test_golden_of_exllamav3_1_6(name, golden_exl3_1_6, tmp_path):
    back_and_forth(golden_exl3_1_6 / name, tmp_path)


@pytest.mark.parametrize("k", [*range(1, 9), 1.5, 2.5, 3.5])
def test_codes_come_back(k):
    words = torch.randint(-(2**15), 2**15, (4, 3, int(16 * k)), generator=torch.Generator().manual_seed(0)).short()
    assert torch.equal(trellis_bits.to_exl3(trellis_bits.from_exl3(words), 64), words)
    with pytest.raises(ValueError, match="K as EXL3 has it"):
        trellis_bits.to_exl3(torch.zeros(16, 18, dtype=torch.int16), 64)


def native(folder, dtype=torch.float32, arch="llama", finish=None, bits=(2, 1.5, 3), code="mul1", **overrides):
    """A native model of random codes; its scales have the sizes that quantizing gives: su near 1, sv that of the weight."""

    def scaled(stored):
        for key, value in stored.items():
            if key.endswith(("suh", "svh")):
                stored[key] = value.float()

    config = {"quantization_config": {"quant_method": "exl3", "version": "1.6.5"}}
    make = foreign.exl3((code,), bits)
    foreign.write_checkpoints(arch, folder, make, config, finish=scaled, **overrides)
    convert(folder / "foreign", folder / "native")
    tensors, generator = load_file(folder / "native" / "model.safetensors"), torch.Generator().manual_seed(1)
    for key, value in tensors.items():
        if key.endswith(("su", "sv")):
            size = 1.0 if key.endswith("su") else 0.02
            tensors[key] = (size * torch.randn(value.shape, generator=generator)).to(dtype).to(value.dtype)
    if finish is not None:
        finish(tensors)
    save_file(tensors, folder / "native" / "model.safetensors", {"format": "pt"})
    return folder / "native"


def decoded(tensors, name, code="mul1"):
    """The weight [out, in] of a linear of an EXL3 file, with its padding, from the format's description alone."""
    suh, svh = (tensors[f"{name}.{kind}"].double() for kind in ("suh", "svh"))
    inner = foreign.exl3_inner(tensors[f"{name}.trellis"], code)
    h = truth.hadamard(128)
    rotated = torch.block_diag(*[h] * (len(suh) // 128)) @ inner @ torch.block_diag(*[h] * (len(svh) // 128))
    return (suh[:, None] * rotated * svh).T


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 1e-6), (torch.float32, 5e-4)])
@torch.no_grad()
def test_what_was_quantized_here(dtype, most, tmp_path):
    """Scales in float16 are written without loss, though a power of two is moved; float32 is rounded to float16."""
    folder = native(tmp_path, dtype, num_hidden_layers=1)
    convert(folder, tmp_path / "exl3", to="exl3")
    before, after = (AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32) for at in (folder, tmp_path / "exl3"))
    tensors, compared = load_file(tmp_path / "exl3" / "model.safetensors"), 0
    for name, module in quantized_modules(before).items():
        weight = module.dequantize(torch.float64)
        found = decoded(tensors, name)[: module.out_features, : module.in_features]
        assert ((found - weight).norm() / weight.norm()).item() < most
        # the weight's size is in suh, as exllamav3's float16 activations want it
        assert 0.5 < tensors[f"{name}.svh"].float().pow(2).mean().sqrt() < 2
        assert {key.rpartition(".")[2] for key in tensors if key.startswith(f"{name}.")} == {
            "trellis",
            "suh",
            "svh",
            "mul1",
        }
        assert tensors[f"{name}.mul1"].item() & 0xFFFFFFFF == 0x83DCD12D
        assert all(size % 128 == 0 for kind in ("suh", "svh") for size in tensors[f"{name}.{kind}"].shape)
        compared += 1
    assert compared == 7  # and the head is the table
    logits, expected = after(tiny_ids()).logits, before(tiny_ids()).logits
    assert ((logits - expected).norm() / expected.norm()).item() < 10 * most
    records = read(tmp_path / "exl3", "quantization_config.json")["tensor_storage"]
    assert {name for name, record in records.items() if "quant_format" in record} == set(quantized_modules(before))
    assert {record.get("bits_per_weight") for record in records.values()} == {None, 1.5, 2, 3}


@torch.no_grad()
def test_folded_factors(tmp_path):
    """The routed experts of Laguna hold W / 128 in EXL3 files; the shared ones hold W."""
    folder = native(tmp_path, torch.float16, "laguna", bits=(2,))
    convert(folder, tmp_path / "exl3", to="exl3")
    before, after = (AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32) for at in (folder, tmp_path / "exl3"))
    tensors, factors = load_file(tmp_path / "exl3" / "model.safetensors"), set()
    for name, module in quantized_modules(before).items():
        # Transformers calls them shared_experts, and Laguna's makers shared_expert
        weight, found = module.dequantize(torch.float64), decoded(tensors, name.replace("shared_experts", "shared_expert"))
        factor = 1 / 128 if "mlp.experts." in name and name.endswith("up_proj") else 1
        error = (found[: module.out_features, : module.in_features] - factor * weight).norm() / (factor * weight.norm())
        assert error.item() < 1e-5, name
        factors.add(factor)
    assert factors == {1, 1 / 128}
    expected = before(tiny_ids()).logits
    assert ((after(tiny_ids()).logits - expected).norm() / expected.norm()).item() < 1e-4


@torch.no_grad()
def test_a_tied_head_stays_tied(tmp_path):
    folder = native(tmp_path, torch.float16, num_hidden_layers=1, tie_word_embeddings=True)
    convert(folder, tmp_path / "exl3", to="exl3")
    config = read(tmp_path / "exl3")
    assert (config["tie_word_embeddings"], config["quantization_config"]["head_bits"]) == (True, 16)
    before, after = (AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32) for at in (folder, tmp_path / "exl3"))
    torch.testing.assert_close(after(tiny_ids()).logits, before(tiny_ids()).logits, rtol=1e-4, atol=1e-5)


def too_large(tensors):
    tensors[f"{UP}.su"][3] = 1e7


def test_a_number_that_float16_cannot_hold(tmp_path):
    folder = native(tmp_path, finish=too_large, num_hidden_layers=1)
    with pytest.raises(ValueError, match=rf"{UP}.su has numbers up to .*: EXL3 has float16"):
        convert(folder, tmp_path / "exl3", to="exl3")
    assert not (tmp_path / "exl3").exists()


WIDE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"codebook": "e8p", "incoherence": "hadamard-128"},
            rf"{UP}: codebook 'e8p' has no form in EXL3.*codebook='trellis:",
        ),
        ({"codebook": "trellis:mul1:k2:rows"}, rf"{UP}: codebook 'trellis:mul1:k2:rows' has no form in EXL3"),
        ({"codebook": "trellis:1mad:k2:exl3"}, rf"{UP}: codebook 'trellis:1mad:k2:exl3' has no form in EXL3"),
        ({"incoherence": ["hadamard", "hadamard-128"]}, rf"{UP}: the transform 'hadamard' has no form in EXL3"),
        ({"incoherence": ["hadamard-128", "none"]}, rf"{UP}: the transform 'none' has no form in EXL3"),
    ],
)
def test_what_the_format_cannot_hold(options, message):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama", **WIDE))
    replace_by_empty(model, UP, QuipConfig(**(TRELLIS | {"dataset": None} | options)))
    with pytest.raises(ValueError, match=message):
        exl3_modules(model, {}, str)


def test_linears_that_are_computed_together_need_one_code():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama", **WIDE))
    gate = UP.replace("up_proj", "gate_proj")
    replace_by_empty(model, UP, QuipConfig(**TRELLIS, dataset=None))
    replace_by_empty(model, gate, QuipConfig(**TRELLIS | {"codebook": "trellis:mcg:k2:exl3"}, dataset=None))
    with pytest.raises(ValueError, match=r"gate_proj and .*up_proj have codebooks 'trellis:mcg:k2:exl3' and 'trellis:mul1"):
        exl3_modules(model, {}, str)


def test_models_that_are_refused(golden, tmp_path):
    with pytest.raises(ValueError, match="is not in the native format of transformers-quip"):
        convert(golden / "exl3_mcg_k4", tmp_path / "out", to="exl3")
    with pytest.raises(ValueError, match="to='gguf' must be one of native, exl3"):
        convert(golden / "exl3_mcg_k4", tmp_path / "out", to="gguf")
    folder = save_tiny_model("llama", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuipConfig(bits=2, dataset=None))
    model.save_pretrained(tmp_path / "e8p")
    with pytest.raises(ValueError, match="codebook 'e8p' has no form in EXL3"):
        convert(tmp_path / "e8p", tmp_path / "out", to="exl3")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"mlp.experts: exllamav3 reads quantized experts alone, and these are dense"):
        exl3_modules(tiny_model("laguna"), {}, str)


def test_on_the_command_line(golden, tmp_path, capsys):
    convert(golden / "exl3_mcg_k4", tmp_path / "native")
    assert cli.main(["convert", str(tmp_path / "native"), str(tmp_path / "exl3"), "--to", "exl3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized_layers"] == 15  # seven in each of two layers, and the head
    assert (tmp_path / "exl3" / "quantization_config.json").is_file()
    shutil.rmtree(tmp_path / "exl3")
    assert cli.main(["convert", str(golden / "exl3_mcg_k4"), str(tmp_path / "exl3"), "--to", "exl3"]) != 0
    assert "is not in the native format" in capsys.readouterr().err
