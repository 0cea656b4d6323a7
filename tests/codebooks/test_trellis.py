"""Trellis codes against the formats' descriptions, one weight at a time, and against the golden checkpoints."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open

from tests.truth import trellis_place, trellis_value
from transformers_quip import codebooks
from transformers_quip.checkpoints.foreign import trellis_bits
from transformers_quip.codebooks import trellis
from transformers_quip.codebooks.trellis import Trellis

NAMES = [
    "trellis:1mad:k2:rows",
    "trellis:2mad:k4:rows",
    "trellis:3inst:k3:rows",
    "trellis:3inst:k1:exl3",
    "trellis:mcg:k5:exl3",
    "trellis:mul1:k8:exl3",
    "trellis:mul1:k1.5:exl3",
    "trellis:mul1:k2.5:exl3",
    "trellis:mul1:k3.5:exl3",
    "trellis:hyb-q9v2:k2:qtip",
    "trellis:hyb-q9v2:k3:qtip",
    "trellis:hyb-q9v2:k4:qtip",
    "trellis:hyb-q8v1:k6:rows",
    "trellis:quantlut-q10v2:k8:rows",
    "trellis:quantlut-q16v1:k7:rows",
    "trellis:lut-q16v2:k2:rows",
]


def brute_force(book, streams, m, n, table):
    """Ŵ [m, n] of the rings of bits of its tiles (lists of 0 and 1, row-major)."""
    weight = torch.empty(m, n, dtype=torch.float64)
    v = 1 if table is None else table.shape[1]
    for tile, bits in enumerate(streams):
        down, right = divmod(tile, n // 16)
        for step in range(256 // v):
            begin = math.ceil(step * book.k * v)
            window = [bits[(begin + j) % len(bits)] for j in range(16)]
            state = int("".join(map(str, window)), 2)
            for i, w in enumerate(trellis_value(book.code, state, table)):
                row, column = trellis_place(book.order, step * v + i)
                weight[16 * down + row, 16 * right + column] = w
    return weight


def some_streams(tiles, k):
    return torch.randint(0, 2, (tiles, int(256 * k)), generator=torch.Generator().manual_seed(int(2 * k))).tolist()


def words(bits, size=16):
    """Numbers of `size` bits, the first bit the highest."""
    return [int("".join(map(str, bits[i : i + size])), 2) for i in range(0, len(bits), size)]


def as_int16(numbers):
    return torch.tensor(numbers, dtype=torch.int64).to(torch.int16)


def some_table(book):
    if book.table_shape is None:
        return None
    return torch.randn(book.table_shape, generator=torch.Generator().manual_seed(1)).half()


def tensors(codes, table=None):
    return {"codes": codes} if table is None else {"codes": codes, "table": table}


@pytest.mark.parametrize("name", NAMES)
def test_decode_is_the_description(name):
    book, m, n = Trellis.parse(name), 32, 64
    assert book.name == name
    streams, table = some_streams(8, book.k), some_table(book)
    codes = as_int16([words(bits) for bits in streams]).view(m, -1)
    assert codes.shape == book.tensors(m, n)["codes"].shape
    assert torch.equal(book.decode(tensors(codes, table), n).double(), brute_force(book, streams, m, n, table))


@pytest.mark.parametrize("code", trellis.COMPUTED)
def test_every_state_has_its_value(code):
    expected = torch.tensor([trellis_value(code, state, None)[0] for state in range(0, 65536, 7)])
    values = Trellis(code, 2, "rows").values(None, torch.device("cpu"))
    assert torch.equal(values[::7], expected)
    # the published spread of these codes on all states
    assert abs(values.std() - {"3inst": 1.2437, "mcg": 1.2441}.get(code, 1.0)) < 2e-3


def test_decode_in_parts_and_in_other_dtypes(monkeypatch):
    book = Trellis.parse("trellis:1mad:k3:exl3")
    codes = as_int16(torch.randint(0, 65536, (96, 4 * 3), generator=torch.Generator().manual_seed(0)).tolist())
    whole = book.decode(tensors(codes), 64)
    monkeypatch.setattr(trellis, "DECODED_AT_ONCE", 16 * 64 * 4)
    assert torch.equal(book.decode(tensors(codes), 64), whole)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(book.decode(tensors(codes), 64, dtype), whole.to(dtype))
    assert torch.equal(book.decode(tensors(codes[32:64]), 64), whole[32:64])
    assert book.decode(tensors(codes[:0]), 64).shape == (0, 64)


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_qtip_layout(k):
    book, m, n = Trellis("3inst", k, "rows"), 16, 32
    streams = some_streams(2, k)
    codes = trellis_bits.from_qtip(as_int16([words(bits) for bits in streams]), m, n)
    assert torch.equal(book.decode(tensors(codes), n).double(), brute_force(book, streams, m, n, None))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_qtip_kernel_layout(k):
    book, m, n = Trellis("hyb", k, "qtip", (512, 2)), 64, 32
    streams, table = some_streams(8, k), some_table(book)
    stored = []
    for down in range(m // 32):
        for right in range(n // 32):
            for group in range(32):
                for dn in range(2):
                    for dm in range(2):
                        bits = streams[(2 * down + dm) * (n // 16) + 2 * right + dn]
                        stored += reversed(words(bits, 8)[group * k : (group + 1) * k])
    packed = torch.tensor(stored, dtype=torch.uint8).view(torch.int16).view(8, 16 * k)
    codes = trellis_bits.from_qtip_kernel(packed, m, n)
    assert torch.equal(book.decode(tensors(codes, table), n).double(), brute_force(book, streams, m, n, table))


@pytest.mark.parametrize("k", [*range(1, 9), 1.5, 2.5, 3.5])
def test_exl3_layout(k):
    book, m, n = Trellis("mul1", k, "exl3"), 16, 64
    streams = some_streams(4, k)
    tiles = []
    for bits in streams:
        # windows end where native ones begin ⌊K⌋ bits later: the stored ring is the native one turned by 16 − ⌊K⌋ bits
        turned = bits[16 - int(k) :] + bits[: 16 - int(k)]
        tiles.append([half for word in words(turned, 32) for half in (word & 0xFFFF, word >> 16)])
    stored = as_int16(tiles).view(n // 16, m // 16, int(16 * k))
    codes = trellis_bits.from_exl3(stored)
    assert torch.equal(book.decode(tensors(codes), n).double(), brute_force(book, streams, m, n, None))


def test_layouts_lose_no_bit():
    """What is written into one bit shows in exactly one bit, another one for each."""
    k = 3
    stored = torch.zeros(4 * 256 * k, 4 * 16 * k, dtype=torch.int16)
    index = torch.arange(len(stored))
    stored[index, index // 16] = as_int16((1 << index % 16).tolist())
    kernel = torch.stack([trellis_bits.from_qtip_kernel(bit.view(4, -1), 32, 32).flatten() for bit in stored])
    exl3 = torch.stack([trellis_bits.from_exl3(bit.view(2, 2, -1)).flatten() for bit in stored])
    for moved in (kernel, exl3):
        assert (moved != 0).sum(1).eq(1).all()
        numbers = {(int(row.nonzero()[0]), int(row.sum()) & 0xFFFF) for row in moved}
        assert len(numbers) == len(stored)
        assert all(number & (number - 1) == 0 for _, number in numbers)


@pytest.mark.parametrize("k", [2, 1.5, 2.5, 3.5])
def test_exl3_windows_end_where_their_steps_end(k):
    """EXL3's own description, without the native one: state i ends after ⌊(i + 1)·K⌋ bits of the stored ring."""
    stored = as_int16(torch.randint(0, 65536, (2, 1, int(16 * k)), generator=torch.Generator().manual_seed(0)).tolist())
    weight = Trellis("mul1", k, "exl3").decode(tensors(trellis_bits.from_exl3(stored)), 32)
    for tile in range(2):
        halves = (stored[tile, 0].long() & 0xFFFF).view(-1, 2).flip(1).flatten().tolist()
        ring = "".join(f"{half:016b}" for half in halves)
        for i in range(256):
            end = math.floor((i + 1) * k)
            state = int("".join(ring[bit % len(ring)] for bit in range(end - 16, end)), 2)
            row, column = trellis_place("exl3", i)
            assert weight[row, 16 * tile + column] == trellis_value("mul1", state, None)[0]


def golden_cases(golden, family):
    for folder in sorted(golden.glob(f"{family}_*")):
        model, expected = (safe_open(folder / f"{part}.safetensors", "pt") for part in ("model", "expected"))
        config = json.loads((folder / "config.json").read_text())
        for key in expected.keys():  # noqa: SIM118 - safe_open is not a mapping
            kind, _, name = key.partition("/")
            if kind in ("hatW", "inner"):
                yield config, model, name, expected.get_tensor(key)


def test_golden_qtip(golden):
    found = 0
    for config, model, name, expected in golden_cases(golden, "qtip"):
        params, k = config["quip_params"], config["quip_params"]["K"]
        stored, (m, n) = model.get_tensor(f"{name}.trellis"), expected.shape
        table = model.get_tensor(f"{name}.tlut") if params["decode_mode"] == "quantlut_sym" else None
        if table is None:
            book, codes = Trellis(params["decode_mode"], k, "rows"), trellis_bits.from_qtip(stored, m, n)
        else:
            book, codes = Trellis("hyb", k, "qtip", (512, 2)), trellis_bits.from_qtip_kernel(stored, m, n)
        assert torch.equal(book.decode(tensors(codes, table), n), expected)
        found += 1
    assert found >= 6


@pytest.mark.parametrize("folder", ["golden", "golden_exl3_1_6"])
def test_golden_exl3(folder, request):
    found = 0
    for _, model, name, expected in golden_cases(request.getfixturevalue(folder), "exl3"):
        code = next((code for code in ("mcg", "mul1") if f"{name}.{code}" in model.keys()), "3inst")  # noqa: SIM118
        stored = model.get_tensor(f"{name}.trellis")
        codes = trellis_bits.from_exl3(stored)
        book = Trellis(code, stored.shape[2] / 16, "exl3")
        assert torch.equal(book.decode(tensors(codes), expected.shape[0], torch.float16).T, expected)
        found += 1
    assert found >= 6


@pytest.mark.parametrize(
    "name",
    [
        "trellis:mul1:k9:exl3",
        "trellis:mul1:k0:exl3",
        "trellis:mul1:k4.5:exl3",
        "trellis:mul1:k2.25:exl3",
        "trellis:mul1:k2.0:exl3",
        "trellis:mul1:k2.5:rows",
        "trellis:mcg:k2.5:exl3",
        "trellis:mul1:k2",
        "trellis:mul1:k2:columns",
        "trellis:4mad:k2:rows",
        "trellis:mul1-q9v2:k2:rows",
        "trellis:hyb:k2:qtip",
        "trellis:hyb-q16v2:k2:qtip",
        "trellis:hyb-q9v4:k2:qtip",
        "trellis:lut-q9v2:k2:rows",
        "trellis:quantlut-q99999999v1:k2:rows",
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="is not a codebook"):
        codebooks.get(name)


def test_names_are_found():
    assert codebooks.get("trellis:mul1:k3:exl3").bits == 3
    assert codebooks.get("trellis:hyb-q9v2:k2:qtip") is codebooks.get("trellis:hyb-q9v2:k2:qtip")


@pytest.mark.parametrize("name", NAMES)
def test_stored_tensors(name):
    book = Trellis.parse(name)
    grids = book.tensors(32, 64)
    assert grids["codes"] == ((32, int(4 * book.k)), torch.int16, 0)
    assert 8 * grids["codes"].nbytes(torch.float16) == book.bits * 32 * 64
    table = some_table(book)
    assert list(grids) == ["codes"] + ["table"] * (table is not None)
    codes = torch.zeros(32, int(4 * book.k), dtype=torch.int16)
    book.check(tensors(codes, table), 32, 64)
    if table is not None:
        assert (grids["table"].shape, grids["table"].dtype.is_floating_point) == (book.table_shape, True)
        assert grids["table"].nbytes(torch.float16) == table.nbytes
        with pytest.raises(ValueError, match=r"table of a \[32, 64\] layer .* must be floating point \["):
            book.check(tensors(codes, table[:, :0]), 32, 64)


@pytest.mark.parametrize("name", NAMES)
def test_selected_rows_come_with_their_tiles(name):
    book = codebooks.get(name)
    table, rows = some_table(book), torch.tensor([40, 3, 16, 40])
    codes = torch.randint(-(2**15), 2**15, (48, int(4 * book.k)), generator=torch.Generator().manual_seed(2)).to(
        torch.int16
    )
    whole = book.decode(tensors(codes, table), 64)
    selected = book.decode(book.select_rows(tensors(codes, table), rows), 64)
    assert torch.equal(selected, torch.cat([whole[row // 16 * 16 :][:16] for row in rows.tolist()]))


def test_what_does_not_fit_is_refused():
    book, hyb = Trellis("mul1", 2, "exl3"), Trellis("hyb", 2, "qtip", (512, 2))
    with pytest.raises(ValueError, match=r"tiles of 16x16.*\[16, 24\]"):
        book.tensors(16, 24)
    with pytest.raises(ValueError, match=r"multiples of 16 and 32, got \[16, 48\]"):
        Trellis("mul1", 2.5, "exl3").tensors(16, 48)
    with pytest.raises(ValueError, match=r"are int16 \[16, 4\], got torch.int16 \[16, 6\]"):
        book.decode(tensors(torch.zeros(16, 6, dtype=torch.int16)), 32)
    with pytest.raises(ValueError, match=r"has no table, got \[512, 2\]"):
        book.decode(tensors(torch.zeros(16, 4, dtype=torch.int16), torch.zeros(512, 2)), 32)
    with pytest.raises(ValueError, match=r"needs a floating point table \[512, 2\], got none"):
        hyb.decode(tensors(torch.zeros(16, 4, dtype=torch.int16)), 32)
    with pytest.raises(ValueError, match=r"encodes vectors of 256 numbers, got shape \(1, 16\)"):
        book.encode(torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"int16 with 2 tiles of 16·K words.*got torch.int16 \[3, 32\]"):
        trellis_bits.from_qtip(torch.zeros(3, 32, dtype=torch.int16), 16, 32)
    with pytest.raises(ValueError, match="multiples of 32"):
        trellis_bits.from_qtip_kernel(torch.zeros(2, 32, dtype=torch.int16), 16, 32)
    with pytest.raises(ValueError, match="2, 3 or 4 bits, got 5"):
        trellis_bits.from_qtip_kernel(torch.zeros(4, 80, dtype=torch.int16), 32, 32)
    with pytest.raises(ValueError, match=r"got torch.int32 \[1, 2, 32\]"):
        trellis_bits.from_exl3(torch.zeros(1, 2, 32, dtype=torch.int32))
    for shape in ((1, 2, 40), (2, 2, 72), (2, 2, 20), (2, 32)):
        with pytest.raises(ValueError, match=r"1.5, 2.5 or 3.5 and n a multiple of 32, got torch.int16 \["):
            trellis_bits.from_exl3(torch.zeros(*shape, dtype=torch.int16))
