"""The table of routes on the CPU: which kernel computes which layer, and the thresholds on both sides."""

import pytest
import torch

from transformers_quip.ops.cpu.route import MOST_VECTORS, Case, Route, is_int8, planes, routes

FLOAT, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
MANY = 10_000
R = Route


def case(kernels="e8p", dtype=FLOAT, planes=3, m=64, n=96, stages=1, **others):
    return Case(kernels, stages, dtype, m, n, planes, **others)


def test_the_table():
    """Measured crossovers; a change of one is a decision to be measured again."""
    assert MOST_VECTORS == {
        "e8p": {3: 64, 2: 40, 1: 64},
        "bundled": {2: 20, 1: 24},
        "trellis": {3: 16, 2: 16, 1: 16},
        "records": {3: 16, 2: 16, 1: 64},
    }


@pytest.mark.parametrize(
    ("given", "few", "most", "many"),
    [
        # no AMX
        (case(), R.FUSED, 64, R.DECODED),
        (case(dtype=BF16, planes=2), R.FUSED, 40, R.DECODED),
        (case(dtype=BF16, planes=1), R.FUSED, 64, R.DECODED),
        (case(dtype=HALF, planes=1, stages=2), R.FUSED, 64, R.DECODED),
        (case(has_transforms=False), R.PRODUCTS, 64, R.DECODED),
        (case("trellis"), R.FUSED, 16, R.DECODED),
        (case("trellis", has_transforms=False), R.PRODUCTS, 16, R.DECODED),
        (case("trellis", is_expanded=True), R.FUSED, 16, R.DECODED),
        (case("trellis", planes=1, is_expanded=True), R.FUSED, 64, R.DECODED),
        # AMX: products of bfloat16, or of int8 for one stage
        (case(dtype=BF16, planes=2, has_amx=True), R.FUSED, 20, R.BUNDLED),
        (case(dtype=BF16, planes=1, has_amx=True), R.FUSED, 24, R.BUNDLED),
        (case(dtype=BF16, planes=1, stages=2, has_amx=True), R.FUSED, 24, R.BUNDLED),
        (case(dtype=HALF, planes=1, has_amx=True), R.FUSED, 24, R.BUNDLED),
        # what bundles would round, or do not take
        (case(dtype=HALF, planes=2, has_amx=True), R.FUSED, 40, R.DECODED),
        (case(dtype=HALF, planes=1, stages=2, has_amx=True), R.FUSED, 64, R.DECODED),
        (case(has_amx=True), R.FUSED, 64, R.DECODED),
        (case(planes=1, has_amx=True), R.FUSED, 64, R.DECODED),
        (case(dtype=BF16, planes=1, n=100, has_amx=True), R.FUSED, 64, R.DECODED),
        (case(dtype=BF16, planes=1, m=33, has_amx=True), R.FUSED, 64, R.DECODED),
        (case(dtype=BF16, planes=2, has_transforms=False, has_amx=True), R.PRODUCTS, 40, R.DECODED),
        (case("trellis", dtype=BF16, has_amx=True), R.FUSED, 16, R.DECODED),
        (case(n=1 << 18), R.FUSED, 64, R.DECODED),
    ],
)
def test_routes(given, few, most, many):
    assert routes(given) == (few, most, many)
    assert [routes(given).of(vectors) for vectors in (0, 1, most, most + 1, MANY)] == [R.REFERENCE, few, few, many, many]


@pytest.mark.parametrize(
    "given",
    [
        case(None),
        case(is_usable=False),
        case(tensors_fit=False),
        case(dtype=DOUBLE),
        case(n=(1 << 18) + 1),
        case("trellis", is_usable=False, has_amx=True),
        case("trellis", tensors_fit=False),
    ],
)
def test_the_reference_computes_what_the_library_does_not(given):
    assert {routes(given).of(vectors) for vectors in (0, 1, 64, MANY)} == {R.REFERENCE}


@pytest.mark.parametrize(
    ("dtype", "activations", "expected"),
    [
        (FLOAT, "auto", 3),
        (BF16, "auto", 1),
        (HALF, "auto", 1),
        (FLOAT, "exact", 3),
        (BF16, "exact", 2),
        (HALF, "exact", 2),
        (FLOAT, "int8", 1),
        (BF16, "int8", 1),
    ],
)
def test_planes(dtype, activations, expected):
    assert planes(dtype, activations) == expected


def test_int8_is_for_one_stage():
    assert is_int8(case(planes=1))
    assert not is_int8(case(planes=1, stages=2))
    assert not is_int8(case(planes=2))
