"""Shares of quantized linears: what the processes compute together is the linear, by the dense float64 formula."""

from __future__ import annotations

import pytest
import torch

from tests import truth
from transformers_quip import incoherence
from transformers_quip.nn import shares
from transformers_quip.nn.shares import Scheme
from transformers_quip.ops.bundle import Form, described

M, N = 192, 128
CODEBOOKS = [
    *truth.CODEBOOKS,
    "trellis:3inst:k2:qtip",
    "trellis:mul1:k3:exl3",
    "trellis:mul1:k1.5:exl3",
    "trellis:hyb-q9v2:k2:qtip",
]
BLOCKS = [
    ("hadamard-16", "hadamard"),
    ("hadamard", "hadamard-16"),
    ("hadamard-eighths", "hadamard/8"),
    ("none", "none"),
]


def linear(codebook="e8p", sides=("hadamard", "hadamard")):
    parts = truth.random_linear(M, N, codebook=codebook)
    del parts["bias"]
    return Form(codebook, *sides, 0), parts


def dense(form, parts):
    sides = ((form.incoherence_in, N), (form.incoherence_out, M))
    return truth.weight_between(parts, form.codebook, *(incoherence.get(name, size).matrix() for name, size in sides))


def product(share, parts, x, sv):
    tensors = {name: share.cut(name, tensor) for name, tensor in truth.stored(parts).items()}
    assert {name: tuple(grid.shape) for name, grid in share.grids.items()} == {
        k: tuple(v.shape) for k, v in tensors.items()
    }
    weight = [tensor.contiguous() for tensor in tensors.values()]
    return torch.ops.quip.bundle(x, weight, [share.cut("su", parts["su"])], [sv], described([share.form]))


def rows_then_transform(found, parts, x):
    """ROWS: the products of all ranks, gathered, and the transform of the outputs."""
    scales = [shares.scales_of(share, parts["sv"]) for share in found]
    z = torch.cat([product(share, parts, x, own) for share, (own, _) in zip(found, scales, strict=True)], -1)
    return shares.outputs_of(z, found[0], scales[0][1])


def close(y, wanted):
    assert (y.double() - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_rows_of_any_codebook(codebook, count):
    form, parts = linear(codebook)
    x = torch.randn(5, N)
    wanted = x.double() @ dense(form, parts).T
    of_outputs = [shares.of_outputs(form, M, N, r, count, [(r * M // count, (r + 1) * M // count)]) for r in range(count)]
    assert {share.scheme for share in of_outputs} == {Scheme.ROWS}
    close(rows_then_transform(of_outputs, parts, x), wanted)
    assert shares.of_inputs(form, M, N, 1, count) == of_outputs[1]


@pytest.mark.parametrize("sides", BLOCKS)
@pytest.mark.parametrize(
    "codebook", ["e8p", "e8p-rvq4", "scalar3", "d4", "trellis:3inst:k2:qtip", "trellis:mul1:k1.5:exl3"]
)
def test_blocks(codebook, sides):
    form, parts = linear(codebook, sides)
    x = torch.randn(5, N)
    wanted = x.double() @ dense(form, parts).T
    found = [shares.of_outputs(form, M, N, r, 2, [(96 * r, 96 * (r + 1))]) for r in range(2)]
    if sides[1] == "hadamard":
        assert found[0].scheme is Scheme.ROWS
    else:
        assert {share.scheme for share in found} == {Scheme.BLOCKS}
        close(torch.cat([product(s, parts, x, s.cut("sv", parts["sv"])) for s in found], -1), wanted)
    found = [shares.of_inputs(form, M, N, r, 4) for r in range(4)]
    if sides[0] == "hadamard":
        assert found[0].scheme is Scheme.ROWS
    else:
        assert {share.scheme for share in found} == {Scheme.BLOCKS}
        assert [share.columns for share in found] == [(0, 32), (32, 64), (64, 96), (96, 128)]
        close(sum(product(s, parts, x[:, slice(*s.columns)], parts["sv"]) for s in found), wanted)


def test_a_share_in_blocks_of_eighths_is_named_by_its_size():
    form, _ = linear(sides=("hadamard", "hadamard-eighths"))
    share = shares.of_outputs(form, M, N, 0, 4, [(0, 48)])
    assert share.form == form._replace(incoherence_out="hadamard-24")
    assert share.whole == form


@pytest.mark.parametrize(
    ("count", "own", "scheme"),
    [
        (1, [(0, 192)], Scheme.WHOLE),
        (5, [(0, 38)], Scheme.WHOLE),  # 192 rows cannot be divided by 5
        (4, [(0, 48), (96, 144)], Scheme.ROWS),  # q, k and v that were quantized as one
        (4, [(0, 8)], Scheme.ROWS),  # half a block
        (4, [(32, 48)], Scheme.BLOCKS),  # one head of two, for two processes
    ],
)
def test_the_scheme(count, own, scheme):
    form, _ = linear(sides=("hadamard", "hadamard-16"))
    assert shares.of_outputs(form, M, N, 0, count, own).scheme is scheme


def test_tiles_are_not_cut():
    form, _ = linear("trellis:3inst:k2:qtip", ("hadamard-8", "hadamard-8"))
    assert shares.of_outputs(form, M, N, 0, 8, [(0, 24)]).scheme is Scheme.WHOLE  # 24 rows are not whole tiles
    assert shares.of_inputs(form, M, N, 0, 16).scheme is Scheme.WHOLE  # nor are 8 columns and 12 rows
    assert shares.of_inputs(form, M, N, 0, 2).scheme is Scheme.BLOCKS


def test_products_before_the_transform_are_as_large_as_outputs():
    form, parts = linear()
    parts["sv"] *= 1e-4
    x = 1000 * torch.randn(64, N)
    share = shares.of_outputs(form, M, N, 0, 2, [(0, 96)])
    own, _ = shares.scales_of(share, parts["sv"])
    y = x.double() @ dense(form, parts).T
    z = product(share, parts, x, own)
    assert 0.3 < z.square().mean().sqrt() / y.square().mean().sqrt() < 3
