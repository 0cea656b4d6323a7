"""Checkpoints of other packages that are damaged, contradictory or of a kind that is not supported: one clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from tests import foreign
from transformers_quip import QuipConfig, QuipLinear
from transformers_quip.hf.convert import convert


@pytest.fixture
def damaged(golden, tmp_path):
    """damaged(name, change of the tensors, change of the config) → a changed copy of a golden checkpoint."""

    def folder(name, tensors=None, config=None):
        target = tmp_path / "damaged"
        shutil.copytree(golden / name, target, copy_function=shutil.copyfile)
        target.chmod(0o755)
        if tensors is not None:
            values = load_file(target / "model.safetensors")
            tensors(values)
            save_file(values, target / "model.safetensors", {"format": "pt"})
        if config is not None:
            values = json.loads((target / "config.json").read_text())
            config(values)
            (target / "config.json").write_text(json.dumps(values))
        return target

    return folder


DOWN = "model.layers.1.mlp.down_proj"
QKV = "model.layers.0.self_attn.qkv_proj"
K = "model.layers.0.self_attn.k_proj"


def without(key):
    return lambda tensors: tensors.pop(key)


def changed(key, function):
    return lambda tensors: tensors.__setitem__(key, function(tensors.get(key)))


def spoiled(key, number):
    def change(tensors):
        tensors[key].view(-1)[0] = float(number)

    return change


def params(**values):
    return lambda config: config["quip_params"].update(values)


def quantization(**values):
    return lambda config: config["quantization_config"].update(values)


CASES = {
    "no SU": ("qs_E8P12_t128", without(f"{QKV}.SU"), None, [f"{QKV}.SU is missing"]),
    "no SV, not merged": ("qfa_E8P12_had_t128", without(f"{DOWN}.SV"), None, [f"{DOWN}.SV is missing"]),
    "no Wscale of QuIP#": ("qs_E8P12_t128", without(f"{QKV}.Wscale"), None, [f"{QKV}.Wscale is missing"]),
    "no codebook_id": ("qs_E8P12_t128", without(f"{QKV}.codebook_id"), None, [f"{QKV}.codebook_id is missing"]),
    "no fuse_scales": ("qs_E8P12_t128", without(f"{QKV}.fuse_scales"), None, [f"{QKV}.fuse_scales is missing"]),
    "two fuse_scales": (
        "qs_E8P12_t128",
        changed(f"{QKV}.fuse_scales", lambda scales: scales[:2].clone()),
        None,
        [f"{QKV}.fuse_scales is F16 [2] instead of", "[3]"],
    ),
    "no scaleWH": ("qs_E8P12_t128", None, params(rescale_WH=True), ["scaleWH is missing"]),
    "scaleWH too many": ("qs_E8P12_rescaleWH_t128", None, params(rescale_WH=False), ["scaleWH exists", "rules out"]),
    "no flag": ("qs_E8P12_rescaleWH_t128", None, params(rescale_WH="yes"), ["rescale_WH='yes'", "true or false"]),
    "scaleWH is 0": (
        "qs_E8P12_rescaleWH_t128",
        spoiled(f"{QKV}.scaleWH", 0),
        None,
        [f"scales of {QKV} are not all finite"],
    ),
    "not fused": ("qs_E8P12_t128", None, params(fused=False), [".scale is missing"]),
    "SU is NaN": ("qs_E8P12_t128", spoiled(f"{QKV}.SU", "nan"), None, [f"{QKV}.SU has numbers that are not finite"]),
    "Wscale is infinite": ("qfa_D4_had_t128", spoiled(f"{DOWN}.Wscale", "inf"), None, [f"{DOWN}.Wscale has numbers"]),
    "svh is NaN": ("exl3_mcg_k4", spoiled(f"{DOWN}.svh", "nan"), None, [f"{DOWN}.svh has numbers"]),
    "the table is infinite": ("qtip_hyb_k2", spoiled(f"{DOWN}.tlut", "-inf"), None, [f"{DOWN}.tlut has numbers"]),
    "a table too many": (
        "qtip_1mad_k2",
        changed(f"{DOWN}.tlut", lambda table: torch.zeros(512, 2).half()),
        None,
        [f"{DOWN}.tlut exists", "decode_mode='1mad' has no table"],
    ),
    "other bits": ("qtip_hyb_k2", None, params(K=3), ["has 2 bits, but quip_params says 3"]),
    "skipped and there": ("qtip_hyb_k2", None, params(skip_list=["1_down"]), [f"{DOWN} has a trellis", "skip_list"]),
    "no skip_list": ("qtip_hyb_k2", None, params(skip_list="1_down"), ["skip_list='1_down'", "'0_v'"]),
    "states of QTIP": ("qtip_hyb_k2", None, params(L=12), ["L=12", "only 16"]),
    "four at a time": ("qtip_hyb_k2", None, params(V=4), ["V=4 with decode_mode='quantlut_sym'"]),
    "size of the table": ("qtip_hyb_k2", None, params(tlut_bits=16), ["tlut_bits=16", "15 at most"]),
    "per_channel": ("qfa_D4_had_t128", None, quantization(per_channel=True), ["Wscale has shape []", "per_channel=True"]),
    "use_rand": ("qfa_E8P12_rand_t128", None, quantization(use_rand=False), ["had_", "says use_rand=false"]),
    "scale of EXL3": (
        "exl3_mcg_k4",
        changed(f"{DOWN}.scale", lambda scale: torch.ones(1)),
        None,
        [f"{DOWN}.scale", "early"],
    ),
    "no Wscale": ("qfa_E8P12_had_t128", without(f"{DOWN}.Wscale"), None, [f"{DOWN}.Wscale is missing"]),
    "no suh": ("exl3_mcg_k4", without(f"{DOWN}.suh"), None, [f"{DOWN} has neither suh nor su"]),
    "no table": ("qtip_hyb_k2", without(f"{DOWN}.tlut"), None, [f"{DOWN}.tlut is missing"]),
    "no factor": ("qfa_E8P12_rand_t128", without(f"{DOWN}.had_left"), None, [f"{DOWN}.had_left is missing"]),
    "no codes and no weight": ("qfa_D4_had_t128", without(f"{DOWN}.Qidxs"), None, [DOWN, "neither codes nor a weight"]),
    "wrong shape": (
        "qs_E8P12_t128",
        changed(f"{DOWN}.Qidxs", lambda codes: codes[:, :-1].contiguous()),
        None,
        [f"{DOWN}.Qidxs is I64 [128, 11] instead of I64 [128, 12]"],
    ),
    "wrong type": (
        "qfa_E8P12_had_t128",
        changed(f"{DOWN}.Qidxs", lambda codes: codes.int()),
        None,
        [f"{DOWN}.Qidxs is I32", "instead of I16"],
    ),
    "half bits of a code that has none": (
        "exl3_mcg_k4",
        changed(f"{DOWN}.trellis", lambda words: words[..., :-8].contiguous()),
        None,
        [f"{DOWN}.trellis has 3.5 bits, which only code mul1 has"],
    ),
    "bits of a version to come": (
        "exl3_mul1_k2",
        changed(f"{DOWN}.trellis", lambda words: torch.cat([words, words, words[..., :8]], -1)),
        lambda config: config["quantization_config"].update(version="1.9.0"),
        [f"{DOWN}.trellis has shape", "forms of exllamav3 up to 1.6", "was made by exllamav3 1.9.0"],
    ),
    "unknown codebook_id": (
        "qs_E8P12_t128",
        changed(f"{QKV}.codebook_id", lambda identity: torch.tensor(3)),
        None,
        [f"{QKV}.codebook_id is 3", "7, 10, 17, 18"],
    ),
    "another codebook_id": (
        "qs_E8P12_t128",
        changed(f"{QKV}.codebook_id", lambda identity: torch.tensor(17)),
        None,
        [f"{QKV}.Qidxs", "[256, 8]"],
    ),
    "codes beside a weight": (
        "qfa_E8P12_had_t128",
        changed(f"{DOWN}.weight", lambda weight: torch.zeros(128, 384)),
        None,
        [f"{DOWN} has both Qidxs and a weight of shape [128, 384]"],
    ),
    "a module too many": (
        "qfa_E8P12_had_t128",
        changed("model.layers.7.mlp.down_proj.Qidxs", lambda codes: torch.zeros(128, 48, dtype=torch.int16)),
        None,
        ["model.layers.7.mlp.down_proj", "LlamaForCausalLM has none of that name"],
    ),
    "a bias too many": (
        "exl3_mcg_k4",
        changed(f"{DOWN}.bias", lambda bias: torch.zeros(256).half()),
        None,
        [f"{DOWN}.bias exists"],
    ),
    "no bias": ("exl3_mul1_k1_bias", without(f"{K}.bias"), None, [f"{K}.bias is missing"]),
    "another split": (
        "qtip_hyb_k2",
        changed(f"{DOWN}.rcp", lambda rcp: torch.tensor(3)),
        None,
        [f"{DOWN}.rcp is 3"],
    ),
    "no quip_params": ("qs_E8P12_t128", None, lambda c: c.update(quip_params=[]), ["quip_params=[]", "must be a dict"]),
    "version 0": ("qs_E8P12_t128", None, params(codebook_version=0), ["version 0 of codebook E8P12", "2023-12-19"]),
    "model version": ("qs_E8P12_t128", None, params(model_version=2), ["model_version=2"]),
    "low rank": ("qs_E8P12_t128", None, params(lora_rank=64), ["lora_rank=64", "not supported"]),
    "split channels": ("qs_E8P12_t128", None, params(outlier_channel_split=True), ["outlier_channel_split"]),
    "codebook of quip_params": ("qs_E8P12_t128", None, params(codebook="E8P13"), ["codebook='E8P13'", "'E8P12RVQ4B'"]),
    "codebook of QUiP": ("qfa_E8P12_had_t128", None, quantization(codebook="E9"), ["codebook='E9'", "'E8P12'"]),
    "decode_mode": ("qtip_hyb_k2", None, params(decode_mode="4inst"), ["decode_mode='4inst'", "'quantlut_sym'"]),
    "tile": ("qtip_hyb_k2", None, params(td_x=8), ["td_x=8", "only 16"]),
    "residual scale": ("qfa_E8P12RVQ4B_had_t128", None, quantization(opt_resid_scale="1"), ["opt_resid_scale='1'"]),
    "no codes at all": ("exl3_mcg_k4", lambda t: [t.pop(k) for k in list(t) if k.endswith("trellis")], None, ["…trellis"]),
    "another size": (
        "qfa_E8P12_had_t128",
        None,
        lambda c: c.update(intermediate_size=256),
        ["instead of F16 or BF16 or F32 [256]"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case, damaged):
    name, tensors, config, messages = CASES[case]
    with pytest.raises(ValueError) as caught:
        AutoModelForCausalLM.from_pretrained(damaged(name, tensors, config))
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["qs_E8P12_t128", "qfa_E8P12_rand_t128_bin"])
def test_truncated(name, damaged):
    folder = damaged(name)
    (file,) = [*folder.glob("model.safetensors"), *folder.glob("*.bin")]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_pickled_code_is_refused(damaged):
    folder = damaged("qfa_E8P12_rand_t128_bin")
    torch.save({"model.norm.weight": torch.zeros(1), "code": json.dumps}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as a file of tensors alone"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read as a file of tensors alone.*as safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)  # Transformers looks for the type before anybody else reads
    with pytest.raises(ValueError, match="cannot be read as a file of tensors alone"):
        convert(folder, folder / "native")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read.*download or save the model again"):
        AutoModelForCausalLM.from_pretrained(folder)


def shards(folder, name, other):
    """Give the checkpoint an index that places all tensors in one file but the last, which is in another."""
    keys = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys[:-1], name) | {keys[-1]: other}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, lambda folder: convert(folder, folder / "native")])
def test_an_index_that_leads_elsewhere(load, damaged, golden):
    folder = damaged("qs_E8P12_t128")
    (folder / "sub").mkdir()
    shards(folder, "part.safetensors", "sub/../../part.safetensors")
    shutil.copyfile(folder / "part.safetensors", folder.parent / "part.safetensors")
    with pytest.raises(ValueError, match=r"names .*part\.safetensors, which is not in"):
        load(folder)


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, lambda folder: convert(folder, folder / "native")])
def test_an_index_that_names_a_missing_file(load, damaged):
    folder = damaged("qs_E8P12_t128")
    shards(folder, "part-1.safetensors", "part-2.safetensors")
    with pytest.raises((ValueError, OSError), match=r"part-2\.safetensors"):
        load(folder)


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, lambda folder: convert(folder, folder / "native")])
def test_a_header_that_promises_too_much(load, damaged):
    folder = damaged("qs_E8P12_t128")
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[f"{QKV}.Qidxs"] |= {"shape": [2**40, 4], "data_offsets": [0, 2**45]}
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("name", ["qfa_E8P12_had_t128", "qfa_E8P12_rand_t128_bin"])
@torch.no_grad()
def test_a_config_beside_the_config(name, damaged, golden, tmp_path):
    taken = {}
    folder = damaged(name, None, lambda config: taken.update(config.pop("quantization_config")))
    (folder / "quantization_config.json").write_text(json.dumps(taken))
    expected = load_file(golden / name / "expected.safetensors")
    for arguments in ({}, {"quantization_config": QuipConfig()}):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments)
        logits = model(expected["input_ids"]).logits
        assert ((logits - expected["logits"]).norm() / expected["logits"].norm()).item() < 1e-4
    convert(folder, tmp_path / "native")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    assert torch.equal(again(expected["input_ids"]).logits, logits)
    (folder / "quantization_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"quantization_config\.json is not JSON"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_convert_of_a_type_that_is_not_known(damaged, tmp_path):
    folder = damaged("qs_E8P12_t128", lambda tensors: tensors.update(extra=torch.zeros(2).to(torch.float8_e4m3fn)))
    with pytest.raises(ValueError, match="extra is of type F8_E4M3, which is not supported; types are F64, F32"):
        convert(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_convert_on_a_full_disk(golden, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large.*model\.safetensors"):
            convert(golden / "qs_E8P12_t128", tmp_path / "native")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "native").exists()


def test_a_convert_that_is_killed(golden, tmp_path):
    """In a process of its own, which kills itself when half of the tensors are written."""
    code = (
        "import os, signal, sys\n"
        "from transformers_quip import cli\n"
        "from transformers_quip.checkpoints import writer\n"
        "class Bar(writer.tqdm):\n"
        "    def update(self, n=1):\n"
        "        super().update(n)\n"
        "        if self.n > self.total // 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "writer.tqdm = Bar\n"
        "cli.main(['convert', *sys.argv[1:]])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(golden / "qs_E8P12_t128"), str(tmp_path / "native")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (tmp_path / "native").exists()
    (rest,) = tmp_path.iterdir()
    assert rest.name.startswith(".native.")
    assert sorted(path.name for path in rest.rglob("*") if path.is_file()) == [".moving", "model.safetensors.partial"]


def test_another_method_on_a_quantized_checkpoint(golden):
    with pytest.raises(ValueError, match=r"has quip_params: the model is quantized already.*QuipConfig\(\)"):
        AutoModelForCausalLM.from_pretrained(
            golden / "qs_E8P12_t128", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_quip_params_with_a_config_of_ours(golden):
    model = AutoModelForCausalLM.from_pretrained(golden / "qs_E8P12_t128", quantization_config=QuipConfig())
    assert not hasattr(model.config, "quip_params")
    assert model.model.layers[0].self_attn.q_proj.out_features == 128


def test_only_some_experts(tmp_path):
    config = {"quantization_config": {"quant_method": "exl3", "version": "1.4.1"}}
    folder, dense = foreign.write_checkpoints("mixtral", tmp_path, foreign.exl3(), config)
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if ".experts.1.w2." in key).rpartition(".")[0]
    for kind in ("trellis", "suh", "svh", "mcg", "mul1"):
        tensors.pop(f"{name}.{kind}", None)
    tensors[f"{name}.weight"] = load_file(dense / "model.safetensors")[f"{name}.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"4 experts, of which only some linears are quantized \(not 1\.w2\)"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_convert_of_what_is_not_quantized(damaged, tmp_path):
    folder = damaged("qs_E8P12_t128", None, lambda config: config.pop("quip_params"))
    with pytest.raises(ValueError, match="not a quantized checkpoint"):
        convert(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_what_the_model_has_nothing_of_is_left_out(damaged, caplog):
    def add(tensors):
        for key in [key for key in tensors if key.startswith(DOWN)]:
            tensors[key.replace(DOWN, "mtp.down_proj")] = tensors[key].clone()

    folder = damaged("exl3_mcg_k4", add)
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model.layers[1].mlp.down_proj, QuipLinear)
    for name in ("lm_head", "mtp.down_proj"):
        assert f"{name} of the checkpoint is not a part of LlamaModel" in caplog.text
