"""push_to_hub and from_pretrained through the real client over HTTP: every byte, every error, every interruption."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.hub import client as run
from tests.hub.client import Client, ClientError
from tests.loopback_hub import READER, TOKEN

REPO = "owner/tiny-2bit"
IDS = [[5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def expected(quantized):
    """What the folder computes."""
    return Client({"OMP_NUM_THREADS": "1"})(run.logits, quantized, IDS)


@pytest.fixture(scope="module")
def commit(client, quantized):
    """The first push: private, in shards."""
    return client(run.push, quantized, REPO, private=True, max_shard_size="40KB")


def weights(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


def test_every_byte_arrives_and_comes_back(hub, client, commit, quantized, expected):
    stored = hub.files(REPO)
    assert len(weights(quantized)) >= 3
    assert {name: raw for name, raw in stored.items() if name.endswith(".safetensors")} == weights(quantized)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert stored[name] == (Path(quantized) / name).read_bytes()
    assert client(run.snapshot, REPO) == stored
    assert client(run.logits, REPO, IDS) == expected
    assert hub.repos[REPO].private


def test_the_card_is_the_hub_s_kind_of_card(hub, client, commit):
    card = hub.files(REPO)["README.md"].decode()
    assert "quantized_by: owner" in card
    assert f'from_pretrained("{REPO}"' in card
    client(run.validate_card, card)
    with pytest.raises(ClientError, match="base_model 'no repo id'"):
        client(run.validate_card, card.replace("library_name:", "base_model: no repo id\nlibrary_name:"))


def test_inspect_fetches_only_headers(hub, client, commit, quantized):
    from transformers_quip.checkpoints.inventory import read_folder

    local = read_folder(quantized)
    before = len(hub.requests)
    assert client(run.inspect, REPO, revision=commit) == (local.true_bits, local.total_bytes, 14)
    fetched = [request for request in hub.requests[before:] if request[0] == "GET" and "storage" in request[1]]
    assert fetched
    assert all(range_ for _, _, range_, _ in fetched)


@pytest.mark.parametrize(
    ("token", "message"),
    [(False, "not a valid model identifier|private"), (READER, "not a valid model identifier|private")],
    ids=["no token", "another's token"],
)
def test_a_private_repository_is_private(client, commit, token, message):
    with pytest.raises(ClientError, match=message) as caught:
        client(run.logits, REPO, IDS, token=token, force_download=True)
    assert "token" in str(caught.value)


def test_a_wrong_token_is_named(client, commit):
    with pytest.raises(ClientError, match="401|Invalid credentials"):
        client(run.logits, REPO, IDS, token="hf_wrong", force_download=True)


def test_pushing_into_another_s_repository_is_refused(hub, client, quantized):
    with pytest.raises(ClientError, match="403.*rights to create|rights to create.*403"):
        client(run.push, quantized, "owner/other", token=READER)
    assert "owner/other" not in hub.repos


def test_revisions(hub, client, commit, dense, expected):
    with pytest.raises(ClientError, match="no-such"):
        client(run.logits, REPO, IDS, revision="no-such")
    client(run.push, dense, REPO, revision="dense")
    assert hub.files(REPO) == hub.files(REPO, commit)
    assert "quantization_config" not in hub.files(REPO, "dense")["config.json"].decode()
    other = client(run.logits, REPO, IDS, revision="dense")
    assert other != expected
    assert client(run.logits, REPO, IDS, revision=commit) == expected


def test_an_interrupted_upload_continues(hub, client, quantized, expected):
    repo = "owner/interrupted"
    hub.blobs.clear()
    hub.refuse_uploads_after = 2
    try:
        with pytest.raises(ClientError):
            client(run.push, quantized, repo, patient=False, max_shard_size="40KB")
    finally:
        hub.refuse_uploads_after = None
    assert set(hub.files(repo)) == {".gitattributes"}  # nothing half-done can be seen
    sent = set(hub.blobs)
    assert len(sent) == 2
    before = len(hub.requests)
    client(run.push, quantized, repo, max_shard_size="40KB")
    again = {path[5:] for method, path, *_ in hub.requests[before:] if method == "PUT"}
    shards = {hashlib.sha256(raw).hexdigest() for raw in weights(quantized).values()}
    assert again == shards - sent
    assert {name: raw for name, raw in hub.files(repo).items() if name.endswith(".safetensors")} == weights(quantized)
    assert client(run.logits, repo, IDS) == expected


def test_a_broken_connection_continues_where_it_broke(hub, client, quantized, expected):
    repo = "owner/broken"
    client(run.push, quantized, repo, max_shard_size="40KB")
    client(run.read_in_pieces, 1000)
    name, raw = list(weights(quantized).items())[1]
    hub.cut[name] = 5500
    before = len(hub.requests)
    assert client(run.logits, repo, IDS) == expected
    ranges = [request[2] for request in hub.requests[before:] if request[2] and request[0] == "GET"]
    assert ranges == ["bytes=5000-"]
    assert client(run.snapshot, repo)[name] == raw


def test_an_interrupted_download_keeps_what_is_whole(hub, client, quantized, expected):
    repo = "owner/half"
    client(run.push, quantized, repo, max_shard_size="40KB")
    *_, last = weights(quantized)
    hub.lost.add(last)
    with pytest.raises(ClientError):
        client(run.logits, repo, IDS)
    hub.lost.clear()
    before = len(hub.requests)
    assert client(run.logits, repo, IDS) == expected
    fetched = [path for method, path, *_ in hub.requests[before:] if method == "GET" and "storage" in path]
    assert fetched == [f"/storage/{hashlib.sha256(weights(quantized)[last]).hexdigest()}"]


def test_offline_the_cache_is_enough(hub, environment, client, commit, expected):
    client(run.logits, REPO, IDS)
    offline = Client({**environment, "HF_HUB_OFFLINE": "1", "HF_TOKEN": None})
    before = len(hub.requests)
    assert offline(run.logits, REPO, IDS) == expected
    assert offline(run.inspect, REPO)[2] == 14
    with pytest.raises(ClientError, match="offline|cached"):
        offline(run.logits, "owner/never-seen", IDS)
    assert len(hub.requests) == before
    offline.pool.shutdown()


def test_a_user_s_own_card_stays_on_the_hub(hub, client, commit, quantized):
    repo = "owner/own-card"
    client(run.push, quantized, repo)
    written = hub.files(repo)["README.md"].decode()
    hub.files(repo)["README.md"] = written.replace("---\n\n#", "license: mit\n---\n\n#", 1).encode()
    client(run.push, quantized, repo)  # only the metadata was edited: refreshed, with the license kept
    refreshed = hub.files(repo)["README.md"].decode()
    assert "license: mit" in refreshed
    assert refreshed.partition("\n# ")[2] == written.partition("\n# ")[2]
    own = "---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n"
    hub.files(repo)["README.md"] = own.encode()
    client(run.push, quantized, repo)
    assert "My own words." in hub.files(repo)["README.md"].decode()
    assert "transformers-quip" not in hub.files(repo)["README.md"].decode()


def test_save_pretrained_can_push(hub, client, quantized, tmp_path):
    client(run.save_and_push, quantized, str(tmp_path), "owner/saved")
    assert hub.files("owner/saved")["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert "quantized_by: owner" in hub.files("owner/saved")["README.md"].decode()


def test_the_server_itself_checks(hub):
    assert TOKEN != READER
    assert hub.count("POST", "/api/repos/create") > 0
    assert not [path for _, path, *_ in hub.requests if "xet" in path]
