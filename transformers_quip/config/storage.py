"""Unusual storage of the tensors of a quantized linear: a record in config.json.

Models that were quantized by transformers-quip need no such record. Checkpoints of other packages are re-packed without
loss; everything that the usual tensors cannot express is recorded here, for patterns of module names as in the option
`modules`. In config.json the record is called "layout".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .patterns import check_patterns

_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Storage:
    """How one quantized linear of m outputs and n inputs is stored.

    Attributes:
        padded: (m', n') where the codes belong to a larger matrix. su has n' entries then, sv m'; the input is extended
            by zeros and the output cropped.
        row_scales: whether a vector [m'] multiplies the rows of Ŵ before the output transform.
        scales_dtype: of su, sv and the other vectors; None: the model's.
        fuses: the linears in the same parent module whose outputs it computes one after the other. They have no
            weights of their own.
        parts: for a linear of the model that is stored as several: the name and the number of outputs of each. (Not a
            dict: Transformers would sort it when it writes JSON.)
    """

    padded: tuple[int, int] | None = None
    row_scales: bool = False
    scales_dtype: str | None = None
    fuses: tuple[str, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Storage:
        """The inverse of [`to_dict`]. Raises `ValueError` for anything else."""
        known = [entry.name for entry in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"a record of layout has {', '.join(known)}, not {unknown[0]!r}")
        values = dict(values)
        padded = values.get("padded")
        if padded is not None:
            if not isinstance(padded, (list, tuple)) or len(padded) != 2 or not all(map(_is_size, padded)):
                raise ValueError(f"padded={padded!r} must be two positive integers up to {_LARGEST:,}")
            values["padded"] = tuple(padded)
        if not isinstance(values.get("row_scales", False), bool):
            raise ValueError(f"row_scales={values['row_scales']!r} must be true or false")
        if values.get("scales_dtype") not in (None, *_DTYPES):
            raise ValueError(f"scales_dtype={values['scales_dtype']!r} must be one of {', '.join(_DTYPES)}")
        fuses, parts = values.get("fuses", ()), values.get("parts", ())
        if not isinstance(fuses, (list, tuple)) or not all(isinstance(name, str) and name for name in fuses):
            raise ValueError(f"fuses={fuses!r} must be a list of names")
        if not isinstance(parts, (list, tuple)) or not all(_is_part(part) for part in parts):
            raise ValueError(f"parts={parts!r} must be a list of [name, outputs]")
        values["fuses"], values["parts"] = tuple(fuses), tuple((name, size) for name, size in parts)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The attributes that are not the default, JSON-serialisable."""
        result: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value:
                result[entry.name] = json.loads(json.dumps(value))  # tuples as the lists that they are read as
        return result


# Inputs or outputs of a linear: more than any model has, and the size of two of them is still a 64-bit number.
_LARGEST = 10**8
# The usual storage.
PLAIN = Storage()


def check(record: Any) -> dict[str, dict] | None:
    """The record of a config, {pattern: {…}}. Raises `ValueError` if it is something else."""
    if record is None:
        return None
    if not isinstance(record, dict) or not all(isinstance(pattern, str) and pattern for pattern in record):
        raise ValueError("must be a dict of {module name or pattern: {…}}")
    check_patterns(record)
    for pattern, values in record.items():
        if not isinstance(values, dict):
            raise ValueError(f"has {pattern!r}: {values!r}, which must be a dict")
        try:
            Storage.from_dict(values)
        except ValueError as error:
            raise ValueError(f"has {pattern!r}: {error}") from None
    return record


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


def _is_part(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str) and _is_size(value[1])
