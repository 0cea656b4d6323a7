"""Threads of the library: how many a call uses, and what it does where they do not help."""

import ctypes
import time

import pytest
import torch

from quip_kernels import cpu, cpu_library
from quip_kernels import cpu_linear as kernels
from tests import truth
from tests.control_groups import pretend

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the CPU library was not compiled")

LATE = 0.03  # seconds
PAUSE = 10  # times what was lost, as threads.c has it


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
def runtime(work, argument, threads, flags):
    """In the place of GOMP_parallel: the caller does all of the work, and then waits for a thread that had no processor."""
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)(argument)
    asked.append(threads)
    time.sleep(late[0])


asked, late = [], [0.0]


@pytest.fixture(autouse=True)
def this_runtime():
    library, before = cpu_library.loaded(), torch.get_num_threads()
    library.quip_share_threads(ctypes.cast(runtime, ctypes.c_void_p))
    asked.clear()
    late[0] = 0.0
    yield
    torch.set_num_threads(before)
    library.quip_limit_threads(cpu_library.MOST_THREADS)
    library.quip_share_threads(cpu_library._openmp_entry())


def layer(m=2000, n=512):
    codes, x = truth.random_linear(m, n)["codes"], torch.randn(1, n)
    expected = x.double() @ truth.decode(codes, n).T

    def run():
        y = kernels.linear(x, codes, None, None, None, None, None)
        assert truth.relative_error(y, expected) < 1e-6

    return run


@pytest.mark.parametrize("limit", [1, 3, 64])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_no_more_threads_than_pytorch_or_the_group_has(threads, limit):
    cpu_library.loaded().quip_limit_threads(limit)
    torch.set_num_threads(threads)
    layer()()
    assert asked == [min(threads, limit)] * (min(threads, limit) > 1)


def test_calls_do_without_threads_that_come_late():
    torch.set_num_threads(2)
    run = layer()
    late[0] = LATE
    run()
    assert asked == [2]
    begin = time.perf_counter()
    for _ in range(50):
        run()
    passed = time.perf_counter() - begin
    # one more for each pause that has passed; no wait without a pause ten times as long
    assert len(asked) <= 1 + passed / (PAUSE * LATE * 0.9) + 1
    late[0] = 0.0
    asked.clear()
    time.sleep(PAUSE * LATE * 1.5)
    run()
    assert asked == [2]  # they are tried again


GROUPS = {
    "version 2": ("0::/jobs/7\n", {"jobs/cpu.max": "150000 100000", "jobs/7/cpu.max": "max 100000"}, 2),
    "its own limit is smaller": ("0::/jobs/7\n", {"jobs/cpu.max": "800000 100000", "jobs/7/cpu.max": "50000 100000"}, 1),
    "version 1": (
        "9:memory:/\n4:cpu,cpuacct:/jobs\n",
        {"cpu/jobs/cpu.cfs_quota_us": "400000", "cpu/jobs/cpu.cfs_period_us": "100000"},
        4,
    ),
    "version 1 without a limit": (
        "4:cpu:/jobs\n0::/\n",
        {"cpu/jobs/cpu.cfs_quota_us": "-1", "cpu/jobs/cpu.cfs_period_us": "100000"},
        None,
    ),
    "seen from inside of a container": ("0::/docker/1234\n", {"cpu.max": "200000 100000"}, 2),
    "no groups": ("", {}, None),
}


@pytest.mark.parametrize("case", GROUPS)
def test_processors_of_control_groups(case, tmp_path, monkeypatch):
    listed, files, expected = GROUPS[case]
    pretend(monkeypatch, tmp_path, listed, files)
    assert cpu_library.granted_processors() == expected
