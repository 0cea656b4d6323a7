"""A safetensors file taken apart and written without any check, so that it can be written wrongly."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

# Type → (code of Python's struct, bytes). BF16 has no code: it is the upper half of a float32.
TYPES = {
    "F64": ("d", 8), "F32": ("f", 4), "F16": ("e", 2), "BF16": (None, 2),
    "I64": ("q", 8), "I32": ("i", 4), "I16": ("h", 2), "I8": ("b", 1), "U8": ("B", 1), "BOOL": ("B", 1),
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


class RawFile:
    """One file: `header` and `data` may be changed to anything and written back.

    Args:
        path: of a sound file.
    """

    def __init__(self, path: Path):
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        self.path = path
        self.header: dict[str, Any] = json.loads(content[8 : 8 + size])
        self.data = bytearray(content[8 + size :])

    @property
    def names(self) -> list[str]:
        """Of the tensors."""
        return [name for name in self.header if name != "__metadata__"]

    def text(self) -> str:
        """The header as it is written."""
        return json.dumps(self.header, separators=(",", ":"))

    def write(self, text: str | bytes | None = None, length: int | None = None) -> None:
        """Write it back, with another header or another length of the header if they are given."""
        text = self.text() if text is None else text
        encoded = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        encoded += b" " * (-len(encoded) % 8)
        self.path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + self.data)

    def part(self, name: str) -> memoryview:
        """The bytes of a tensor, to be written to."""
        begin, end = self.header[name]["data_offsets"]
        return memoryview(self.data)[begin:end]

    def count(self, name: str) -> int:
        """How many numbers a tensor has."""
        return math.prod(self.header[name]["shape"])

    def put(self, name: str, position: int, value: float) -> bool:
        """Set one number. False if its type cannot hold the value."""
        dtype = self.header[name]["dtype"]
        encoded = encode(value, dtype)
        if encoded is None:
            return False
        self.part(name)[position * len(encoded) : (position + 1) * len(encoded)] = encoded
        return True


def encode(value: float, dtype: str) -> bytes | None:
    """The bytes of a number in a type; None if the type cannot hold it."""
    code, _ = TYPES[dtype]
    try:
        if code is None:
            return struct.pack("<f", value)[2:]
        return struct.pack(f"<{code}", value if dtype in FLOATS else int(value))
    except (struct.error, OverflowError, ValueError):
        return None


def decode(content: bytes, dtype: str) -> list[float]:
    """The numbers behind bytes."""
    code, size = TYPES[dtype]
    if code is None:
        words = struct.unpack(f"<{len(content) // 2}H", content)
        return list(struct.unpack(f"<{len(words)}f", b"".join(struct.pack("<I", word << 16) for word in words)))
    return list(struct.unpack(f"<{len(content) // size}{code}", content))
