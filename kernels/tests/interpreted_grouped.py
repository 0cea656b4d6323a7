"""The kernels of experts against float64, in Triton's interpreter. Run by test_gpu_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from interpreted import kernels_are_asked_for  # noqa: F401 - a fixture for every test

from quip_kernels import e8p
from quip_kernels.gpu import grouped as kernels
from quip_kernels.gpu import small_batch, transform
from tests import truth
from tests.no_sync import forbidden_synchronisation
from transformers_quip import incoherence
from transformers_quip.ops.triton.grouped import grouped_linear

# The first expert, the last and one between have no tokens, and the last tokens have no expert.
ENDS = [0, 3, 3, 4, 21, 40, 40]
EXPERTS, TOKENS = len(ENDS), 43


def relative(value, expected):
    return float((value.double() - expected).norm() / expected.norm())


def stacked(rows, columns, codebook="e8p", dtype=torch.float32, experts=EXPERTS):
    parts = [truth.random_linear(rows, columns, seed, dtype, codebook) for seed in range(experts)]
    names = [name for name in parts[0] if name.startswith("codes")]
    weight = [torch.stack([part[name] for part in parts]) for name in names]
    return weight, *(torch.stack([part[name] for part in parts]) for name in ("su", "sv"))


def decoded(weight, columns, codebook="e8p"):
    stored = [dict(zip(truth.STORED, codes, strict=False)) for codes in zip(*weight, strict=True)]
    return [truth.decode(**one, columns=columns, codebook=codebook) for one in stored]


def by_expert(x, ends, weights):
    y, begin = torch.zeros(len(x), weights[0].shape[0], dtype=torch.float64), 0
    for weight, end in zip(weights, ends, strict=True):
        y[begin:end] = x[begin:end].double() @ weight.T
        begin = end
    return y


def vectors(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_tables_of_stored_codes_name_every_nibble():
    """Every code: w = (2·nibble − 15) / 4, nibble 2j + h is weight 4h + j."""
    table = e8p.table_of_stored(torch.device("cpu")).long() & 0xFFFFFFFF
    codes = torch.arange(65536)
    words = table[codes >> 8] ^ table[256 + (codes & 0xFF)]
    nibbles = torch.stack([(words >> (4 * (2 * (w % 4) + w // 4))) & 0xF for w in range(8)], 1)
    assert torch.equal((2 * nibbles - 15) / 4, truth.decode(codes.to(torch.int16).view(-1, 1), 8).float())


@pytest.mark.parametrize(("columns", "terms", "gather"), [(8, 1, True), (136, 2, False), (1000, 2, True)])
def test_each_vector_meets_its_own_expert(columns, terms, gather):
    weight, _, _ = stacked(70, columns)
    x = vectors(TOKENS, columns) * 1e5  # beyond float16
    width = -(-columns // kernels.ALIGNMENT) * kernels.ALIGNMENT
    y = kernels.grouped(small_batch.halves(x, terms, width=width), torch.tensor(ENDS), *weight, gather=gather)
    assert not y[:, ENDS[-1] :].any()
    wanted = by_expert(x, ENDS, decoded(weight, columns))
    for i in range(TOKENS - 3):  # each one: errors of large vectors may not hide those of small ones
        assert relative(y.sum(0)[i], wanted[i]) < (1e-3 if terms == 1 else 2e-6)


@pytest.mark.parametrize("codebook", ["e8p-rvq3", "e8p-rvq4"])
def test_two_stages(codebook):
    weight, _, _ = stacked(20, 264, codebook)
    x, scale = vectors(TOKENS, 264), truth.RESIDUAL_SCALES[codebook]
    y = kernels.grouped(small_batch.halves(x, 2, width=384), torch.tensor(ENDS), *weight, scale)
    assert relative(y.sum(0), by_expert(x, ENDS, decoded(weight, 264, codebook))) < 1e-6


@pytest.mark.parametrize("ends", [[0, 0, 0], [5, 5, 5], [0, 0, 5], [1, 2, 3], [0, 80, 80], [80, 80, 200]])
def test_any_share_of_the_vectors(ends):
    weight, _, _ = stacked(5, 64, experts=3)
    tokens = max(ends[-1], 5)
    x = vectors(tokens, 64)
    y = kernels.grouped(small_batch.halves(x, 2, width=128), torch.tensor(ends, dtype=torch.int32), *weight).sum(0)
    torch.testing.assert_close(y.double(), by_expert(x, ends, decoded(weight, 64)), rtol=1e-5, atol=1e-4)


def test_values_that_are_not_finite_stay_with_their_vectors():
    weight, _, _ = stacked(5, 64, experts=2)
    x = vectors(4, 64)
    x[1], x[3] = float("nan"), float("inf")  # vector 3 has no expert
    y = kernels.grouped(small_batch.halves(x, 1, width=128), torch.tensor([2, 3]), *weight).sum(0)
    assert y.isnan().all(1).tolist() == [False, True, False, False]
    assert not y[3].any()


def test_long_rows_are_cut_into_parts(monkeypatch):
    monkeypatch.setattr(kernels, "processors", lambda device: 3)
    weight, _, _ = stacked(5, 4200, experts=2)
    x = vectors(2, 4200)
    y = kernels.grouped(small_batch.halves(x, 2, width=4224), torch.tensor([1, 2]), *weight)
    assert y.shape == (3, 2, 5)
    assert relative(y.sum(0), by_expert(x, [1, 2], decoded(weight, 4200))) < 1e-6


def test_tiles_suffice_for_every_choice_of_experts():
    for experts, tokens in [(1, 1), (3, 40), (64, 4), (8, 4096), (5, 100)]:
        block = kernels.block_vectors(tokens, experts)
        generator = torch.Generator().manual_seed(tokens)
        for counts in ([tokens] + [0] * (experts - 1), [1] * min(experts, tokens), None):
            if counts is None:
                counts = torch.randint(0, experts + 1, (tokens,), generator=generator).bincount().tolist()
            rest = tokens - sum(counts)
            needed = sum(-(-count // block) for count in [*counts, rest])
            assert needed <= kernels.most_tiles(tokens, experts, block)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"codes": torch.zeros(2, 3, 8, dtype=torch.int32)}, "codes of experts are int16"),
        ({"codes": torch.zeros(2, 24, dtype=torch.int16)}, r"must be contiguous and \[experts, m, c\], got \[2, 24\]"),
        ({"residual": torch.zeros(2, 3, 9, dtype=torch.uint8)}, r"\[experts, m, c\], got \[2, 3, 9\]"),
        ({"ends": torch.tensor([1, 1, 1])}, r"\[3\] ends do not fit 2 experts"),
        ({"ends": torch.tensor([1.0, 1.0])}, "ends must be contiguous integers"),
        ({"codes": torch.zeros(2, 3, 17, dtype=torch.int16)}, r"do not fit 17 codes a row: \[terms, vectors, 256\]"),
    ],
)
def test_arguments_that_do_not_fit(change, error):
    arguments = {"ends": torch.tensor([1, 1]), "codes": torch.zeros(2, 3, 8, dtype=torch.int16)} | change
    with pytest.raises((TypeError, ValueError), match=error):
        kernels.grouped(small_batch.halves(torch.ones(1, 64), 1, width=128), **arguments)


@pytest.mark.parametrize(("size", "transpose"), [(16, False), (96, True), (100, True)])
def test_a_transform_takes_another_vector_for_each_row(size, transpose):
    q = incoherence.get("hadamard", size, 3)
    plan = transform.make_plan(size, q.dense_factors, torch.device("cpu"))
    x, pre, post, which = vectors(5, size), vectors(3, size, 2), vectors(3, size, 3), torch.tensor([2, 0, 0, 1, 2])
    y = transform.transform(x, plan, transpose, torch.float32, pre=pre, post=post, which=which)
    wanted = (q.apply_transpose if transpose else q.apply)(x.double() * pre[which]) * post[which]
    assert relative(y, wanted) < 5e-7


@pytest.mark.parametrize(
    ("codebook", "dtype", "rows", "columns"),
    [
        ("e8p", torch.float16, 96, 100),
        ("e8p", torch.float32, 20, 64),
        ("e8p-rvq3", torch.bfloat16, 24, 100),
        ("e8p-rvq4", torch.float32, 257, 40),  # 257 is a transform without matrices
        ("e8p", torch.float64, 12, 24),  # without a kernel
        ("d4", torch.float32, 12, 24),
    ],
)
def test_the_op(codebook, dtype, rows, columns):
    weight, su, sv = stacked(rows, columns, codebook, dtype)
    x = (vectors(TOKENS, columns) / 16).to(dtype)
    q_in, q_out = (incoherence.get("hadamard", size, 0).matrix() for size in (columns, rows))
    inner = decoded(weight, columns, codebook)
    names = (codebook, "hadamard", "hadamard", 0)
    y = grouped_linear(x, torch.tensor(ENDS), weight, su, sv, *names)
    assert y.dtype == dtype
    assert not y[ENDS[-1] :].any()
    dense = [o.double()[:, None] * (q_out @ w @ q_in.T) * i.double() for w, i, o in zip(inner, su, sv, strict=True)]
    most = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative(y, by_expert(x, ENDS, dense)) < most


@pytest.mark.parametrize("codebook", ["e8p", "e8p-rvq3", "e8p-rvq4"])
def test_the_host_reads_nothing(codebook):
    weight, su, sv = stacked(24, 96, codebook)
    arguments = (vectors(TOKENS, 96), torch.tensor(ENDS), weight, su, sv, codebook, "hadamard", "hadamard", 0)
    grouped_linear(*arguments)  # makes the tables
    with forbidden_synchronisation():
        grouped_linear(*arguments)
