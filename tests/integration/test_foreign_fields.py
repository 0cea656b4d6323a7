"""Every field and every vintage that `shared/formats` names and the golden folders do not show, in whole checkpoints.

The checkpoints are written from those descriptions (`tests/foreign.py`), beside dense ones of the weights that they mean.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import foreign, truth
from tests.models import tiny_ids
from transformers_quip import QuipLinear, codebooks
from transformers_quip.hf.convert import convert

EXL3 = {"quantization_config": {"quant_method": "exl3", "version": "1.4.1"}}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}
QKV = {"qkv_proj": ("q_proj:64", "k_proj:32", "v_proj:32"), "gate_up_proj": ("gate_proj:96", "up_proj:96")}


@torch.no_grad()
def check(folders, tmp_path, dtype=torch.float32, tolerance=1e-4):
    """The checkpoint computes what its dense weights do; saved and converted it computes the very same."""
    packed, dense = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in folders)
    logits, expected = packed(tiny_ids() % 100).logits, dense(tiny_ids() % 100).logits
    assert ((logits - expected).norm() / expected.norm()).item() < tolerance
    packed.save_pretrained(tmp_path / "saved")
    convert(folders[0], tmp_path / "converted")
    for folder in ("saved", "converted"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=dtype)
        assert torch.equal(again(tiny_ids() % 100).logits, logits)
    return packed


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def leave_dense(names):
    """A change of the foreign tensors: linears with these parts of names are weights as in the dense checkpoint."""

    def change(folders):
        dense = load_file(folders[1] / "model.safetensors")

        def apply(tensors):
            for key in [key for key in tensors if any(name in key for name in names)]:
                del tensors[key]
            tensors.update({key: dense[key] for key in dense if any(name in key for name in names)})

        change_tensors(folders[0], apply)

    return change


# EXL3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_exl3_head_beside_tied_embeddings(arch, dtype, tmp_path, monkeypatch):
    """The head is of 100 tokens, padded to 128; what config.json says besides the method does not count."""
    monkeypatch.setattr(foreign, "_DENSE", tuple(name for name in foreign._DENSE if name != "lm_head"))
    told = {"bits": 7.5, "head_bits": 3, "codebook": "mul1", "out_scales": "auto", "calibration": {"rows": 1, "cols": 2}}
    told |= {"original_quantization_config": {"quant_method": "fp8"}, "tensor_storage": {"lm_head": {"stored_tensors": {}}}}
    config = {"quantization_config": EXL3["quantization_config"] | told}
    make = foreign.exl3(("mcg",), (6, 2, 4))
    folders = foreign.write_checkpoints(arch, tmp_path, make, config, vocab_size=100, tie_word_embeddings=False)
    change_config(folders[0], tie_word_embeddings=True)
    model = check(folders, tmp_path, dtype, 1e-4 if dtype == torch.float32 else 0.05)
    assert isinstance(model.lm_head, QuipLinear)
    assert model.lm_head.out_features == 100
    assert not model.config.tie_word_embeddings
    embedding = load_file(folders[0] / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight, embedding.to(dtype))
    for module in model.modules():
        if isinstance(module, QuipLinear):
            assert module.su.dtype == module.sv.dtype == torch.float32
            assert module.codes.dtype == torch.int16
    with pytest.raises(ValueError, match="lm_head is quantized"):
        model.resize_token_embeddings(120)


@pytest.mark.parametrize("arch", ["llama", "phi3", "mixtral"])
def test_exl3_of_all_bits_in_one_file(arch, tmp_path):
    make = foreign.exl3(bits=(8, 7, 6, 5, 4, 3, 2, 1))
    folders = foreign.write_checkpoints(arch, tmp_path, make, EXL3, QKV if arch == "phi3" else None)
    model = check(folders, tmp_path)
    books = {module.codebook for module in model.modules() if isinstance(module, QuipLinear)}
    assert {name.split(":")[2] for name in books} == {f"k{k}" for k in range(1, 9)}


def test_exl3_of_which_some_linears_are_dense(tmp_path):
    folders = foreign.write_checkpoints("llama", tmp_path, foreign.exl3(), EXL3)
    leave_dense(["layers.0.mlp.down_proj", "layers.1.self_attn"])(folders)
    model = check(folders, tmp_path)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[1].mlp.down_proj, QuipLinear)


def test_exl3_part_of_a_joined_linear_that_is_dense(tmp_path):
    folders = foreign.write_checkpoints("phi3", tmp_path, foreign.exl3(), EXL3, QKV)

    def change(tensors):
        for key in [key for key in tensors if ".layers.1.self_attn.k_proj." in key]:
            del tensors[key]
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 64)

    change_tensors(folders[0], change)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.qkv_proj.*k_proj"):
        AutoModelForCausalLM.from_pretrained(folders[0])


def test_exl3_padded_biases_zero_scales_and_markers(tmp_path):
    def finish(tensors):
        for name in ("q_proj", "k_proj"):
            bias = tensors[f"model.layers.0.self_attn.{name}.bias"]
            padded = torch.full((128,), 7.0)  # what lies beyond is noise
            padded[: len(bias)] = bias
            tensors[f"model.layers.0.self_attn.{name}.bias"] = padded
        for key in tensors:
            if key.endswith((".mcg", ".mul1")):
                tensors[key] = torch.tensor(1, dtype=torch.int32)  # that it is there counts

    def make(name, m, n, generator):
        tensors, weight = linear(name, m, n, generator)
        tensors["svh"][:5] = 0  # outputs that are always zero
        weight[:5] = 0
        return tensors, weight

    linear = foreign.exl3()
    check(foreign.write_checkpoints("qwen2", tmp_path, make, EXL3, finish=finish), tmp_path)


def test_exl3_signs_of_early_files(tmp_path):
    """su and sv are signs in bits, beside a marker, for inputs or outputs or both."""

    def make(name, m, n, generator):
        tensors, weight = linear(name, m, n, generator)
        columns, rows = len(tensors["suh"]), len(tensors["svh"])
        for old, new, size in (("suh", "su", columns), ("svh", "sv", rows)):
            if name.endswith(("q_proj", "down_proj")) or (old == "suh" and name.endswith("k_proj")):
                signs = torch.randint(0, 2, (size // 16, 16), generator=generator)
                values = tensors.pop(old)
                tensors[new] = (signs << torch.arange(16)).sum(1).to(torch.int16)
                ratio = (1 - 2 * signs.flatten().double()) / values.double()
                weight = weight * ratio[:n] if old == "suh" else ratio[:m, None] * weight
        return tensors, weight

    linear = foreign.exl3()
    folders = foreign.write_checkpoints("llama", tmp_path, make, EXL3)
    tensors = load_file(folders[0] / "model.safetensors")
    assert tensors["model.layers.0.self_attn.k_proj.su"].dtype == torch.int16
    assert "model.layers.0.self_attn.k_proj.svh" in tensors
    check(folders, tmp_path, tolerance=1e-3)  # weights and thus logits of hundreds


# QTIP


def test_qtip_after_fine_tuning(tmp_path):
    """All floats in the model's dtype, no rcp; keys that may be missing are, and others are there that say nothing."""

    def make(name, m, n, generator):
        tensors, _ = linear(name, m, n, generator)
        for kind in ("SU", "SV", "tlut"):
            tensors[kind] = tensors[kind].bfloat16()
        k = tensors["trellis"].shape[1] // 16
        w = foreign._qtip_inner(tensors["trellis"], m, n, "quantlut_sym", 2 * k, tensors["tlut"].double(), True)
        w = truth.hadamard(m) @ w @ truth.hadamard(n).T
        del tensors["rcp"]
        tensors["tp_rank"] = torch.tensor(3)  # without meaning where nothing is split
        return tensors, tensors["SV"].double()[:, None] * w * tensors["SU"].double()

    linear = foreign.qtip("quantlut_sym", 2, 2, 9)
    config = foreign.qtip_config("quantlut_sym", 2, 2, 9, something="else")
    for key in ("split_for_tp", "codebook_version"):
        del config["quip_params"][key]
    check(foreign.write_checkpoints("llama", tmp_path, make, config), tmp_path)


def test_qtip_other_bits_for_v(tmp_path):
    """K_v_proj, which the package's models read and its quantizer never writes."""
    wide, narrow = foreign.qtip("quantlut_sym", 4, 2, 9), foreign.qtip("quantlut_sym", 2, 2, 9)

    def make(name, *arguments):
        return (wide if name.endswith("v_proj") else narrow)(name, *arguments)

    config = foreign.qtip_config("quantlut_sym", 2, 2, 9, K_v_proj=4)
    folders = foreign.write_checkpoints("llama", tmp_path, make, config)
    model = check(folders, tmp_path)
    assert model.model.layers[0].self_attn.v_proj.codebook == "trellis:hyb-q9v2:k4:qtip"
    change_config(folders[0], **foreign.qtip_config("quantlut_sym", 2, 2, 9))
    with pytest.raises(ValueError, match=r"v_proj\.trellis has 4 bits, but quip_params says 2"):
        AutoModelForCausalLM.from_pretrained(folders[0])


def test_qtip_skips(tmp_path):
    config = foreign.qtip_config("3inst", 2, skip_list=["0_q", "1_down", "1_up"])
    folders = foreign.write_checkpoints("llama", tmp_path, foreign.qtip("3inst", 2), config)
    leave_dense(["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.1.mlp.up_proj"])(folders)
    model = check(folders, tmp_path)
    assert sum(isinstance(module, QuipLinear) for module in model.modules()) == 11


# QuIP#


def quip_params(**values) -> dict:
    told = {"codesz": 8, "packsz": 2.6666666666666665, "idx_dtype": "torch.int64", "train_mode": True, "grad_ckpt": False}
    return {"quip_params": {"codebook": "E8P12", "codebook_version": 1, "lora_rank": 0, **told, **values}}


@pytest.mark.parametrize(
    ("codebook", "version", "override", "divisor"),
    [
        ("E8P12RVQ4B", 1, None, 3.45),
        ("E8P12RVQ4B", 1, -1, 3.45),
        ("E8P12RVQ4B", 1, 2.5, 2.5),
        ("E8P12RVQ3B", 0, -1, 2.04),
        ("E8P12RVQ3B", None, 3.0, 3.0),  # a missing version is 0
    ],
)
def test_quip_sharp_residuals(codebook, version, override, divisor, tmp_path):
    make = foreign.quip_sharp(codebook, divisors=(divisor, divisor))
    config = quip_params(codebook=codebook, codebook_version=version, resid_scale_override=override)
    for key in ("codebook_version", "resid_scale_override"):
        if config["quip_params"][key] is None:
            del config["quip_params"][key]
    check(foreign.write_checkpoints("llama", tmp_path, make, config, fuse=FUSED, intermediate_size=128), tmp_path)


def test_quip_sharp_codebooks_in_one_file(tmp_path):
    """Each linear's codebook_id counts, and sizes of 12·2^p, whose Hadamard matrix is not symmetric."""
    books = {"qkv_proj": "E8P12", "o_proj": "E8P12RVQ3B", "upgate_proj": "HI4B1C", "down_proj": "E8P12RVQ4B"}
    make = foreign.quip_sharp(books, rescale=True, wscale=0.5, divisors=(1.5, 1.5))
    config = quip_params(rescale_WH=True, resid_scale_override=1.5)
    folders = foreign.write_checkpoints("llama", tmp_path, make, config, fuse=FUSED, intermediate_size=192)
    model = check(folders, tmp_path)
    block = model.model.layers[0]
    assert block.self_attn.o_proj.codebook == codebooks.spec("e8p-rvq3", 1 / 1.5)
    assert block.mlp.upgate_proj.codebook == "half-integer"


@pytest.mark.parametrize("kind", ["A", "B", "ocs_dupe_inds"])
def test_quip_sharp_terms_that_are_not_supported(kind, tmp_path):
    folders = foreign.write_checkpoints(
        "llama", tmp_path, foreign.quip_sharp(), quip_params(), fuse=FUSED, intermediate_size=128, num_hidden_layers=1
    )
    name = f"model.layers.0.mlp.down_proj.{kind}"
    change_tensors(folders[0], lambda tensors: tensors.update({name: torch.zeros(64, 4)}))
    with pytest.raises(ValueError, match=rf"{name}: low-rank terms and split channels of QuIP# are not supported"):
        AutoModelForCausalLM.from_pretrained(folders[0])


# QuIP-for-all


@pytest.mark.parametrize(
    ("codebook", "told", "residual"),
    [
        ("E8P12RVQ4B", -1, -1.0),  # taken literally
        ("E8P12RVQ3B", -1, -1.0),
        ("E8P12RVQ4B", 0.4, 0.4),
        ("E8P12RVQ4B", None, 1 / 3.45),
        ("E8P12RVQ3B", "missing", 1 / 2.04),
    ],
)
def test_quip_for_all_residuals(codebook, told, residual, tmp_path):
    make = foreign.quip_for_all(codebook=codebook, residual=residual)
    config = foreign.quip_for_all_config(use_rand=False, codebook=codebook, opt_resid_scale=told)
    if told == "missing":
        del config["quantization_config"]["opt_resid_scale"]
    check(foreign.write_checkpoints("llama", tmp_path, make, config), tmp_path)


@pytest.mark.parametrize("arch", ["opt", "gpt_neox"])
@pytest.mark.parametrize("missing", [("SU", "SV"), ("SV",), ()])
def test_quip_for_all_padded_with_row_scales_and_biases(arch, missing, tmp_path):
    """106 = 2·53 has no Hadamard matrix, so that 128 rows or columns are stored."""
    make = foreign.quip_for_all(per_channel=True, missing=missing)
    config = foreign.quip_for_all_config(use_rand=False, per_channel=True, merge_suv=bool(missing))
    overrides = {"ffn_dim": 106} if arch == "opt" else {"intermediate_size": 106}
    folders = foreign.write_checkpoints(arch, tmp_path, make, config, **overrides)
    scales = [value for key, value in load_file(folders[0] / "model.safetensors").items() if key.endswith("Wscale")]
    assert {len(scale) for scale in scales} >= {64, 128}
    check(folders, tmp_path)


def test_quip_for_all_of_december_2023(tmp_path):
    """Without the dummy weight and most keys: factors are random; two keys that later files do not have."""

    def finish(tensors):
        for key in [key for key in tensors if key.removesuffix(".weight") + ".Qidxs" in tensors]:
            del tensors[key]

    told = {"quant_method": "QUiP", "codebook": "E8P12", "lora_rank": 0, "outlier_channel_split": False}
    make = foreign.quip_for_all(use_rand=True)
    folders = foreign.write_checkpoints("mistral", tmp_path, make, {"quantization_config": told}, finish=finish)
    assert not any(value.ndim == 0 for key, value in load_file(folders[0] / "model.safetensors").items() if "weight" in key)
    check(folders, tmp_path)
    for key, value in (("lora_rank", 8), ("outlier_channel_split", True)):
        change_config(folders[0], quantization_config=told | {key: value})
        with pytest.raises(ValueError, match=key):
            AutoModelForCausalLM.from_pretrained(folders[0])


@pytest.mark.parametrize("told", [["q_proj", "layers.1.mlp"], ["self_attn"], None])
def test_quip_for_all_skips(told, tmp_path):
    """What is dense is what has no Qidxs, whatever the config's list says: the package itself reads it in two ways."""
    config = foreign.quip_for_all_config(use_rand=False, modules_to_not_convert=told)
    folders = foreign.write_checkpoints("llama", tmp_path, foreign.quip_for_all(), config)
    leave_dense(["q_proj", "layers.1.mlp"])(folders)
    model = check(folders, tmp_path)
    assert sum(isinstance(module, QuipLinear) for module in model.modules()) == 2 * 7 - 2 - 3


def test_quip_for_all_rescaled_is_decoded_as_it_is_stored(tmp_path, caplog):
    config = foreign.quip_for_all_config(use_rand=False, rescale_WH=True)
    folders = foreign.write_checkpoints("llama", tmp_path, foreign.quip_for_all(), config)
    check(folders, tmp_path)
    assert "rescale_WH=true, which its package stores wrongly" in caplog.text
