"""Foreign checkpoints of many architectures: they must give the logits of the dense weights that they mean."""

from __future__ import annotations

import json

import pytest
import torch
from functorch.compile import make_boxed_func
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.common import aot_autograd
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from tests import foreign
from tests.models import tiny_config, tiny_ids
from transformers_quip import QuipConfig, QuipLinear
from transformers_quip.hf.convert import convert

QKV = {"qkv_proj": ("q_proj:64", "k_proj:32", "v_proj:32"), "gate_up_proj": ("gate_proj:96", "up_proj:96")}


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}


def quip_params(codebook: str = "E8P12", **values) -> dict:
    return {"quip_params": {"codebook": codebook, "codebook_version": int(codebook == "E8P12"), "codesz": 8, **values}}


@torch.no_grad()
def compare(folders, dtype=torch.float32, tolerance=1e-4):
    """Load both, compare the logits, and return the re-packed model."""
    packed, dense = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in folders)
    expected = dense(tiny_ids()).logits
    logits = packed(tiny_ids()).logits
    assert ((logits - expected).norm() / expected.norm()).item() < tolerance
    return packed


@torch.no_grad()
def compare_saved(model, folders, tmp_path):
    """What is saved and loaded again, and what is converted on disk, computes the same as the model."""
    expected = model(tiny_ids()).logits
    model.save_pretrained(tmp_path / "saved")
    convert(folders[0], tmp_path / "converted")
    for folder in ("saved", "converted"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=model.dtype)
        assert torch.equal(again(tiny_ids()).logits, expected)


@pytest.mark.parametrize("use_rand", [False, True])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox", "gpt2", "phi3", "mixtral"])
def test_quip_for_all(arch, use_rand, tmp_path):
    config = foreign.quip_for_all_config(use_rand=use_rand)
    folders = foreign.write_checkpoints(arch, tmp_path, foreign.quip_for_all(use_rand), config)
    model = compare(folders)
    compare_saved(model, folders, tmp_path)


def test_quip_for_all_with_a_quantized_router(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "_DENSE", tuple(name for name in foreign._DENSE if name != "gate.weight"))
    config = foreign.quip_for_all_config(use_rand=False)
    folders = foreign.write_checkpoints("mixtral", tmp_path, foreign.quip_for_all(), config)
    assert "model.layers.0.block_sparse_moe.gate.Qidxs" in load_file(folders[0] / "model.safetensors")
    model = compare(folders)
    compare_saved(model, folders, tmp_path)


@pytest.mark.parametrize(
    ("mode", "k", "v", "q"),
    [
        ("1mad", 8, 1, 0),
        ("2mad", 3, 1, 0),
        ("3inst", 5, 1, 0),
        ("lut", 2, 2, 16),
        ("lut", 3, 1, 16),
        ("quantlut", 2, 2, 7),
        ("quantlut", 4, 1, 9),
        ("quantlut_sym", 1, 2, 9),
        ("quantlut_sym", 2, 2, 11),
        ("quantlut_sym", 3, 2, 9),
        ("quantlut_sym", 4, 1, 9),
    ],
)
def test_qtip(mode, k, v, q, tmp_path):
    make, config = foreign.qtip(mode, k, v, q), foreign.qtip_config(mode, k, v, q)
    compare(foreign.write_checkpoints("llama", tmp_path, make, config, num_hidden_layers=1))


def test_qtip_of_eight_devices_that_says_so_only_in_its_config(tmp_path):
    config = foreign.qtip_config("3inst", 2, split_for_tp=True, skip_list=None)
    folders = foreign.write_checkpoints("llama", tmp_path, foreign.qtip("3inst", 2, devices=8), config)
    model = compare(folders)
    compare_saved(model, folders, tmp_path)


@pytest.mark.parametrize("keys", ["language_model.model", "model.language_model"])
@torch.no_grad()
def test_exl3_of_a_multimodal_model(keys, tmp_path):
    text = tiny_config("gemma3").to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    dense = Gemma3ForConditionalGeneration(config).eval()
    make, generator, tensors = foreign.exl3(), torch.Generator().manual_seed(0), {}
    for name, parameter in dense.named_parameters():
        stored = name.replace("model.language_model", keys).replace("model.vision_tower", "vision_tower")
        stored = stored.replace("model.multi_modal_projector", "multi_modal_projector")
        if ".layers." in name and "_proj." in name and "language_model" in name:
            parts, weight = make(name, *parameter.shape, generator)
            tensors |= {f"{stored.removesuffix('.weight')}.{kind}": value for kind, value in parts.items()}
            parameter.copy_(weight)
        else:
            tensors[stored] = parameter.clone()
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    described = {"quantization_config": {"quant_method": "exl3", "version": "1.4.1"}}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | described))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(model.model.language_model.layers[0].mlp.down_proj, QuipLinear)
    expected = dense(tiny_ids()).logits
    assert ((model(tiny_ids()).logits - expected).norm() / expected.norm()).item() < 1e-4


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "gpt_neox", "opt", "phi3", "mixtral"])
def test_exl3(arch, tmp_path):
    # each linear with another code and another number of bits, sizes padded to 128
    config = {"quantization_config": {"quant_method": "exl3", "version": "1.4.1", "bits": 2.1, "head_bits": 16}}
    rename = QKV if arch == "phi3" else None
    folders = foreign.write_checkpoints(arch, tmp_path, foreign.exl3(), config, rename)
    model = compare(folders)
    books = {module.codebook for module in model.modules() if isinstance(module, QuipLinear)}
    assert {name.split(":")[1] for name in books} == {"mcg", "3inst", "mul1"}
    compare_saved(model, folders, tmp_path)


def test_scales_of_rows_and_merged_vectors(tmp_path):
    config = foreign.quip_for_all_config(use_rand=False, per_channel=True, merge_suv=True)
    make = foreign.quip_for_all(per_channel=True, missing=("SU",))
    folders = foreign.write_checkpoints("llama", tmp_path, make, config)
    model = compare(folders)
    assert model.model.layers[0].mlp.down_proj.row_scales is not None
    compare_saved(model, folders, tmp_path)


def test_half_precision(tmp_path):
    folders = foreign.write_checkpoints(
        "llama", tmp_path, foreign.quip_for_all(), foreign.quip_for_all_config(use_rand=False)
    )
    model = compare(folders, torch.bfloat16, 0.05)
    linear = model.model.layers[0].mlp.down_proj
    assert linear.su.dtype == torch.float32
    assert linear.weight.dtype == torch.bfloat16
    compare_saved(model, folders, tmp_path)


KINDS = {
    "joined": ("phi3", foreign.exl3, {"quantization_config": {"quant_method": "exl3"}}, {"rename": QKV}),
    "experts": ("mixtral", foreign.exl3, {"quantization_config": {"quant_method": "exl3"}}, {}),
    "fused": ("llama", foreign.quip_sharp, quip_params(), {"fuse": FUSED, "intermediate_size": 128}),
    "biased": ("gpt2", foreign.quip_for_all, foreign.quip_for_all_config(use_rand=False), {}),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dequantize(kind, tmp_path):
    arch, make, config, options = KINDS[kind]
    folders = foreign.write_checkpoints(arch, tmp_path, make(), config, **options)
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).dequantize()
    expected = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["fused", "experts"])
def test_a_disk_offloaded_model(kind, tmp_path):
    arch, make, config, options = KINDS[kind]
    folders = foreign.write_checkpoints(arch, tmp_path, make(), config, **options)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        folders[0], dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    assert torch.equal(offloaded(tiny_ids()).logits, model(tiny_ids()).logits)


def test_a_config_of_ours_is_welcome(tmp_path):
    config = foreign.quip_for_all_config(use_rand=False)
    folders = foreign.write_checkpoints("llama", tmp_path, foreign.quip_for_all(), config)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(folders[0], quantization_config=QuipConfig())
    assert model.config.quantization_config.quantized_modules


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_quip_sharp_fused(arch, tmp_path):
    make = foreign.quip_sharp(rescale=True, wscale=1.5)
    config = quip_params(rescale_WH=True)
    overrides = {"intermediate_size": 128, **({"head_dim": 16} if arch == "qwen3" else {})}
    folders = foreign.write_checkpoints(arch, tmp_path, make, config, fuse=FUSED, **overrides)
    model = compare(folders)
    assert model.model.layers[0].self_attn.qkv_proj.out_features == 128
    compare_saved(model, folders, tmp_path)


@pytest.mark.parametrize("codebook", ["E8P12", "D4", "HI4B1C"])
def test_quip_sharp_of_early_2024(codebook, tmp_path):
    def finish(tensors):
        for name in [key.removesuffix(".Qidxs") for key in tensors if key.endswith(".Qidxs")]:
            # in these files the scale of each projection is a buffer beside it; here SV gives it a factor 2
            tensors[f"{name}.SV"] = tensors[f"{name}.SV"] / 2
            tensors[f"{name.removesuffix('_proj')}_scale"] = torch.tensor(2.0).half()

    make = foreign.quip_sharp(codebook, fused=False, wscale=0.75)
    config = quip_params(codebook, fused=False)
    folders = foreign.write_checkpoints("llama", tmp_path, make, config, finish=finish, intermediate_size=128)
    model = compare(folders)
    compare_saved(model, folders, tmp_path)


@torch.no_grad()
def test_quip_sharp_compiled_and_generating(tmp_path):
    folders = foreign.write_checkpoints(
        "llama", tmp_path, foreign.quip_sharp(), quip_params(), fuse=FUSED, intermediate_size=128
    )
    packed, dense = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    expected = packed(tiny_ids()).logits
    compiled = torch.compile(packed, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    assert torch.allclose(compiled(tiny_ids(), use_cache=False).logits, expected, atol=1e-5)
    # qkv, o, upgate and down in each of two layers
    assert sum("quip" in str(node.target) for graph in graphs for node in graph.graph.nodes) == 8
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    calls = []
    fused = packed.model.layers[1].self_attn.qkv_proj
    fused.register_forward_hook(lambda *_: calls.append("fused"))
    packed.register_forward_hook(lambda *_: calls.append("model"))
    for cache in (None, "static"):
        calls.clear()
        tokens = packed.generate(tiny_ids(), cache_implementation=cache, **options)
        assert calls == ["fused", "model"] * 8  # once for q, k and v of each token
        assert torch.equal(tokens, dense.generate(tiny_ids(), cache_implementation=cache, **options))


def test_adapters_on_fused_projections(tmp_path):
    peft = pytest.importorskip("peft")
    folders = foreign.write_checkpoints(
        "llama", tmp_path, foreign.quip_sharp(), quip_params(), fuse=FUSED, intermediate_size=128
    )
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    with torch.no_grad():
        before = model(tiny_ids()).logits
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        assert torch.equal(model(tiny_ids()).logits, before)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("q_proj" in name for name in adapters)
    assert any("qkv_proj" in name for name in adapters)
    with torch.no_grad():
        for name, parameter in adapters.items():
            if "lora_B" in name:
                parameter.normal_()
    model(tiny_ids(), labels=tiny_ids()).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters.values())
