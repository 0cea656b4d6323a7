"""Linear layers of trellis codes on the CPU: the fused layer, its products alone, and the decoded weight.

The library (`cpu.is_available`) decodes the weights to float32 during the product and does not store them; or it
multiplies weights that were expanded to bytes (`cpu_records`). Codes and tables are described in
`transformers_quip.codebooks.trellis`.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from .cpu_layers import description
from .cpu_library import LayerArguments, TrellisArguments, default_level, loaded
from .cpu_linear import DTYPES, Transform, contiguous, rows_of, type_of, vector_type
from .cpu_records import TILE, columns_of_records, is_records, shape_of_records

CODES = ("1mad", "2mad", "3inst", "mcg", "mul1", "hyb", "quantlut", "lut")  # in the order of the C source's numbers
ORDERS = ("rows", "qtip", "exl3")
TABULATED = CODES[5:]
_STORED, _RECORDS, _BYTES = range(3)  # forms of a weight, as the C source numbers them
BITS, HALF_BITS = (1, 2, 3, 4, 5, 6, 7, 8), (1.5, 2.5, 3.5)
# codes, su, sv, bias, table
TrellisTensors = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Layout(NamedTuple):
    """The format of the codes of a weight: one of `CODES`, bits per weight, and one of `ORDERS`.

    Bits are 1 to 8, and for code mul1 also 1.5, 2.5 and 3.5.
    """

    code: str
    k: float
    order: str

    @property
    def pair_bits(self) -> int:
        """Bits of two weights."""
        return int(2 * self.k)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    su: torch.Tensor | None,
    sv: torch.Tensor | None,
    bias: torch.Tensor | None,
    transform_in: Transform | None,
    transform_out: Transform | None,
    layout: Layout,
    table: torch.Tensor | None = None,
    level: int | None = None,
    exact: bool = True,
) -> torch.Tensor:
    """y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) + bias in float32 arithmetic; a part that is None is left out.

    The result depends neither on threads nor on the other vectors.

    Args:
        x: float32, bfloat16 or float16 [..., n], n a multiple of 16.
        codes: int16 [m, n/16·K], m a multiple of 16; or the records that they are expanded to.
        su: [n]; sv, bias: [m]; each float32, bfloat16 or float16.
        transform_in, transform_out: of sizes n and m.
        layout: the format of the codes.
        table: float32, bfloat16 or float16 [2^Q, V] for a code of `TABULATED`.
        level: instruction set, an index of `cpu_library.LEVELS`; None: `default_level`.
        exact: of records, multiply the codes, as ever; False: the bytes, by activations of 16 bits.

    Returns:
        [..., m] in the dtype of x. A vector with an entry that is not finite does not give finite numbers.

    Raises:
        ValueError: a tensor is not as described.
    """
    n = x.shape[-1]
    vectors = x if x.is_contiguous() else rows_of(x, n)
    tensors = (contiguous(codes), contiguous(su), contiguous(sv), contiguous(bias), contiguous(table))
    layer, address = layer_of(n, tensors, transform_in, transform_out, layout, exact)
    m = layer.layer.m
    kind = type_of(x, "x")
    y = x.new_empty(*x.shape[:-1], m)
    stride = n if vectors is x else vectors.stride(0)
    level = default_level() if level is None else level
    _check(
        loaded().quip_trellis_linear(
            address, vectors.data_ptr(), y.data_ptr(), x.numel() // n, stride, kind, kind, level, torch.get_num_threads()
        ),
        layout,
    )
    del layer, tensors  # kept alive until here, even if another thread drops them from the cache
    return y


def products(
    x: torch.Tensor,
    codes: torch.Tensor,
    layout: Layout,
    table: torch.Tensor | None = None,
    level: int | None = None,
    exact: bool = True,
) -> torch.Tensor:
    """Ŵ x for every vector: [`linear`] without transforms, su, sv and bias."""
    return linear(x, codes, None, None, None, None, None, layout, table, level, exact)


def decode(
    codes: torch.Tensor,
    columns: int,
    dtype: torch.dtype,
    layout: Layout,
    table: torch.Tensor | None = None,
    level: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight Ŵ [m, columns] of trellis codes or records: values of float32, rounded to float32, bfloat16 or float16.

    Args:
        codes, layout, table, level: see [`linear`].
        columns: n.
        dtype: of the result.
        out: the tensor to write to; None: a new one.

    Raises:
        ValueError: a tensor or the dtype is not as described.
    """
    if dtype not in DTYPES:
        raise ValueError(f"weights are decoded to float32, bfloat16 or float16, not {dtype}")
    codes, table = contiguous(codes), contiguous(table)
    arguments = _arguments((codes, None, None, None, table), columns, None, None, layout)
    rows = arguments.layer.m
    weight = torch.empty(rows, columns, dtype=dtype) if out is None else out
    if weight.shape != (rows, columns) or weight.dtype != dtype or not weight.is_contiguous():
        raise ValueError(f"out must be a contiguous {dtype} {[rows, columns]}, got {list(weight.shape)}")
    _check(
        loaded().quip_trellis_decode(
            ctypes.byref(arguments),
            weight.data_ptr(),
            DTYPES[dtype],
            default_level() if level is None else level,
            torch.get_num_threads(),
        ),
        layout,
    )
    return weight


def expand(
    codes: torch.Tensor, layout: Layout, table: torch.Tensor | None = None, level: int | None = None
) -> torch.Tensor:
    """The records (`cpu_records`) of codes int16 [m, n/16·K].

    Args:
        layout, table, level: see [`linear`].

    Raises:
        ValueError: a tensor is not as described there.
    """
    codes, table, n = contiguous(codes), contiguous(table), columns_of(codes, layout)
    arguments = _arguments((codes, None, None, None, table), n, None, None, layout)
    records = torch.empty(shape_of_records(codes.shape[0], n, layout.pair_bits), dtype=torch.int8)
    level = default_level() if level is None else level
    _check(
        loaded().quip_trellis_expand(ctypes.byref(arguments), records.data_ptr(), level, torch.get_num_threads()), layout
    )
    return records


def columns_of(codes: torch.Tensor, layout: Layout) -> int:
    """Columns of the weight of stored codes."""
    return 2 * TILE * codes.shape[-1] // layout.pair_bits


def layer_of(
    n: int,
    tensors: TrellisTensors,
    transform_in: Transform | None,
    transform_out: Transform | None,
    layout: Layout,
    exact: bool = True,
) -> tuple[TrellisArguments, int]:
    """The layer's description for the library and its address (`cpu_layers.description`).

    Args:
        tensors: codes or records, su, sv, bias, table, all contiguous.
        exact: see [`linear`].
    """
    return description(_arguments, tensors, n, transform_in, transform_out, layout, exact)


def _arguments(
    tensors: TrellisTensors,
    n: int,
    transform_in: Transform | None,
    transform_out: Transform | None,
    layout: Layout,
    exact: bool = True,
) -> TrellisArguments:
    """See [`layer_of`]. Raises `ValueError` for a tensor that is not as [`linear`] describes it."""
    codes, su, sv, bias, table = tensors
    code, k, order = layout
    if code not in CODES or order not in ORDERS or k not in BITS + HALF_BITS * (code == "mul1"):
        raise ValueError(
            f"the library has no trellis {layout}: codes {', '.join(CODES)}, 1 to 8 bits (mul1 also 1.5, 2.5 and 3.5), "
            f"{', '.join(ORDERS)}"
        )
    form, m = _form(codes, n, layout, exact)
    if (table is not None) != (code in TABULATED):
        raise ValueError(f"code {code} {'needs a' if table is None else 'has no'} table")
    bits, step, kind = 0, 1, 0
    if table is not None:
        bits, most = table.shape[0].bit_length() - 1, 15 if code == "hyb" else 16
        if (
            table.dim() != 2
            or table.shape[1] not in (1, 2)
            or table.shape[0] != 1 << bits
            or not (16 if code == "lut" else 1) <= bits <= most
            or table.dtype not in DTYPES
            or not table.is_cpu
        ):
            raise ValueError(
                f"the table of code {code} must be float32, bfloat16 or float16 [2^Q, 1 or 2] on the CPU, got "
                f"{table.dtype} {list(table.shape)} on {table.device}"
            )
        step, kind = table.shape[1], DTYPES[table.dtype]
    for transform, size in ((transform_in, n), (transform_out, m)):
        if transform is not None and transform.size != size:
            raise ValueError(f"a transform of size {transform.size} was given for {size} features")
    layer = LayerArguments(
        codes.data_ptr(),
        None,
        *(None if v is None else v.data_ptr() for v in (su, sv, bias)),
        *(None if q is None else q.address for q in (transform_in, transform_out)),
        n,
        m,
        1.0,
        *(vector_type(v, size, name) for v, size, name in ((su, n, "su"), (sv, m, "sv"), (bias, m, "bias"))),
    )
    return TrellisArguments(
        layer,
        None if table is None else table.data_ptr(),
        CODES.index(code),
        layout.pair_bits,
        ORDERS.index(order),
        step,
        bits,
        kind,
        form,
    )


def _form(codes: torch.Tensor, n: int, layout: Layout, exact: bool) -> tuple[int, int]:
    """The form of a weight of n columns, and its rows. Raises `ValueError` if it is neither codes nor records."""
    if is_records(codes):
        if columns_of_records(codes, layout.pair_bits) != n:
            raise ValueError(f"the records are not of {n} columns with {layout.k} bits: {list(codes.shape)}")
        return _RECORDS if exact else _BYTES, len(codes) * TILE
    if codes.dtype != torch.int16 or codes.dim() != 2 or not codes.is_cpu or n % TILE or codes.shape[0] % TILE or n < TILE:
        raise ValueError(
            f"codes of {n} columns must be int16 on the CPU, rows and columns multiples of {TILE}, got {codes.dtype} "
            f"{list(codes.shape)} on {codes.device}"
        )
    if 2 * codes.shape[1] != n // TILE * layout.pair_bits:
        words = f"{n // TILE * layout.k:g}"
        raise ValueError(f"codes of {n} columns with {layout.k} bits must be [m, {words}], got {list(codes.shape)}")
    return _STORED, codes.shape[0]


def _check(failed: int, layout: Layout) -> None:
    if failed == -2:
        raise MemoryError("no memory for the products with trellis codes")
    if failed:
        raise ValueError(f"the library refuses {layout}")
