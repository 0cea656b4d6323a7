"""The compiled encoder of trellis codes finds the very states of the reference, with every instruction set."""

import pytest
import torch

from quip_kernels import cpu, cpu_library, cpu_viterbi
from transformers_quip.codebooks import viterbi

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the CPU library was not compiled")

LEVELS = range(len(cpu_library.LEVELS))
# V, new bits of even and of odd states, doublings: each kind of step, of stored choices and of new bits before others
CASES = [
    (1, (1, 1), 0),
    (1, (1, 2), 1),
    (1, (2, 2), 0),
    (1, (2, 3), 1),
    (1, (3, 4), 2),
    (1, (8, 8), 6),
    (2, (2, 2), 1),
    (2, (4, 4), 0),
    (2, (10, 10), 3),
    (2, (12, 12), 4),
    (2, (16, 16), 15),
]


def some_tiles(weights, seed):
    """Ordinary numbers, the extremes, and few values with many ties."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(weights, 1 << 16, generator=generator) * 9000
    levels[:, ::5] = torch.randint(-3, 4, levels[:, ::5].shape, generator=generator) * 10922.0
    x = torch.randn(3, 256 // weights, weights, generator=generator) * torch.tensor([9000.0, 0, 40000])[:, None, None]
    return x.clamp(-32768, 32767).to(torch.int16), levels.clamp(-32768, 32767).to(torch.int16)


@pytest.mark.parametrize(("weights", "fresh", "doublings"), CASES, ids=str)
def test_states_are_those_of_the_reference(weights, fresh, doublings):
    x, levels = some_tiles(weights, fresh[0])
    window = 18 if weights == 1 else 128  # 18: the first step of the window is through an odd state
    wanted = viterbi.search(x, levels, fresh, doublings, window, passes=2)
    for level in LEVELS[: cpu_library.library().quip_cpu_level() + 1]:
        found = cpu_viterbi.search(x, levels, fresh, doublings, window, 2, level)
        assert torch.equal(found, wanted), cpu_library.LEVELS[level]


def test_threads_and_number_of_tiles_change_nothing():
    x, levels = some_tiles(2, 1)
    x = torch.cat([x.roll(i, 1) for i in range(13)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu_viterbi.search(x, levels, (4, 4), 0, 32, 2)
        torch.set_num_threads(3)
        assert torch.equal(cpu_viterbi.search(x, levels, (4, 4), 0, 32, 2), one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(cpu_viterbi.search(x[7:8], levels, (4, 4), 0, 32, 2), one[7:8])
    assert cpu_viterbi.search(x[:0], levels, (4, 4), 0, 32, 2).shape == (0, 128)


def test_the_level_of_the_environment_is_used(monkeypatch):
    x, levels = some_tiles(2, 2)
    monkeypatch.setenv(cpu_library.LEVEL_VARIABLE, "sse9")
    cpu_library.default_level.cache_clear()
    try:
        with pytest.raises(ValueError, match="QUIP_KERNELS_CPU_LEVEL='sse9' must be one of plain"):
            cpu_viterbi.search(x, levels, (4, 4), 0, 32, 1)
    finally:
        monkeypatch.undo()
        cpu_library.default_level.cache_clear()


def test_what_does_not_fit_is_refused():
    x, levels = some_tiles(2, 3)
    with pytest.raises(ValueError, match=r"x of the trellis encoder must be int16 \[3, 128, 2\].*got torch.float32"):
        cpu_viterbi.search(x.float(), levels, (4, 4), 0, 32, 1)
    with pytest.raises(ValueError, match=r"levels of the trellis encoder must be int16 \[2, 65536\].*\[2, 65535\]"):
        cpu_viterbi.search(x, levels[:, 1:], (4, 4), 0, 32, 1)
    for fresh, doublings, window, passes in (
        ((0, 4), 0, 32, 1),
        ((4, 17), 0, 32, 1),
        ((4, 4), 16, 32, 1),
        ((4, 4), 0, 33, 1),
        ((4, 4), 0, 130, 1),
        ((4, 4), 0, 32, 0),
    ):
        with pytest.raises(ValueError, match="the library has no trellis with fresh="):
            cpu_viterbi.search(x, levels, fresh, doublings, window, passes)
