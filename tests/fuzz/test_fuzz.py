"""A short run of the harness, always the same; the tools that it is made of; and a few kills."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fuzz import kill, mutations, specimens, verdict
from tests.fuzz.__main__ import prepare, summary, table
from tests.fuzz.explain import config_damage, read_safetensors, weight_damage
from tests.fuzz.raw import RawFile, decode
from tests.fuzz.worker import one

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ROOT / "tests" / "formats"
COUNT = 25  # mutations for each seed


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A few specimens, and what each computes."""
    threads = torch.get_num_threads()
    yield prepare(tmp_path_factory.mktemp("specimens"), specimens.QUICK)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(1, 6))
def test_mutations(quick, tmp_path, seed):
    """No fault in a short run. (`python -m tests.fuzz --replay` does not repeat these: it has more specimens.)"""
    records = [one(number, seed, quick, tmp_path / "work") for number in range(COUNT)]
    faults = [record for record in records if record["verdict"] in verdict.FAULTS]
    assert not faults, json.dumps(faults, indent=1)
    assert {record["verdict"] for record in records} >= {"same", "refused"}  # it has mutated, and it has loaded


def test_a_mutation_can_be_repeated(quick, tmp_path):
    source = next(iter(quick))
    changed = []
    for name in ("a", "b"):
        shutil.copytree(source, tmp_path / name / "model")
        changed.append(mutations.mutate(tmp_path / name / "model", random.Random("5/7")))
    assert changed[0] == changed[1]
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def _contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The judge


@pytest.fixture
def folder(tmp_path):
    specimens._copy(FORMATS / "e8p", tmp_path / "model")
    return tmp_path / "model"


def change(folder, name, value):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = value(tensors[name]) if callable(value) else value
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)


LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        (f"{LINEAR}.codes", lambda t: t + 1, 0),
        (f"{LINEAR}.su", lambda t: -2 * t, 0),
        (f"{LINEAR}.su", lambda t: t.half(), 0),
        (f"{LINEAR}.su", lambda t: t * float("nan"), 1),
        (f"{LINEAR}.su", lambda t: t[:-1], 1),
        (f"{LINEAR}.su", lambda t: t.int(), 1),
        (f"{LINEAR}.su", None, 1),
        (f"{LINEAR}.extra", torch.zeros(2), 1),
        ("model.norm.weight", lambda t: t / 0, 1),
        ("model.embed_tokens.weight", lambda t: t / 0, 0),
    ],
)
def test_what_weights_may_be(folder, name, value, found):
    change(folder, name, value if value is not None else (lambda _: None))
    assert len(weight_damage(FORMATS / "e8p", folder)) == found
    assert not config_damage(FORMATS / "e8p", folder)


LOST = object()


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("incoherence", "none", 0),
        ("residual_scale", 0.5, 0),
        ("residual_scale", float("nan"), 1),
        ("residual_scale", True, 1),
        ("residual_scale", None, 0),
        ("incoherence", LOST, 1),
        ("residual_scale", LOST, 1),
        ("incoherence", "x", 1),
        ("quantized_modules", ["model.layers.0.self_attn.q_proj"], 1),
        ("format_version", 2, 1),
        ("codebook", 5, 1),
        ("modules", {"*": {"residual_scale": 0.5}}, 0),
        ("modules", {"*": {"fuses": 5}}, 1),
    ],
)
def test_what_a_description_may_be(folder, key, value, found):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    if value is LOST:
        del config["quantization_config"][key]
    (folder / "config.json").write_text(json.dumps(config))
    assert len(config_damage(FORMATS / "e8p", folder)) == found
    assert not weight_damage(FORMATS / "e8p", folder)


def test_the_judge_reads_files_as_safetensors_does(folder):
    expected = load_file(folder / "model.safetensors")
    found = read_safetensors(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, stored in found.items():
        assert torch.equal(torch.tensor(decode(stored.content, stored.dtype)).double(), expected[name].double().flatten())


@pytest.mark.parametrize("how", ["cut", "longer", "overlap", "twice", "list"])
def test_the_judge_refuses_files_that_contradict_themselves(folder, how):
    raw = RawFile(folder / "model.safetensors")
    name = raw.names[0]
    if how == "cut":
        del raw.data[-1:]
    elif how == "longer":
        raw.data += b"\0"
    elif how == "overlap":
        raw.header[name]["data_offsets"] = raw.header[raw.names[1]]["data_offsets"]
    text = {"twice": f'{raw.text()[:-1]},"{name}":{json.dumps(raw.header[name])}}}', "list": "[]"}.get(how)
    raw.write(text)
    assert len(weight_damage(FORMATS / "e8p", folder)) == 1


# The verdicts


@pytest.mark.parametrize(
    ("error", "clear"),
    [
        (ValueError("model.safetensors cannot be read: download it again"), True),
        (TypeError("config.json has a number where codebook belongs"), True),
        (FileNotFoundError(2, "No such file or directory", "config.json"), True),
        (ValueError("something is wrong with a file"), False),
        (ValueError("codebook"), False),
        (KeyError("config.json has no codebook"), False),
        (RuntimeError("config.json has no codebook"), False),
        (AttributeError("'int' object has no attribute 'codebook'"), False),
        (TypeError("unhashable type: 'list' in codebook"), False),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "config.json"), False),
    ],
)
def test_clear_errors(error, clear):
    assert verdict.is_clear(error, ["config.json", "codebook", "model.safetensors"]) == clear


def test_verdicts():
    error = {"outcome": "error", "clear": False, "ours": True}
    assert verdict.verdict(error) == "cryptic, ours"
    assert verdict.verdict(error | {"ours": False}) == "cryptic, theirs"
    assert verdict.verdict(error | {"clear": True}) == "refused"
    assert verdict.verdict(error | {"clear": True, "left": ["x"]}) == "left"
    assert verdict.verdict({"outcome": "other", "damage": []}) == "unknowable"
    assert verdict.verdict({"outcome": "other", "damage": ["x"]}) == "SILENT"
    assert verdict.verdict({"outcome": "shown", "unprintable": "'x'"}) == "not printable"
    records = [{"verdict": "SILENT", "family": "native", "seed": 1}, {"verdict": "same", "family": "EXL3", "seed": 1}]
    assert summary(records)["verdicts"]["SILENT"] == 1
    assert "| native | 1 |" in table(records, "family")


def test_the_driver_calls_every_entry_point():
    """Of the C library; `make sanitize` runs it."""
    sources = "\n".join(path.read_text() for path in (ROOT / "kernels" / "cpu").glob("*.c"))
    entries = set(re.findall(r"^EXPORT \w+ (\w+)\(", sources, re.MULTILINE))
    driver = (ROOT / "tests" / "fuzz" / "sanitize" / "driver.c").read_text()
    assert len(entries) >= 12
    called = set(re.findall(r"(?<!EXPORT int )(?<!EXPORT void )\b(quip_\w+)\(", driver))
    assert entries - called == set()


@pytest.mark.slow
def test_kills(tmp_path):
    records = kill.run(12, 1, tmp_path)
    assert [record for record in records if record["faults"]] == []
    assert sum(record["killed"] for record in records) >= 8
