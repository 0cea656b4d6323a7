"""Layouts by the tensors alone, and weights of two stages."""

import pytest
import torch

from quip_kernels import e8, e8p, layout
from tests import truth


def test_the_form_follows_from_the_dtype_and_the_planes():
    codes = truth.random_linear(3, 40)["codes"]
    second = torch.arange(15, dtype=torch.uint8).view(3, 5)
    assert torch.equal(layout.pack(codes), e8p.pack(codes))
    assert torch.equal(layout.pack(second), e8.pack(second))
    assert torch.equal(layout.unpack(layout.pack(codes), 40), codes)
    assert torch.equal(layout.unpack(layout.pack(second), 40), second)


def test_stages():
    codes = truth.random_linear(3, 40)["codes"]
    planes, second = e8p.pack(codes), e8.pack(torch.zeros(3, 5, dtype=torch.uint8))
    (only,) = layout.stages(planes, 40)
    assert (only.signed, only.factor, len(only.table)) == (True, 1.0, 512)
    first, residual = layout.stages(planes, 40, second, 0.3)
    assert first.planes is planes
    assert (first.signed, first.factor) == (True, 1.0)
    assert residual.planes is second
    assert (residual.signed, residual.factor, len(residual.table)) == (False, 0.3, 256)


def test_what_is_no_layout_is_refused():
    planes = e8p.pack(truth.random_linear(3, 40)["codes"])
    with pytest.raises(TypeError, match=r"int16 \(E8P\) or uint8 \(E8\), got torch.int64"):
        layout.pack(torch.zeros(2, 2, dtype=torch.int64))
    for wrong in (torch.zeros(3, 3, 4, dtype=torch.int32), torch.zeros((), dtype=torch.int32), planes.long()):
        with pytest.raises(ValueError, match="the kernel layout of 40 columns"):
            layout.stages(wrong, 40)
    with pytest.raises(ValueError, match="stages of 3 and 2 rows do not belong to one weight"):
        layout.stages(planes, 40, planes[:, :2])
