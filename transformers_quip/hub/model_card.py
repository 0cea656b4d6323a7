"""The model card of a quantized model, made from what its folder holds.

A card is written where there is none, over an earlier card of ours that nobody has edited, and over the empty form that
Transformers leaves; never over anybody's own text, unless that is asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import codebooks
from ..checkpoints.inventory import Inventory, read_folder
from ..config import OPTIONS, QUANT_METHOD, QuipConfig
from ..version import __version__

logger = logging.getLogger(__name__)

CARD = "README.md"
# Where `transformers-quip evaluate --save` leaves what it measured.
EVALUATION = "quip_evaluation.json"
_MARK = re.compile(r"<!-- written by transformers-quip; sha256 of the text above: ([0-9a-f]{64}) -->")
_TRANSFORMERS_FORM = "This model card has been automatically generated."
_FORM_FIELD = "[More Information Needed]"
_CITATION = """```bibtex
@inproceedings{tseng2024quipsharp,
  title     = {{QuIP\\#}: Even Better {LLM} Quantization with {H}adamard Incoherence and Lattice Codebooks},
  author    = {Tseng, Albert and Chee, Jerry and Sun, Qingyao and Kuleshov, Volodymyr and De Sa, Christopher},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}
```"""


def make_card(folder: str | Path, *, repo_id: str | None = None, base_model: str | None = None) -> ModelCard:
    """The card of the quantized model in a folder.

    Args:
        folder: as `save_pretrained` wrote it; measured perplexities are taken from `quip_evaluation.json` if that is there.
        repo_id: where it is or will be on the Hub.
        base_model: the dense model's id on the Hub, where config.json does not know it.

    Raises:
        ValueError: the folder holds no model that was quantized by this package, or a file cannot be read.
    """
    inventory = read_folder(folder)
    options = inventory.quantization
    if options.get("quant_method") != QUANT_METHOD or not inventory.linears:
        raise ValueError(f"{folder} holds no model that was quantized by transformers-quip, so there is no card to write")
    QuipConfig.from_dict(dict(options))  # raises where somebody has edited it
    origin = options.get("origin") or {}
    base_model = base_model or origin.get("base_model")
    results = read_results(folder)
    measured = _eval_results(results)
    name = base_model or origin.get("folder") or (inventory.config.get("architectures") or ["model"])[0]
    title = f"{name.rpartition('/')[2]}, {options['bits']:g} bits per weight"
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation" if _generates(inventory) else None,
        tags=["quip", f"{options['bits']:g}-bit", "quantized", "transformers-quip"],
        quantized_by=repo_id.partition("/")[0] if repo_id and "/" in repo_id else "transformers-quip",
        model_name=title if measured else None,
        eval_results=measured or None,
    )
    body = _body(title, inventory, base_model, repo_id or "path/or/repo", results)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_marked(body)}\n")


def write_card(
    folder: str | Path, *, repo_id: str | None = None, base_model: str | None = None, overwrite: bool = False
) -> bool:
    """Write the card of the quantized model in a folder, unless somebody's own text is there.

    What the metadata of a card that is replaced says (a license, tags) is kept.

    Args:
        folder, repo_id, base_model: see [`make_card`].
        overwrite: whether to replace somebody's own text.

    Returns:
        Whether it was written.

    Raises:
        ValueError: see [`make_card`].
        OSError: the file cannot be written.
    """
    path = Path(folder) / CARD
    old = path.read_bytes() if path.is_file() else None
    before = None if old is None else _parse(old)
    if old is not None and not overwrite and not (before and is_ours_to_replace(before)):
        logger.info("%s has a text of its own and is left as it is (hub.model_card.write_card(..., overwrite=True))", path)
        return False
    card = make_card(folder, repo_id=repo_id, base_model=base_model)
    if before is not None:
        _keep_metadata(card, before, base_model)
    write_whole(path, str(card))
    return True


def try_to_write_card(folder: str | Path, **options: Any) -> bool:
    """As [`write_card`], but where that cannot be done it is a warning: the weights in the folder matter more."""
    try:
        return write_card(folder, **options)
    except (ValueError, OSError) as error:
        logger.warning(
            "The model in %s is saved, but no model card (README.md) was written: %s "
            "(hub.model_card.write_card writes it when that is mended)",
            folder,
            error,
        )
        return False


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all; what a link in the client's cache points to stays as it is."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _parse(raw: bytes) -> ModelCard | None:
    """A card; None for what no program wrote: other encodings, and metadata that is no YAML."""
    try:
        return ModelCard(raw.decode(), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):
        return None


def is_ours_to_replace(card: ModelCard) -> bool:
    """Whether a card's text is empty, an unedited one of ours, or Transformers' form that nobody has filled in."""
    body = card.text.strip()
    mark = _MARK.search(body)
    if mark:
        return mark[1] == _digest(body[: mark.start()]) and not body[mark.end() :].strip()
    return not body or _is_empty_form(card)


def _is_empty_form(card: ModelCard) -> bool:
    """Whether this is just what Transformers makes of its template."""
    if _TRANSFORMERS_FORM not in card.text or _FORM_FIELD not in card.text:
        return False
    description = f"This is the model card of a 🤗 transformers model that has been pushed on the Hub. {_TRANSFORMERS_FORM}"
    # some metadata (a license) is repeated in the text, if it was known when that was made
    forms = [ModelCard.from_template(data, model_description=description) for data in (card.data, ModelCardData())]
    return "".join(card.text.split()) in ["".join(form.text.split()) for form in forms]


def _keep_metadata(card: ModelCard, old: ModelCard, base_model: str | None) -> None:
    """Whatever else the old metadata says stays; tags are united; a base model that somebody has named stays."""
    others = [old.data.tags] if isinstance(old.data.tags, str) else old.data.tags or []
    tags = [*card.data.tags, *(tag for tag in others if tag not in card.data.tags)]
    for key, value in old.data.to_dict().items():
        if card.data.get(key) is None and key != "model-index":
            card.data[key] = value
    if old.data.get("base_model") and base_model is None:
        card.data["base_model"] = old.data["base_model"]
    if card.data.get("base_model"):
        card.data["base_model_relation"] = "quantized"
    card.data["tags"] = tags


def _marked(body: str) -> str:
    body = body.strip() + "\n\n"
    return f"{body}<!-- written by transformers-quip; sha256 of the text above: {_digest(body)} -->"


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(text.strip().splitlines()).encode()).hexdigest()


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """What was measured of the model in a folder: a list of {"dataset", "perplexity", "protocol", ...}, empty if nothing.

    Raises:
        ValueError: the file of measurements is there and cannot be used.
    """
    path = Path(folder) / EVALUATION
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): measure again or remove it") from None
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, list) or not all(map(_is_result, results)):
        raise ValueError(
            f"{path} has no list of results with dataset, perplexity (a number) and protocol: measure again or remove it"
        )
    return results


def _is_result(result: Any) -> bool:
    if not isinstance(result, dict):
        return False
    texts = all(isinstance(result.get(key), str) for key in ("dataset", "protocol"))
    return texts and _is_number(result.get("perplexity")) and _is_number(result.get("dense_perplexity", 1.0))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _eval_results(results: list[dict[str, Any]]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Language modeling",
            dataset_type=result["dataset"],
            dataset_name=result["dataset"],
            metric_type="perplexity",
            metric_name=f"Perplexity ({result['protocol']})",
            metric_value=result["perplexity"],
        )
        for result in results
        if math.isfinite(result["perplexity"])  # the Hub keeps JSON, which has no other numbers
    ]


def _generates(inventory: Inventory) -> bool:
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in inventory.config.get("architectures") or [])


def _body(title: str, inventory: Inventory, base_model: str | None, place: str, results: list[dict[str, Any]]) -> str:
    options = inventory.quantization
    origin = options.get("origin") or {}
    source = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a dense model"
    parts = [
        f"# {title}",
        f"This is {source}, quantized with transformers-quip (QuIP#: incoherence by Hadamard transforms and lattice "
        "codebooks).",
        "## Load it",
        "```bash\npip install transformers-quip\n```",
        f"```python\nimport transformers_quip\nfrom transformers import AutoModelForCausalLM\n"
        f'model = AutoModelForCausalLM.from_pretrained("{place}", device_map="auto")\n```',
        "**The first line is needed:** without it Transformers warns of an unknown quantization type and gives a model "
        "with random weights.",
        "## What it is",
        _table(_facts(inventory)),
    ]
    if results:
        rows: list[tuple[str, ...]] = [("data", "perplexity", "dense model", "protocol")]
        for result in results:
            dense = result.get("dense_perplexity")
            shown = "" if dense is None else f"{dense:.4g}"
            rows.append((result["dataset"], f"{result['perplexity']:.4g}", shown, result["protocol"]))
        parts += ["## Measured", _table(rows)]
    parts += ["## Limits", _limits(inventory), "## How it was made", _recipe(options, origin), "## Citation", _CITATION]
    return "\n\n".join(parts)


def _facts(inventory: Inventory) -> list[tuple[str, ...]]:
    options = inventory.quantization
    calibration, made_here = options.get("calibration"), bool(options.get("origin"))
    book = options["codebook"] or "by module"
    share = inventory.quantized_weights / inventory.parameters
    rows: list[tuple[str, ...]] = [
        ("", ""),
        ("method", f"codebook {book}, incoherence {options['incoherence']}, rounding {options['rounding']}"),
        ("bits per weight", f"{options['bits']:g} in the codes, {inventory.true_bits:.3f} with everything that is stored"),
        ("quantized", f"{len(inventory.linears)} layers, {share:.1%} of {inventory.parameters:,} parameters"),
        ("calibration", calibration["data"] if calibration else "none: nearest points" if made_here else "not known"),
        ("size", f"{_megabytes(inventory.dense_bytes)} before, {_megabytes(inventory.total_bytes)} now"),
    ]
    if calibration and "mean_relative_error" in calibration:
        rows.append(("mean relative error of a layer's output", f"{calibration['mean_relative_error']:.4f}"))
    return rows


def _limits(inventory: Inventory) -> str:
    lines = ["It has the limits and biases of the model that it was made from, and it has lost some of its quality."]
    if inventory.quantization.get("origin") and not inventory.quantization.get("calibration"):
        lines.append("It was quantized without calibration; at 2 bits that damages a model badly.")
    if inventory.quantized_weights < inventory.parameters:
        lines.append("Embeddings, norms, and what else is not counted as quantized above, are stored as they were.")
    return " ".join(lines)


def _recipe(options: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """The call that makes it, with every option that is not the default, and the versions."""
    if not origin:
        return f"Converted from a checkpoint of another format. Versions: transformers_quip {__version__} (this card)."
    chosen = {
        name: options[name]
        for name, option in OPTIONS.items()
        if name in options and (name == "bits" or options[name] != option.default)
    }
    average = options["codebook"] is None  # bits of each module, as they were measured, are in config.json
    usual = average or options["codebook"] == codebooks.default_for_bits(options["bits"])
    for name in ("codebook" if usual else "bits", *(("modules",) if average else ())):
        chosen.pop(name, None)
    arguments = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    source = origin.get("base_model") or origin.get("folder") or "the dense model"
    code = (
        "```python\nfrom transformers import AutoModelForCausalLM\nfrom transformers_quip import QuipConfig\n"
        f"config = QuipConfig({arguments})\n"
        f'model = AutoModelForCausalLM.from_pretrained("{source}", quantization_config=config)\n```'
    )
    given = (
        "\n\nThe data set was given by the caller and is not stored." if "given by" in str(chosen.get("dataset")) else ""
    )
    versions = ", ".join(f"{name} {version}" for name, version in (origin.get("versions") or {}).items())
    return f"{code}{given}\n\nVersions: {versions}."


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
