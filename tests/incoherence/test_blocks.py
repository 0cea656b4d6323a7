"""Transforms in blocks, and QuIP-for-all's own Hadamard matrices, against their definitions entry by entry."""

from __future__ import annotations

import importlib

import pytest
import torch

from transformers_quip import incoherence

quip_for_all = importlib.import_module("transformers_quip.incoherence.quip_for_all")


def test_blocks_of_128():
    sylvester = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)]).double() / 128**0.5
    expected = torch.block_diag(*[sylvester] * 3)
    torch.testing.assert_close(incoherence.get("hadamard-128", 384).matrix(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("block", "count"), [(2, 3), (12, 2), (24, 8), (36, 1), (100, 3), (256, 2), (10, 5)])
def test_blocks_of_any_size(block, count):
    name, size = f"hadamard-{block}", block * count
    whole = incoherence.get("hadamard", block, 5).matrix()
    found = incoherence.get(name, size, 5)
    torch.testing.assert_close(found.matrix(), torch.block_diag(*[whole] * count), rtol=0, atol=1e-12)
    assert incoherence.get(name, size, 5) is found
    assert incoherence.blocks_of(name, size) == incoherence.multiple_of(name) == block
    # a part of whole blocks has the same transform
    part = incoherence.get(name, block, 5).matrix()
    torch.testing.assert_close(found.matrix()[:block, :block], part, rtol=0, atol=1e-12)


def test_names_of_blocks():
    assert [incoherence.block_size(name) for name in ("hadamard-2", "hadamard-4096", "hadamard-262144")] == [
        2,
        4096,
        262144,
    ]
    for name in (
        "hadamard-1",
        "hadamard-0",
        "hadamard-012",
        "hadamard--8",
        "hadamard-8 ",
        "hadamard-999999",
        "hadamard-514",
        "hadamard-eighths",
        "hadamard/8",
        8,
        None,
    ):
        assert incoherence.block_size(name) is None
    assert [incoherence.block_count(name) for name in ("hadamard/2", "hadamard/1024", "hadamard-eighths")] == [2, 1024, 8]
    for name in ("hadamard/1", "hadamard/0", "hadamard/08", "hadamard/1025", "hadamard/8 ", "hadamard-8", 8, None):
        assert incoherence.block_count(name) is None
    assert incoherence.get("hadamard", 514).dense_factors is None  # 2 · 257: it cannot be used in blocks
    assert incoherence.get("hadamard-502", 502).dense_factors is not None  # 2 · 251
    assert incoherence.blocks_of("hadamard-eighths", 192) == 24
    assert incoherence.blocks_of("hadamard", 192) is None
    assert incoherence.multiple_of("kronecker") == 1
    with pytest.raises(ValueError, match="'hadamard-64' is the name of the Hadamard transform in blocks"):
        incoherence.register("hadamard-64", lambda size, seed: None)
    with pytest.raises(ValueError, match="'hadamard/3' is the name of the Hadamard transform in blocks"):
        incoherence.register("hadamard/3", lambda size, seed: None)
    with pytest.raises(ValueError, match="'hadamard-1' is not known"):
        incoherence.get("hadamard-1", 64)


def test_eighths_have_the_matrix_of_the_whole_size():
    block = incoherence.get("hadamard", 24).matrix()
    whole = incoherence.get("hadamard", 192).matrix()
    # the same 12x12 matrix in both: that of the whole size is 12 ⊗ Sylvester 16, of an eighth 12 ⊗ Sylvester 2
    assert torch.equal(torch.sign(block[::2, ::2]), torch.sign(whole[::16, ::16]))
    expected = torch.block_diag(*[block] * 8)
    for name in ("hadamard-eighths", "hadamard/8"):
        torch.testing.assert_close(incoherence.get(name, 192).matrix(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("count", "size"), [(2, 36), (3, 12), (6, 6), (7, 112)])
def test_a_number_of_blocks(count, size):
    block = incoherence.get("hadamard", size // count, 5).matrix()
    found = incoherence.get(f"hadamard/{count}", size, 5).matrix()
    torch.testing.assert_close(found, torch.block_diag(*[block] * count), rtol=0, atol=1e-12)
    assert incoherence.blocks_of(f"hadamard/{count}", size) == size // count
    assert incoherence.multiple_of(f"hadamard/{count}") == count


@pytest.mark.parametrize("count", [1, 2, 7, 112, 257, 1024])
def test_any_number_of_blocks(count):
    transform = incoherence.get("hadamard-128", 128 * count)
    assert transform.size == 128 * count
    x = torch.randn(2, 128 * count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = incoherence.get("hadamard", 128)
    torch.testing.assert_close(transform.apply(x), block.apply(x.view(2, count, 128)).flatten(1))
    torch.testing.assert_close(transform.apply_transpose(transform.apply(x)), x)


@pytest.mark.parametrize(
    ("name", "size"), [("hadamard-128", 192), ("hadamard-256", 384), ("hadamard/8", 12), ("hadamard-7", 12)]
)
def test_sizes_without_blocks(name, size):
    with pytest.raises(ValueError, match=f"size={size} is not a multiple"):
        incoherence.get(name, size)


def test_a_stored_transform_is_not_made():
    with pytest.raises(ValueError, match="'stored' is not known"):
        incoherence.get("stored", 64)


@pytest.mark.parametrize("order", quip_for_all.ORDERS)
def test_matrices_of_quip_for_all_are_hadamard(order):
    matrix = quip_for_all.matrix(order).long()
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order).long())


@pytest.mark.parametrize("order", [212, 228, 252])
def test_symmetric_form(order):
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    matrix = quip_for_all.matrix(order)
    assert (matrix[0] == 1).all()
    assert (matrix[:, 0] == 1).all()
    for i, j in ((0, 0), (3, 5), (q - 1, 1), (17, 101), (q - 2, q - 3)):
        assert matrix[1 + i, 1 + j] == (1 if (i + j) % q in squares else -1)


@pytest.mark.parametrize("order", [188, 236])
def test_goethals_seidel_form(order):
    t = order // 4
    matrix = quip_for_all.matrix(order)
    # A is the first block; the others are read off the first block row, which is [A, B R, C R, D R]
    blocks = [matrix[:t, k * t : (k + 1) * t] for k in range(4)]
    a, b, c, d = (blocks[0], *(block.flip(1) for block in blocks[1:]))
    for block in (a, b, c, d):
        assert all(torch.equal(block[i], block[0].roll(i)) for i in range(t))
    second = torch.cat([-b.flip(1), a, -d.T.flip(1), c.T.flip(1)], 1)
    third = torch.cat([-c.flip(1), d.T.flip(1), a, -b.T.flip(1)], 1)
    assert torch.equal(matrix[t : 2 * t], second)
    assert torch.equal(matrix[2 * t : 3 * t], third)


def test_other_sizes_of_quip_for_all_are_native():
    for size in (24, 40, 688):
        native = incoherence.get("hadamard", size).matrix()
        assert torch.equal(incoherence.get("hadamard-quip-for-all", size).matrix(), native)
    paley = incoherence.get("hadamard-quip-for-all", 248).matrix()
    assert not torch.equal(paley, incoherence.get("hadamard", 248).matrix())
    assert torch.equal(torch.sign(paley[::2, ::2]), quip_for_all.matrix(124).double())
