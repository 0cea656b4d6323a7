"""Choosing by measuring, with a clock and a device of our own."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from quip_kernels.gpu import cache, tune

DEVICE = torch.device("cuda", 0)
TIMES = {"slow": 3.0, "fast": 1.0, "large": None}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The measurements, in order; every run takes as long as `TIMES` says, and None does not fit onto the device."""
    measured = []

    def milliseconds(run, device):
        run()
        if TIMES[measured[-1]] is None:
            raise tune.OutOfResources(1, 0, "shared memory")
        return TIMES[measured[-1]]

    monkeypatch.setattr(tune, "interpreted", lambda: False)
    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(cache, "device_name", lambda device: "Test GPU (80 GB)")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    forget(monkeypatch)
    return measured


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(tune, "_answers", {})
    monkeypatch.setattr(tune, "_spent", 0.0)


def choose(runs, shape=(4096, 128), candidates=("slow", "fast", "large")):
    return tune.choose("matvec", shape, candidates, DEVICE, runs.append)


def test_the_fastest_is_taken_and_remembered(runs, monkeypatch):
    assert choose(runs) == "fast"
    assert runs == ["slow", "fast", "large"]
    assert choose(runs) == "fast"
    assert choose(runs, (3000, 70)) == "fast"  # the same powers of two
    assert len(runs) == 3
    assert choose(runs, (4097, 128)) == "fast"
    assert len(runs) == 6
    forget(monkeypatch)
    assert choose(runs) == "fast"
    assert len(runs) == 6  # from the file


def test_the_file_is_of_one_device_and_one_version_of_the_kernels(runs, monkeypatch, tmp_path):
    choose(runs)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name == f"Test-GPU-80-GB-{cache.version()}.json"
    assert json.loads(file.read_text()) == {"matvec 4096x128": 1}
    monkeypatch.setattr(cache, "version", lambda: "later")
    forget(monkeypatch)
    choose(runs)
    assert len(runs) == 6


def test_answers_of_other_processes_are_kept(runs, monkeypatch, tmp_path):
    choose(runs)
    known = tune._answers
    forget(monkeypatch)
    choose(runs, (8, 8))
    monkeypatch.setattr(tune, "_answers", known)
    choose(runs, (16, 16))
    (file,) = (tmp_path / "cache").iterdir()
    assert json.loads(file.read_text()).keys() == {"matvec 4096x128", "matvec 8x8", "matvec 16x16"}


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", "[" * 100_000, '{"a":' * 100_000, '{"matvec 4096x128": "1"}', '{"matvec 4096x128": 7}', b"\xff\xfe"],
)
def test_a_broken_file_is_made_again(content, runs, monkeypatch, tmp_path):
    choose(runs)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    forget(monkeypatch)
    assert choose(runs) == "fast"
    assert len(runs) == 6
    assert json.loads(file.read_text())["matvec 4096x128"] == 1


def test_an_answer_that_does_not_fit_is_measured_again(runs, monkeypatch, tmp_path):
    """The file may be of another device of the same name: the launch says so, and the caller asks again."""
    choose(runs)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text('{"matvec 4096x128": 2}')
    forget(monkeypatch)
    assert choose(runs) == "large"
    assert tune.choose("matvec", (4096, 128), ("slow", "fast", "large"), DEVICE, runs.append, unfit="large") == "fast"
    assert json.loads(file.read_text())["matvec 4096x128"] == 1
    count = len(runs)
    # another caller, whose launch failed before the new answer was known, gets that
    assert tune.choose("matvec", (4096, 128), ("slow", "fast", "large"), DEVICE, runs.append, unfit="large") == "fast"
    assert len(runs) == count


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_others_may_read_the_file_as_the_umask_says(runs, tmp_path, umask):
    before = os.umask(umask)
    try:
        choose(runs)
    finally:
        os.umask(before)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_no_temporary_file_is_left(runs, monkeypatch, tmp_path, error):
    def replace(source, target):
        raise error

    monkeypatch.setattr(cache.os, "replace", replace)
    if isinstance(error, OSError):
        assert choose(runs) == "fast"
    else:
        with pytest.raises(KeyboardInterrupt):
            choose(runs)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_temporary_file_of_a_process_that_was_killed_is_removed(runs, tmp_path):
    choose(runs)
    (file,) = (tmp_path / "cache").iterdir()
    old, new = file.with_name(file.name + ".123.tmp"), file.with_name(file.name + ".124.tmp")
    for left in (old, new):
        left.write_text("{")
    os.utime(old, (0, 0))
    choose(runs, (8, 8))
    assert sorted((tmp_path / "cache").iterdir()) == sorted([file, new])


def test_a_folder_that_cannot_be_written_does_no_harm(runs, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    assert choose(runs) == "fast"
    assert choose(runs) == "fast"
    assert len(runs) == 3
    assert (tmp_path / "file").read_text() == ""


def test_when_the_time_is_used_up_the_first_is_taken(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "_spent", tune.SECONDS)
    assert choose(runs) == "slow"
    assert not runs
    assert not (tmp_path / "cache").exists()


def test_a_question_ends_in_time(runs, monkeypatch):
    """Candidates of two seconds each: the third would end after six."""
    now = [0.0]
    monkeypatch.setattr(tune, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    measure = tune.milliseconds

    def slowly(run, device):
        now[0] += 2
        return measure(run, device)

    monkeypatch.setattr(tune, "milliseconds", slowly)
    assert choose(runs, candidates=("slow", "fast", "slow", "fast")) == "fast"
    assert runs == ["slow", "fast"]
    assert (now[0], tune._spent) == (4.0, 4.0)
    assert choose(runs, candidates=("slow", "fast", "slow", "fast")) == "fast"
    assert len(runs) == 2  # remembered


def test_nothing_is_measured_while_a_graph_is_recorded(runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(runs) == "slow"
    assert not runs
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(runs) == "fast"


def test_without_memory_the_first_is_taken(runs, monkeypatch):
    def milliseconds(run, device):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    assert choose(runs) == "slow"


def test_where_nothing_fits_the_error_is_raised(runs):
    with pytest.raises(tune.OutOfResources):
        choose(runs, candidates=("large", "large"))


def test_a_single_candidate_is_not_measured(runs):
    assert choose(runs, candidates=("large",)) == "large"
    assert not runs


@pytest.mark.parametrize("another", [True, False])
@pytest.mark.parametrize("module", ["matvec", "small_batch"])
def test_callers_ask_again(monkeypatch, module, another):
    """A launch that the device refuses: the kernel's caller launches another candidate, or raises without one."""
    from quip_kernels import e8p, layout
    from quip_kernels.gpu import matvec, small_batch
    from quip_kernels.gpu.quantize import Digits

    kernel = {"matvec": matvec, "small_batch": small_batch}[module]
    launched = []

    def choose(name, shape, candidates, device, run, unfit=None):
        return "small" if unfit is not None and another else "large"

    def launch(inputs, stage, tile, parts):
        launched.append(tile)
        if tile == "large":
            raise tune.OutOfResources(1, 0, "shared memory")
        parts.fill_(5)

    monkeypatch.setattr(kernel.tune, "choose", choose)
    monkeypatch.setattr(kernel, "_launch", launch)
    monkeypatch.setattr(kernel, "split", lambda *_: 1)
    columns = e8p.WORDS_ALIGNMENT * e8p.WEIGHTS_PER_WORD
    planes = layout.pack(torch.zeros(16, columns // 8, dtype=torch.int16))
    words = planes.shape[2]
    if module == "matvec":
        digits = Digits(torch.zeros(1, 2, 8, words, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32), torch.ones(1))
        call = lambda: matvec.matvec(digits, planes, columns)  # noqa: E731
    else:
        halves = small_batch.Halves(torch.zeros(1, 9, columns, dtype=torch.float16), torch.ones(9))
        call = lambda: small_batch.small_batch(halves, planes, columns)  # noqa: E731
    if another:
        assert torch.all(call() == 5)
        assert launched == ["large", "small"]
    else:
        with pytest.raises(tune.OutOfResources):
            call()
        assert launched == ["large"]
