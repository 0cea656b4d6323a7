"""The Triton kernels of trellis codes as interpreted.py tests those of E8P. Run by test_gpu_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from interpreted import arguments, kernels_are_asked_for, relative, vectors  # noqa: F401 - a fixture for every test

from quip_kernels.gpu import trellis
from transformers_quip import incoherence
from transformers_quip.codebooks.trellis import Trellis
from transformers_quip.ops.triton import run as ops

TRELLIS = [
    ("1mad", 2, "rows", None),
    ("2mad", 1, "qtip", None),
    ("3inst", 3, "exl3", None),
    ("mcg", 4, "rows", None),
    ("mul1", 2, "exl3", None),
    ("mul1", 8, "qtip", None),
    ("hyb", 2, "qtip", (512, 2)),
    ("hyb", 5, "exl3", (256, 1)),
    ("quantlut", 3, "rows", (1024, 2)),
    ("lut", 2, "rows", (65536, 1)),
    ("mul1", 1.5, "exl3", None),
    ("mul1", 2.5, "exl3", None),
    ("mul1", 3.5, "exl3", None),
]


def some_trellis(code, k, order, shape, m, n, table_dtype=torch.float16):
    generator = torch.Generator().manual_seed(int(k))
    book = Trellis(code, k, order, shape)
    codes = torch.randint(-(2**15), 2**15, book.tensors(m, n)["codes"].shape, generator=generator).to(torch.int16)
    table = None if shape is None else torch.randn(shape, generator=generator).to(table_dtype)
    return book, codes, table


def stored(codes, table):
    return {"codes": codes} if table is None else {"codes": codes, "table": table}


@pytest.mark.parametrize("case", TRELLIS)
def test_trellis_dequantize_is_exact(case):
    book, codes, table = some_trellis(*case, 16, 160)
    for dtype in (torch.float32, torch.float16):
        weight = trellis.dequantize(codes, 160, dtype, *case[:3], table)
        assert torch.equal(weight, book.decode(stored(codes, table), 160, dtype))


@pytest.mark.parametrize("code", trellis.CODES[:5])
def test_trellis_dequantize_of_many_states(code):
    """With 8 bits, the first state of a tile is its first word."""
    states = torch.arange(0, 65536, 2039)[:32]
    codes = states.to(torch.int16)[:, None].expand(-1, 128).reshape(16, -1)
    weight = trellis.dequantize(codes, 16 * len(states), torch.float32, code, 8, "rows")
    assert torch.equal(weight[0, ::16], Trellis(code, 8, "rows").values(None, torch.device("cpu"))[states])


@pytest.mark.parametrize(("case", "batch"), [*((case, 1 + i % 3) for i, case in enumerate(TRELLIS)), (TRELLIS[4], 5)])
def test_trellis_matvec(case, batch):
    book, codes, table = some_trellis(*case, 16, 320, torch.bfloat16 if case[1] == 3 else torch.float32)
    x = vectors(batch, 320)
    y = trellis.matvec(x, codes, *case[:3], table)
    assert y.shape[1:] == (batch, 16)
    assert relative(y.sum(0), x.double() @ book.decode(stored(codes, table), 320, torch.float64).T) < 1e-6


def test_trellis_matvec_in_parts():
    book, codes, _ = some_trellis("mul1", 2, "exl3", None, 16, 800)
    y = trellis.matvec(vectors(2, 800), codes, "mul1", 2, "exl3")
    assert y.shape[0] > 1
    assert relative(y.sum(0), vectors(2, 800).double() @ book.decode({"codes": codes}, 800, torch.float64).T) < 1e-6


@pytest.mark.parametrize(
    ("case", "batch", "dtype"),
    [
        (TRELLIS[4], 1, torch.float16),
        (TRELLIS[4], 9, torch.float32),
        (TRELLIS[6], 9, torch.bfloat16),
        (TRELLIS[6], 3, torch.float32),
        (TRELLIS[-2], 1, torch.float16),
        (TRELLIS[-2], 9, torch.float32),
    ],
)
def test_trellis_linear(case, batch, dtype):
    m, n = 32, 96
    book, codes, table = some_trellis(*case, m, n)
    args = arguments(m, n, batch, dtype)
    tensors = stored(codes, table)
    args[1], args[5] = list(tensors.values()), book.name
    y = ops.linear(*args)
    x, _, su, sv, bias, *_ = args
    q_in, q_out = (incoherence.get("hadamard", size, 0).matrix() for size in (n, m))
    weight = sv.double()[:, None] * (q_out @ book.decode(tensors, n, torch.float64) @ q_in.T) * su.double()
    error = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative(y, x.double() @ weight.T + bias.double()) < error
    found, wanted = ops.decode(args[1], book.name, m, n, dtype), book.decode(tensors, n, dtype)
    # the interpreter cuts bfloat16 off where a device rounds it; test_gpu.py asks for equality there
    torch.testing.assert_close(found, wanted, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


def test_trellis_that_does_not_fit_is_refused():
    _, codes, table = some_trellis("hyb", 2, "qtip", (512, 2), 16, 32)
    layout = ("hyb", 2, "qtip")
    with pytest.raises(ValueError, match="needs a table"):
        trellis.dequantize(codes, 32, torch.float32, *layout)
    with pytest.raises(ValueError, match=r"int16 \[m, 8\]"):
        trellis.dequantize(codes, 64, torch.float32, *layout, table)
    with pytest.raises(ValueError, match="1 to 8 vectors"):
        trellis.matvec(vectors(9, 32), codes, *layout, table)
    with pytest.raises(ValueError, match="unknown trellis"):
        trellis.matvec(vectors(1, 32), codes, "hyb", 9, "qtip", table)
    with pytest.raises(ValueError, match="unknown trellis"):
        trellis.matvec(vectors(1, 32), codes, "mcg", 2.5, "exl3")
