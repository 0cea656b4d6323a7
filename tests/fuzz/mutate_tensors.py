"""Mutations of the weights' files: headers, values, bytes, indices."""

from __future__ import annotations

import json
import math
import os
import random
import struct
from pathlib import Path

from .mutations import HOSTILE, dump, mutation, read, shown, weight_files
from .raw import FLOATS, RawFile

INDEX = "model.safetensors.index.json"
_DTYPES = (
    "F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "U32", "U64", "C64", "F8_E4M3",
    "F8_E5M2", "F4", "X", "",
    None, 5,
)  # fmt: skip
# Last parts of the names of what is neither codes nor a dense weight.
_SMALL = (
    "su", "sv", "SU", "SV", "Wscale", "suh", "svh", "scaleWH", "fuse_scales", "tlut", "table", "row_scales",
    "codebook_id", "had_left",
    "had_right", "mcg", "mul1", "rcp", "tp_rank", "factor_in", "factor_out", "bias",
)  # fmt: skip


def _open(folder: Path, rng: random.Random) -> RawFile | None:
    files = weight_files(folder)
    return RawFile(rng.choice(files)) if files else None


@mutation(6)
def header_entry(folder: Path, rng: random.Random) -> str | None:
    """Shape, type or place of one tensor."""
    raw = _open(folder, rng)
    if raw is None:
        return None
    name = rng.choice(raw.names)
    entry = raw.header[name]
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    offsets = (
        [end, begin], [begin, end + 8], [begin + 1, end + 1], [-8, end], [0, 2**63], [2**64, 2**64 + 8], [begin], None,
        "x", [begin, end - 1],
        [0, end - begin], [1e9, 2e9], [float(begin), float(end)], [True, True],
    )  # fmt: skip
    shapes = (
        shape[::-1], [], [1], [0], [-1], [2**63], [2**33, 2**33], [2**64], [1.5], "x", None, [None], [10**400], [*shape,
        1], [1, *shape],
        [math.prod(shape)], [float(size) for size in shape], [True] * len(shape),
    )  # fmt: skip
    how = rng.randrange(6)
    if how == 0:
        entry["shape"] = rng.choice(shapes)
    elif how == 1:
        entry["dtype"] = rng.choice(_DTYPES)
    elif how == 2:
        entry["data_offsets"] = rng.choice(offsets)
    elif how == 3:
        del entry[rng.choice(list(entry))]
    elif how == 4:
        entry["extra"] = rng.choice(HOSTILE)
    else:
        raw.header[name] = rng.choice([None, [], "x", 5, {}])
    raw.write()
    return f"header of {name}: way {how}, {shown(raw.header[name], 90)}"


@mutation(4)
def header_name(folder: Path, rng: random.Random) -> str | None:
    """A tensor under another name, lost, doubled, or exchanged with another one."""
    raw = _open(folder, rng)
    if raw is None:
        return None
    name, other = rng.choice(raw.names), rng.choice(raw.names)
    how = rng.randrange(6)
    if how == 0:
        new = name + rng.choice([".", "\0", "x", " ", "/../x", ".weight", ".codes"])
    elif how == 1:  # one character, as a damaged disk has it
        position = rng.randrange(len(name))
        new = name[:position] + rng.choice("abcdeqmux_.0123456789") + name[position + 1 :]
    elif how == 2:
        module, _, _ = name.rpartition(".")
        new = f"{module}.{rng.choice(['codes', 'su', 'sv', 'Qidxs', 'trellis', 'weight', 'mcg', 'SU', 'suh', 'table'])}"
    elif how == 3:
        raw.header[name], raw.header[other] = raw.header[other], raw.header[name]
        raw.write()
        return f"{name} and {other} are exchanged"
    elif how == 4:
        _drop(raw, name)
        raw.write()
        return f"{name} is lost"
    else:
        raw.data += bytes(8)
        size = len(raw.data)
        raw.header[f"{name}.{rng.choice(['extra', 'codes', 'su'])}"] = {
            "dtype": "F32", "shape": [2], "data_offsets": [size - 8, size],
        }  # fmt: skip
        raw.write()
        return f"a tensor more, below {name}"
    if new in raw.header:
        return None
    raw.header[new] = raw.header.pop(name)
    raw.write()
    return f"{name} is called {shown(new)}"


def _drop(raw: RawFile, name: str) -> None:
    """Take a tensor out of a file, which is a sound one afterwards."""
    begin, end = raw.header.pop(name)["data_offsets"]
    del raw.data[begin:end]
    for key in raw.names:
        if raw.header[key]["data_offsets"][0] >= end:
            raw.header[key]["data_offsets"] = [place - (end - begin) for place in raw.header[key]["data_offsets"]]


@mutation(2)
def header_text(folder: Path, rng: random.Random) -> str | None:
    """The bytes of a header."""
    raw = _open(folder, rng)
    if raw is None:
        return None
    whole = raw.text()
    name, other, position = rng.choice(raw.names), rng.choice(raw.names), rng.randrange(len(whole))
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    texts = {
        "a name twice": f"{whole[:-1]},{json.dumps(name)}:{json.dumps(raw.header[other])}}}",
        "cut off": whole[:position],
        "lists": "[" * 100000,
        "objects": '{"a":' * 20000 + "1" + "}" * 20000,
        "null": "null",
        "one character": whole[:position] + chr(rng.randrange(1, 127)) + whole[position + 1 :],
        "a long name": f'{whole[:-1]},"{"x" * 100000}":{empty}',
        "an empty tensor": f'{whole[:-1]},"{name}.codes":{empty}',
        "many tensors": whole[:-1] + "".join(f',"t{i}":{empty[:-1]}' for i in range(20000)) + "}",
        "no tensors": "{}",
    }
    how = rng.choice(sorted(texts))
    raw.write(texts[how])
    return f"text of {raw.path.name}'s header: {how}"


@mutation(1)
def header_metadata(folder: Path, rng: random.Random) -> str | None:
    """The part of a header that describes the file."""
    raw = _open(folder, rng)
    if raw is None:
        return None
    values = (
        None,
        {},
        {"format": "tf"},
        {"format": 5},
        {"x": "y"},
        [],
        "x",
        {"format": "pt", "a": {"b": 1}},
        {"format": "mlx"},
    )
    raw.header["__metadata__"] = rng.choice(values)
    raw.write()
    return f"metadata is {shown(raw.header['__metadata__'])}"


@mutation(4)
def file_bytes(folder: Path, rng: random.Random) -> str | None:
    """The bytes of a file of weights."""
    files = sorted(path for suffix in ("safetensors", "bin") for path in folder.glob(f"*.{suffix}") if path.is_file())
    if not files:
        return None
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    size = struct.unpack("<Q", content[:8])[0] if file.suffix == ".safetensors" else len(content) - 8
    lengths = [0, 1, 2, size - 8, size + 8, 2**63, 2**64 - 1, len(content), len(content) - 8, 100_000_001]
    how = rng.choice(["cut", "appended", "length", "some", "bit", "empty", "random", "zeros", "folder", "sparse", "lfs"])
    if how == "cut":
        content = content[: rng.choice([rng.randrange(len(content)), len(content) - 1, len(content) // 2])]
    elif how == "appended":
        content += rng.randbytes(rng.choice([1, 8, 1000]))
    elif how == "length":
        content[:8] = struct.pack("<Q", rng.choice(lengths))
    elif how == "some":
        for _ in range(rng.choice([1, 4, 64])):
            content[rng.randrange(8 + size)] = rng.randrange(256)
    elif how == "bit":
        content[rng.randrange(8 + size)] ^= 1 << rng.randrange(8)
    elif how == "empty":
        content = bytearray()
    elif how == "random":
        content = bytearray(rng.randbytes(1000))
    elif how == "zeros":
        begin = rng.randrange(max(1, len(content) - 64))
        content[begin : begin + 64] = bytes(len(content[begin : begin + 64]))
    elif how == "folder":
        file.unlink()
        file.mkdir()
        return f"{file.name} is a folder"
    elif how == "sparse":
        os.truncate(file, 1 << 34)
        return f"{file.name} has 16 GiB of nothing at its end"
    else:
        content = bytearray(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n")
    file.write_bytes(content)
    return f"bytes of {file.name}: {how}"


@mutation(7)
def values(folder: Path, rng: random.Random) -> str | None:
    """The numbers of a tensor."""
    raw = _open(folder, rng)
    if raw is None:
        return None
    small = [name for name in raw.names if name.rpartition(".")[2] in _SMALL or len(raw.header[name]["shape"]) < 2]
    name = rng.choice(small if small and rng.random() < 0.75 else raw.names)
    count = raw.count(name)
    if not count:
        return None
    if raw.header[name]["dtype"] in FLOATS:
        new = rng.choice([math.nan, math.inf, -math.inf, 0.0, -0.0, 6e4, -6e4, 1e-7, 1.0, 3e38])
        everywhere = rng.random() < 0.4
        if not all(raw.put(name, place, new) for place in (range(count) if everywhere else [rng.randrange(count)])):
            return None
        what = f"{name} is {new} {'everywhere' if everywhere else 'in one place'}"
    else:
        how = rng.choice(["random", "constant", "one"])
        part = raw.part(name)
        if how == "random":
            part[:] = rng.randbytes(len(part))
        elif how == "constant":
            part[:] = bytes([rng.choice([0, 255, 128])]) * len(part)
        else:
            raw.put(name, rng.randrange(count), rng.choice([0, -1, 1, 99]))
        what = f"{name} has other integers: {how}"
    raw.write()
    return what


@mutation(4)
def index(folder: Path, rng: random.Random) -> str | None:
    """The index of several files."""
    file = folder / INDEX
    if not file.is_file():
        if not (folder / "model.safetensors").is_file():
            return None
        names = RawFile(folder / "model.safetensors").names
        first = folder / "model-00001-of-00001.safetensors"
        (folder / "model.safetensors").rename(first)
        dump(file, {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, first.name)})
    content = read(file)
    places, shards = content["weight_map"], sorted(folder.glob("model-*.safetensors"))
    shard, name = rng.choice(shards), rng.choice(list(places))
    outside = folder.parent / "outside.safetensors"
    how = rng.choice([
        "outside", "absolute", "entry", "weight_map", "no metadata", "metadata", "a name less", "a name more",
        "no shard", "a link", "shards exchanged",
        "all in one", "the other shard", "a link to itself", "beside", "a shard twice",
    ])  # fmt: skip
    if how in ("outside", "absolute", "a link"):
        outside.write_bytes(shard.read_bytes())
    if how in ("outside", "absolute"):
        to = f"../{outside.name}" if how == "outside" else str(outside)
        content["weight_map"] = {key: to if place == shard.name else place for key, place in places.items()}
    elif how == "entry":
        odd = [
            None,
            5,
            [],
            {},
            "",
            ".",
            "missing.safetensors",
            "config.json",
            "\0",
            "/dev/zero",
            f"x/../{shard.name}",
            "x" * 5000,
            "\ud800",
        ]
        places[name] = rng.choice(odd)
    elif how == "weight_map":
        content["weight_map"] = rng.choice([None, [], "x", {}, 5, [list(places.items())]])
    elif how == "no metadata":
        content.pop("metadata", None)
    elif how == "metadata":
        content["metadata"] = rng.choice([None, [], {"total_size": -1}, {"total_size": "x"}, {"total_size": 10**400}, 5])
    elif how == "a name less":
        del places[name]
    elif how == "a name more":
        places[rng.choice(["model.extra", "", "\0", f"{name}.codes"])] = shard.name
    elif how == "no shard":
        shard.unlink()
    elif how == "a link":
        shard.unlink()
        shard.symlink_to(outside)
    elif how == "a link to itself":
        shard.unlink()
        shard.symlink_to(shard.name)
    elif how == "shards exchanged":
        first, last = shards[0].read_bytes(), shards[-1].read_bytes()
        shards[0].write_bytes(last)
        shards[-1].write_bytes(first)
    elif how == "all in one":
        content["weight_map"] = dict.fromkeys(places, shard.name)
    elif how == "the other shard":
        places[name] = rng.choice(shards).name
    elif how == "beside":  # an older model that was saved in one file, into the same folder
        raw = RawFile(shard)
        raw.path = folder / "model.safetensors"
        raw.write()
    else:
        raw = RawFile(shard)
        key = rng.choice(raw.names)
        raw.part(key)[:] = rng.randbytes(len(raw.part(key)))
        raw.path = folder / "model-00009-of-00009.safetensors"
        raw.write()
        content["weight_map"][f"{key}.extra"] = raw.path.name
    if file.is_file():
        dump(file, content)
    return f"index: {how}, {shown(name, 50)}"


@mutation(2)
def files(folder: Path, rng: random.Random) -> str | None:
    """Files that are missing, links, or of another model."""
    there = sorted(path for path in folder.iterdir() if path.is_file())
    file = rng.choice(there)
    how = rng.choice(["lost", "link to nothing", "link to a device", "moved", "older weights", "an adapter", "empty"])
    if how == "lost":
        file.unlink()
    elif how in ("link to nothing", "link to a device"):
        file.unlink()
        file.symlink_to("nothing" if how == "link to nothing" else "/dev/null")
    elif how == "moved":
        file.rename(file.with_name(f"{file.name}.bak"))
    elif how == "older weights":
        (folder / "pytorch_model.bin").write_bytes(rng.randbytes(100))
        return "a pytorch_model.bin beside the weights"
    elif how == "an adapter":
        dump(folder / "adapter_config.json", rng.choice(HOSTILE))
        return "an adapter_config.json"
    else:
        file.write_bytes(b"")
    return f"{file.name}: {how}"
