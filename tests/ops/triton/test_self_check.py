"""The verdicts about a device, from a fake device layer: programs that answer, are wrong, die, hang or say nothing."""

from __future__ import annotations

import json
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from quip_kernels.gpu import cache
from transformers_quip.ops import backend
from transformers_quip.ops.triton import run, self_check
from transformers_quip.ops.triton.route import ALL, Family

DEVICE = torch.device("cuda", 0)
PROGRAM = """
import json, os, sys, time
device, *names = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
print("a compiler says something")
for name in names:
    {body}
    print("verdict: " + json.dumps(reason), flush=True)
"""


@pytest.fixture
def program(tmp_path):
    """program(body) → the command of a child whose `body` sets `reason` for `name`; and the file of its calls."""

    def make(body):
        path, log = tmp_path / "child.py", tmp_path / "calls.jsonl"
        path.write_text(PROGRAM.format(body=body, log=str(log)))
        return [sys.executable, str(path)]

    return make


def calls(tmp_path):
    return [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]


def test_right_and_wrong(program, tmp_path):
    command = program('reason = "ArithmeticError: 7" if name == "matvec" else None')
    found = self_check.examine("cuda:3", command)
    assert found == dict.fromkeys(self_check.names()) | {"matvec": "ArithmeticError: 7"}
    assert calls(tmp_path) == [["cuda:3", *self_check.names()]]


def test_a_child_that_ends_after_an_error_is_followed_by_another(program, tmp_path):
    body = 'reason = "RuntimeError: x" if name == "trellis" else None'
    end = 'if reason: print("verdict: " + json.dumps(reason)); break'
    command = program(f"{body}\n    {end}")
    found = self_check.examine("cuda:0", command)
    assert found == dict.fromkeys(self_check.names()) | {"trellis": "RuntimeError: x"}
    names = self_check.names()
    assert [call[1:] for call in calls(tmp_path)] == [names, names[names.index("trellis") + 1 :]]


def test_a_kernel_that_never_ends(program, tmp_path):
    command = program('reason = None\n    if name == "small batch": time.sleep(600)')
    begin = time.monotonic()
    found = self_check.examine("cuda:0", command, patience=3)
    assert time.monotonic() - begin < 60
    assert found == dict.fromkeys(self_check.names()) | {"small batch": "it did not end within 3 s"}
    assert len(calls(tmp_path)) == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.abort()", r"its process ended with code -6 \(it said nothing\)"),
        ("sys.exit('no such device')", r"its process ended with code 1 \(no such device\)"),
        ("break", "its process ended without an answer"),
        ("sys.stderr.write('w' * 1_000_000); sys.exit(3)", r"its process ended with code 3 \(w{300}\)"),
    ],
)
def test_a_child_that_dies_at_once_each_time(program, tmp_path, body, reason):
    found = self_check.examine("cuda:0", program(body))
    assert set(found) == set(self_check.names())
    assert all(re.fullmatch(reason, value) for value in found.values())
    assert len(calls(tmp_path)) == len(self_check.names())


def test_several_children_share_the_names(program, tmp_path):
    body = 'reason = "RuntimeError: x" if name == "trellis" else None'
    end = 'if reason: print("verdict: " + json.dumps(reason)); break'
    found = self_check.examine("cuda:0", program(f"{body}\n    {end}"), 120.0, 3)
    assert list(found.items()) == list((dict.fromkeys(self_check.names()) | {"trellis": "RuntimeError: x"}).items())
    asked = [call[1:] for call in calls(tmp_path)]
    shares = [self_check.names()[index::3] for index in range(3)]
    assert all(share in asked for share in shares)
    assert len(asked) <= 4  # and one that does the rest of the share with the error


@pytest.mark.parametrize(("gigabytes", "expected"), [(0.2, 1), (2.5, 2), (80, 8)])
def test_children_fit_into_the_memory_of_the_device(gigabytes, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gigabytes * 2**30), 2**40))
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert self_check._children(DEVICE) == expected


def test_parts_that_are_right_and_a_whole_that_is_wrong(program):
    found = self_check.examine("cuda:0", program('reason = "A: 1" if name == "whole layers" else None'))
    assert found.pop("whole layers") == "A: 1"
    assert set(found.values()) == {"whole layers: A: 1"}


def test_no_process_can_be_started(tmp_path):
    found = self_check.examine("cuda:0", [str(tmp_path / "missing")])
    assert all("no process can be started" in value for value in found.values())


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device of its own, and the list of checks that were made; `wrong` decides their outcome."""

    found = SimpleNamespace(wrong={}, checks=[])

    def examine(name, program, patience, children, kind):
        found.checks.append((name, kind))
        return {part: found.wrong.get(part) for part in self_check.names(kind)}

    monkeypatch.setattr(self_check, "examine", examine)
    monkeypatch.setattr(cache, "device_name", lambda device: "Test GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    forget(monkeypatch)
    return found


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(self_check, "_trusted", {})
    monkeypatch.setattr(self_check, "_encodes", {})


def test_a_device_is_checked_once_for_all_processes(device, monkeypatch, tmp_path):
    assert self_check.trusted(DEVICE) == ALL
    assert self_check.trusted(torch.device("cuda", 1)) == ALL  # of the same kind
    forget(monkeypatch)
    assert self_check.trusted(DEVICE) == ALL
    assert device.checks == [("cuda:0", self_check.RUN)]
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name == f"Test-GPU-{cache.version()}-check.json"


def test_encoders_are_checked_when_a_weight_is_first_encoded(device, monkeypatch, tmp_path):
    device.wrong = {"panels of e8p": "no"}
    assert self_check.trusted(DEVICE) == ALL  # whoever runs a model does not wait for them
    assert [kind for _, kind in device.checks] == [self_check.RUN]
    for _ in range(2):
        assert run.encoder(DEVICE) == "reference"
        assert [kind for _, kind in device.checks] == [self_check.RUN, self_check.ENCODE]
        forget(monkeypatch)
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {
        f"Test-GPU-{cache.version()}-{end}.json" for end in ("check", "check-encoders")
    }


def test_all_encoders_are_examined(program, tmp_path):
    found = self_check.examine("cuda:0", program("reason = name[:3]"), kind=self_check.ENCODE)
    assert found == {name: name[:3] for name in self_check.names(self_check.ENCODE)}


def test_what_is_wrong_is_not_used_and_said_once(device, caplog):
    device.wrong = {"matvec": "ArithmeticError: e8p: relative error 0.5", "grouped": "it did not end within 120 s"}
    with caplog.at_level("WARNING", logger="transformers_quip"):
        assert self_check.trusted(DEVICE) == ALL - {Family.MATVEC, Family.GROUPED}
        self_check.trusted(DEVICE)
        self_check.trusted(torch.device("cuda", 1))
    (record,) = caplog.records
    text = record.getMessage()
    for part in ("matvec (ArithmeticError: e8p: relative error 0.5)", "grouped (it did not", "Test GPU", torch.__version__):
        assert part in text
    assert run.trusted(DEVICE) == ALL - {Family.MATVEC, Family.GROUPED}
    assert backend.for_device(DEVICE) == run.encoder(DEVICE) == "triton"


def test_nothing_that_works_is_the_reference(device):
    device.wrong = dict.fromkeys(self_check.names(), "no")
    assert backend.for_device(DEVICE) == "reference"
    assert run.trusted(DEVICE) == ()


def test_the_users_choice_is_not_checked(device):
    device.wrong = dict.fromkeys(self_check.names(), "no")
    with backend.overridden(backend="triton"):
        assert (backend.for_device(DEVICE), run.trusted(DEVICE), run.encoder(DEVICE)) == ("triton", ALL, "triton")
    with backend.overridden(backend="reference"):
        assert (backend.for_device(DEVICE), run.trusted(DEVICE)) == ("reference", ())
    assert device.checks == []


def test_nothing_begins_while_a_graph_is_recorded(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert self_check.trusted(DEVICE) == frozenset()
    assert not self_check.encodes(DEVICE)
    assert device.checks == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert self_check.trusted(DEVICE) == ALL


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        "[]",
        b"\xff",
        '{"verdicts": {}}',
        lambda content: content | {"versions": content["versions"] | {"driver": "another"}},
        lambda content: content | {"verdicts": {**content["verdicts"], "matvec": 3}},
        lambda content: content | {"verdicts": {}},
    ],
)
def test_a_file_that_is_damaged_or_about_something_else(device, monkeypatch, tmp_path, content):
    self_check.trusted(DEVICE)
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    if callable(content):
        content = json.dumps(content(json.loads(whole)))
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    forget(monkeypatch)
    assert self_check.trusted(DEVICE) == ALL
    assert len(device.checks) == 2
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written(device, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    assert self_check.trusted(DEVICE) == ALL


def test_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    forget(monkeypatch)
    assert self_check.trusted(DEVICE) == frozenset()
    assert backend.for_device(DEVICE) == "reference"
