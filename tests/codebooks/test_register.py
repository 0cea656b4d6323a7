"""`codebooks.register`: the worked example of its docstring, lazily made codebooks, and those that are refused."""

import inspect
import math
import textwrap

import pytest
import torch

from tests.models import tiny_model
from transformers_quip import QuipConfig, codebooks
from transformers_quip.codebooks import Codebook, Grid
from transformers_quip.quantize.layer import quantize_weight
from transformers_quip.quantize.plan import make_plan


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(codebooks._CODEBOOKS, "_entries", dict(codebooks._CODEBOOKS._entries))
    yield
    codebooks._get.cache_clear()


def test_the_worked_example():
    text = inspect.getdoc(codebooks.register)
    example = textwrap.dedent(text.partition("Example:")[2].partition("\n")[2])
    names = {"Codebook": Codebook, "QuipConfig": QuipConfig, "codebooks": codebooks, "torch": torch}
    exec(example, names)
    book = codebooks.get("signs")
    assert isinstance(book, names["Signs"])
    # E(x − s·sign(x))² of a unit Gaussian at its least, s = √(2/π)
    x = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0))
    codes, points = book.encode(x * book.gaussian_scale)
    assert torch.equal(points, x.sign())
    assert (x - points / book.gaussian_scale).square().mean().item() == pytest.approx(1 - 2 / math.pi, rel=5e-3)
    assert torch.equal(book.decode(book.store(codes[None, :3]), 24), points[:3].reshape(1, 24))
    config = QuipConfig(codebook="signs", dataset=None)
    assert (config.bits, QuipConfig.from_dict(config.to_dict()).codebook) == (1, "signs")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    result = quantize_weight(weight, config, "weight")
    assert result.tensors["codes"].shape == (64, 16)
    assert result.statistics["relative_error"] == pytest.approx(1 - 2 / math.pi, rel=0.03)
    plan = make_plan(tiny_model("llama"), config)
    entry = plan.entries[0]
    m, n = entry.shape
    assert entry.packed_bytes == m * n // 8 + 4 * (m + n)


class Halves(Codebook):
    """−1/2 and 1/2, one bit in a byte."""

    name, bits, block_size, code_dtype, gaussian_scale = "halves", 1.0, 1, torch.uint8, 0.63

    def encode(self, x):
        codes = (self.check_vectors(x) >= 0).to(torch.uint8)
        return codes.reshape(x.shape[:-1]), (codes - 0.5).reshape(x.shape)

    def decode(self, tensors, columns, dtype=torch.float32):
        return tensors["codes"][:, :columns].to(dtype) - 0.5


def test_a_function_makes_it_when_it_is_needed():
    made = []
    codebooks.register("halves", lambda: made.append(Halves()) or made[-1])
    assert "halves" in codebooks.names()
    assert not made
    assert codebooks.get("halves") is codebooks.get("halves") is made[0]
    with pytest.raises(ValueError, match="codebook 'halves' has no second stage"):
        codebooks.get("halves@0.5")
    assert len(made) == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="codebook 'e8p' is registered already"):
        codebooks.register("e8p", codebooks.get("e8p"))
    for name in ("", "my:book", "e8p@half", None):
        with pytest.raises(ValueError, match="a name is text without"):
            codebooks.register(name, Halves())
    with pytest.raises(ValueError, match="registered as 'other' is called 'halves'"):
        codebooks.register("other", Halves())
    codebooks.register("later", Halves)
    with pytest.raises(ValueError, match="registered as 'later' is called 'halves'"):
        codebooks.get("later")


@pytest.mark.parametrize("names", [("words",), ("codes", "su"), ("codes", "a.b"), ()])
def test_names_of_tensors_that_cannot_be_stored(names, monkeypatch):
    grids = {name: Grid((None,), torch.uint8) for name in names}
    monkeypatch.setattr(Halves, "tensors", lambda self, m, n: grids)
    with pytest.raises(ValueError, match="the first tensor must be called 'codes'"):
        codebooks.register("halves", Halves())
    assert "halves" not in codebooks.names()


def test_grids():
    grid = Grid((4, None), torch.uint8, expected=3)
    assert grid.empty_shape() == (4, 0)
    assert grid.nbytes(torch.float16) == 12
    assert [grid.fits(shape) for shape in ((4, 0), (4, 9), (5, 9), (4,), (4, 9, 1))] == [True, True, False, False, False]
    assert str(grid) == "torch.uint8 [4, any]"
    scales = Grid((4, 2), torch.float32)
    assert (scales.nbytes(torch.float16), scales.dtype_in(torch.bfloat16)) == (16, torch.bfloat16)
    assert str(scales) == "floating point [4, 2]"


@pytest.mark.parametrize("name", codebooks.names())
def test_every_codebook_describes_what_it_stores(name):
    book = codebooks.get(name)
    for m, n in ((1, 1), (5, 40), (16, 77)):
        blocks = math.ceil(n / book.block_size)
        codes, _ = book.encode(torch.randn(m, blocks, book.block_size, generator=torch.Generator().manual_seed(m)))
        stored = book.store(codes)
        book.check(stored, m, n)
        whole = book.decode(stored, n)
        assert whole.shape == (m, n)
        rows = torch.tensor([m - 1, 0])
        assert torch.equal(book.decode(book.select_rows(stored, rows), n), whole[rows])
        with pytest.raises(ValueError, match=rf"codes of a \[{m + 1}, {n}\] layer"):
            book.check(stored, m + 1, n)
