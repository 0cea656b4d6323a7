"""The Triton encoder of trellis codes against the reference in PyTorch. Run by test_gpu_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from interpreted import kernels_are_asked_for  # noqa: F401 - a fixture for every test

from quip_kernels.gpu import viterbi
from transformers_quip.codebooks import viterbi as reference
from transformers_quip.codebooks.trellis import Trellis
from transformers_quip.ops import backend

# bits of a state, V, new bits of even and odd states, doublings, T, window
VITERBI = [(5, 1, (2, 2), 0, 12, 12), (5, 2, (1, 2), 1, 8, 6), (4, 1, (4, 4), 0, 4, 4), (8, 1, (3, 3), 2, 8, 4)]


@pytest.mark.parametrize(("bits", "weights", "fresh", "doublings", "steps", "window"), VITERBI, ids=str)
def test_viterbi_finds_the_states_of_the_reference(bits, weights, fresh, doublings, steps, window, monkeypatch):
    monkeypatch.setattr(viterbi, "TILES", 1)
    generator = torch.Generator().manual_seed(bits)
    levels = torch.randint(-32768, 32768, (weights, 1 << bits), generator=generator).to(torch.int16)
    x = torch.randint(-32768, 32768, (2, steps, weights), generator=generator).to(torch.int16)
    x[1] //= 16384  # few values, with ties
    levels[:, ::3] //= 16384
    wanted = reference.search(x, levels, fresh, doublings, window, passes=2)
    assert torch.equal(viterbi.search(x, levels, fresh, doublings, window, passes=2), wanted)
    assert viterbi.search(x[:0], levels, fresh, doublings, window, 1).shape == (0, steps)


def test_viterbi_is_the_encoder_of_the_triton_backend(monkeypatch):
    calls = []

    def search(*arguments):
        calls.append(arguments[2:])
        return reference.search(*arguments)

    monkeypatch.setattr(viterbi, "search", search)
    book, x = Trellis("hyb", 4, "rows", (512, 2)), torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    with backend.overridden(devices={"cpu": "reference"}):
        expected = book.encode(x)[0]
        assert not calls
    assert torch.equal(book.encode(x)[0], expected)
    assert [call[0] for call in calls] == [(8, 8)]
