"""One quantized linear or embedding of a native model → its EXL3 tensors, which `exl3.py` describes.

exllamav3 rotates activations in float16. So the size of the weight belongs into suh, and svh is near ±1: a power of two is
moved from the one to the other. That changes no value, as long as suh does not become too small for float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ... import codebooks
from ...codebooks.trellis import Trellis
from ...codebooks.trellis_rows import GROUP, TrellisRows
from ...nn.embedding import QuipEmbedding
from ...nn.linear import QuipLinear
from . import trellis_bits

BLOCK = 128
# The 32 bits of the tensor without dimensions that names a code; 3inst has none.
MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
CODES = (*MULTIPLIERS, "3inst")
# suh is not made smaller than this on average: below 2^-14 float16 loses bits.
_SMALLEST = 2.0**-8
_REMEDY = (
    "Quantize the model with codebook='trellis:mul1:k2:exl3' (or other bits) and incoherence='hadamard-128', or leave this "
    "module dense"
)

Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class ExlModule:
    """One quantized module of a native model and its form in an EXL3 file.

    Attributes:
        name: in the file.
        module: the native one, on the meta device or not.
        factor: by which exllamav3 wants the weight multiplied (`exl3_folded`).
        bias_dtype: of the bias, if it has one.
    """

    name: str
    module: QuipLinear | QuipEmbedding
    factor: float = 1.0
    bias_dtype: torch.dtype | None = None

    @property
    def is_table(self) -> bool:
        """Whether it is an embedding."""
        return isinstance(self.module, QuipEmbedding)

    @property
    def book(self) -> Trellis | TrellisRows:
        """Its codebook."""
        book = codebooks.get(self.module.codebook)
        assert isinstance(book, Trellis | TrellisRows)  # `check` has seen it
        return book

    @property
    def padded(self) -> tuple[int, int]:
        """(m', n')."""
        return self.module.sv.shape[0], self.module.su.shape[0]

    def check(self) -> None:
        """Raise `ValueError`, with the name and the remedy, for a module that the format cannot hold."""
        module, book = self.module, codebooks.get(self.module.codebook)
        if isinstance(module, QuipEmbedding):
            if not isinstance(book, TrellisRows) or module.incoherence != "hadamard-256":
                raise ValueError(
                    f"{self.name}: EXL3 has no form for an embedding of codebook {book.name!r}: leave it dense"
                )
            return
        if not isinstance(book, Trellis) or book.order != "exl3" or book.code not in CODES:
            raise ValueError(
                f"{self.name}: codebook {book.name!r} has no form in EXL3, which has the trellis codes "
                f"{', '.join(CODES)} of order exl3. {_REMEDY}"
            )
        for side in (module.incoherence_in, module.incoherence_out):
            if side != "hadamard-128":
                raise ValueError(
                    f"{self.name}: the transform {side!r} has no form in EXL3, which has 'hadamard-128'. {_REMEDY}"
                )
        if getattr(module, "row_scales", None) is not None:
            raise ValueError(f"{self.name}: row_scales have no form in EXL3. {_REMEDY}")
        real = (module.out_features, module.in_features)
        wanted = tuple(-(-size // BLOCK) * BLOCK for size in real)
        if self.padded != wanted:
            raise ValueError(
                f"{self.name}: EXL3 pads {list(real)} to {list(wanted)}, and this linear has codes for {list(self.padded)}"
            )

    def expected(self) -> Expected:
        """Shape and dtype of its tensors by their full names."""
        rows, columns = self.padded
        if isinstance(self.book, TrellisRows):
            kinds: Expected = {
                "trellis": (self.book.codes_shape(rows, columns), torch.int16),
                "signs": ((columns // GROUP, GROUP), torch.float16),
            }
        else:
            kinds = {
                "trellis": ((columns // 16, rows // 16, int(16 * self.book.k)), torch.int16),
                "suh": ((columns,), torch.float16),
                "svh": ((rows,), torch.float16),
            }
            if self.book.code in MULTIPLIERS:
                kinds[self.book.code] = ((), torch.int32)
            if self.bias_dtype is not None:
                kinds["bias"] = ((rows,), self.bias_dtype)
        return {f"{self.name}.{kind}": value for kind, value in kinds.items()}

    @torch.no_grad()
    def make(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Its tensors by their full names.

        Args:
            read: gives a native tensor of the module by the last part of its name.

        Raises:
            ValueError: a number is too large for float16.
        """
        su, sv = read("su").double(), read("sv").double()
        rows, columns = self.padded
        if isinstance(self.book, TrellisRows):
            if not (sv == 1).all():
                raise ValueError(
                    f"{self.name}.sv: EXL3 has no scales of the rows of an embedding besides those of the codes"
                )
            kinds = {"trellis": read("codes"), "signs": self._half("su", su).view(-1, GROUP)}
        else:
            sv = sv * self.factor
            moved = _power_of_two(sv)
            if moved < 1:
                moved = max(moved, min(1.0, _SMALLEST / _power_of_two(su)))
            kinds = {
                "trellis": trellis_bits.to_exl3(read("codes"), columns),
                "suh": self._half("su", su * moved),
                "svh": self._half("sv", sv / moved),
            }
            if self.book.code in MULTIPLIERS:
                kinds[self.book.code] = torch.tensor(MULTIPLIERS[self.book.code], dtype=torch.int64).to(torch.int32)
            if self.bias_dtype is not None:
                bias = read("bias")
                kinds["bias"] = nn.functional.pad(bias, (0, rows - bias.shape[0]))
        return {f"{self.name}.{kind}": value for kind, value in kinds.items()}

    def _half(self, kind: str, value: torch.Tensor) -> torch.Tensor:
        half = value.to(torch.float16)
        if not half.isfinite().all():
            raise ValueError(
                f"{self.name}.{kind} has numbers up to {value.abs().max():.3g}: EXL3 has float16, which cannot hold them"
            )
        return half

    @property
    def bits(self) -> float:
        """Bits of the codes per weight."""
        return self.book.k

    def described(self) -> dict[str, object]:
        """Its record in the "tensor_storage" of quantization_config.json."""
        record = stored(self.expected())
        if isinstance(self.book, TrellisRows):
            return record
        record |= {"quant_format": "exl3", "bits_per_weight": self.book.k}
        code = self.book.code
        return record | ({f"{code}_multiplier": MULTIPLIERS[code]} if code in MULTIPLIERS else {})


def _power_of_two(vector: torch.Tensor) -> float:
    """The power of two next to the root mean square of a vector; 1 for zeros."""
    size = math.sqrt(float((vector**2).mean()))
    return 2.0 ** round(math.log2(size)) if size > 0 else 1.0


def stored(tensors: Expected) -> dict[str, object]:
    """Shape, bytes and type of tensors as quantization_config.json lists them."""
    listed = {
        name: {"shape": list(shape), "n_bytes": math.prod(shape) * dtype.itemsize, "dtype": str(dtype)}
        for name, (shape, dtype) in tensors.items()
    }
    return {"stored_tensors": listed}


def check_together(modules: list[ExlModule]) -> None:
    """Check what exllamav3 asks of linears that it computes together.

    In one parent module, linears of one size and number of bits must have one code; all experts of a layer must have one
    code and number of bits for each projection.

    Raises:
        ValueError: it names two of them.
    """
    seen: dict[tuple, tuple[tuple, ExlModule]] = {}
    for module in modules:
        if not isinstance(module.book, Trellis):
            continue
        parent, _, last = module.name.rpartition(".")
        experts, _, number = parent.rpartition(".")
        code: tuple = (module.book.code,)
        where: tuple = (parent, module.padded, module.book.k)
        if number.isdecimal() and experts.endswith(".experts"):
            where, code = (experts, last), (module.book.code, module.book.k)
        other = seen.setdefault(where, (code, module))
        if other[0] != code:
            raise ValueError(
                f"{other[1].name} and {module.name} have codebooks {other[1].book.name!r} and {module.book.name!r}, and "
                "exllamav3 computes them together: they need one code" + (" and number of bits" if len(code) > 1 else "")
            )
