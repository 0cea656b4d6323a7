"""QuipEmbedding: an embedding whose table is codes behind an incoherence transform of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import codebooks
from .. import ops as _ops  # noqa: F401 - registers torch.ops.quip
from ..incoherence import sides
from .stand_in import PackedTable
from .stored import StoredTensors


class QuipEmbedding(StoredTensors, nn.Embedding):
    """row i = sv_i · su ⊙ (Q ŵ_i), ŵ_i = codebook.decode(tensors of row i).

    The formula of [`QuipLinear`]'s dense weight with no transform on the output side: it would mix all rows, and a
    look-up needs only a few. So only these rows are decoded (with those that a codebook of tiles codes together with them),
    and sv scales each of them.

    It is an `nn.Embedding` so that tools which look for those (PEFT) find it, but it has no weight parameter: `weight` is
    a read-only stand-in with the shape, dtype and device of the dense table. All parameters are frozen; it has no
    buffers. A new module gives zeros until its parameters are loaded.

    Args:
        num_embeddings, embedding_dim: m and n, any positive sizes.
        padding_idx: as in `nn.Embedding`; it affects only training, and nothing is trained here.
        codebook, seed: see [`QuipLinear`].
        incoherence: name of the transform.
        padded: n', the columns of the codes and entries of su, for checkpoints whose rows have more columns than the table;
            the rest of a row is cut off. None: n.
        device, dtype: of the parameters, the dtype of su, sv and the rows.

    Parameters:
        codes, …: the tensors that `Codebook.tensors` names (`tensor_names`).
        su: [n], or [n'] of a padded table. sv: [m].
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        codebook: str = "e8p",
        incoherence: str = "hadamard",
        seed: int = 0,
        padded: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the dense table
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"num_embeddings={num_embeddings} and embedding_dim={embedding_dim} must be positive")
        if padded is not None and padded < embedding_dim:
            raise ValueError(f"padded={padded} is less than embedding_dim={embedding_dim}")
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.codebook, self.incoherence, self.seed = codebook, incoherence, seed
        self._add_empty(num_embeddings, padded or embedding_dim, device, dtype)
        # Transformers' weight initialisation leaves such a module alone.
        self._is_hf_initialized = True

    @classmethod
    def like(cls, embedding: nn.Embedding, config: Any, padded: int | None = None) -> QuipEmbedding:
        """An empty quantized embedding on the meta device, for a dense one.

        Args:
            embedding: its sizes, its padding and its table's dtype are used.
            config: has `codebook_spec`, `incoherence` (of a pair, the input side) and `seed`
                ([`QuipConfig`]).
            padded: see the class.
        """
        module = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            codebook=config.codebook_spec,
            incoherence=sides(config.incoherence)[0],
            seed=config.seed,
            padded=padded,
            device="meta",
            dtype=embedding.weight.dtype,
        )
        return module.train(embedding.training)

    @property
    def weight(self) -> PackedTable:  # type: ignore[override]
        """A stand-in with the shape [m, n], dtype and device of the dense table; see [`PackedWeight`]."""
        return PackedTable.like(self.su, self.num_embeddings, self.embedding_dim, self.su.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "the table of a quantized embedding cannot be set: it is stored as codes. Call model.dequantize() "
                "first, or replace the module by an nn.Embedding"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Quantized tables have no random initialisation; only code for dense embeddings calls this."""
        raise TypeError("a quantized embedding cannot be initialised at random: load or quantize a table")

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors of the table: the codebook's, su and sv."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    @property
    def true_bits(self) -> float:
        """Bits per weight, counting all stored tensors: packed_bytes · 8 / (m·n)."""
        return self.packed_bytes * 8 / (self.num_embeddings * self.embedding_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integers [...] below m → [..., n] in the dtype of su.

        Raises:
            TypeError: ids are not integers.
            IndexError: (on a CPU) one of them is not below m, or negative.
        """
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"expected token ids in int64 or int32, got {ids.dtype} {list(ids.shape)} in {self}")
        if ids.numel() == 0:
            return self.su.new_empty((*ids.shape, self.embedding_dim))
        flat = ids.reshape(-1)
        book = codebooks.get(self.codebook)
        rows = self._decode(book.select_rows(self.stored(), flat), len(flat) * book.rows_together, self.su.dtype)
        if book.rows_together > 1:
            places = torch.arange(len(flat), device=flat.device) * book.rows_together + flat % book.rows_together
            rows = rows.index_select(0, places)
        return self._rows(rows, self.sv.index_select(0, flat), self.su.dtype).reshape(*ids.shape, self.embedding_dim)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense table [m, n], in this dtype; None: the dtype of su."""
        dtype = dtype or self.su.dtype
        return self._rows(self._decode(self.stored(), self.num_embeddings, dtype), self.sv, dtype)

    def _decode(self, tensors: Mapping[str, torch.Tensor], rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Ŵ [rows, n'] of stored tensors, in float64 for that dtype, else in float32."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.ops.quip.decode(list(tensors.values()), self.codebook, rows, self.su.shape[0], compute)

    def _rows(self, decoded: torch.Tensor, sv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows [k, n] of the table from those of Ŵ [k, n'] and their sv [k]."""
        rows = torch.ops.quip.transform(decoded, self.incoherence, self.seed, False)
        rows = rows * self.su.to(rows.dtype) * sv.to(rows.dtype)[:, None]
        return rows[:, : self.embedding_dim].to(dtype).contiguous()

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, codebook={self.codebook}, bits={self.true_bits:.3f}"
