"""The table of routes on GPUs: which kernel computes which layer, and the thresholds on both sides."""

import pytest
import torch

from transformers_quip.ops.triton.route import ALL, MOST_VECTORS, Family, Route, digits, route

FLOAT, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
R = Route


def test_the_table():
    assert MOST_VECTORS == {"e8p": ((R.DIGITS, 4), (R.HALVES, 64)), "trellis": ((R.TRELLIS, 8),)}


@pytest.mark.parametrize(
    ("kernels", "dtype", "expected"),
    [
        ("e8p", HALF, {1: R.DIGITS, 4: R.DIGITS, 5: R.HALVES, 64: R.HALVES, 65: R.DENSE_HALF, 4096: R.DENSE_HALF}),
        ("e8p", BF16, {4: R.DIGITS, 5: R.HALVES, 65: R.DENSE_HALF}),
        ("e8p", FLOAT, {4: R.DIGITS, 64: R.HALVES, 65: R.DENSE_SINGLE}),
        ("trellis", HALF, {1: R.TRELLIS, 8: R.TRELLIS, 9: R.DENSE_HALF}),
        ("trellis", FLOAT, {8: R.TRELLIS, 9: R.DENSE_SINGLE, 4096: R.DENSE_SINGLE}),
        ("e8p", DOUBLE, {1: R.REFERENCE, 65: R.REFERENCE}),
        (None, HALF, {1: R.REFERENCE, 65: R.REFERENCE}),
        ("e8p", HALF, {0: R.REFERENCE}),
        ("trellis", BF16, {0: R.REFERENCE}),
    ],
)
def test_routes(kernels, dtype, expected):
    assert {vectors: route(kernels, dtype, vectors) for vectors in expected} == expected
    assert {route(kernels, dtype, vectors, trusted=()) for vectors in expected} == {R.REFERENCE}


@pytest.mark.parametrize(
    ("kernels", "vectors", "family"),
    [
        ("e8p", 1, Family.MATVEC),
        ("e8p", 5, Family.SMALL_BATCH),
        ("e8p", 65, Family.DEQUANTIZE),
        ("trellis", 1, Family.TRELLIS),
        ("trellis", 9, Family.TRELLIS),
    ],
)
def test_each_route_needs_its_family_and_no_other(kernels, vectors, family):
    for dtype in (HALF, BF16, FLOAT):
        assert route(kernels, dtype, vectors, ALL - {family}) is R.REFERENCE
        assert route(kernels, dtype, vectors, {family}) is route(kernels, dtype, vectors) is not R.REFERENCE


@pytest.mark.parametrize(
    ("dtype", "activations", "expected"),
    [(FLOAT, "auto", 3), (HALF, "auto", 2), (BF16, "exact", 2), (FLOAT, "int8", 1), (HALF, "int8", 1)],
)
def test_digits(dtype, activations, expected):
    assert digits(dtype, activations) == expected
