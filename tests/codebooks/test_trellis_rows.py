"""Rows of an embedding in a trellis code against the format's description, one weight at a time, and the golden files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.truth import trellis_value
from transformers_quip import codebooks
from transformers_quip.codebooks import trellis_rows
from transformers_quip.codebooks.trellis_rows import TrellisRows


def some_codes(rows, groups, k):
    """Random rings with scales; the first group has scale 0, the second one a scale that is no normal float16."""
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(-(2**15), 2**15, (rows, groups, 1 + 16 * k), generator=generator).to(torch.int16)
    scales = torch.randn(rows, groups, generator=generator).half()
    scales.view(-1)[:2] = torch.tensor([0, 3e-6])
    codes[..., 0] = scales.view(torch.int16)
    return codes.flatten(1), scales


def brute_force(codes, scales, k):
    rows, groups = scales.shape
    table = torch.empty(rows, groups, 256, dtype=torch.float64)
    for row in range(rows):
        for group in range(groups):
            words = codes.view(rows, groups, -1)[row, group, 1:].tolist()
            stream = "".join(f"{word & 0xFFFF:016b}"[::-1] for word in words)  # the lowest bit of each word first
            symbols = [int(stream[i * k : (i + 1) * k][::-1], 2) for i in range(256)]
            for i in range(256):
                state = sum((symbols[i - j // k] >> j % k & 1) << j for j in range(16))
                table[row, group, i] = trellis_value("mul1", state, None)[0] * float(scales[row, group])
    return table.flatten(1)


@pytest.mark.parametrize("k", range(1, 9))
def test_decode_is_the_description(k, monkeypatch):
    name = f"trellis-rows:mul1:k{k}"
    book, (codes, scales) = codebooks.get(name), some_codes(3, 2, k)
    assert (book.name, book.bits) == (name, codes.shape[1] * 16 / 512)
    assert book.tensors(3, 512)["codes"] == (tuple(codes.shape), torch.int16, 0)
    assert torch.equal(book.scales(codes), scales)
    expected = brute_force(codes, scales, k)
    assert torch.equal(book.decode({"codes": codes}, 512), expected.float())  # products of two float16
    monkeypatch.setattr(trellis_rows, "DECODED_AT_ONCE", 2 * 512)
    for dtype in (torch.float64, torch.float16):
        assert torch.equal(book.decode({"codes": codes}, 512, dtype), expected.to(dtype))
    rows = torch.tensor([2, 0, 2])
    assert torch.equal(book.decode(book.select_rows({"codes": codes}, rows), 512), expected.float()[rows])


def test_golden(golden_exl3_1_6):
    folder = golden_exl3_1_6 / "exl3_qemb"
    stored, expected = (load_file(folder / f"{part}.safetensors") for part in ("model", "expected"))
    codes, name = stored["model.embed_tokens.trellis"], "model.embed_tokens"
    book = TrellisRows(4)
    assert torch.equal(book.scales(codes), expected[f"embed_scale/{name}"])
    inner = expected[f"embed_inner/{name}"]
    groups = codes[: len(inner)].reshape(len(inner), -1, book.words).clone()
    groups[..., 0] = torch.tensor(1.0).half().view(torch.int16)
    assert torch.equal(book.decode({"codes": groups.flatten(1)}, 512, torch.float16), inner.flatten(1))


def test_what_does_not_fit_is_refused():
    for name in ("trellis-rows:mul1:k9", "trellis-rows:mul1:k2.5", "trellis-rows:mcg:k4", "trellis-rows:"):
        with pytest.raises(ValueError, match="is not a codebook"):
            codebooks.get(name)
    with pytest.raises(ValueError, match="1 to 8 bits, got 9"):
        TrellisRows(9)
    book = TrellisRows(2)
    with pytest.raises(ValueError, match="groups of 256 weights, and a row has 320"):
        book.tensors(3, 320)
    with pytest.raises(ValueError, match=r"are int16 \[3, 66\], got torch.int16 \[3, 33\]"):
        book.decode({"codes": torch.zeros(3, 33, dtype=torch.int16)}, 512)
    with pytest.raises(ValueError, match="nothing here quantizes with it"):
        book.encode(torch.zeros(1, 256))
    assert codebooks.get(book.name).is_read_only
