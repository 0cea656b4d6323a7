"""Blocks that fail under autocast are observed without it."""

import pytest
import torch
from torch import nn

from transformers_quip.calibration import BlockCall, BlockHessians, BlockInputs

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Adds the output of a linear, bfloat16 under autocast, to float32 numbers in place."""

    def __init__(self, broken=False):
        super().__init__()
        self.a, self.b, self.broken = nn.Linear(4, 4), nn.Linear(4, 4), broken

    def forward(self, x):
        if self.broken:
            raise RuntimeError("broken")
        return self.b(torch.zeros(3, 4).index_add_(0, torch.arange(3), self.a(x)))


@torch.no_grad()
def test_it_is_run_again_without_autocast():
    block, inputs = Block(), BlockInputs([X, X + 1], [BlockCall((), {})] * 2)
    outputs, restarts = {}, []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hessians = BlockHessians().collect(block, "ab", inputs, outputs.__setitem__, lambda: restarts.append(1))
        assert torch.is_autocast_enabled("cpu")
    assert inputs.precision.is_exact
    assert restarts == [1]
    x = torch.cat([X, X + 1]).double()
    torch.testing.assert_close(hessians.pop("a").double(), x.T @ x / 6, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[0], block(X))


def test_other_errors_are_raised():
    inputs = BlockInputs([X], [BlockCall((), {})])
    with pytest.raises(RuntimeError, match="broken"), torch.autocast("cpu", dtype=torch.bfloat16):
        BlockHessians().collect(Block(broken=True), "ab", inputs)
    with pytest.raises(RuntimeError, match="broken"):
        BlockHessians().collect(Block(broken=True), "ab", BlockInputs([X], [BlockCall((), {})]))
