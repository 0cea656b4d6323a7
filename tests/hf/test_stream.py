"""From folder to folder with one block in memory: the same tensors as `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import transformers_quip
from tests.architectures.tiny import randomize, tiny_config
from tests.models import ARCHITECTURES, save_tiny_model, tiny_ids, tiny_tokenizer
from transformers_quip import QuipConfig
from transformers_quip.calibration import capture
from transformers_quip.hf import streamed
from transformers_quip.quantize.state import FOLDER

QUICK = {"dataset": tiny_ids(4, 24), "num_samples": 4, "sequence_length": 24, "batch_size": 2, "refinement_sweeps": 1}


def content(folder):
    """All tensors and the config of a saved model."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors, json.loads((folder / "config.json").read_text())


def check_same(arch, config, tmp_path, **model):
    """Quantize in both ways and compare."""
    dense = save_tiny_model(arch, tmp_path / "dense", **model)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(tmp_path / "memory")
    transformers_quip.quantize(dense, tmp_path / "streamed", config)
    (tensors, about), (expected, about_expected) = content(tmp_path / "streamed"), content(tmp_path / "memory")
    assert about == about_expected
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
    assert not (tmp_path / "streamed" / FOLDER).exists()
    return tmp_path / "streamed"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures(arch, tmp_path):
    folder = check_same(arch, QuipConfig(**QUICK), tmp_path, dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(folder)(tiny_ids()).logits.isfinite().all()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "mixtral"])
def test_without_calibration(arch, tmp_path):
    check_same(arch, QuipConfig(bits=4, dataset=None), tmp_path)


@pytest.mark.parametrize("codebook", ["e8p-rvq3", "e8p-rvq4", "d4", "half-integer", "scalar3", "trellis"])
def test_codebooks(codebook, tmp_path):
    check_same("llama", QuipConfig(codebook=codebook, **QUICK), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"calibrate_on": "dense"},
        {"calibrate_on": "quantized"},
        {"modules": {"lm_head": {"bits": 4}}},
        {"modules": {"embed_tokens": {"bits": 4}, "lm_head": {"bits": 3}}, "calibrate_on": "mixed"},
        {"bits": 2.5},
        {"bits": 3.5, "modules": {"lm_head": {"damping": 0.01}}},
        {"rounding": "yaqa", "refinement_sweeps": None},
        {"tune": {"mode": "blocks", "block_windows": 2}},
        {"dataset": "self"},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(options, tmp_path):
    check_same("llama", QuipConfig(**{**QUICK, **options}), tmp_path)


def test_full_tuning(tmp_path):
    """Vectors are trained after the blocks, against states of the dense model."""
    tune = {"mode": "full", "block_windows": 2, "held_out": 2, "epochs": 1.0, "batch_size": 2}
    check_same("llama", QuipConfig(**{**QUICK, "dataset": tiny_ids(8, 24)}, tune=tune), tmp_path)


def test_shards_and_files_of_several_kinds(tmp_path):
    """A sharded source, also of `.bin` files, and a sharded result; the names of files are those of `save_pretrained`."""
    dense = save_tiny_model("llama", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    config = QuipConfig(**QUICK)
    expected = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    expected.save_pretrained(tmp_path / "memory", max_shard_size="10KB")
    transformers_quip.quantize(tmp_path / "sharded", tmp_path / "out", config, max_shard_size="10KB")
    names = [sorted(path.name for path in (tmp_path / which).glob("*.safetensors*")) for which in ("memory", "out")]
    assert names[0] == names[1]
    assert all(
        torch.equal(value, content(tmp_path / "memory")[0][name]) for name, value in content(tmp_path / "out")[0].items()
    )


def test_one_block_is_in_memory(tmp_path, monkeypatch):
    """While a block runs, no other block has weights."""
    dense = save_tiny_model("llama", tmp_path / "dense", num_hidden_layers=4)
    seen = []
    real = capture.BlockInputs.run

    def run(self, block, batch):
        owner = next(model for model in models if block in model.model.layers.children())
        seen.append([any(not p.is_meta for p in layer.parameters()) for layer in owner.model.layers])
        assert not any(parameter.is_meta for parameter in block.parameters())
        return real(self, block, batch)

    models = []
    load = streamed.StreamedWeights.load_outside
    monkeypatch.setattr(streamed.StreamedWeights, "load_outside", lambda self: (models.append(self.model), load(self)))
    monkeypatch.setattr(capture.BlockInputs, "run", run)
    transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**QUICK))
    assert {sum(blocks) for blocks in seen} == {1}
    assert {blocks.index(True) for blocks in seen} == {0, 1, 2, 3}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_files_of_blocks_are_not_mapped_while_a_block_is_quantized(tmp_path, monkeypatch):
    """Under a limit of memory a mapped file counts, however few of its pages are there."""
    AutoModelForCausalLM.from_pretrained(save_tiny_model("llama", tmp_path / "whole", num_hidden_layers=4)).save_pretrained(
        tmp_path / "dense", max_shard_size="40KB"
    )
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())["weight_map"]
    outside = {file for name, file in index.items() if ".layers." not in name}
    inside = set(index.values()) - outside
    assert len(inside) >= 4
    seen = []
    real = capture.BlockInputs.run

    def run(self, block, batch):
        seen.append({file for file in inside if file in Path("/proc/self/maps").read_text()})
        return real(self, block, batch)

    monkeypatch.setattr(capture.BlockInputs, "run", run)
    transformers_quip.quantize(tmp_path / "dense", tmp_path / "out", QuipConfig(**QUICK))
    assert seen
    assert not any(seen)


def test_the_report_and_the_tokenizer(tmp_path):
    dense = save_tiny_model("llama", tmp_path / "dense")
    tiny_tokenizer().save_pretrained(dense)
    model = transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**QUICK))
    assert [record["name"] for record in model.hf_quantizer.report.modules] == [
        f"model.layers.{block}.{name}_proj"
        for block in range(2)
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "transformers_quip" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["zaya", "hy_v4"])
def test_blocks_that_pass_on_more_than_hidden_states(kind, tmp_path):
    """Blocks without weights cannot compute it, so the run is refused instead of being another one than in memory."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {kind}")
    model = AutoModelForCausalLM.from_config(tiny_config(kind))
    randomize(model)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="read more outputs of the block before .* `from_pretrained`"):
        transformers_quip.quantize(tmp_path / "dense", tmp_path / "out", QuipConfig(**QUICK))
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer(tmp_path, caplog):
    """Some tokenizers need files, and raise a TypeError without them."""
    config = AutoConfig.for_model("ctrl", vocab_size=64, n_embd=32, dff=48, n_layer=1, n_head=2, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    transformers_quip.quantize(tmp_path / "dense", tmp_path / "out", QuipConfig(bits=4, dataset=None))
    assert "no tokenizer that can be read" in caplog.text
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


def test_what_cannot_be_quantized_is_said_before_the_work(tmp_path):
    dense = save_tiny_model("llama", tmp_path / "dense")
    config = QuipConfig(**QUICK)
    transformers_quip.quantize(dense, tmp_path / "out", config)
    with pytest.raises(ValueError, match="exists and is not empty"):
        transformers_quip.quantize(dense, tmp_path / "out", config)
    with pytest.raises(ValueError, match="is quantized already"):
        transformers_quip.quantize(tmp_path / "out", tmp_path / "again", config)
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="is the model that is read"):
        transformers_quip.quantize(dense, dense, config, overwrite=True)
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no model.layers.1.mlp.up_proj.weight"):
        transformers_quip.quantize(dense, tmp_path / "other", config)
    assert not (tmp_path / "other").exists()
