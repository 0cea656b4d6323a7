"""The commands that talk to the Hub, through the real client: push, inspect, and what they say when they may not."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.hub import client as run
from tests.loopback_hub import READER
from transformers_quip import cli

REPO = "owner/pushed"


@pytest.fixture(scope="module")
def folder(quantized, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy") / "model"
    shutil.copytree(quantized, copy)
    (copy / ".hidden").write_text("mine")
    return copy


@pytest.fixture(scope="module")
def pushed(client, folder):
    options = ["--private", "--base-model", "org/dense", "--message", "Two bits", "--json"]
    code, out, _ = client(run.command_line, "push", folder, REPO, *options)
    assert code == 0
    return json.loads(out)


def test_push_brings_every_byte(hub, client, pushed, folder):
    stored = hub.files(REPO, pushed["commit"])
    local = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".hidden"}
    assert {**stored, ".gitattributes": b""} == {**local, ".gitattributes": b""}
    assert hub.repos[REPO].private
    assert pushed["repo"] == REPO
    card = stored["README.md"].decode()
    assert "base_model: org/dense" in card
    assert "quantized_by: owner" in card
    assert client(run.snapshot, REPO) == stored


def test_push_to_a_branch_and_over_somebody_s_card(hub, client, pushed, folder):
    main = dict(hub.files(REPO))
    (folder / "README.md").write_text("# Mine\n")
    code, out, said = client(run.command_line, "push", folder, REPO, "--revision", "other")
    assert code == 0
    assert out.startswith(hub.endpoint)
    assert "is pushed as it is" in said
    assert hub.files(REPO, "other")["README.md"] == b"# Mine\n"
    assert hub.files(REPO) == main
    assert client(run.command_line, "push", folder, REPO, "--overwrite-card")[0] == 0
    assert b"import transformers_quip" in hub.files(REPO)["README.md"]


def test_nothing_is_made_for_a_folder_that_is_no_model(hub, client, dense):
    code, _, said = client(run.command_line, "push", dense, "owner/nothing")
    assert code == cli.UNUSABLE
    assert "not hold a model that was quantized by transformers-quip" in said
    assert "owner/nothing" not in hub.repos


def test_inspect_of_a_private_repository(client, pushed, quantized):
    code, out, _ = client(run.command_line, "inspect", REPO, "--json")
    assert code == 0
    assert (
        json.loads(out)["weight_bytes"]
        == json.loads(client(run.command_line, "inspect", quantized, "--json")[1])["weight_bytes"]
    )
    code, _, said = client(run.command_line, "inspect", REPO, "--revision", "no-such")
    assert code == cli.UNREACHABLE
    assert "no-such" in said


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (["push", "FOLDER", REPO, "--token", "hf_wrong"], "Invalid credentials", "hf auth login"),
        (["push", "FOLDER", REPO, "--token", READER], "rights to create a model under this namespace", "hf auth login"),
        (["inspect", REPO, "--token", READER], "Repository Not Found", "make sure you are authenticated"),
        (["inspect", "owner/never"], "Repository Not Found", "make sure you are authenticated"),
    ],
    ids=["wrong token", "another's repository", "another's private model", "unknown"],
)
def test_what_the_hub_refuses_is_said_with_a_remedy(client, pushed, quantized, arguments, message, remedy):
    arguments = [quantized if argument == "FOLDER" else argument for argument in arguments]
    code, _, said = client(run.command_line, *arguments)
    assert code == cli.UNREACHABLE, said
    assert said.startswith("error: ")
    assert message in said
    assert remedy in said
    assert "Traceback" not in said
