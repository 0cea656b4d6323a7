"""compare A B: two models side by side."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ..text import size
from .console import json_option, show_json, show_table, token_option
from .evaluate import batch_option, length_option, windows_option
from .inspect import describe, read
from .loading import device_option, dtype_option, find_tokenizer, load_model


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--dataset",
    help="A text file, wikitext2, or self (text that B writes): loads both models and compares their predictions.",
)
@windows_option
@length_option
@batch_option
@dtype_option
@device_option
@token_option
@json_option
def command(
    a: str,
    b: str,
    dataset: str | None,
    windows: int,
    length: int,
    batch_size: int,
    dtype: str,
    device_map: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Sizes and bits of the models A and B; with --dataset also their perplexities and the KL divergence of A from B.

    Without --dataset only configs and the headers of the weight files are read.
    """
    if dataset is not None:
        from ..evaluation import check_source

        check_source(dataset)
    content: dict[str, Any] = {name: describe(read(name, token=token), 4096) for name in (a, b)}
    if dataset is not None:
        content["predictions"] = _predictions(a, b, dataset, windows, length, batch_size, dtype, device_map, token)
    if as_json:
        show_json(content)
        return
    rows = [
        (label, *(_shown(content[name].get(key), form) for name in (a, b)))
        for label, key, form in (
            ("method", "quant_method", str),
            ("codebook", "codebook", str),
            ("true bits per weight", "true_bits", "{:.3f}".format),
            ("quantized layers", "quantized_layers", str),
            ("parameters", "parameters", "{:,}".format),
            ("weights", "weight_bytes", size),
            ("memory to run it", "memory_bytes", size),
        )
    ]
    if dataset is not None:
        predictions = content["predictions"]
        rows.append(("perplexity", *(f"{predictions['perplexity'][name]:.4g}" for name in (a, b))))
        kl = predictions["divergence"]
        rows.append(("KL divergence of A to B, nats per token", f"{kl['mean']:.4f}", ""))
        rows.append(("same likeliest token", f"{kl['top1_agreement']:.1%}", ""))
        rows.append(("text", predictions["protocol"], ""))
    show_table(f"{a}  and  {b}", ("", "A", "B"), rows)


def _shown(value: Any, form: Any) -> str:
    return "-" if value is None else form(value)


def _predictions(
    a: str, b: str, dataset: str, windows: int, length: int, batch_size: int, dtype: str, device_map: str | None,
    token: str | None,
) -> dict[str, Any]:  # fmt: skip
    from ..evaluation import divergence, evaluation_windows, perplexity

    tokenizer = find_tokenizer(b, token=token)
    models = {name: load_model(name, dtype=dtype, device_map=device_map, token=token) for name in (a, b)}
    ids, protocol = evaluation_windows(dataset, models[b], tokenizer, windows, length)
    return {
        "protocol": protocol,
        "perplexity": {name: perplexity(model, ids, batch_size) for name, model in models.items()},
        "divergence": asdict(divergence(models[a], models[b], ids, batch_size)),
    }
