"""Checkpoints of QTIP and YAQA (Cornell-RelaxML/qtip): trellis codes of 2, 3 or 4 bits.

The format was derived from the published package. `config.json` has a dict "quip_params" with the trellis. A linear is

    y = SV ⊙ Q_m Ŵ Q_nᵀ ( SU ⊙ x )

where in models that were made for 8 devices one of the transforms works on eighths of its vector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ...config.storage import Storage
from ..headers import DAMAGED
from . import trellis_bits
from .family import FLOATING, Family, Form, Source, is_one_of, is_true
from .quip_sharp import check_hadamard

# decode_mode → native code, and whether it has a table
_CODES = {
    "quantlut_sym": ("hyb", True),
    "quantlut": ("quantlut", True),
    "lut": ("lut", True),
    "1mad": ("1mad", False),
    "2mad": ("2mad", False),
    "3inst": ("3inst", False),
}
_FIXED = {"codebook": "bitshift", "codebook_version": 0, "L": 16, "td_x": 16, "td_y": 16}
_DEVICES = 8
_SHORT_NAME = r"\d+_(q|k|v|o|up|gate|down)"
# Linears whose inputs are split over the devices; the others split their outputs.
_SPLIT_INPUTS = ("o_proj", "down_proj")


class Qtip(Family):
    """See the file's description."""

    name = "QTIP"
    marker = "trellis"
    kinds = ("trellis", "SU", "SV", "tlut", "rcp", "tp_rank")

    def check(self, parameters: Mapping[str, Any]) -> None:
        """See [`Family.check`]."""
        for key, value in _FIXED.items():
            if parameters.get(key, value) != value:
                raise ValueError(f"quip_params of QTIP has {key}={parameters[key]!r}; only {value!r} is supported")
        mode: Any
        mode, step, bits = (parameters.get(key) for key in ("decode_mode", "V", "tlut_bits"))
        if not is_one_of(mode, _CODES):
            raise ValueError(f"quip_params of QTIP has decode_mode={mode!r}; supported are {', '.join(map(repr, _CODES))}")
        tabulated = _CODES[mode][1]
        if isinstance(step, bool) or not isinstance(step, int) or step not in ((1, 2) if tabulated else (1,)):
            raise ValueError(f"quip_params of QTIP has V={step!r} with decode_mode={mode!r}, which is not supported")
        if tabulated and (not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 16):
            raise ValueError(f"quip_params of QTIP has tlut_bits={bits!r}, which is not a number from 1 to 16")
        if mode == "lut" and bits != 16:
            raise ValueError(f"quip_params of QTIP has tlut_bits={bits!r} with decode_mode='lut', which needs 16")
        if mode == "quantlut_sym" and bits == 16:
            raise ValueError("quip_params of QTIP has tlut_bits=16 with decode_mode='quantlut_sym', which has 15 at most")
        is_true(parameters, "split_for_tp")
        _skipped(parameters)

    def describe(self, source: Source, rows: int, columns: int, parameters: Mapping[str, Any]) -> Form:
        """See [`Family.describe`]."""
        code, tabulated = _CODES[parameters["decode_mode"]]
        shape = source.require("trellis", ("I16",))
        k = shape[1] // 16 if len(shape) == 2 else 0
        if _short_name(source.name) in _skipped(parameters):
            raise ValueError(f"{source.name} has a trellis, but quip_params lists it in skip_list: {DAMAGED}")
        last = source.name.rpartition(".")[2]
        said = parameters.get("K_v_proj") if last == "v_proj" and "K_v_proj" in parameters else parameters.get("K", k)
        if said != k:
            raise ValueError(f"{source.name}.trellis has {shape[-1] / 16:g} bits, but quip_params says {said!r}: {DAMAGED}")
        source.require("trellis", ("I16",), (rows * columns // 256, 16 * k))
        if not 1 <= k <= 8 or rows % 16 or columns % 16:
            raise ValueError(
                f"{source.name}.trellis has shape {list(shape)}: it is not a trellis of 1 to 8 bits for [{rows}, {columns}]"
            )
        source.require("SU", FLOATING, (columns,))
        source.require("SV", FLOATING, (rows,))
        step: int = parameters["V"]
        bits: Any = parameters.get("tlut_bits")
        # the package does not write which of its two layouts it used: it follows from the kind of trellis
        kernel = code == "hyb" and step == 2 and bits == 9 and k in (2, 3, 4)
        if kernel and (rows % 32 or columns % 32):
            raise ValueError(f"{source.name} is [{rows}, {columns}]; this trellis needs sizes that are multiples of 32")
        if tabulated:
            source.require("tlut", FLOATING, (1 << bits, step))
            code += f"-q{bits}v{step}"
        elif "tlut" in source.tensors:
            mode = parameters["decode_mode"]
            raise ValueError(f"{source.name}.tlut exists, but decode_mode={mode!r} has no table: {DAMAGED}")
        check_hadamard(source.name, rows, columns)
        return Form(
            rows,
            columns,
            f"trellis:{code}:k{k}:{'qtip' if kernel else 'rows'}",
            _transforms(source, parameters),
            storage=Storage(scales_dtype="float32"),
            details={"kernel": kernel},
        )

    def repack(self, tensors: Mapping[str, torch.Tensor], form: Form) -> dict[str, torch.Tensor]:
        """See [`Family.repack`]."""
        unpack = trellis_bits.from_qtip_kernel if form.details["kernel"] else trellis_bits.from_qtip
        result = {
            "codes": unpack(tensors["trellis"], form.rows, form.columns),
            "su": tensors["SU"].float(),
            "sv": tensors["SV"].float(),
        }
        if "tlut" in tensors:
            result["table"] = tensors["tlut"].float()
        return result


def _skipped(parameters: Mapping[str, Any]) -> list[str]:
    """Linears that were not quantized, such as "0_v" and "1_down". Raises `ValueError` if it is not a list of these."""
    names = parameters.get("skip_list") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and re.fullmatch(_SHORT_NAME, name) for name in names):
        raise ValueError(f"quip_params of QTIP has skip_list={names!r}: it must be a list of names such as '0_v', '1_down'")
    return names


def _short_name(name: str) -> str:
    """The name of a linear in `skip_list`; its own name if the list has no name for such linears."""
    match = re.search(r"layers\.(\d+)\.\w+\.(q|k|v|o|up|gate|down)_proj$", name)
    return f"{match[1]}_{match[2]}" if match else name


def _transforms(source: Source, parameters: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the transforms; "rcp" says which of them is split: 1 for the inputs, 2 for the outputs, 0 for none."""
    last = source.name.rpartition(".")[2]
    if "rcp" in source.tensors:
        split = source.number("rcp")
    elif is_true(parameters, "split_for_tp"):
        # a model that was run before it was saved has lost "rcp"
        split = 1 if last in _SPLIT_INPUTS else 2
    else:
        split = 0
    if split not in (0, 1, 2):
        raise ValueError(f"{source.name}.rcp is {split}, but must be 0, 1 or 2")
    devices = source.number("tp_rank") if "tp_rank" in source.tensors else _DEVICES
    if split and devices != _DEVICES:
        raise ValueError(f"{source.name}.tp_rank is {devices}; only models made for {_DEVICES} devices are supported")
    return ("hadamard-eighths" if split == 1 else "hadamard", "hadamard-eighths" if split == 2 else "hadamard")
