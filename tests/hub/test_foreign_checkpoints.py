"""Checkpoints of other packages by the name of a repository, with their config wherever their packages put it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hub import client as run
from tests.hub.client import ClientError
from tests.loopback_hub import READER, TOKEN, Repo

BESIDE = "quantization_config.json"


@pytest.fixture
def publish(hub, golden):
    """publish(repo, name, …) → (ids, expected logits): a golden checkpoint as a repository, its config only beside."""

    def make(repo, name, folder="", branch="main", beside=True, private=False):
        files = {path.name: path.read_bytes() for path in (golden / name).iterdir() if "expected" not in path.name}
        config = json.loads(files["config.json"])
        if beside:
            files[BESIDE] = json.dumps(config.pop("quantization_config")).encode()
            files["config.json"] = json.dumps(config).encode()
        if repo not in hub.repos:
            hub.repos[repo] = Repo(private)
        commit = f"{name}-{branch}".encode().hex()[:40].ljust(40, "0")
        hub.repos[repo].commits[commit] = {folder + key: raw for key, raw in files.items()}
        hub.repos[repo].branches[branch] = [commit]
        expected = load_file(golden / name / "expected.safetensors")
        return expected["input_ids"].tolist(), expected["logits"]

    return make


def check(logits, expected):
    assert ((torch.tensor(logits) - expected).norm() / expected.norm()).item() < 2e-3  # as EXL3's own


NAMES = ("qfa_E8P12_had_t128", "qfa_E8P12_rand_t128_bin", "exl3_mcg_k2_padded", "exl3_legacy_su_sv")


@pytest.mark.parametrize("name", NAMES)
def test_a_config_beside_the_config(name, hub, client, publish, tmp_path):
    repo = f"owner/{name}"
    ids, expected = publish(repo, name)
    before = len(hub.requests)
    check(client(run.logits, repo, ids, dtype="float32"), expected)
    assert any(BESIDE in path for _, path, *_ in hub.requests[before:])
    check(client(run.logits_with_config, repo, ids, dtype="float32"), expected)
    assert client(run.command_line, "convert", repo, tmp_path / "native")[0] == 0
    check(client(run.logits, str(tmp_path / "native"), ids, dtype="float32"), expected)


@pytest.mark.parametrize("name", ["qs_E8P12_t128", "qtip_hyb_k2", "exl3_mul1_k2"])
def test_a_config_in_the_config(name, hub, client, publish):
    repo = f"owner/{name}"
    ids, expected = publish(repo, name, beside=False)
    before = len(hub.requests)
    check(client(run.logits, repo, ids, dtype="float32"), expected)
    check(client(run.logits_with_config, repo, ids, dtype="float32"), expected)
    assert not any(BESIDE in path for _, path, *_ in hub.requests[before:])


def test_several_files_of_pickles(hub, client, publish, golden, tmp_path):
    ids, expected = publish("owner/bin", "qfa_E8P12_rand_t128_bin")
    files = hub.files("owner/bin")
    files["pytorch_model-00001-of-00002.bin"] = files.pop("pytorch_model.bin")
    torch.save({}, tmp_path / "empty.bin")
    files["pytorch_model-00002-of-00002.bin"] = (tmp_path / "empty.bin").read_bytes()
    tensors = torch.load(golden / "qfa_E8P12_rand_t128_bin" / "pytorch_model.bin", weights_only=True)
    weight_map = dict.fromkeys(tensors, "pytorch_model-00001-of-00002.bin") | {"a": "pytorch_model-00002-of-00002.bin"}
    files["pytorch_model.bin.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    check(client(run.logits, "owner/bin", ids, dtype="float32"), expected)


def test_where_it_is_asked_for(hub, client, publish, tmp_path):
    """Revision, subfolder, token and cache are those of the call, and the cache is enough."""
    ids, expected = publish("reader/branches", "exl3_mcg_k4", folder="4.0bpw/", branch="other", private=True)
    options = {"revision": "other", "subfolder": "4.0bpw", "token": READER, "cache_dir": str(tmp_path / "cache")}
    check(client(run.logits, "reader/branches", ids, dtype="float32", **options), expected)
    assert {path.name for path in tmp_path.glob("cache/*/snapshots/*/*/*")} >= {"config.json", BESIDE}
    before = len(hub.requests)
    check(client(run.logits, "reader/branches", ids, dtype="float32", local_files_only=True, **options), expected)
    assert not any(BESIDE in path for _, path, *_ in hub.requests[before:])
    with pytest.raises(ClientError, match="not a valid model identifier|private"):
        client(run.logits, "reader/branches", ids, **options | {"token": TOKEN, "cache_dir": str(tmp_path / "empty")})


def test_of_a_dense_model_it_is_asked_once(hub, client, dense):
    hub.repos["owner/dense"] = Repo(private=False)
    hub.files("owner/dense").update((path.name, path.read_bytes()) for path in Path(dense).iterdir())
    ids = [[5, 6, 7]]
    before = len(hub.requests)
    expected = client(run.logits, "owner/dense", ids)
    assert len([path for _, path, *_ in hub.requests[before:] if BESIDE in path]) == 1
    before = len(hub.requests)
    assert client(run.logits, "owner/dense", ids) == expected
    assert not [path for method, path, *_ in hub.requests[before:] if BESIDE in path and method != "HEAD"]


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_a_damaged_config_is_named(content, hub, client, publish):
    repo = f"owner/damaged-{len(content)}"
    ids, _ = publish(repo, "qfa_E8P12_had_t128")
    hub.files(repo)[BESIDE] = content
    with pytest.raises(ClientError, match=r"quantization_config\.json is not (a )?JSON.*download or save the model again"):
        client(run.logits, repo, ids)
