"""evaluate MODEL: quality, speed and size."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .console import json_option, revision_option, show_json, show_table, size, tell, token_option
from .destination import check_file
from .loading import device_option, dtype_option, find_tokenizer, load_model

text_option = click.option(
    "--dataset",
    default="wikitext2",
    show_default=True,
    help="A text file, wikitext2 (its test split, from the Hub), or self: text that the dense model writes.",
)
windows_option = click.option("--windows", default=40, show_default=True, help="Number of windows of text.")
length_option = click.option("--length", default=512, show_default=True, help="Tokens in each of them.")
batch_option = click.option("--batch-size", default=4, show_default=True, help="Windows in one forward pass.")


@click.command(short_help="Measure perplexity, divergence, speed and size.")
@click.argument("model")
@click.option("--dense", help="The dense model (folder or id): adds KL divergence and top-1 agreement.")
@text_option
@windows_option
@length_option
@batch_option
@click.option("--bos", is_flag=True, help="Put the tokenizer's BOS token before every window (Gemma needs it).")
@click.option("--new-tokens", default=64, show_default=True, help="Tokens to write for the speed; 0: not measured.")
@click.option("--save", is_flag=True, help="Keep the perplexity in MODEL (a folder), and put it on its model card.")
@dtype_option
@device_option
@revision_option
@token_option
@json_option
def command(
    model: str,
    dense: str | None,
    dataset: str,
    windows: int,
    length: int,
    batch_size: int,
    bos: bool,
    new_tokens: int,
    save: bool,
    dtype: str,
    device_map: str | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Perplexity of MODEL, KL divergence to the dense model, top-1 agreement, tokens per second, and size.

    Protocol: the text is tokenized without special tokens and cut into windows end to end; each window is read from its
    own beginning, and every token but its first is predicted from those before it. Perplexity is exp of the mean
    cross-entropy, the divergence the mean of KL(dense ‖ MODEL) in nats per token. Figures can be compared only if text,
    windows, length and --bos are the same.
    """
    from ..evaluation import check_source

    check_source(dataset)
    if save:
        _check_can_save(model)
    source: dict[str, Any] = {"revision": revision, "token": token}
    tokenizer = find_tokenizer(model, **source)
    loaded = load_model(model, dtype=dtype, device_map=device_map, **source)
    reference = load_model(dense, dtype=dtype, device_map=device_map, token=token) if dense else None
    content = measure(loaded, reference, tokenizer, dataset, windows, length, batch_size, bos, new_tokens)
    content["model"] = model
    if save:
        save_results(Path(model), content)
    if as_json:
        show_json(content)
    else:
        show_table(model, ("", ""), facts(content))


def measure(
    model: Any, reference: Any, tokenizer: Any, dataset: str, windows: int, length: int, batch_size: int, bos: bool,
    new_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything that `evaluate` prints, as values for JSON."""
    from ..evaluation import divergence, evaluation_windows, generation_speed, linear_sizes, perplexity

    if bos and getattr(tokenizer, "bos_token_id", None) is None:
        raise ValueError("--bos needs a tokenizer with a BOS token, and this model has none")
    start = tokenizer.bos_token_id if bos else None
    ids, protocol = evaluation_windows(dataset, reference or model, tokenizer, windows, length)
    protocol += ", with BOS" if bos else ""
    content: dict[str, Any] = {
        "dataset": dataset if dataset in ("self", "wikitext2") else Path(dataset).name,
        "protocol": protocol,
        "perplexity": perplexity(model, ids, batch_size, start),
    }
    if reference is not None:
        content["dense_perplexity"] = perplexity(reference, ids, batch_size, start)
        content["divergence"] = asdict(divergence(model, reference, ids, batch_size, start))
    if new_tokens:
        content["speed"] = asdict(generation_speed(model, ids[:1, : length // 2], new_tokens))
    sizes = linear_sizes(model)
    content["weight_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    content["true_bits"] = 8 * sum(s.bytes for s in sizes) / sum(s.weights for s in sizes) if sizes else None
    return content


def facts(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table."""
    rows = [("text", content["protocol"]), ("perplexity", f"{content['perplexity']:.4g}")]
    if "divergence" in content:
        kl = content["divergence"]
        rows += [
            ("perplexity of the dense model", f"{content['dense_perplexity']:.4g}"),
            (
                "KL divergence to it, nats per token",
                f"{kl['mean']:.4f} (median {kl['median']:.4f}, 99 % {kl['percentile_99']:.3f})",
            ),
            ("same likeliest token", f"{kl['top1_agreement']:.1%}"),
        ]
    if "speed" in content:
        speed = content["speed"]
        rows += [
            (f"reads a prompt of {speed['prompt_tokens']} tokens", f"{speed['prompt']:.1f} tokens/s"),
            (f"writes {speed['written_tokens']} tokens", f"{speed['written']:.1f} tokens/s"),
        ]
    rows.append(("size of all weights", size(content["weight_bytes"])))
    if content["true_bits"] is not None:
        rows.append(("true bits per quantized weight", f"{content['true_bits']:.3f}"))
    return rows


def _check_can_save(model: str) -> None:
    """Refuse before anything is measured."""
    from ..hub.model_card import EVALUATION, make_card

    if not Path(model).is_dir():
        raise ValueError(f"--save needs a folder to write into, and {model} is not a folder")
    make_card(model)
    check_file(Path(model) / EVALUATION)


def save_results(folder: Path, content: dict[str, Any]) -> None:
    """Add a result to the folder's file of measurements; it replaces an older one with the same protocol."""
    from ..hub.model_card import EVALUATION, read_results, write_card, write_whole

    path = folder / EVALUATION
    results = read_results(folder)
    kept = ("dataset", "perplexity", "dense_perplexity", "divergence", "protocol")
    new = {key: content[key] for key in kept if key in content}
    results = [result for result in results if result["protocol"] != new["protocol"]] + [new]
    write_whole(path, json.dumps({"results": results}, indent=2) + "\n")
    if not write_card(folder):
        tell("README.md has a text of its own, so the measurement is not put there.")
