"""The one reader of headers: against safetensors itself, and on files that are damaged or not safetensors files."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from transformers_quip.checkpoints import headers
from transformers_quip.checkpoints.headers import DAMAGED, TensorInfo, read_header, read_headers, read_json

DTYPES = [getattr(torch, headers.torch_dtype_name(name)) for name in headers.supported_types()]


def test_headers_of_files(tmp_path):
    save_file({"a": torch.zeros(2, 3, dtype=torch.int16)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "2.safetensors")
    files = [str(tmp_path / "1.safetensors"), str(tmp_path / "2.safetensors")]
    assert read_headers(files) == {
        "a": TensorInfo((2, 3), "I16", files[0]),
        "b": TensorInfo((4,), "BF16", files[1]),
    }


@pytest.mark.parametrize("kept", [3, 40, -1])
def test_a_truncated_file(tmp_path, kept):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(200, 3)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .* download or save the model again"):
        read_headers([str(file)])


def test_pickle_files_are_not_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(nn.Linear(2, 2).state_dict(), file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file"):
        read_headers([str(file)])


def test_every_type_against_safetensors(tmp_path):
    """Shape, type and bytes of every supported type, an empty tensor and a number included."""
    tensors = {
        f"{dtype}.{len(shape)}": torch.zeros(shape).to(dtype) for dtype in DTYPES for shape in [(), (3,), (2, 0), (2, 3, 4)]
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    found = read_header(file)
    with safe_open(file, framework="pt") as handle:
        assert found.keys() == set(handle.keys())
        for key in handle.keys():  # noqa: SIM118 - safe_open is not a mapping
            part = handle.get_slice(key)
            assert found[key] == TensorInfo(tuple(part.get_shape()), part.get_dtype(), str(file))
            assert found[key].key == key
            assert found[key].bytes == tensors[key].nbytes
            assert found[key].elements == tensors[key].numel()
            assert headers.torch_dtype(found[key].dtype) == tensors[key].dtype


def test_names_of_types():
    for dtype in DTYPES:
        name = headers.type_name(dtype)
        assert headers.torch_dtype(name) == dtype
        assert headers.type_bytes(dtype) == dtype.itemsize == headers.type_bytes(str(dtype).removeprefix("torch."))
    assert headers.type_name(torch.float8_e4m3fn) is None
    assert headers.type_bytes("None") is None
    with pytest.raises(ValueError, match="F8_E4M3 is not supported; types are F64, F32"):
        headers.torch_dtype("F8_E4M3")
    with pytest.raises(ValueError, match="a has the type F99, which is not a known type"):
        TensorInfo((1,), "F99", key="a").bytes  # noqa: B018


def write(file, entries, size=None):
    raw = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    if size is None:
        size = max(entry["data_offsets"][1] for entry in entries.values())
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))


def entry(begin, end, shape=(2, 2), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        ({"a": entry(0, 16), "b": entry(8, 24)}, None, "its tensors overlap"),
        ({"a": entry(0, 16), "b": entry(20, 36)}, None, "have gaps"),
        ({"a": entry(0, 15)}, None, r"a is F32 \[2, 2\], for which its header has 15 bytes"),
        ({"a": entry(0, 16, dtype="F99")}, None, "its header has .*F99.* for 'a'"),
        ({"a": entry(0, 16, dtype=[])}, None, "its header has .* for 'a'"),
        ({"a": entry(0, 16, shape=(-2, -2))}, None, "its header has .* for 'a'"),
        ({"a": entry(0, 16, shape=(True, 4))}, None, "its header has .* for 'a'"),
        ({"a": {"dtype": "F32"}}, 16, "its header has .* for 'a'"),
        ({"a": 5}, 16, "its header has 5 for 'a'"),
        ({"a": entry(0, 16)}, 15, "bytes instead of the"),
        ({"a": entry(0, 16)}, 17, "bytes instead of the"),
        (b"[1]", 16, "its header is not a JSON object"),
        (b"[" * 200_000, 16, "its header is not JSON"),
        (b"\xff\xfe{}", 16, "its header is not JSON"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path, entries, size, message):
    file = tmp_path / "model.safetensors"
    write(file, entries, size)
    with pytest.raises(ValueError, match=message) as error:
        read_header(file)
    assert str(error.value).startswith(f"{file} cannot be read (")
    assert str(error.value).endswith(DAMAGED)


def test_types_that_are_not_read_still_have_a_size(tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, {"a": entry(0, 6, (3, 4), "F4"), "b": entry(6, 9, (4,), "F6_E2M3"), "c": entry(9, 11, (2,), "F8_E8M0")})
    found = read_header(file)
    assert {key: info.bytes for key, info in found.items()} == {"a": 6, "b": 3, "c": 2}
    assert sum(math.prod(info.shape) for info in found.values()) == 18
    assert not any(headers.is_supported(info.dtype) for info in found.values())


def test_json(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_json(file)
    for content, message in [("[]", "is not a JSON object"), ("{", "is not JSON"), ("[" * 200_000, "is not JSON")]:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(file)
    file.write_text('{"a": "\u00e9"}', encoding="utf-8")
    assert read_json(file) == {"a": "é"}


def test_pytorch_is_not_imported():
    code = "import sys, transformers_quip.checkpoints.inventory; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("metadata", [[], "x", 5, {"format": 5}, {"format": "pt", "a": {"b": 1}}, {"a": None}])
def test_metadata_that_safetensors_refuses(metadata, tmp_path):
    file = tmp_path / "model.safetensors"
    header = json.dumps({"__metadata__": metadata, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    if metadata:
        with pytest.raises(Exception, match="header"), safe_open(file, framework="pt"):
            pass
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*__metadata__"):
            read_header(file)
