"""quantize MODEL OUT: quantize a model and save it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..text import size
from .console import json_option, revision_option, show, show_json, tell, token_option
from .destination import check_file, check_not_source
from .loading import check_dense, device_option, dtype_option, find_tokenizer, read_config


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--bits", type=float, help="Code bits per weight.  [default: 2, or the bits of --codebook]")
@click.option("--codebook", help="Codebook by name, instead of --bits.")
@click.option(
    "--dataset",
    default="self",
    show_default=True,
    help="Calibration data: self (text that the model writes), self:NAME (that another model writes), none, a text file "
    "(documents between blank lines), or the name of a data set that Optimum knows (wikitext2, c4).",
)
@click.option(
    "--tokenizer",
    "tokenizer_name",
    metavar="NAME",
    help="Folder or id on the Hub of the tokenizer to calibrate with and to save.  [default: MODEL's own]",
)
@click.option("--num-samples", default=256, show_default=True, help="Token sequences to calibrate on.")
@click.option("--sequence-length", default=512, show_default=True, help="Tokens in each of them.")
@click.option("--batch-size", default=8, show_default=True, help="Sequences in one forward pass.")
@click.option(
    "--tensor-parallel",
    type=int,
    metavar="N",
    help="Choose transforms with which N devices, or a divisor of N, can share each layer without more traffic.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed.")
@click.option(
    "--tune",
    type=click.Choice(["none", "vectors", "full"]),
    default="none",
    show_default=True,
    help="Train after rounding, on the same text: vectors (su, sv and the norms), full (each block as well).",
)
@click.option("--skip", multiple=True, metavar="MODULE", help="Name or pattern of modules to leave dense; repeatable.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other option of QuipConfig, the value as JSON (a bare word is a string); repeatable.",
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write an HTML file with pictures.")
@click.option(
    "--peers",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="For --report: JSON of {name: perplexity} to compare with.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest size of a file of weights.")
@click.option("--overwrite", is_flag=True, help="Replace the model in OUT, once the new one is complete.")
@click.option("--fresh", is_flag=True, help="Delete an unfinished run in OUT instead of resuming it.")
@dtype_option
@device_option
@revision_option
@token_option
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code in MODEL's or the tokenizer's repository.")
@json_option
def command(
    model: str,
    out: Path,
    report: Path | None,
    peers: Path | None,
    max_shard_size: str,
    overwrite: bool,
    fresh: bool,
    dtype: str,
    device_map: str | None,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    tokenizer_name: str | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Quantize MODEL (a folder or an id on the Hub) and save it, with its tokenizer and a model card, in OUT.

    Memory holds one decoder block at a time. Finished blocks are kept in OUT/.quantizing: after an error, Ctrl-C or a power
    cut the same command resumes. OUT is a model only when it is complete; one that was there stays until then.
    """
    options = config_options(**chosen)
    if report is not None and options["dataset"] is None:
        raise click.UsageError("--report needs calibration: --dataset none measures nothing")
    known_peers = _read_peers(peers)

    from ..calibration import processes
    from ..config import QuipConfig
    from ..hf.stream import quantize

    source: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    config = QuipConfig(**options)
    check_not_source(out, model)
    check_dense(model, read_config(model, **source))
    if report is not None and out.absolute() not in report.absolute().parents:
        check_file(report)
    tokenizer = None
    if tokenizer_name is not None:  # before the work, because it may need the network; --revision is for MODEL only
        reasons: list[str] = []
        tokenizer = find_tokenizer(tokenizer_name, reasons.append, **source | {"revision": None})
        if tokenizer is None:
            raise ValueError(f"--tokenizer {tokenizer_name}: {reasons[0]}")
    quantized = quantize(
        model,
        out,
        config,
        dtype=dtype,
        device=device_of(device_map),
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        fresh=fresh,
        **source,
    )
    if not processes.is_first():
        return
    if report is not None:
        from ..evaluation.html_report import write_report

        write_report(report, quantized, known_peers)
        tell(f"report: {report}")
    _conclude(out, as_json)


def device_of(device_map: str | None) -> str:
    """The device for one block: --device-map, of which "auto" is the accelerator if there is one."""
    if device_map == "auto":
        import torch

        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if found is None else str(found)
    return device_map or "cpu"


def config_options(
    bits: float | None,
    codebook: str | None,
    dataset: str,
    skip: tuple[str, ...],
    options: tuple[str, ...],
    **others: Any,
) -> dict[str, Any]:
    """The command line as keywords of QuipConfig.

    Raises:
        ValueError: an --option without "=", or a text file that is not there or empty.
    """
    result: dict[str, Any] = {"dataset": dataset_of(dataset), **others}
    if bits is not None:
        result["bits"] = int(bits) if bits == int(bits) else bits
    if codebook is not None:
        result["codebook"] = codebook
    if skip:
        result["modules_to_not_convert"] = list(skip)
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise ValueError(f"--option {option!r} must be NAME=VALUE")
        try:
            result[name] = json.loads(value)
        except (ValueError, RecursionError):
            result[name] = value
    return result


def dataset_of(value: str) -> Any:
    """None for "none", the documents of a text file, else the name as it is."""
    if value == "none":
        return None
    if value.startswith("self:"):
        return value
    path = Path(value)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:  # names of data sets have neither
            raise ValueError(f"--dataset {value}: the file does not exist")
        return value
    documents = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n")]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"--dataset {value} has no text in it")
    return documents


def _read_peers(path: Path | None) -> dict[str, float]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--peers {path} is not JSON ({error})") from None
    if not isinstance(content, dict) or not all(type(value) in (int, float) for value in content.values()):
        raise ValueError(f"--peers {path} must hold one JSON object of names and perplexities")
    return content


def _conclude(out: Path, as_json: bool) -> None:
    from ..checkpoints.inventory import read_folder

    inventory = read_folder(out)
    if as_json:
        show_json(
            {
                "folder": str(out),
                "true_bits": inventory.true_bits,
                "quantized_layers": len(inventory.linears),
                "weight_bytes": inventory.total_bytes,
                "dense_bytes": inventory.dense_bytes,
                "calibration": inventory.quantization.get("calibration"),
            }
        )
        return
    show(
        f"{out}: {len(inventory.linears)} layers at {inventory.true_bits:.3f} bits per weight, "
        f"{size(inventory.dense_bytes)} before, {size(inventory.total_bytes)} now"
    )
