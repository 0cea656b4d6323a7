"""Which files of a model's folder go into a copy of the model."""

from __future__ import annotations

import json

import pytest

from transformers_quip.checkpoints.companions import companions


@pytest.fixture
def folder(tmp_path):
    result = tmp_path / "model"
    result.mkdir()
    return result


def names(folder):
    return [path.name for path in companions(folder)]


def test_what_a_model_is_made_of_and_nothing_else(folder):
    wanted = [
        "LICENSE",
        "README.md",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    others = [".env", ".git-credentials", ".gitattributes", "setup.sh", "run.py", "state.pkl", "model.safetensors"]
    others += ["model.safetensors.index.json", "pytorch_model.bin", "training_args.bin", "id_rsa", "notes.ipynb", "a.zip"]
    for name in (*wanted, *others):
        (folder / name).write_text("{}")
    (folder / ".git").mkdir()
    (folder / "sub.json").mkdir()
    assert names(folder) == wanted


def test_links_that_leave_the_folder(folder, tmp_path):
    (tmp_path / "blobs").mkdir()
    for secret in (tmp_path / "secret", tmp_path / "blobs" / "secret", tmp_path / "model-2"):
        secret.write_text("secret")
    (folder / "real.json").write_text("{}")
    (folder / "inside.json").symlink_to("real.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "blobs" / "secret")  # not the store of a cache
    (folder / "merges.txt").symlink_to("../model-2")
    (folder / "tokens.txt").symlink_to("nowhere")
    assert names(folder) == ["inside.json", "real.json"]


def test_the_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "ab12").write_text("{}")
    (tmp_path / "refs").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/ab12")
    (snapshot / "vocab.json").symlink_to("../../refs")
    assert names(snapshot) == ["tokenizer.json"]


def test_code_that_the_model_needs(folder, tmp_path):
    mapped = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModel": "other/repo--modeling_y.Y",
        "AutoTokenizer": [None, "tok.T"],
    }
    (folder / "config.json").write_text(json.dumps({"auto_map": mapped}))
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "../up.T", "A": 5}}')
    (folder / "bad.json").write_text("{" * 100_000)
    (folder / "configuration_x.py").write_text("from .layers import Layer\nfrom . import other, helper\n")
    (folder / "tok.py").write_text("from .configuration_x import XConfig\nimport os\n")
    (tmp_path / "up.py").write_text("")
    for name in ("layers.py", "helper.py", "modeling_y.py", "evil.py"):
        (folder / name).write_text("")
    code = [name for name in names(folder) if name.endswith(".py")]
    assert code == ["configuration_x.py", "helper.py", "layers.py", "tok.py"]


def test_code_that_is_a_link_is_not_followed(folder, tmp_path):
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "a.A"}}')
    (tmp_path / "secret.py").write_text("password = 1")
    (folder / "a.py").symlink_to(tmp_path / "secret.py")
    assert names(folder) == ["config.json"]
