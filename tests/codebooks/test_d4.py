"""D4 against its published table and a brute force over all points."""

import pytest
import torch

from tests import truth
from transformers_quip import codebooks
from transformers_quip.codebooks import d4

BOOK = codebooks.get("d4")


def test_table_is_the_published_one():
    assert torch.equal(d4.points().double(), truth.d4_table())  # which has its checksum
    assert len(d4.points().unique(dim=0)) == 256


@pytest.mark.parametrize("scale", [0.3, 1.2, 4.0])
def test_nearest_point_equals_brute_force(scale):
    x = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0)) * scale
    codes, values = BOOK.encode(x)
    assert codes.dtype == torch.uint8
    assert torch.equal(truth.d4_table()[codes.long()].float(), values)
    least = torch.cdist(x.double(), truth.d4_table()).min(1).values
    torch.testing.assert_close((x.double() - values.double()).norm(dim=1), least, rtol=1e-6, atol=1e-9)


def test_every_point_is_its_own_nearest():
    codes, values = BOOK.encode(d4.points())
    assert torch.equal(codes.long(), torch.arange(256))
    assert torch.equal(values, d4.points())


@pytest.mark.parametrize("columns", [20, 18])
def test_decode(columns):
    parts = truth.random_linear(30, columns, codebook="d4")
    assert BOOK.tensors(30, columns) == {"codes": (parts["codes"].shape, torch.uint8, 0)}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        weight = BOOK.decode(parts, columns, dtype)
        assert weight.dtype == dtype
        assert torch.equal(weight.double(), truth.decode(parts["codes"], columns, "d4"))


def test_round_panel_gives_codes_of_its_points():
    generator = torch.Generator().manual_seed(3)
    target, base = torch.randn(2, 9, 16, generator=generator)
    codes, points, delta = BOOK.round_panel(target, base, torch.randn(16, 16, generator=generator) * 0.2)
    assert torch.equal(BOOK.decode(BOOK.store(codes), 16), points)
    assert torch.equal(delta, base - points)
    # the last block has no feedback
    assert torch.equal(points[:, 12:], BOOK.encode(target[:, 12:])[1])


def test_shapes():
    with pytest.raises(ValueError, match="d4 encodes vectors of 4 numbers"):
        BOOK.encode(torch.zeros(3, 8))
    codes, values = BOOK.encode(torch.empty(0, 4))
    assert (codes.shape, values.shape) == ((0,), (0, 4))
