"""Calibration reads the model's own tokenizer: from the branch, folder and cache of the model, with its token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.hub import client as run
from tests.hub.client import Client, ClientError
from tests.loopback_hub import TOKEN

REPO = "owner/tokenizers"
PRIVATE = "owner/private-tokenizers"
CUSTOM = "owner/custom-tokenizer"
TEXTS = ["abcdefgh"]
MAIN = [[ord(letter) for letter in "abcd"]]
OTHER = [[130 - ord(letter) for letter in "abcd"]]

_CODE = """
from transformers import PreTrainedTokenizerFast

class Custom(PreTrainedTokenizerFast):
    def __call__(self, texts, **options):
        return {"input_ids": [[7] * len(text) for text in texts]}
"""


@pytest.fixture(scope="module")
def other(dense, tmp_path_factory) -> Path:
    """The model with another tokenizer: 130 less the code of each character."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(dense, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {k: 130 - v if len(k) == 1 else v for k, v in vocabulary.items()}
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module", autouse=True)
def repositories(hub, client, dense, other, tmp_path_factory):
    client(run.upload, dense, REPO)
    client(run.upload, str(other), REPO, revision="v2")
    client(run.upload, str(other), REPO, inside="inner")
    bare = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(dense, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat*"))
    client(run.upload, str(bare), "owner/no-tokenizer")
    client(run.upload, str(other), PRIVATE, private=True)
    custom = tmp_path_factory.mktemp("custom") / "model"
    shutil.copytree(dense, custom)
    settings = json.loads((custom / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": [None, "custom.Custom"]}}
    (custom / "tokenizer_config.json").write_text(json.dumps(settings))
    (custom / "custom.py").write_text(_CODE)
    client(run.upload, str(custom), CUSTOM)


@pytest.fixture(scope="module")
def stranger(environment, tmp_path_factory):
    """A client that is not logged in, and whose cache is empty."""
    home = {"HF_TOKEN": None, "HF_HOME": str(tmp_path_factory.mktemp("stranger"))}
    stranger = Client(environment | home)
    yield stranger
    stranger.pool.shutdown()


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, MAIN), ({"revision": "v2"}, OTHER), ({"subfolder": "inner"}, OTHER)],
    ids=["main", "branch", "subfolder"],
)
def test_branch_and_subfolder(client, options, expected):
    assert client(run.calibration_ids, REPO, TEXTS, **options) == expected


def test_subfolder_of_a_local_folder(client, other, tmp_path):
    shutil.copytree(other, tmp_path / "inner")
    assert client(run.calibration_ids, str(tmp_path), TEXTS, subfolder="inner") == OTHER


def test_private_with_a_token(stranger):
    assert stranger(run.calibration_ids, PRIVATE, TEXTS, token=TOKEN) == OTHER


def test_cache_dir_and_local_files_only(hub, stranger, tmp_path):
    assert stranger(run.calibration_ids, REPO, TEXTS, revision="v2", cache_dir=str(tmp_path)) == OTHER
    assert not list(Path(tmp_path).parent.glob("hub"))
    before = len(hub.requests)
    offline = {"cache_dir": str(tmp_path), "local_files_only": True}
    assert stranger(run.calibration_ids, REPO, TEXTS, revision="v2", **offline) == OTHER
    assert not [path for _, path, *_ in hub.requests[before:] if "token" in path.rpartition("/")[2]]


def test_another_repository_tokenizer_has_a_branch_of_its_own(stranger):
    # the branch is the model's: the other repository has none of that name
    options = {"tokenizer": PRIVATE, "revision": "v2", "token": TOKEN}
    assert stranger(run.calibration_ids, REPO, TEXTS, **options) == OTHER
    assert stranger(run.calibration_ids, "owner/no-tokenizer", TEXTS, tokenizer=PRIVATE, token=TOKEN) == OTHER


def test_code_runs_only_where_it_was_trusted(client):
    assert client(run.calibration_ids, CUSTOM, TEXTS, trust_remote_code=True) == [[7] * 4]
    with pytest.raises(ClientError, match="from 'owner/custom-tokenizer'.* load the model with trust_remote_code=True"):
        client(run.calibration_ids, CUSTOM, TEXTS)
    with pytest.raises(ClientError, match="from 'owner/custom-tokenizer'.* load the tokenizer yourself"):
        client(run.calibration_ids, REPO, TEXTS, tokenizer=CUSTOM, trust_remote_code=True)


def test_no_tokenizer_is_one_error_that_shows_no_token(stranger):
    with pytest.raises(ClientError, match="needs a tokenizer, and none could be loaded from 'owner/no-tokenizer'") as error:
        stranger(run.calibration_ids, "owner/no-tokenizer", TEXTS, token=TOKEN)
    assert TOKEN not in str(error.value).splitlines()[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "data.txt"
    path.write_text("abcdefgh" * 20)
    return path


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ((REPO,), "a"),
        ((REPO, "--revision", "v2"), 130 - ord("a")),
        ((PRIVATE, "--token", TOKEN), 130 - ord("a")),
        ((REPO, "--tokenizer", PRIVATE, "--token", TOKEN), 130 - ord("a")),
        ((REPO, "--revision", "v2", "--tokenizer", REPO), "a"),
    ],
    ids=["main", "branch", "private", "another", "another with a branch"],
)
def test_command_line(stranger, text, tmp_path, options, first):
    model, *others = options
    few = ["--dataset", text, "--num-samples", "2", "--sequence-length", "16"]
    code, _, said = stranger(run.command_line, "quantize", model, tmp_path / "out", *few, *others)
    assert code == 0, said
    vocabulary = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary["a"] == (ord("a") if first == "a" else first)
    saved = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert saved["calibration"]["tokens"] == 32


def test_command_line_without_the_tokenizer_that_was_named(stranger, text, tmp_path):
    code, _, said = stranger(
        run.command_line, "quantize", REPO, tmp_path / "out", "--dataset", text, "--tokenizer", "owner/no-tokenizer"
    )
    assert code != 0
    assert "--tokenizer owner/no-tokenizer" in said
    assert not (tmp_path / "out").exists()
