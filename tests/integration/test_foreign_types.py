"""Foreign configs with values of any type where a name or a number belongs, and files that raise anything while read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_quip.checkpoints import files
from transformers_quip.checkpoints.foreign.family import is_finite_number, is_one_of
from transformers_quip.checkpoints.foreign.plan import family_of
from transformers_quip.hf.convert import convert

ODD = ([], {}, [[]], {"a": []}, None, True, 3, 2.5, 10**400, "", "x" * 5000, ["E8P12"])


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"codebook": "E8P12", "codebook_version": 1}, "codebook"),
        ({"quant_method": "QUiP", "codebook": "E8P12"}, "codebook"),
        ({"codebook": "bitshift", "decode_mode": "1mad", "V": 1, "K": 2}, "decode_mode"),
        ({"codebook": "bitshift", "decode_mode": "quantlut_sym", "V": 2, "K": 2, "tlut_bits": 9}, "tlut_bits"),
        ({"quant_method": "exl3"}, "quant_method"),
    ],
)
def test_another_value_is_an_error_that_names_its_key(parameters, key, value):
    family_of(parameters)
    if (key, value) in (("quant_method", None), ("tlut_bits", 3)):
        return  # a value that is possible
    with pytest.raises(ValueError, match=key):
        family_of({**parameters, key: value})


@pytest.mark.parametrize(
    "value", [value for value in ODD if not isinstance(value, int | float) or value == 10**400 or value is True]
)
@pytest.mark.parametrize(
    "parameters",
    [
        ("resid_scale_override", {"codebook": "E8P12RVQ4B", "codebook_version": 1}),
        ("opt_resid_scale", {"quant_method": "QUiP", "codebook": "E8P12RVQ4B"}),
        ("V", {"codebook": "bitshift", "decode_mode": "1mad", "K": 2}),
    ],
    ids=lambda pair: pair[0],
)
def test_numbers(parameters, value):
    key, others = parameters
    if key == "opt_resid_scale" and value is None:
        family_of({**others, key: value})  # as if it was not there
        return
    with pytest.raises(ValueError, match=key):
        family_of({**others, key: value})


def test_names_and_numbers():
    assert is_one_of("a", {"a": 1})
    assert not any(is_one_of(value, {"a": 1}) for value in (*ODD, "b"))
    assert all(map(is_finite_number, (0, -1.5, 2**80)))
    assert not any(map(is_finite_number, (True, None, "1", [], float("nan"), float("inf"), 10**400)))


@pytest.mark.parametrize("method", [[], {}, 5])
def test_a_method_beside_config_json(method, golden, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(golden / "qfa_D4_had_t128", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    values = json.loads((folder / "config.json").read_text())
    described = values.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "quantization_config.json").write_text(json.dumps(described | {"quant_method": method}))
    with pytest.raises(ValueError, match="quant_method="):
        convert(folder, tmp_path / "native")


ERRORS = (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), AssertionError("no"), KeyError("k"), IndexError(), TypeError("t"))
ERRORS += (AttributeError("a"), RecursionError("deep"), OverflowError("o"), NotImplementedError(), ZeroDivisionError())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_the_reader_raises_names_the_file(error, monkeypatch, tmp_path, golden):
    def load(*args, **kwargs):
        raise error

    source = golden / "qfa_E8P12_rand_t128_bin"
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin cannot be read .*{type(error).__name__}"):
        files.Files([str(source / "pytorch_model.bin")])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def test_too_little_memory_is_not_damage(monkeypatch, golden):
    def load(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        files.Files([str(golden / "qfa_E8P12_rand_t128_bin" / "pytorch_model.bin")])


@pytest.mark.parametrize(
    ("key", "value"), [("dtype", {"a": []}), ("vocab_size", 0.5), ("tie_word_embeddings", 3), ("rope_parameters", "*")]
)
def test_a_config_that_transformers_cannot_use(key, value, golden, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(golden / "exl3_mcg_k4", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        convert(folder, tmp_path / "native")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "null", "[]", "{", '{"a":' * 5000 + "1" + "}" * 5000, '{"a": ' + "9" * 5000 + "}"]
)
def test_a_config_json_that_is_none(text, golden, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(golden / "exl3_mcg_k4", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not"):
        convert(folder, tmp_path / "native")
