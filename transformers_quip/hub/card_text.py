"""The text of a model card. Everything that comes from a file or from the user is escaped by `text`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import codebooks
from ..checkpoints.inventory import Inventory
from ..config import OPTIONS, QuipConfig
from ..text import markdown, python, size
from ..version import __version__
from . import claims

_CITATION = """```bibtex
@inproceedings{tseng2024quipsharp,
  title     = {{QuIP\\#}: Even Better {LLM} Quantization with {H}adamard Incoherence and Lattice Codebooks},
  author    = {Tseng, Albert and Chee, Jerry and Sun, Qingyao and Kuleshov, Volodymyr and De Sa, Christopher},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}
```"""


def body(
    title: str,
    inventory: Inventory,
    config: QuipConfig,
    base_model: str | None,
    place: str,
    results: list[dict[str, Any]],
) -> str:
    """The text in Markdown.

    Args:
        title: of the card.
        inventory: of the folder.
        config: its quantization_config, checked.
        base_model: the dense model's id on the Hub.
        place: for the example of loading it.
        results: measured perplexities, see `model_card.read_results`.
    """
    source = f"[{markdown(base_model)}](https://huggingface.co/{base_model})" if base_model else "a dense model"
    parts = [
        f"# {markdown(title)}",
        f"This is {source}, quantized with transformers-quip (QuIP#: incoherence by Hadamard transforms and lattice "
        "codebooks).",
        "## Load it",
        "```bash\npip install transformers-quip\n```",
        f"```python\nimport transformers_quip\nfrom transformers import AutoModelForCausalLM\n"
        f'model = AutoModelForCausalLM.from_pretrained({python(place)}, device_map="auto")\n```',
        "**The first line is needed:** without it Transformers warns of an unknown quantization type and gives a model "
        "with random weights. To load it in another program, use `transformers-quip run PROGRAM`.",
        "## The model",
        _table(_facts(inventory, config)),
    ]
    if results:
        parts += ["## Measured", _measured(results)]
    recipe = _recipe(inventory.quantization, config)
    parts += ["## Limits", _limits(inventory), "## How it was made", recipe, "## Citation", _CITATION]
    return "\n\n".join(parts)


def _measured(results: list[dict[str, Any]]) -> str:
    """The measured perplexities, and each column that some result has."""
    columns = [
        ("KL divergence", "divergence", "mean", ".4f"),
        ("dense model's perplexity of its own text", "generation", "perplexity", ".4g"),
        ("of the dense model's text", "generation", "own_perplexity", ".4g"),
        ("repeated in its own text", "generation", "repetition", ".1%"),
        ("in the dense model's", "generation", "own_repetition", ".1%"),
    ]
    columns = [column for column in columns if any(column[2] in (r.get(column[1]) or {}) for r in results)]
    rows: list[tuple[str, ...]] = [("data", "perplexity", "dense model", *(column[0] for column in columns), "protocol")]
    for result in results:
        more = ((result.get(part) or {}, key, form) for _, part, key, form in columns)
        dense = result.get("dense_perplexity")
        rows.append(
            (
                result["dataset"],
                f"{result['perplexity']:.4g}",
                "" if dense is None else f"{dense:.4g}",
                *(format(part[key], form) if key in part else "" for part, key, form in more),
                result["protocol"],
            )
        )
    return _table(rows)


def _facts(inventory: Inventory, config: QuipConfig) -> list[tuple[str, ...]]:
    options = inventory.quantization
    calibration, made_here = claims.calibration(options), bool(options.get("origin"))
    book = config.codebook or "by module"
    share = inventory.quantized_weights / inventory.parameters
    rows: list[tuple[str, ...]] = [
        ("", ""),
        ("method", f"codebook {book}, incoherence {config.incoherence}, rounding {config.rounding}"),
        ("bits per weight", f"{config.bits:g} in the codes, {inventory.true_bits:.3f} counting all stored tensors"),
        ("quantized", f"{len(inventory.linears)} layers, {share:.1%} of {inventory.parameters:,} parameters"),
        ("calibration", calibration["data"] if calibration else "none: nearest points" if made_here else "not known"),
        ("size", f"{size(inventory.dense_bytes)} before, {size(inventory.total_bytes)} now"),
    ]
    if calibration and "mean_relative_error" in calibration:
        rows.append(("mean relative error of a layer's output", f"{calibration['mean_relative_error']:.4f}"))
    tuning = claims.tuning(options)
    if tuning:
        amount = f" on {tuning['tokens']:,} tokens" if "tokens" in tuning else ""
        rows.append((f"KL divergence to the dense model, before tuning{amount}", f"{tuning['held_out_before']:.4f}"))
        rows.append(("the same after tuning (text held out from it)", f"{tuning['held_out_after']:.4f}"))
    return rows


def _limits(inventory: Inventory) -> str:
    lines = ["It has the limits and biases of the original model, and has lost some of its quality."]
    if inventory.quantization.get("origin") and not claims.calibration(inventory.quantization):
        lines.append("It was quantized without calibration; at 2 bits that damages a model badly.")
    if inventory.quantized_weights < inventory.parameters:
        unchanged = "Embeddings, norms, and all other parameters not counted as quantized above are stored unchanged"
        trained = ", except those that tuning has trained" if claims.tuning(inventory.quantization) else ""
        lines.append(f"{unchanged}{trained}.")
    return " ".join(lines)


def _recipe(options: Mapping[str, Any], config: QuipConfig) -> str:
    """The call that makes it, with every option that is not the default, and the versions."""
    origin = claims.origin(options)
    if not options.get("origin"):
        return f"Converted from a checkpoint of another format. Versions: transformers_quip {__version__} (this card)."
    chosen = {
        name: options[name]
        for name, option in OPTIONS.items()
        if name in options and (name == "bits" or options[name] != option.default)
    }
    if config.is_mixed:
        chosen.pop("modules", None)  # the bits of each module, as they were measured, are in config.json
    elif config.codebook in (None, *codebooks.defaults()):
        chosen.pop("codebook", None)
    else:
        chosen.pop("bits", None)
    # repr writes strings of any depth as literals on one line
    arguments = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    source = origin.get("base_model") or origin.get("folder") or "the dense model"
    code = (
        "```python\nfrom transformers import AutoModelForCausalLM\nfrom transformers_quip import QuipConfig\n"
        f"config = QuipConfig({arguments})\n"
        f"model = AutoModelForCausalLM.from_pretrained({python(source)}, quantization_config=config)\n```"
    )
    given = (
        "\n\nThe data set was given by the caller and is not stored." if "given by" in str(chosen.get("dataset")) else ""
    )
    if claims.tuning(options) and "tune" not in chosen:
        given += "\n\nIt was tuned afterwards, as `transformers-quip tune` does it."
    versions = ", ".join(markdown(f"{name} {version}") for name, version in origin.get("versions", {}).items())
    return f"{code}{given}\n\nVersions: {versions or 'not known'}."


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
