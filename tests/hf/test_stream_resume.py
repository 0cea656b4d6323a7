"""A run that is stopped at any moment resumes, and its result has the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import transformers_quip
from tests.models import save_tiny_model, tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.calibration import capture
from transformers_quip.checkpoints import durable as durable_module
from transformers_quip.hf import stream, streamed
from transformers_quip.quantize import block, recipe, state
from transformers_quip.quantize.state import FOLDER

OPTIONS = {"dataset": tiny_ids(4, 24), "num_samples": 4, "sequence_length": 24, "batch_size": 2, "refinement_sweeps": 0}
MODULES = {"embed_tokens": {"bits": 4}, "lm_head": {"bits": 4}}


class Killed(BaseException):
    """Raised instead of a kill: nothing handles it."""


def hashes(folder):
    """Of every file but the card, which has the time of the run in it, and that is not compared."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
    }


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("dense"), num_hidden_layers=3)


def stop_at(monkeypatch, moment):
    """Stop the run before its n-th file becomes durable."""
    count = 0
    real = os.replace

    def replace(source, target):
        nonlocal count
        if str(source).endswith(durable_module.TEMPORARY):
            count += 1
            if count == moment:
                raise Killed
        real(source, target)

    monkeypatch.setattr(durable_module.os, "replace", replace)


def stopped(monkeypatch, moment, run):
    with monkeypatch.context() as patched:
        stop_at(patched, moment)
        with pytest.raises(Killed):
            run()


@pytest.mark.parametrize(
    "options",
    [{"calibrate_on": "mixed"}, {"modules": MODULES}, {"bits": 2.5, "dataset": "self"}, {"bits": 4, "dataset": None}],
    ids=["mixed", "embeddings", "self and average", "without calibration"],
)
def test_every_moment(dense, tmp_path, monkeypatch, options):
    config = QuipConfig(**{**OPTIONS, **options})
    whole = transformers_quip.quantize(dense, tmp_path / "whole", config)
    expected = hashes(tmp_path / "whole")
    for moment in range(1, 40):
        out = tmp_path / f"stopped-{moment}"
        with monkeypatch.context() as patched:
            stop_at(patched, moment)
            try:
                transformers_quip.quantize(dense, out, config)
                break
            except Killed:
                assert not (out / "config.json").exists()
        resumed = transformers_quip.quantize(dense, out, config)
        assert hashes(out) == expected
        if config.is_calibrated:
            records = [report.hf_quantizer.report.modules for report in (whole, resumed)]
            assert [r["name"] for r in records[0]] == [r["name"] for r in records[1]]
            assert [r["relative_error"] for r in records[0]] == [r["relative_error"] for r in records[1]]
    assert moment > 4


def test_finished_blocks_are_not_quantized_again(dense, tmp_path, monkeypatch):
    quantized = []
    real = recipe.quantize_block
    monkeypatch.setattr(recipe, "quantize_block", lambda *a: (quantized.append(a[3]), real(*a))[1])
    config = QuipConfig(**OPTIONS)
    stopped(
        monkeypatch, 4, lambda: transformers_quip.quantize(dense, tmp_path / "out", config)
    )  # the file of the second block; each has one, and the list of finished parts another
    transformers_quip.quantize(dense, tmp_path / "out", config)
    assert quantized == [f"model.layers.{index}." for index in (0, 1, 1, 2)]


def test_another_run_is_refused_with_the_differences(dense, tmp_path, monkeypatch):
    stopped(monkeypatch, 4, lambda: transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**OPTIONS)))
    other = {**OPTIONS, "seed": 5, "bits": 3}
    with pytest.raises(ValueError, match=r"options.bits was 2 and is 3.*options.seed was 0 and is 5.*--fresh"):
        transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**other))
    texts = {**OPTIONS, "dataset": tiny_ids(4, 24, seed=9)}
    with pytest.raises(ValueError, match="token ids was"):
        transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**texts))
    changed = save_tiny_model("llama", tmp_path / "changed", num_hidden_layers=3, seed=1)
    with pytest.raises(ValueError, match=r"source.model.safetensors was"):
        transformers_quip.quantize(changed, tmp_path / "out", QuipConfig(**OPTIONS))
    transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**other), fresh=True)
    transformers_quip.quantize(dense, tmp_path / "same", QuipConfig(**other))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "same")


def test_two_runs_cannot_write_one_folder(dense, tmp_path, monkeypatch):
    def second(*arguments):
        with pytest.raises(ValueError, match="another process is writing"):
            transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**OPTIONS))
        raise Killed

    monkeypatch.setattr(stream, "_calibrated", second)
    with pytest.raises(Killed):
        transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**OPTIONS))
    assert not (tmp_path / "out").exists()  # nothing was finished


def test_an_old_model_stays_until_the_new_one_is_complete(dense, tmp_path, monkeypatch):
    out = tmp_path / "out"
    transformers_quip.quantize(dense, out, QuipConfig(bits=4, dataset=None))
    before = hashes(out)
    stopped(monkeypatch, 4, lambda: transformers_quip.quantize(dense, out, QuipConfig(**OPTIONS), overwrite=True))
    assert hashes(out) == before
    transformers_quip.quantize(dense, out, QuipConfig(**OPTIONS), overwrite=True)
    assert hashes(out) != before
    assert sorted(path.name for path in out.iterdir()) == sorted(before)


def test_a_full_disk(dense, tmp_path, monkeypatch):
    """The error names the file; what was finished before is used."""
    real, count = state.save_file, 0

    def save_file(*arguments):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(28, "No space left on device", str(arguments[1]))
        real(*arguments)

    monkeypatch.setattr(state, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**OPTIONS))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [FOLDER]
    transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**OPTIONS))
    transformers_quip.quantize(dense, tmp_path / "whole", QuipConfig(**OPTIONS))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_damaged_list_is_named(dense, tmp_path, monkeypatch):
    stopped(monkeypatch, 4, lambda: transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**OPTIONS)))
    (tmp_path / "out" / FOLDER / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state.json is damaged.*--fresh"):
        transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**OPTIONS))


def test_kill(dense, tmp_path):
    """A real kill, of a process that is in the middle of a block."""
    program = (
        "import sys, torch, transformers_quip\n"
        "from tests.hf.test_stream_resume import OPTIONS\n"
        "from transformers_quip.calibration import capture\n"
        "real = capture.CapturedInputs.advance\n"
        "def advance(self, index, *rest):\n"
        "    real(self, index, *rest)\n"
        "    if index == 1: print('here', flush=True); sys.stdin.read()\n"
        "capture.CapturedInputs.advance = advance\n"
        "torch.set_num_threads(1)\n"
        f"transformers_quip.quantize({str(dense)!r}, sys.argv[1], transformers_quip.QuipConfig(**OPTIONS))\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert sorted(path.name for path in out.iterdir()) == [FOLDER]
    torch.set_num_threads(1)
    transformers_quip.quantize(dense, out, QuipConfig(**OPTIONS))
    transformers_quip.quantize(dense, tmp_path / "whole", QuipConfig(**OPTIONS))
    assert hashes(out) == hashes(tmp_path / "whole")
    assert block.quantize_block is recipe.quantize_block


def test_the_precision_of_blocks_is_kept(dense, tmp_path, monkeypatch):
    """A block that fails under autocast switches it off for all later ones, also after the run was stopped."""
    seen = []
    real = capture.BlockInputs.run

    def run(self, block, batch):
        seen.append(self.precision.is_exact)
        return real(self, block, batch)

    monkeypatch.setattr(capture.BlockInputs, "run", run)
    real_inputs = streamed.StreamedWeights.inputs

    def inputs(self, captured):
        if not self.state.finished:
            captured.precision.is_exact = True
        return real_inputs(self, captured)

    monkeypatch.setattr(streamed.StreamedWeights, "inputs", inputs)
    stopped(monkeypatch, 4, lambda: transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**OPTIONS)))
    seen.clear()
    transformers_quip.quantize(dense, tmp_path / "out", QuipConfig(**OPTIONS))
    assert seen
    assert all(seen)
