"""Re-packed lattice codes, against the description of each layout, bit by bit."""

from __future__ import annotations

import pytest
import torch

from tests import foreign, truth
from transformers_quip.checkpoints.foreign import lattice_bits


def test_signs_of_quip_for_all():
    codes = torch.arange(65536).to(torch.int16).view(256, 256)
    native = lattice_bits.reorder_signs(codes)
    assert native.dtype == torch.int16
    assert torch.equal(
        truth.e8p_table()[native.long() & 0xFFFF].float(), truth.quip_for_all_points()[codes.long() & 0xFFFF]
    )


@pytest.mark.parametrize("shape", [(16, 64), (48, 128)])
def test_tiles_of_quip_sharp(shape):
    codes = truth.random_linear(*shape)["codes"]
    assert torch.equal(lattice_bits.unpack_tiles(foreign.pack_tiles(codes), *shape), codes)


@pytest.mark.parametrize(("rows", "columns", "words"), [(24, 64, 48), (16, 96, 48), (16, 64, 31)])
def test_tiles_that_are_none(rows, columns, words):
    with pytest.raises(ValueError, match=r"not the tiles of a weight"):
        lattice_bits.unpack_tiles(torch.zeros(words, dtype=torch.int64), rows, columns)


@pytest.mark.parametrize("order", [(0, 2, 4, 6, 1, 3, 5, 7), (7, 5, 3, 1, 6, 4, 2, 0)])
def test_nibbles(order):
    words = torch.randint(-(2**31), 2**31, (3, 5), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    values = lattice_bits.reorder_nibbles(words, order)
    assert values.dtype == torch.uint8
    assert values.shape == (3, 20)
    for row in range(3):
        for word in range(5):
            for nibble, weight in enumerate(order):
                wanted = (int(words[row, word]) >> (4 * nibble)) & 15
                at = 8 * word + weight
                assert (int(values[row, at // 2]) >> (4 * (at % 2))) & 15 == wanted
