"""Ctrl-C, SIGTERM and a full disk in the middle of a command: nothing is left broken, and it can be done again."""

from __future__ import annotations

import resource
import shutil
import signal
import time

import pytest

from tests.cli.child import finish, start, wait_for
from tests.loopback_hub import TOKEN, LoopbackHub
from transformers_quip import cli
from transformers_quip.quantize.state import FOLDER


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, cli.STOPPED), (signal.SIGTERM, cli.TERMINATED)])
def test_quantize(dense, tmp_path, sent, code):
    """A run that would take hours is stopped while it calibrates; what was there before is still there."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "old.txt").write_text("old")
    process = start("quantize", dense, out, "--overwrite", "--num-samples", 100000, "--sequence-length", 512)
    wait_for(process, "are quantized to")
    time.sleep(0.2)
    process.send_signal(sent)
    found, said = finish(process)
    assert found == code, said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "old.txt"]


def test_convert(golden, tmp_path):
    """Stopped between two linears of a checkpoint that takes long."""
    out = tmp_path / "out"
    slow = (
        "import time\nfrom transformers_quip.checkpoints import convert\nreal = convert.repack\n"
        "convert.repack = lambda *a: (time.sleep(30), real(*a))[1]"
    )
    process = start("convert", golden / "qs_E8P12_t128", out, before=slow)
    wait_for(process, "Re-packing")
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    process.send_signal(signal.SIGINT)
    found, said = finish(process)
    assert found == cli.STOPPED, said
    assert list(tmp_path.iterdir()) == []


def test_evaluate(quantized, text, tmp_path):
    """Stopped while it measures: no result is kept, and the card is as it was."""
    folder, long = tmp_path / "model", tmp_path / "long.txt"
    shutil.copytree(quantized, folder)
    long.write_text(text.read_text() * 2000)
    before = contents(folder)
    options = ["--dataset", long, "--windows", 100000, "--length", 16, "--batch-size", 1, "--save"]
    process = start("evaluate", folder, *options)
    wait_for(process, "Perplexity")
    process.send_signal(signal.SIGINT)
    found, said = finish(process)
    assert found == cli.STOPPED, said
    assert contents(folder) == before


def test_push(quantized, tmp_path):
    """Stopped in the middle of an upload: nobody sees half a model."""
    folder = tmp_path / "model"
    shutil.copytree(quantized, folder)
    with LoopbackHub() as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        variables["HF_HOME"] = str(tmp_path / "home")
        hub.hold_uploads = True
        process = start("push", folder, "owner/model", **variables)
        assert hub.held.wait(300)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        hub.hold_uploads = False
        hub.release.set()
        found, said = finish(process)
        assert found == cli.STOPPED, said
        assert set(hub.files("owner/model")) == {".gitattributes"}
    # but for the card, which names the repository now, the folder is as it was; that the next push goes on is in tests/hub
    shutil.copy(folder / "README.md", tmp_path / "card.md")
    shutil.copy(quantized / "README.md", folder / "README.md")
    assert contents(folder) == contents(quantized)
    assert "owner/model" in (tmp_path / "card.md").read_text()


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_a_full_disk(dense, golden, tmp_path, capsys, command):
    """A limit on the size of files stands for it: the system refuses the write in the same way."""
    source, *options = {"quantize": [dense, "--dataset", "none"], "convert": [golden / "qs_E8P12_t128"]}[command]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        code = cli.main(list(map(str, [command, source, tmp_path / "out", *options])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == cli.UNREACHABLE
    assert "File too large" in capsys.readouterr().err
    if command == "convert":
        assert list(tmp_path.iterdir()) == []
    else:  # its finished blocks are kept, and the same command goes on
        assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]
        assert cli.main(list(map(str, [command, source, tmp_path / "out", *options]))) == 0
        assert not (tmp_path / "out" / FOLDER).exists()
