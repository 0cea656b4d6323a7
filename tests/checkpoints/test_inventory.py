"""Inventories against the tensors themselves, damaged files, and a model of 70 billion weights that is not there."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model
from transformers_quip import QuipConfig
from transformers_quip.checkpoints.headers import read_header
from transformers_quip.checkpoints.inventory import read_folder
from transformers_quip.nn.replace import quantized_linears


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    dense, folder = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("quantized")
    save_tiny_model("gpt2", dense)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=QuipConfig(dataset=None), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def test_against_the_model(folder):
    inventory = read_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    linears = quantized_linears(model)
    assert {linear.name: linear.true_bits for linear in inventory.linears} == {n: m.true_bits for n, m in linears.items()}
    for stored in inventory.linears:
        module = linears[stored.name]
        assert (stored.out_features, stored.in_features) == (module.out_features, module.in_features)
        assert stored.code_bits == 2
        assert stored.bytes == module.packed_bytes
    assert inventory.total_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    dense = model.dequantize()
    assert inventory.parameters == sum(p.numel() for p in dense.parameters())
    assert inventory.dense_bytes == 2 * inventory.parameters
    # GPT-2: 2 layers, 4 heads of 16, 16 bits, keys and values
    assert inventory.cache_bytes(100) == 2 * 2 * 4 * 16 * 2 * 100


def test_a_dense_model(tmp_path):
    save_tiny_model("llama", tmp_path)
    inventory = read_folder(tmp_path)
    assert inventory.linears == ()
    assert inventory.quantization == {}
    with pytest.raises(ValueError, match="no linear layer quantized in the native format"):
        inventory.true_bits  # noqa: B018
    assert inventory.cache_bytes(10) == 2 * 2 * 2 * 16 * 2 * 10  # 2 key-value heads of 16


def damage(folder, kind):
    file = sorted(folder.glob("*.safetensors"))[1]
    raw = file.read_bytes()
    if kind == "cut":
        file.write_bytes(raw[:-1])
    elif kind == "header":
        file.write_bytes(struct.pack("<Q", 10) + b"not JSON!!" + raw)
    elif kind == "no safetensors":
        file.write_bytes(b"PK\x03\x04" + b"\xff" * 100)
    elif kind == "gone":
        file.unlink()
    elif kind == "config":
        (folder / "config.json").write_text("[]")
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "index":
        (folder / "model.safetensors.index.json").write_text("{}")
    elif kind == "nothing":
        for path in folder.glob("model*"):
            path.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "bytes instead of the"),
        ("header", "its header is not JSON"),
        ("no safetensors", "is not a safetensors file"),
        ("gone", r"is missing \(1 of"),
        ("config", r"config\.json is not a JSON object"),
        ("no config", r"config\.json does not exist"),
        ("index", "has no weight_map"),
        ("nothing", "has neither model.safetensors nor"),
    ],
)
def test_damage_is_named(folder, tmp_path, kind, message):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damage(copy, kind)
    with pytest.raises(ValueError, match=message):
        read_folder(copy)


def test_an_index_of_an_earlier_save_is_not_read(tmp_path):
    """Transformers leaves it where one file takes the place of several, and loads that one."""
    save_tiny_model("llama", tmp_path)
    expected = read_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"old": "model-00001-of-00002.safetensors"}}')
    (tmp_path / "model-backup.safetensors").write_bytes(b"old")
    assert read_folder(tmp_path) == expected


def test_codes_without_su_are_damage(tmp_path):
    save_file({"a.codes": torch.zeros(4, 1, dtype=torch.int16), "a.sv": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "quip", "format_version": 1}}')
    with pytest.raises(ValueError, match="a has codes, but has no su"):
        read_folder(tmp_path)
    assert set(read_header(tmp_path / "model.safetensors")) == {"a.codes", "a.sv"}


# Llama 70B: 80 layers; every matrix as [out, in]
_BLOCK = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
_OPTIONS = {"quant_method": "quip", "format_version": 1, "bits": 2, "codebook": "e8p", "incoherence": "hadamard"}


def large_model(folder, with_files):
    """The index and, as sparse files without content, the shards of a 2-bit Llama 70B."""
    tensors = {"model.embed_tokens.weight": ((128256, 8192), "BF16", 2), "lm_head.weight": ((128256, 8192), "BF16", 2)}
    for layer in range(80):
        for name, (m, n) in _BLOCK.items():
            prefix = f"model.layers.{layer}.{name}"
            tensors[f"{prefix}.codes"] = ((m, n // 8), "I16", 2)
            tensors[f"{prefix}.su"] = ((n,), "BF16", 2)
            tensors[f"{prefix}.sv"] = ((m,), "BF16", 2)
    names = list(tensors)
    shards = {f"model-{i + 1:05d}-of-00016.safetensors": names[i::16] for i in range(16)}
    total = 0
    for file, members in shards.items():
        header, offset = {}, 0
        for name in members:
            (shape, dtype, size) = tensors[name]
            end = offset + size * torch.Size(shape).numel()
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        total += offset
        if with_files:
            raw = json.dumps(header).encode()
            with (folder / file).open("wb") as stream:
                stream.write(struct.pack("<Q", len(raw)) + raw)
                stream.truncate(8 + len(raw) + offset)
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "quantization_config": _OPTIONS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from /proc")
@pytest.mark.parametrize("with_files", [True, False], ids=["headers", "index only"])
def test_seventy_billion_weights(tmp_path, with_files):
    """Less than 2 s of processor time and 300 MB, in a process of its own."""
    total = large_model(tmp_path, with_files)
    code = (
        "import resource, sys\n"
        "from transformers_quip.cli import main\n"
        "code = main(['inspect', sys.argv[1], '--json'])\n"
        "use = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(use.ru_utime + use.ru_stime, peak / 1024, 'torch' in sys.modules, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    seconds, megabytes, torch_imported = result.stderr.split()[-3:]
    assert float(seconds) < 2
    assert float(megabytes) < 300
    assert torch_imported == "False"
    content = json.loads(result.stdout)
    assert content["weight_bytes"] == total
    assert content["quantized_layers"] == 560
    weights = 80 * sum(m * n for m, n in _BLOCK.values())
    vectors = 80 * sum(m + n for m, n in _BLOCK.values())
    assert content["true_bits"] == (pytest.approx(2 + 16 * vectors / weights) if with_files else None)
    assert content["memory_bytes"] == total + 2 * 80 * 8 * 128 * 2 * 4096
