"""A dense tiny model, one that `quantize` has made of it, and a text."""

from __future__ import annotations

import pytest

from tests.models import save_tiny_model, tiny_tokenizer
from transformers_quip import cli

QUICK = ["--num-samples", "2", "--sequence-length", "16", "--option", "refinement_sweeps=1"]


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_model("llama", folder, max_position_embeddings=512)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {i} says that {i} is a number like others." for i in range(20)))
    return path


@pytest.fixture(scope="session")
def quantized(dense, text, tmp_path_factory):
    """What `quantize` makes, with a report."""
    out = tmp_path_factory.mktemp("out") / "tiny-2bit"
    arguments = ["quantize", dense, out, "--dataset", text, *QUICK, "--report", out.parent / "report.html"]
    assert cli.main(list(map(str, arguments))) == 0
    return out
