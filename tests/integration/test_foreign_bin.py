"""Checkpoints of QuIP-for-all as its package writes: files of `torch.save`, several with an index; and hostile ones."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_quip import QuipConfig
from transformers_quip.hf.convert import convert

NAME = "qfa_E8P12_rand_t128_bin"
INDEX = "pytorch_model.bin.index.json"
SHARDS = tuple(f"pytorch_model-{i}-of-00003.bin" for i in ("00001", "00002", "00003"))


class Hostile:
    """Unpickled without care it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def shards(golden, tmp_path):
    """The golden checkpoint's tensors in turn in three files, and an index."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("config.json", "quantization_config.json"):
        shutil.copyfile(golden / NAME / name, folder / name)
    tensors = torch.load(golden / NAME / "pytorch_model.bin", weights_only=True)
    write(folder, {name: {key: tensors[key].clone() for key in list(tensors)[i::3]} for i, name in enumerate(SHARDS)})
    return folder


def write(folder, contents, **options):
    for name, tensors in contents.items():
        torch.save(tensors, folder / name, **options)
    weight_map = {key: name for name, tensors in contents.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def read(folder):
    return {name: torch.load(folder / name, weights_only=True) for name in SHARDS}


@torch.no_grad()
def check_logits(model, golden):
    expected = load_file(golden / NAME / "expected.safetensors")
    logits = model(expected["input_ids"]).logits
    assert ((logits - expected["logits"]).norm() / expected["logits"].norm()).item() < 1e-4


def refuses(folder, *messages):
    """Loading refuses the checkpoint, also where Transformers reads a file first, for its dtype, and so does converting."""
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(folder, weights_only=False),
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        lambda: convert(folder, folder.parent / "native"),
    ):
        with pytest.raises(ValueError) as caught:
            load()
        for message in messages:
            assert message in str(caught.value)
    assert not (folder.parent / "native").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle of before 2020"])
def test_several_files(zipped, shards, golden, tmp_path):
    write(shards, read(shards), _use_new_zipfile_serialization=zipped)
    for arguments in ({}, {"quantization_config": QuipConfig()}):
        check_logits(AutoModelForCausalLM.from_pretrained(shards, dtype=torch.float32, **arguments), golden)
    convert(shards, tmp_path / "native")
    assert not list((tmp_path / "native").glob("*.bin*"))
    check_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32), golden)


def test_files_in_a_folder_of_their_own(shards, golden):
    (shards / "weights").mkdir()
    index = json.loads((shards / INDEX).read_text())
    for name in SHARDS:
        (shards / name).rename(shards / "weights" / name)
    index["weight_map"] = {key: f"weights/{name}" for key, name in index["weight_map"].items()}
    (shards / INDEX).write_text(json.dumps(index))
    check_logits(AutoModelForCausalLM.from_pretrained(shards, dtype=torch.float32), golden)


def test_one_file_counts_more_than_an_index(shards, golden, tmp_path):
    """As for Transformers, which leaves the index of an earlier save where it is."""
    shutil.copyfile(golden / NAME / "pytorch_model.bin", shards / "pytorch_model.bin")
    for name in SHARDS:
        (shards / name).unlink()
    check_logits(AutoModelForCausalLM.from_pretrained(shards, dtype=torch.float32), golden)
    convert(shards, tmp_path / "native")
    check_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32), golden)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_missing_file(shard, shards):
    (shards / shard).unlink()
    refuses(shards, f"has no {shard}, which {INDEX} lists", "download or save the model again")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle of before 2020"])
@pytest.mark.parametrize("shard", SHARDS)
def test_hostile_code_is_not_run(shard, zipped, shards, tmp_path):
    content = read(shards)[shard] | {"code": Hostile(tmp_path / "was-run")}
    torch.save(content, shards / shard, _use_new_zipfile_serialization=zipped)
    refuses(shards, f"{shard} cannot be read as a file of tensors alone: it holds something else", "as safetensors")
    assert not (tmp_path / "was-run").exists()
    torch.load(shards / shard, weights_only=False)
    assert (tmp_path / "was-run").exists()  # it would have been run


@pytest.mark.parametrize("absolute", [True, False])
def test_a_file_elsewhere(absolute, shards, tmp_path):
    (shards / SHARDS[1]).rename(tmp_path / "elsewhere.bin")
    target = str(tmp_path / "elsewhere.bin") if absolute else "weights/../../elsewhere.bin"
    (shards / INDEX).write_text((shards / INDEX).read_text().replace(SHARDS[1], target))
    refuses(shards, "The index of the checkpoint names", f"elsewhere.bin, which is not in {shards}")


INDICES = {
    "no JSON": ("{", f"{INDEX} is not JSON"),
    "no object": ("[]", f"{INDEX} is not a JSON object"),
    "empty": ("{}", f"{INDEX} has no weight_map"),
    "a list": ('{"metadata": {}, "weight_map": ["a"]}', f"{INDEX} has no weight_map"),
    "a number": ('{"metadata": {}, "weight_map": {"a": 1}}', f"{INDEX} has no weight_map"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_no_index(kind, shards):
    text, message = INDICES[kind]
    (shards / INDEX).write_text(text)
    refuses(shards, message, "download or save the model again")


def test_an_index_without_one_of_the_files(shards):
    write(shards, {name: tensors for name, tensors in read(shards).items() if name != SHARDS[2]})
    refuses(shards, "is missing: the files are damaged")


CONTENTS = {
    "a list": (lambda tensors: [*tensors.values()], "holds list instead of tensors by names"),
    "a number": (lambda tensors: {**tensors, "version": 3}, "holds 'version', which is not a tensor of a known type"),
    "no name": (lambda tensors: {**tensors, 3: torch.zeros(1)}, "holds 3, which is not a tensor of a known type"),
    "complex": (lambda tensors: {**tensors, "z": torch.zeros(1).cfloat()}, "holds 'z', which is not a tensor"),
    "sparse": (lambda tensors: {**tensors, "z": torch.zeros(1).to_sparse()}, "holds 'z', which is not a tensor"),
    "no values": (lambda tensors: {**tensors, "z": torch.zeros(1, device="meta")}, "holds 'z', which is not a tensor"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_other_contents(kind, shards):
    change, message = CONTENTS[kind]
    torch.save(change(read(shards)[SHARDS[1]]), shards / SHARDS[1])
    with pytest.raises(ValueError, match=rf"{SHARDS[1]} {message}"):
        AutoModelForCausalLM.from_pretrained(shards, dtype=torch.float32)


def test_a_file_that_is_cut_off(shards):
    raw = (shards / SHARDS[2]).read_bytes()
    for content in (raw[: len(raw) // 2], b""):
        (shards / SHARDS[2]).write_bytes(content)
        refuses(shards, f"{SHARDS[2]} cannot be read as a file of tensors alone")


def test_one_tensor_in_two_files(shards, golden):
    contents = read(shards)
    key = next(key for key in contents[SHARDS[0]] if key.endswith(".SU"))
    contents[SHARDS[2]][key] = contents[SHARDS[0]][key].clone()
    write(shards, contents)
    check_logits(AutoModelForCausalLM.from_pretrained(shards, dtype=torch.float32), golden)  # it is the same
    contents[SHARDS[2]][key][0] += 1
    write(shards, contents)
    refuses(shards, f"{key} is in ", SHARDS[0], SHARDS[2], "and is not the same there")
