"""inspect MODEL: the content of a saved model, without loading its weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..hub import claims
from ..text import size
from .console import json_option, revision_option, show_json, show_table, tell, token_option

if TYPE_CHECKING:
    from ..checkpoints.inventory import Inventory


@click.command()
@click.argument("model")
@click.option("--context", default=4096, show_default=True, help="Tokens for which the key-value cache is counted.")
@click.option("--layers", is_flag=True, help="List every quantized layer, not only the kinds.")
@revision_option
@token_option
@json_option
def command(model: str, context: int, layers: bool, revision: str | None, token: str | None, as_json: bool) -> None:
    """Layers, bits, codebooks, true bits per weight and the memory to run MODEL.

    MODEL is a folder (config.json and model.safetensors.index.json alone are enough) or an id on the Hub. Only the
    config and the headers of the weight files are read.
    """
    inventory = read(model, revision, token)
    content = describe(inventory, context)
    if as_json:
        show_json(content)
        return
    show_table(model, ("", ""), [(key, value) for key, value in _facts(content, context)])
    if inventory.linears:
        rows = _layer_rows(inventory) if layers else _kind_rows(content["kinds"])
        columns = ("layer", "shape", "code bits", "true bits", "size")
        show_table("Quantized layers", columns if layers else ("kind", "number", *columns[1:]), rows)
    elif content["quant_method"] and inventory.has_headers:
        tell(f"Its format ({content['quant_method']}) is not the native one, so layers are not listed.")


def read(model: str, revision: str | None = None, token: str | None = None) -> Inventory:
    """The inventory of a folder or of a repository on the Hub."""
    from ..checkpoints.inventory import read_folder, read_repo

    path = Path(model)
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return read_folder(path.parent)
    return read_repo(model, revision, token)


def describe(inventory: Inventory, context: int) -> dict[str, Any]:
    """The output of `inspect`, as values for JSON."""
    options = inventory.quantization
    cache = inventory.cache_bytes(context)
    names = claims.architectures(inventory.config)
    known = bool(inventory.linears)
    return {
        "architecture": names[0] if names else None,
        "dtype": inventory.config.get("dtype") or inventory.config.get("torch_dtype"),
        "quant_method": options.get("quant_method"),
        "format_version": options.get("format_version"),
        "codebook": options.get("codebook"),
        "incoherence": options.get("incoherence"),
        "bits": options.get("bits"),
        "true_bits": inventory.true_bits if known else None,
        "quantized_layers": len(inventory.linears) if inventory.has_headers else _codes(inventory),
        "quantized_weights": inventory.quantized_weights if known else None,
        "parameters": inventory.parameters if inventory.has_headers and (known or not options) else None,
        "calibration": options.get("calibration"),
        "origin": options.get("origin"),
        "tensors": len(inventory.names),
        "weight_bytes": inventory.total_bytes,
        "dense_bytes": inventory.dense_bytes if known else None,
        "cache_bytes": cache,
        "memory_bytes": None if cache is None else inventory.total_bytes + cache,
        "kinds": _kinds(inventory),
    }


def _codes(inventory: Inventory) -> int:
    return sum(name.endswith((".codes", "_codes")) for name in inventory.names)


def _kinds(inventory: Inventory) -> list[dict[str, Any]]:
    """One row for all layers of one shape whose names differ only in numbers."""
    groups: dict[tuple, list] = {}
    for linear in inventory.linears:
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", linear.name)
        groups.setdefault((kind, linear.shape, linear.codes_bytes), []).append(linear)
    return [
        {
            "kind": kind,
            "number": len(linears),
            "shape": list(shape),
            "code_bits": linears[0].code_bits,
            "true_bits": linears[0].true_bits,
            "bytes": sum(linear.bytes for linear in linears),
        }
        for (kind, shape, _), linears in groups.items()
    ]


def _facts(content: dict[str, Any], context: int) -> list[tuple[str, str]]:
    calibration = claims.calibration(content) or {}
    origin = claims.origin(content)
    true_bits = content["true_bits"]
    share = true_bits and content["parameters"] and f"{content['quantized_weights'] / content['parameters']:.1%}"
    rows = [
        ("architecture", content["architecture"] or "unknown"),
        ("made from", origin.get("base_model") or origin.get("folder")),
        ("method", content["quant_method"] or "dense"),
        ("codebook, incoherence", content["codebook"] and f"{content['codebook']}, {content['incoherence']}"),
        ("bits in the codes", content["bits"]),
        ("true bits per weight", true_bits and f"{true_bits:.3f}"),
        ("quantized layers", content["quantized_layers"] or None),
        ("parameters", content["parameters"] and f"{content['parameters']:,}"),
        ("quantized share", share),
        ("calibrated on", calibration.get("data")),
        ("weights", size(content["weight_bytes"])),
        ("the dense model", content["dense_bytes"] and size(content["dense_bytes"])),
        (f"cache for {context} tokens", content["cache_bytes"] and f"at most {size(content['cache_bytes'])}"),
        ("memory to run it", content["memory_bytes"] and f"{size(content['memory_bytes'])} and activations"),
    ]
    return [(name, str(value)) for name, value in rows if value is not None and value != ""]


def _kind_rows(kinds: list[dict[str, Any]]) -> list[tuple]:
    return [
        (k["kind"], k["number"], "x".join(map(str, k["shape"])), f"{k['code_bits']:.3g}", f"{k['true_bits']:.3f}",
         size(k["bytes"]))
        for k in kinds
    ]  # fmt: skip


def _layer_rows(inventory: Inventory) -> list[tuple]:
    return [
        (
            linear.name,
            f"{linear.out_features}x{linear.in_features}",
            f"{linear.code_bits:.3g}",
            f"{linear.true_bits:.3f}",
            size(linear.bytes),
        )
        for linear in inventory.linears
    ]
