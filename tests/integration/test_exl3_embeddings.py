"""Quantized token tables of exllamav3 1.6: re-packed as they are, decoded where a model's table does more, or refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from transformers_quip.checkpoints.foreign.exl3 import Exl3
from transformers_quip.checkpoints.foreign.family import Source
from transformers_quip.checkpoints.foreign.repack import ForeignLinear
from transformers_quip.checkpoints.headers import TensorInfo
from transformers_quip.checkpoints.inventory import read_folder
from transformers_quip.hf.convert import convert
from transformers_quip.nn import QuipEmbedding

TABLE = "model.embed_tokens"


@pytest.fixture
def changed(golden_exl3_1_6, tmp_path):
    """A copy of the golden checkpoint, changed by functions of its tensors and of its config."""

    def make(tensors=None, config=None):
        folder = tmp_path / "changed"
        shutil.copytree(golden_exl3_1_6 / "exl3_qemb", folder, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        stored, values = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        if tensors is not None:
            tensors(stored)
        if config is not None:
            config(values)
        (folder / "model.safetensors").unlink()
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


@torch.no_grad()
def test_the_codes_stay_and_are_counted(golden_exl3_1_6, tmp_path):
    folder = golden_exl3_1_6 / "exl3_qemb"
    convert(folder, tmp_path / "native")
    words = load_file(folder / "model.safetensors")[f"{TABLE}.trellis"]
    assert torch.equal(load_file(tmp_path / "native" / "model.safetensors")[f"{TABLE}.codes"], words)
    stored, native = (AutoModelForCausalLM.from_pretrained(at) for at in (folder, tmp_path / "native"))
    expected = load_file(folder / "expected.safetensors")
    ids = expected["input_ids"]
    assert torch.equal(native(ids).logits, stored(ids).logits)
    table = native.get_submodule(TABLE)
    assert isinstance(table, QuipEmbedding)
    size = table.su.element_size()
    assert table.packed_bytes == words.nbytes + size * (512 + 250)
    assert table.true_bits == table.packed_bytes * 8 / (250 * 320)
    (listed,) = [linear for linear in read_folder(tmp_path / "native").linears if linear.name == TABLE]
    assert listed.bytes == table.packed_bytes
    dense = native.dequantize().get_submodule(TABLE)
    assert type(dense) is torch.nn.Embedding
    error = (dense.weight - expected[f"W/{TABLE}"]).norm() / expected[f"W/{TABLE}"].norm()
    assert error < {2: 1e-2, 4: 1e-6}[size]


def test_a_table_that_does_more_gets_dense_rows(golden_exl3_1_6):
    """Gemma's embedding is a subclass: its table is decoded."""
    folder = golden_exl3_1_6 / "exl3_qemb"
    stored, expected = load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")
    tensors = {kind: stored[f"{TABLE}.{kind}"] for kind in ("trellis", "signs")}
    types = {torch.int16: "I16", torch.float16: "F16"}
    headers = {kind: TensorInfo(tuple(value.shape), types[value.dtype]) for kind, value in tensors.items()}
    source = Source(TABLE, headers, {kind: f"{TABLE}.{kind}" for kind in tensors}, tensors.__getitem__)
    form = Exl3().describe_table(source, 250, 320, {})
    (made,) = ForeignLinear(TABLE, Exl3(), form, source, dense=True, table=True).repack(tensors).items()
    assert made[0] == f"{TABLE}.weight"
    assert (made[1] - expected[f"W/{TABLE}"]).norm() / expected[f"W/{TABLE}"].norm() < 1e-6


@torch.no_grad()
def test_a_head_beside_it_is_never_tied(changed, golden_exl3_1_6):
    """Files of 1.4 to 1.6 may still say that the table and the head are one, and the head may be dense."""
    expected = load_file(golden_exl3_1_6 / "exl3_qemb" / "expected.safetensors")

    def dense_head(stored):
        for key in [key for key in stored if key.startswith("lm_head.")]:
            del stored[key]
        stored["lm_head.weight"] = torch.randn(250, 320, generator=torch.Generator().manual_seed(0)).half()

    folder = changed(dense_head, lambda config: config.update(tie_word_embeddings=True))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = load_file(folder / "model.safetensors")["lm_head.weight"].float()
    assert torch.equal(model.lm_head.weight, head)
    hidden = model.model(expected["input_ids"]).last_hidden_state
    assert torch.equal(model(expected["input_ids"]).logits, hidden @ head.T)
    assert model.config.tie_word_embeddings is False


def renamed(old, new):
    return lambda stored: stored.update({key.replace(old, new): stored.pop(key) for key in list(stored) if old in key})


def spoiled(stored):
    stored[f"{TABLE}.trellis"][7, 65] = 0x7E00  # the scale of the second group: NaN


CASES = {
    "a rate to come": (
        lambda stored: stored.update({f"{TABLE}.trellis": stored[f"{TABLE}.trellis"][:, :-8].contiguous()}),
        r"embed_tokens.trellis has shape \[250, 122\]; .* exllamav3 up to 1.6.* was made by exllamav3 1\.6",
    ),
    "rows are missing": (
        lambda stored: stored.update({f"{TABLE}.trellis": stored[f"{TABLE}.trellis"][1:].contiguous()}),
        r"embed_tokens.trellis is I16 \[249, 130\] instead of I16 \[250, 130\]",
    ),
    "no signs": (lambda stored: stored.pop(f"{TABLE}.signs"), "embed_tokens"),
    "signs of another size": (
        lambda stored: stored.update({f"{TABLE}.signs": stored[f"{TABLE}.signs"][:1].contiguous()}),
        r"embed_tokens.signs is F16 \[1, 256\] instead of .* \[2, 256\]",
    ),
    "a scale is NaN": (spoiled, "scales of the rows of an embedding are not all finite"),
    "shards": (renamed("embed_tokens.", "embed_tokens.shard_0."), "embeddings in several shards of EXL3 are not supported"),
    "slices": (
        renamed("layers.1.mlp.up_proj.", "layers.1.mlp.up_proj.slice.0."),
        "slices of a wide MLP of EXL3 are not supp",
    ),
    "n-grams": (
        renamed("embed_tokens.", "ple.ngram_embedding."),
        "hashed n-gram embeddings of EXL3 are not supported",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case, changed):
    change, message = CASES[case]
    with pytest.raises(ValueError) as caught:
        AutoModelForCausalLM.from_pretrained(changed(change))
    assert re.search(message, str(caught.value)), caught.value
