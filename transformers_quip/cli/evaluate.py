"""evaluate MODEL: quality, speed and size."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..text import size
from .console import json_option, revision_option, show_json, show_table, tell, token_option
from .destination import check_file
from .loading import device_option, dtype_option, find_tokenizer, load_model

if TYPE_CHECKING:
    from torch import Tensor

# Tokens of a window's beginning that both models continue.
_PROMPT_TOKENS = 32

text_option = click.option(
    "--dataset",
    default="wikitext2",
    show_default=True,
    help="A text file, wikitext2 (its test split, from the Hub), or self: text that the dense model writes.",
)
windows_option = click.option("--windows", default=40, show_default=True, help="Number of windows of text.")
length_option = click.option("--length", default=512, show_default=True, help="Tokens in each of them.")
batch_option = click.option("--batch-size", default=4, show_default=True, help="Windows in one forward pass.")


@click.command()
@click.argument("model")
@click.option("--dense", help="The dense model (folder or id): adds KL divergence, top-1 agreement and generation quality.")
@text_option
@windows_option
@length_option
@batch_option
@click.option("--bos", is_flag=True, help="Put the tokenizer's BOS token before every window (Gemma needs it).")
@click.option("--new-tokens", default=64, show_default=True, help="Tokens to write for the speed; 0: not measured.")
@click.option(
    "--texts",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="With --dense: number of texts that both models write; 0: none.",
)
@click.option(
    "--text-length", type=click.IntRange(8), default=128, show_default=True, help="Tokens that they write for each of them."
)
@click.option("--save", is_flag=True, help="Keep the measured quality in MODEL (a folder), and put it on its model card.")
@dtype_option
@device_option
@revision_option
@token_option
@json_option
def command(
    model: str,
    dense: str | None,
    dataset: str,
    save: bool,
    dtype: str,
    device_map: str | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Perplexity, tokens per second and size of MODEL; with --dense also KL divergence and the quality of its own text.

    Protocol: the text is tokenized without special tokens and cut into windows end to end; each window is read from its
    own beginning, and every token but its first is predicted from those before it. Perplexity is exp of the mean
    cross-entropy, the divergence the mean of KL(dense ‖ MODEL) in nats per token. Figures can be compared only if text,
    windows, length and --bos are the same.

    Own text: both models continue the beginnings of the first windows, sampled at temperature 1 and greedily. The dense
    model's perplexity of the sampled text, and the share of 4-token pieces of the greedy text that occurred in it before,
    show whether MODEL can still write. Perplexity of given text does not show that.

    MODEL is released before the dense model is loaded; of MODEL, its last hidden states over the text are kept.
    """
    from ..checkpoints.headers import check_is_there
    from ..evaluation import check_source

    check_source(dataset)
    if save:
        _check_can_save(model)
    source: dict[str, Any] = {"revision": revision, "token": token}
    for place in filter(None, (model, dense)):
        check_is_there(place)
    tokenizer = find_tokenizer(model, **source)
    load = partial(load_model, model, dtype=dtype, device_map=device_map, **source)
    load_dense = partial(load_model, dense, dtype=dtype, device_map=device_map, token=token) if dense else None
    content = measure(load, load_dense, tokenizer, dataset, options)
    content["model"] = model
    if save:
        save_results(Path(model), content)
    if as_json:
        show_json(content)
    else:
        show_table(model, ("", ""), facts(content))


def measure(
    load: Callable[[], Any],
    load_dense: Callable[[], Any] | None,
    tokenizer: Any,
    dataset: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that `evaluate` prints, as values for JSON. One model is in memory at a time, if possible.

    Args:
        load: gives MODEL.
        load_dense: gives the dense model, each time that it is called; None without one.
        tokenizer: MODEL's, or None.
        dataset: see `evaluation_windows`.
        options: the values of the options that say how much is read and written.
    """
    from ..evaluation import evaluation_windows, generation_speed, linear_sizes, perplexity

    bos, windows, length, batch_size = (options[name] for name in ("bos", "windows", "length", "batch_size"))
    if bos and getattr(tokenizer, "bos_token_id", None) is None:
        raise ValueError("--bos needs a tokenizer with a BOS token, and this model has none")
    start = tokenizer.bos_token_id if bos else None
    if dataset == "self" and load_dense is not None:
        ids, protocol = evaluation_windows(dataset, load_dense(), tokenizer, windows, length)
        gc.collect()
        model = load()
    else:
        model = load()
        ids, protocol = evaluation_windows(dataset, model, tokenizer, windows, length)
    content: dict[str, Any] = {
        "dataset": dataset if dataset in ("self", "wikitext2") else Path(dataset).name,
        "protocol": protocol + (", with BOS" if bos else ""),
        "perplexity": perplexity(model, ids, batch_size, start),
    }
    if options["new_tokens"]:
        content["speed"] = asdict(generation_speed(model, ids[:1, : length // 2], options["new_tokens"]))
    sizes = linear_sizes(model)
    content["weight_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    content["true_bits"] = 8 * sum(s.bytes for s in sizes) / sum(s.weights for s in sizes) if sizes else None
    if load_dense is not None:
        holder = [model]
        del model  # the list holds it alone, so that it can be released
        content |= _against_dense(holder, load_dense, ids, start, options)
    return content


def _against_dense(
    holder: list[Any], load_dense: Callable[[], Any], ids: Tensor, start: int | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The part that needs the dense model. `holder` is a list of MODEL, which is emptied before the dense one is loaded."""
    from torch.nn.functional import pad

    from ..evaluation import divergence, judge, keep_predictions, perplexity, write
    from ..evaluation.kept import UnknownHead

    inputs = ids if start is None else pad(ids, (1, 0), value=start)
    prompts = inputs[: options["texts"], : max(2, min(_PROMPT_TOKENS, ids.shape[1] // 2))]
    written = write(holder[0], prompts, options["text_length"]) if options["texts"] else None
    predictions = holder.pop()
    try:
        predictions = keep_predictions(predictions, inputs, options["batch_size"])
    except UnknownHead as error:
        tell(f"both models are in memory at once: {error}")
    gc.collect()  # hooks of accelerate refer to their modules in circles
    dense = load_dense()
    content: dict[str, Any] = {
        "dense_perplexity": perplexity(dense, ids, options["batch_size"], start),
        "divergence": asdict(divergence(predictions, dense, ids, options["batch_size"], start)),
    }
    if written is not None:
        found = judge(dense, prompts, written)
        figures = ("perplexity", "own_perplexity", "repetition", "own_repetition")
        content["generation"] = {name: getattr(found, name) for name in figures}
        content["generation"] |= {
            "texts": len(prompts),
            "prompt_tokens": prompts.shape[1],
            "written_tokens": written.greedy.shape[1],
        }
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
    if "generation" in content:
        own = content["generation"]
        rows += [
            ("dense model's perplexity of text that it samples", f"{own['perplexity']:.4g}"),
            ("the same of the dense model's own text", f"{own['own_perplexity']:.4g}"),
            ("repeated pieces of 4 tokens in its greedy text", f"{own['repetition']:.1%}"),
            ("the same in the dense model's own text", f"{own['own_repetition']:.1%}"),
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
    from ..checkpoints.unfinished import write_whole
    from ..hub.model_card import EVALUATION, read_results, write_card

    path = folder / EVALUATION
    results = read_results(folder)
    kept = ("dataset", "perplexity", "dense_perplexity", "divergence", "generation", "protocol")
    new = {key: content[key] for key in kept if key in content}
    results = [result for result in results if result["protocol"] != new["protocol"]] + [new]
    write_whole(path, json.dumps({"results": results}, indent=2) + "\n")
    if not write_card(folder):
        tell("README.md has a text of its own, so the measurement is not put there.")
