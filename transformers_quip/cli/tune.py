"""tune MODEL OUT: bring a quantized model closer to the dense one, and save it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .console import json_option, show, show_json, tell, token_option
from .destination import check_file, check_not_source, new_folder
from .loading import check_dense, device_option, dtype_option, find_tokenizer, load_model, read_config
from .quantize import dataset_of


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dense", required=True, help="The model that was quantized: a folder or an id on the Hub.")
@click.option(
    "--dataset",
    default="self",
    show_default=True,
    help="Training data: self (text that the dense model writes), a text file (documents between blank lines), or the "
    "name of a data set that Optimum knows.",
)
@click.option("--num-samples", default=256, show_default=True, help="Token sequences to train on.")
@click.option("--sequence-length", default=512, show_default=True, help="Tokens in each of them.")
@click.option("--held-out", default=16, show_default=True, help="Further sequences that decide whether the result is kept.")
@click.option(
    "--own-windows",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Further sequences to train on, which MODEL writes itself: the dense model corrects what it would say.",
)
@click.option("--epochs", default=2.0, show_default=True, help="Number of times that each sequence is read.")
@click.option("--batch-size", default=4, show_default=True, help="Sequences in one step.")
@click.option("--learning-rate", default=5e-3, show_default=True, help="Learning rate of factors that begin at 1.")
@click.option("--embeddings", is_flag=True, help="Train the embeddings and the output head as well; they stay dense.")
@click.option(
    "--reverse",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Share of KL(quantized || dense) in the loss: it punishes tokens that only the quantized model would write.",
)
@click.option(
    "--code-rounds",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Afterwards, move codes in this many rounds; each is kept only if it helps on the held-out sequences.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed of the text and its order.")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder for the state of the run: a stopped run resumes from it.",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write an HTML file with a plot of the KL divergence.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there, once the new model is complete.")
@dtype_option
@device_option
@token_option
@json_option
def command(
    model: str,
    out: Path,
    dense: str,
    dataset: str,
    num_samples: int,
    sequence_length: int,
    held_out: int,
    own_windows: int,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    embeddings: bool,
    reverse: float,
    code_rounds: int,
    seed: int,
    state: Path | None,
    report_file: Path | None,
    overwrite: bool,
    dtype: str,
    device_map: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Train su, sv and the norms of MODEL, a quantized model, to match the dense model's predictions; save it in OUT.

    With --embeddings, its embeddings and output head, which must be dense, are trained as well.

    The codes stay, or with --code-rounds a few of them become others, so OUT has the size and the speed of MODEL. If the
    result is not better on held-out text, OUT is a copy of MODEL, and a message says so.
    """
    from ..checkpoints.sizes import check_same_sizes
    from ..config import QuipConfig
    from ..finetune import TuneOptions, processes

    options = TuneOptions(
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        held_out=held_out,
        embeddings=embeddings,
        reverse=reverse,
        code_rounds=code_rounds,
        seed=seed,
    )
    data = QuipConfig(dataset=dataset_of(dataset), num_samples=num_samples, sequence_length=sequence_length, seed=seed)
    if data.dataset is None:
        raise click.UsageError("--dataset none: tuning needs text")
    loading: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "token": token}
    check_not_source(out, model)
    dense_config = read_config(dense, token=token)
    check_dense(dense, dense_config)
    config = read_config(model, token=token)
    if not config.get("quantization_config"):
        raise ValueError(f"{model} is a dense model: quantize it first (transformers-quip quantize {model} …)")
    try:
        check_same_sizes(config, dense_config)
    except ValueError as error:
        raise ValueError(f"--dense {dense} is not the model that {model} was made from: {error}") from None
    if report_file is not None and out.absolute() not in report_file.absolute().parents:
        check_file(report_file)
    together = processes.join()
    if together is not None and state is None:
        raise click.UsageError("several processes share the dense model's states: --state names a folder for them")
    if together is not None and together.device.type != "cpu" and device_map is None:
        loading["device_map"] = {"": together.device}
    if not processes.is_first():
        tune_folder(model, dense, None, options, data, state, own_windows, **loading)
        return
    with new_folder(out, overwrite) as folder:
        tuned, report = tune_folder(model, dense, folder, options, data, state, own_windows, **loading)
    if report_file is not None:
        from ..evaluation.html_report import write_report

        write_report(report_file, tuned, records=(), tuning=report.to_dict() | {"history": report.history})
        tell(f"report: {report_file}")
    _conclude(out, report, as_json)


def tune_folder(
    source: str,
    dense: str,
    folder: Path | None,
    options: Any,
    data: Any,
    state: Path | None,
    own_windows: int = 0,
    **loading: Any,
) -> tuple[Any, Any]:
    """Read with the dense model, tune the quantized one and write it to the folder; returns that model and the report.

    Only one of the two models is in memory at a time, so that the quantized one is loaded again after it has written
    `own_windows` sequences. Of several processes, the first makes the text and the dense model's
    states, and has a folder.
    """
    from ..finetune import tune_vectors

    reasons: list[str] = []
    tokenizer = find_tokenizer(source, reasons.append, token=loading["token"])
    own = None
    if own_windows:
        own = _written_by(load_model(source, **loading), tokenizer, own_windows, data)
    teacher = _read_densely(load_model(dense, **loading), tokenizer, options, data, state, own)
    quantized = load_model(source, **loading)
    report = tune_vectors(quantized, teacher, options, state)
    if folder is None:
        return quantized, report
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for reason in reasons:
        tell(reason)
    quantized.save_pretrained(folder)
    return quantized, report


def _written_by(model: Any, tokenizer: Any, count: int, data: Any) -> Any:
    """Token ids [count, T] that the quantized model writes, by the first process."""
    from ..calibration.dataset import load_token_ids
    from ..config import QuipConfig
    from ..finetune import processes

    config = QuipConfig(num_samples=count, sequence_length=data.sequence_length, seed=data.seed)
    return processes.from_first(lambda: load_token_ids(config, model, tokenizer)[0])


def _read_densely(model: Any, tokenizer: Any, options: Any, data: Any, state: Path | None, own: Any) -> Any:
    """The text, with what the quantized model wrote, and the dense model's states over it, by the first process."""
    import torch

    from ..calibration.dataset import load_token_ids
    from ..finetune import processes, record

    ids, description = processes.from_first(lambda: load_token_ids(data, model, tokenizer, held_out=options.held_out))
    if own is not None:
        ids = torch.cat([own.to(ids), ids])  # the last ones are held out
        description += f", and {len(own)} x {own.shape[1]} that the quantized model wrote"
    first = processes.is_first()
    if first:
        tell(f"tuning on {description}")
    path = None if state is None else state / "teacher.bin"
    return processes.first_before_others(lambda: record(model, ids, path, progress=first))


def _conclude(out: Path, report: Any, as_json: bool) -> None:
    if as_json:
        show_json({"folder": str(out), **report.to_dict(), "history": report.history})
        return
    codes = report.codes
    kept = "" if report.verdict.accepted else "; not better, so su, sv and norms are unchanged"
    if codes is not None:
        kept += f"; {codes.moved} of {codes.blocks} blocks moved, {codes.verdict.after:.4f} after that"
    show(
        f"{out}: KL divergence to the dense model {report.verdict.before:.4f} before, {report.verdict.after:.4f} after, "
        f"on {report.tokens} tokens in {report.seconds:.0f} s{kept}"
    )
