"""Text is data: whatever stands in a model's files, what is shown has no effect and nothing ends in a traceback."""

from __future__ import annotations

import ast
import copy
import json
import os
import random
import re
import shutil
import struct
import unicodedata

import pytest
from transformers import AutoModelForCausalLM

from tests.cli.test_cli import run
from transformers_quip import cli
from transformers_quip.hub import model_card

COUNT = int(os.environ.get("QUIP_FUZZ_COUNT", 150))
EVIL = (
    'x"); import os; os.system("id") # <img src=x onerror=alert(1)> | [red]a[/b] \x1b]0;t\x07 \x9b31m \u202e'
    "\n```\n# H $x$ \ud800"
)
DEEP = json.loads("[" * 90 + "]" * 90)
VALUES = [
    None, True, False, 0, -1, 5, 2.5, 1e308, 10**400, float("nan"), float("inf"), "", "x", EVIL, "../../etc", "\0",
    "9" * 5000, [], [5], ["x", None], [[]], {}, {"a": 5}, {"0": {}}, DEEP,
]  # fmt: skip


@pytest.fixture
def folder(quantized, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(quantized, copied)
    (copied / model_card.CARD).unlink()
    result = {"dataset": "wiki", "perplexity": 4.5, "dense_perplexity": 4.0, "protocol": "p"}
    (copied / model_card.EVALUATION).write_text(json.dumps({"results": [result]}))
    return copied


def places(value, path=()):
    """Every key of every object and every index of every list, and one key that is not there."""
    if isinstance(value, dict):
        yield (*path, "not_there")
        for key, item in value.items():
            yield (*path, key)
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield (*path, index)
            yield from places(item, (*path, index))


def mutated(content, path, value):
    result = copy.deepcopy(content)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


def is_harmless(text):
    return all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


def check_commands(capsys, folder):
    """Every command that shows what files say; none raises."""
    for arguments in (
        ["inspect", folder],
        ["inspect", folder, "--layers"],
        ["inspect", folder, "--json"],
        ["compare", folder, folder],
        ["compare", folder, folder, "--json"],
    ):
        code, out, error = run(capsys, *arguments)
        assert code in (0, cli.UNUSABLE), error
        assert isinstance(out, dict) or is_harmless(out)
        assert is_harmless(error)


def check_card(folder):
    """A card, or one clear error; its code is code, its text is one line for each value."""
    try:
        assert model_card.write_card(folder)
    except ValueError:
        return
    text = (folder / model_card.CARD).read_text()
    body = text.split("\n---\n", 1)[1]
    assert is_harmless(body.replace("\U0001f917", ""))
    for block in re.findall(r"^```python\n(.*?)^```", body, re.DOTALL | re.MULTILINE):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)}
        assert calls <= {"AutoModelForCausalLM.from_pretrained", "QuipConfig"}
    outside = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<img" not in outside
    headings = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    assert headings[1:] in (
        ["Load it", "The model", "Limits", "How it was made", "Citation"],
        ["Load it", "The model", "Measured", "Limits", "How it was made", "Citation"],
    )
    for row in re.findall(r"^\|.*$", outside, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 5)


@pytest.mark.parametrize("name", ["config.json", model_card.EVALUATION])
def test_values_of_any_kind_at_any_key(folder, capsys, name):
    """A seeded walk; QUIP_FUZZ_COUNT makes it longer."""
    content = json.loads((folder / name).read_text())
    keys, random_ = list(places(content)), random.Random(13)
    # the values that are shown are all tried with the nastiest text; the rest by chance
    cases = [(key, EVIL) for key in keys if "origin" in key or "calibration" in key or name != "config.json"]
    cases += [(random_.choice(keys), random_.choice(VALUES)) for _ in range(COUNT)]
    for key, value in cases:
        (folder / name).write_text(json.dumps(mutated(content, key, value)))
        try:
            check_commands(capsys, folder)
            check_card(folder)
        except Exception as error:
            raise AssertionError(f"{key} = {value!r:.100}") from error
        (folder / model_card.CARD).unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["config.json", model_card.EVALUATION, "tensors"])
@pytest.mark.parametrize(
    "written",
    ["[" * 100_000, '{"a":' * 100_000, "5", "[]", "", "\xff", '{"a": ' + "9" * 5000 + "}"],
    ids=["lists", "objects", "number", "list", "empty", "bytes", "digits"],
)
def test_files_that_are_not_json_or_nested(folder, capsys, name, written):
    if name == "tensors":
        raw = written.encode("latin-1")
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    else:
        (folder / name).write_bytes(written.encode("latin-1"))
    check_commands(capsys, folder)
    check_card(folder)


@pytest.mark.parametrize("depth", [50, 99, 200, 900])
def test_nested_values_that_json_reads(folder, capsys, depth):
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["origin"] = json.loads('{"folder":' * depth + "5" + "}" * depth)
    (folder / "config.json").write_text(json.dumps(content))
    check_commands(capsys, folder)
    check_card(folder)


@pytest.mark.parametrize("shape", [[0], [], [0, 5]])
def test_a_linear_of_no_size(folder, capsys, shape):
    """It would take a division by zero to say how many bits its weights have."""
    header = {
        "m.codes": {"dtype": "I16", "shape": [4, 1], "data_offsets": [0, 8]},
        "m.su": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        "m.sv": {"dtype": "F32", "shape": shape, "data_offsets": [12, 12 if 0 in shape else 16]},
    }
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(12 if 0 in shape else 16))
    code, _, error = run(capsys, "inspect", folder)
    assert code == cli.UNUSABLE
    assert "m has codes, but has no sv" in error


@pytest.mark.parametrize("name", ["model[/b]", "[red]model", "a|b <i>x", "[link=https://x.y]z", "esc\x1b[31m", "`x`\n# h"])
def test_names_of_folders(folder, tmp_path, capsys, monkeypatch, name):
    renamed = tmp_path / name
    renamed.parent.mkdir(exist_ok=True)
    folder.rename(renamed)
    monkeypatch.chdir(tmp_path)  # a short path is shown on one line
    code, shown, _ = run(capsys, "inspect", name)
    assert code == 0
    assert is_harmless(shown)
    assert name.split("\x1b")[0].split("\n")[0] in shown.replace("\n", "")
    content = json.loads((renamed / "config.json").read_text())
    content["quantization_config"]["origin"]["folder"] = name
    (renamed / "config.json").write_text(json.dumps(content))
    check_card(renamed)
    card = (renamed / model_card.CARD).read_text()
    (call,) = re.findall(r"from_pretrained\((.*), quantization_config=config\)", card)
    assert ast.literal_eval(call) == name


@pytest.mark.parametrize("key", ["origin", "calibration"])
@pytest.mark.parametrize(
    "value", [5, 2.5, "x", [], [5], {"folder": 5}, {"data": 5}, {"base_model": {}}, {"versions": [5]}, {"folder": EVIL}]
)
def test_saving_is_never_stopped_by_the_card(folder, tmp_path, key, value):
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(content))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except (ValueError, TypeError):
        return  # refused before anything is done
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / model_card.CARD).is_file()


def test_a_base_model_that_is_not_an_id_is_not_a_link(folder):
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["origin"] = {"base_model": "org/x) [y](javascript:alert(1)"}
    (folder / "config.json").write_text(json.dumps(content))
    card = model_card.make_card(folder)
    assert card.data.base_model is None
    assert "](" not in re.sub(r"^```.*?^```", "", card.text.replace("\\]", ""), flags=re.DOTALL | re.MULTILINE)
    with pytest.raises(ValueError, match="not the id of a model"):
        model_card.make_card(folder, base_model="org/x y")


@pytest.mark.parametrize("written", ["9" * 5000 + "x", "[" * 5000, "nan", "{"], ids=["digits", "lists", "nan", "half"])
def test_options_that_look_like_json(dense, tmp_path, capsys, written):
    code, _, _ = run(capsys, "quantize", dense, tmp_path / "out", "--dataset", "none", "--option", f"scale={written}")
    assert code == cli.UNUSABLE
    (tmp_path / "peers.json").write_text(written)
    arguments = ["--report", tmp_path / "r.html", "--peers", tmp_path / "peers.json"]
    code, _, error = run(capsys, "quantize", dense, tmp_path / "out", *arguments)
    assert code == cli.UNUSABLE
    assert "peers.json" in error
