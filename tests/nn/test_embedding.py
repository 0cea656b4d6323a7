"""QuipEmbedding: the rows that it gives, and how it behaves as a module among modules."""

import copy

import pytest
import torch
from torch import nn

from tests import truth
from transformers_quip.nn import QuipEmbedding
from transformers_quip.nn.replace import to_dense


def embedding(m=40, n=64, codebook="e8p", dtype=torch.float32, **options):
    """A module with random values, and the float64 table that it stands for."""
    parts = truth.random_linear(m, n, seed=1, dtype=dtype, codebook=codebook)
    del parts["bias"]
    module = QuipEmbedding(m, n, codebook=codebook, dtype=dtype, **options)
    module.load_state_dict(parts)
    su, sv = parts.pop("su").double(), parts.pop("sv").double()
    decoded = truth.decode(**parts, columns=n, codebook=codebook)
    return module, sv[:, None] * (decoded @ truth.hadamard(n).T) * su


@pytest.mark.parametrize("codebook", truth.CODEBOOKS)
@pytest.mark.parametrize("n", [64, 20])
def test_rows_and_table(codebook, n):
    module, table = embedding(n=n, codebook=codebook)
    ids = torch.tensor([[3, 39, 0], [7, 3, 3]])
    for wanted in (ids, ids.int(), ids[0, 1], ids[:, :0]):
        rows = module(wanted)
        assert (rows.dtype, rows.shape) == (torch.float32, (*wanted.shape, n))
        torch.testing.assert_close(rows.double(), table[wanted.long()], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.dequantize(torch.float64), table, rtol=1e-12, atol=1e-12)
    dense = to_dense(module)
    assert type(dense) is nn.Embedding
    assert dense.weight.requires_grad
    torch.testing.assert_close(dense(ids), module(ids))


@pytest.mark.parametrize("codebook", ["trellis:mul1:k2:exl3", "trellis:mul1:k2.5:exl3", "trellis:hyb-q9v2:k2:qtip"])
def test_rows_that_are_coded_together(codebook):
    """A tile has 16 rows: a look-up decodes those of its row, and returns one."""
    module, table = embedding(m=48, codebook=codebook)
    ids = torch.tensor([[3, 47, 0, 16], [15, 3, 3, 32]])
    for wanted in (ids, ids.int(), ids[0, 1], ids[:, :0]):
        rows = module(wanted)
        assert rows.shape == (*wanted.shape, 64)
        torch.testing.assert_close(rows.double(), table[wanted.long()], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.dequantize(torch.float64), table, rtol=1e-12, atol=1e-12)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), module(ids), rtol=0, atol=0)


def test_a_residual_scale_and_half_precision():
    module, table = embedding(codebook="e8p-rvq4@-0.5", dtype=torch.bfloat16)
    rows = module(torch.arange(40))
    assert rows.dtype == torch.bfloat16
    # One rounding of the float32 result: half a unit in the last of bfloat16's 8 bits.
    assert ((rows.double() - table).abs() <= table.abs() * 2**-8 + 1e-6).all()


def test_it_is_a_frozen_embedding_without_weight_and_buffers():
    module, _ = embedding(padding_idx=2)
    assert isinstance(module, nn.Embedding)
    names = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert names == {"codes": (40, 8), "su": (64,), "sv": (40,)}
    assert not any(p.requires_grad for p in module.parameters())
    assert not list(module.buffers())
    assert not module(torch.tensor([1])).requires_grad
    assert (module.padding_idx, module.weight.shape, module.weight.dtype) == (2, (40, 64), torch.float32)
    stored = 40 * 8 * 2 + (40 + 64) * 4
    assert module.packed_bytes == stored
    assert module.true_bits == pytest.approx(8 * stored / (40 * 64))
    assert f"bits={module.true_bits:.3f}" in repr(module)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(torch.arange(40)), module(torch.arange(40)))
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_it_compiles_as_one_graph():
    module, table = embedding()
    ids = torch.tensor([[5, 6]])
    rows = torch.compile(module, fullgraph=True, backend="eager")(ids)
    torch.testing.assert_close(rows.double(), table[ids], rtol=1e-5, atol=1e-5)


def test_what_is_refused():
    module, _ = embedding()
    with pytest.raises(TypeError, match="expected token ids in int64 or int32, got torch.float32"):
        module(torch.zeros(2))
    for ids in (40, -1):
        with pytest.raises(IndexError):
            module(torch.tensor([ids]))
    with pytest.raises(ValueError, match="table of a quantized embedding is stored as codes"):
        module.weight + 1
    with pytest.raises(AttributeError, match="table of a quantized embedding cannot be set"):
        module.weight = nn.Parameter(torch.zeros(40, 64))
    with pytest.raises(TypeError, match="cannot be initialised at random"):
        module.reset_parameters()
    with pytest.raises(ValueError, match="num_embeddings=0 and embedding_dim=4 must be positive"):
        QuipEmbedding(0, 4)
