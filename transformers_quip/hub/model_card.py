"""The model card of a quantized model, made from the files in its folder.

A card is written if there is none yet. It replaces an earlier card of this package that nobody has edited, and the empty
form that Transformers leaves. It never replaces a text that somebody has written, unless asked to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoints.inventory import Inventory, read_folder
from ..checkpoints.unfinished import write_whole
from ..config import QUANT_METHOD, QuipConfig
from ..text import one_line
from . import card_text, claims

logger = logging.getLogger(__name__)

CARD = "README.md"
# The file in which `transformers-quip evaluate --save` stores its measurements.
EVALUATION = "quip_evaluation.json"
_MARK = re.compile(r"<!-- written by transformers-quip; sha256 of the text above: ([0-9a-f]{64}) -->")
_TRANSFORMERS_FORM = "This model card has been automatically generated."
_FORM_FIELD = "[More Information Needed]"


def make_card(folder: str | Path, *, repo_id: str | None = None, base_model: str | None = None) -> ModelCard:
    """The card of the quantized model in a folder.

    Args:
        folder: as `save_pretrained` wrote it; measured perplexities are taken from `quip_evaluation.json` if that is there.
        repo_id: where it is or will be on the Hub.
        base_model: the dense model's id on the Hub, where config.json does not know it.

    Raises:
        ValueError: the folder does not hold a model that was quantized by this package, or a file cannot be read.
    """
    inventory = read_folder(folder)
    options = inventory.quantization
    if options.get("quant_method") != QUANT_METHOD or not inventory.linears:
        raise ValueError(
            f"{folder} does not hold a model that was quantized by transformers-quip, so there is no card to write"
        )
    if base_model is not None and not claims.is_repo_id(base_model):
        raise ValueError(f"base_model {base_model!r} is not the id of a model on the Hub")
    config = _checked(options)
    origin = claims.origin(options)
    base_model = base_model or origin.get("base_model")
    results = read_results(folder)
    measured = _eval_results(results)
    name = base_model or origin.get("folder") or next(iter(claims.architectures(inventory.config)), "model")
    title = f"{one_line(name).rpartition('/')[2]}, {config.bits:g} bits per weight"
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation" if _generates(inventory) else None,
        tags=["quip", f"{config.bits:g}-bit", "quantized", "transformers-quip"],
        quantized_by=repo_id.partition("/")[0] if repo_id and "/" in repo_id else "transformers-quip",
        model_name=title if measured else None,
        eval_results=measured or None,
    )
    body = card_text.body(title, inventory, config, base_model, repo_id or "path/or/repo", results)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_marked(body)}\n")


def write_card(
    folder: str | Path, *, repo_id: str | None = None, base_model: str | None = None, overwrite: bool = False
) -> bool:
    """Write the card of the quantized model in a folder, unless somebody's own text is there.

    The metadata of a replaced card (a license, tags) is kept.

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
    except (ValueError, OSError, yaml.YAMLError) as error:
        logger.warning(
            "The model in %s is saved, but no model card (README.md) was written: %s "
            "(hub.model_card.write_card writes it once this is fixed)",
            folder,
            error,
        )
        return False


def remove_stale_card(folder: str | Path) -> bool:
    """Remove an unedited card of ours from a folder whose model is not quantized by this package any more.

    Returns:
        Whether it was there and is gone. A card that somebody has edited stays, with a warning if it has our mark.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        return False
    raw = path.read_bytes()
    if b"<!-- written by transformers-quip; " not in raw:
        return False
    card = _parse(raw)
    if card is None or not is_ours_to_replace(card):
        logger.warning("%s has a text of its own about a quantized model, but the model there is not quantized now", path)
        return False
    path.unlink()
    return True


def _parse(raw: bytes) -> ModelCard | None:
    """A card; None if it is not UTF-8 or its metadata is not that of a card, so that no program has written it."""
    try:
        return ModelCard(raw.decode(), ignore_metadata_errors=True)
    except MemoryError:
        raise
    except Exception:  # of YAML, or of metadata with values of other types
        return None


def is_ours_to_replace(card: ModelCard) -> bool:
    """Whether a card's text is empty, an unedited one of ours, or Transformers' form that nobody has filled in."""
    body = card.text.strip()
    mark = _MARK.search(body)
    if mark:
        return mark[1] == _digest(body[: mark.start()]) and not body[mark.end() :].strip()
    return not body or _is_empty_form(card)


def _is_empty_form(card: ModelCard) -> bool:
    """Whether this is Transformers' template with nothing filled in."""
    if _TRANSFORMERS_FORM not in card.text or _FORM_FIELD not in card.text:
        return False
    description = f"This is the model card of a 🤗 transformers model that has been pushed on the Hub. {_TRANSFORMERS_FORM}"
    # some metadata (a license) is repeated in the text, if it was known when that was made
    forms = [ModelCard.from_template(data, model_description=description) for data in (card.data, ModelCardData())]
    return "".join(card.text.split()) in ["".join(form.text.split()) for form in forms]


def _keep_metadata(card: ModelCard, old: ModelCard, base_model: str | None) -> None:
    """Whatever else the old metadata says stays; tags are united; a base model that somebody has named stays."""
    found = old.data.tags
    others = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    tags = [*card.data.tags, *(tag for tag in others if isinstance(tag, str) and tag not in card.data.tags)]
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
    """The measurements of the model in a folder: a list of {"dataset", "perplexity", "protocol", ...}, or an empty list.

    Raises:
        ValueError: the file of measurements is there and cannot be used.
    """
    path = Path(folder) / EVALUATION
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): measure again or remove it") from None
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
    numbers = _is_number(result.get("perplexity")) and _is_number(result.get("dense_perplexity", 1.0))
    return texts and numbers and all(_are_numbers(result.get(part)) for part in ("divergence", "generation"))


def _are_numbers(part: Any) -> bool:
    """Whether a part of a result is absent, or an object of numbers."""
    return part is None or (isinstance(part, dict) and all(map(_is_number, part.values())))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def _eval_results(results: list[dict[str, Any]]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Language modeling",
            dataset_type=one_line(result["dataset"]),
            dataset_name=one_line(result["dataset"]),
            metric_type="perplexity",
            metric_name=one_line(f"Perplexity ({result['protocol']})"),
            metric_value=result["perplexity"],
        )
        for result in results
        if math.isfinite(result["perplexity"])  # the Hub keeps JSON, which has no other numbers
    ]


def _generates(inventory: Inventory) -> bool:
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in claims.architectures(inventory.config))


def _checked(options: Mapping[str, Any]) -> QuipConfig:
    """The config that the options stand for. Raises `ValueError` where somebody has edited them, and wrongly."""
    try:
        return QuipConfig.from_dict(dict(options))
    except ValueError:
        raise
    except Exception as error:  # a value of an unexpected kind may raise anything
        raise ValueError(f"the quantization_config cannot be used ({type(error).__name__}: {error})") from error
