"""Quantize a model from folder to folder, with the memory of one block: `transformers_quip.quantize`.

The model is built without weights. Its blocks are read, quantized and written one after the other by the recipe that
`from_pretrained` uses, so the result is the same. A run that is stopped resumes after its last finished block.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped] # accelerate needs it, too
import torch
from safetensors import SafetensorError
from torch import nn

from ..calibration import find_blocks, processes
from ..calibration.dataset import DOCUMENT_LENGTH, fitting_length, is_written, is_written_by_the_model, load_token_ids
from ..calibration.tokenizer import Source
from ..checkpoints.claimed import check_free
from ..checkpoints.durable import flush
from ..checkpoints.unfinished import WORK
from ..config import QuipConfig
from ..config.tune import TuneOptions
from ..finetune.recipe import held_out_windows, quantize_and_tune
from ..nn import replace
from ..quantize.bars import LoadingBar
from ..quantize.block import ModuleResult
from ..quantize.estimate import estimate
from ..quantize.plan import QuantizationPlan, check_device, make_plan
from ..quantize.recipe import QuantizationReport, quantize_embeddings, quantize_without_data
from ..quantize.state import FOLDER, RunState, is_moving
from ..quantize.tensor_parallel import settle_transforms
from . import patches
from .dense import dense_model, fingerprint, local_folder, own_tokenizer, weight_files
from .modes import check_is_causal, recorded, tell_plan
from .quantizer import QuipQuantizer
from .replacing import replaced_model
from .streamed import StreamedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def quantize(
    source: str | Path,
    out: str | Path,
    config: QuipConfig | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    fresh: bool = False,
) -> PreTrainedModel:
    """Quantize a causal language model from a folder (or the Hub) to a folder, with the memory of one block.

    In memory are the weights outside of the decoder blocks, one dense block, its Hessians, and the result of one block.
    Hidden states and finished blocks are in files of `out/.quantizing`. If a run is stopped, by whatever, the same call
    resumes it after the last finished block. The result has the same tensors as
    `from_pretrained(source, quantization_config=config)` and `save_pretrained(out)`.

    In several processes (torchrun, `accelerate launch`) each runs a part of the text through every block, and rounds some
    of its linears. They need a file system that all of them see, and give the result of one process.

    Args:
        source: a folder with the dense model, or its name on the Hub.
        out: a folder that is empty or does not exist, or that has an unfinished run of this call.
        config: how; None: `QuipConfig()`. It is not changed.
        dtype: of the dense weights: "auto" (as they are stored), "float32", "bfloat16" or "float16".
        device: where blocks are computed, such as "cuda:0". With several processes and a device other than "cpu", each has
            one of its own.
        tokenizer: to calibrate with and to save; None: the model's own, if it has one.
        revision, token: as for `from_pretrained`.
        trust_remote_code: whether code of the repository may be run.
        max_shard_size: largest size of a file of weights, as for `save_pretrained`.
        overwrite: whether a model that is in `out` may be replaced, when the new one is complete.
        fresh: whether an unfinished run in `out` is deleted, instead of resumed.

    Returns:
        The quantized model, whose weights are on the meta device. `model.hf_quantizer.report` is the report of a calibrated
        run (`QuantizationReport`).

    Raises:
        ValueError: the model or a combination of options cannot be used; or `out` holds something else, another process
            is writing to it, or its unfinished run is of other settings (the message says which).
        OSError: a file cannot be read or written. What is finished is kept.
    """
    config = (config or QuipConfig()).__deepcopy__({})
    target = Path(out)
    check_device(device)
    device = _join(config, device)
    if not is_moving(target):
        check_free(target, overwrite, _content(target))
    access = {name: value for name, value in (("revision", revision), ("token", token)) if value is not None}
    folder = local_folder(source, access)
    if target.exists() and target.resolve() == folder.resolve():
        raise ValueError(f"{target} is the model that is read: choose another place for the new one")
    patches.install()
    model = dense_model(folder, str(source), dtype, trust_remote_code)
    if config.is_calibrated:
        check_is_causal(model)
    plan = make_plan(model, config)
    config = settle_transforms(model, config, plan)
    tell_plan(model, config, plan)
    if tokenizer is None:
        tokenizer = own_tokenizer(folder, trust_remote_code)
    if config.tokenizer is None:
        config.tokenizer = tokenizer
    paths = weight_files(folder)
    data = None
    if config.is_calibrated and not is_written(config):
        data = load_token_ids(config, model, source=Source(str(folder)), held_out=held_out_windows(config))
        if TuneOptions.parse(config.tune).tunes_vectors:
            TuneOptions.parse(config.tune).check_windows(len(data[0]))
    with _run(target, fingerprint(folder, paths, config, model, data, device), fresh) as state:
        weights = StreamedWeights(model, paths, _parts(model, config), config, state, device)
        weights.load_outside()
        if config.is_calibrated:
            if processes.is_first():
                _tell_estimate(model, config, plan, weights, data)
            report = _calibrated(model, config, weights, data, str(folder))
            settled = report.config
        else:
            report, settled = None, config
            _without_calibration(model, config, plan, weights)
        if processes.is_first():
            weights.load_results()
        settled = recorded(model, settled)
        _save(model, settled, report, tokenizer, target, max_shard_size, state)
    for name, parameter in model.named_parameters():
        owner, _, key = name.rpartition(".")
        empty = torch.empty_like(parameter, device="meta")
        model.get_submodule(owner)._parameters[key] = nn.Parameter(empty, requires_grad=False)
    return model


def _join(config: QuipConfig, device: str | torch.device) -> str | torch.device:
    """Join the processes that this one was started with, and choose its device.

    Raises:
        ValueError: several processes cannot do what the config asks for.
    """
    together = processes.join()
    if processes.count() == 1:
        return device
    if not config.is_calibrated:
        raise ValueError("dataset=None is for one process: without calibration there is nothing to share")
    if TuneOptions.parse(config.tune).mode != "none":
        raise ValueError(
            "tune is for one process here: quantize in several processes without it, and run `transformers-quip tune` in "
            "several afterwards"
        )
    if not processes.is_first():
        logging.getLogger(__package__.partition(".")[0]).setLevel(logging.ERROR)
    return together.device if together is not None and torch.device(device).type != "cpu" else device


def _content(target: Path) -> list[str]:
    """The names in the folder that are not of an unfinished run."""
    names = os.listdir(target) if target.is_dir() else []
    return sorted(name for name in names if name != FOLDER and not name.startswith(WORK))


@contextmanager
def _run(target: Path, fingerprint: Mapping[str, Any], fresh: bool) -> Iterator[RunState]:
    """The state of a run, which stays if the run does not come to its end."""
    state = RunState(target, fingerprint, fresh)
    try:
        yield state
    except BaseException as error:
        if state.close(keep=True):
            logger.warning("%s has the finished parts of this run: the same call resumes it", state.folder)
        if isinstance(error, SafetensorError):
            raise OSError(f"{target} cannot be written: {error}") from error
        raise
    state.close(keep=False)


def _tell_estimate(
    model: PreTrainedModel,
    config: QuipConfig,
    plan: QuantizationPlan,
    weights: StreamedWeights,
    data: tuple[torch.Tensor, str] | None,
) -> None:
    """Log what the run needs; of a resumed one nothing is said, because its bar begins where it was stopped."""
    if weights.state.finished:
        return
    written = DOCUMENT_LENGTH if is_written_by_the_model(config) else 0
    samples = config.num_samples + held_out_windows(config)
    shape = (samples, fitting_length(config.sequence_length, model)) if data is None else tuple(data[0].shape)
    memory = psutil.Process().memory_info().rss
    logger.info(estimate(model, plan, config, (shape[0], shape[1]), written, memory, weights).sentences())


def _calibrated(
    model: PreTrainedModel,
    config: QuipConfig,
    weights: StreamedWeights,
    data: tuple[torch.Tensor, str] | None,
    folder: str,
) -> QuantizationReport:
    """Quantize with the text that is given, that an earlier run has kept, or that is written now."""
    data = data or weights.state.text()
    if data is None:
        data = _written(model, config, weights, Source(folder))
        weights.state.keep_text(*data)
    return quantize_and_tune(model, config, data, weights, weights.state.folder)


def _written(
    model: PreTrainedModel, config: QuipConfig, weights: StreamedWeights, source: Source
) -> tuple[torch.Tensor, str]:
    """Text that this model or another one writes."""
    held_out = held_out_windows(config)
    if not is_written_by_the_model(config):
        return processes.from_first(lambda: load_token_ids(config, model, source=source, held_out=held_out))
    with weights.whole():
        writer = None if processes.from_first(weights.fit) else weights.writer()
        return load_token_ids(config, model, held_out=held_out, writer=writer, shared=weights.shared)


def _without_calibration(
    model: PreTrainedModel, config: QuipConfig, plan: QuantizationPlan, weights: StreamedWeights
) -> None:
    """Quantize part by part, as `from_pretrained` does while it reads the weights."""
    bar = LoadingBar(plan.names)
    inside = {name for part in weights.parts for name in plan.names if name.startswith(part)}
    for part in (*weights.parts, *(f"{name}." for name in plan.names if name not in inside)):
        finished = weights.restore(part)
        for record in finished or ():
            bar.advance(record["name"], record["relative_error"])
        if finished is not None:
            continue
        prefix = part if part in weights.parts else ""
        with weights.part(part) if prefix else nullcontext():
            names = [name for name in plan.names if f"{name}.".startswith(part)]
            weights.finish(part, _quantize_part(model, config, plan, prefix, names, bar), {})


def _quantize_part(
    model: PreTrainedModel,
    config: QuipConfig,
    plan: QuantizationPlan,
    prefix: str,
    names: Sequence[str],
    bar: LoadingBar,
) -> list[dict[str, Any]]:
    """Quantize these modules, whose names begin with the prefix, without calibration; returns their records."""
    records: list[dict[str, Any]] = []

    def done(module: ModuleResult) -> None:
        records.append(module.record)
        bar.advance(module.name, module.quantized.statistics["relative_error"])

    tables = [name for name in names if name in plan.embeddings]
    quantize_embeddings(model, tables, config, done)
    others = [name.removeprefix(prefix) for name in names if name not in tables]
    quantize_without_data(model, others, prefix, config, done)
    return records


def _save(
    model: PreTrainedModel,
    config: QuipConfig,
    report: QuantizationReport | None,
    tokenizer: Any,
    target: Path,
    max_shard_size: int | str,
    state: RunState,
) -> None:
    """Write the model as `save_pretrained` does; `target` is a model when all of it is on the disk."""
    quantizer = QuipQuantizer(config)
    quantizer.report, quantizer.pre_quantized = report, True
    model_: Any = model
    model_.hf_quantizer, model_.config.quantization_config = quantizer, config
    replace.freeze(model)
    if not processes.is_first():
        return
    with replaced_model(target) as work:
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        model.save_pretrained(work, max_shard_size=max_shard_size)
        for path in work.iterdir():
            if path.is_file():
                flush(path)
        state.moving()
    flush(target)


def _parts(model: PreTrainedModel, config: QuipConfig) -> list[str]:
    """The prefixes of the decoder blocks; without calibration, of the members of every outermost list of modules."""
    if config.is_calibrated:
        name, blocks = find_blocks(model)
        return [f"{name}.{index}." for index in range(len(blocks))]
    parts: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(parts)):
            parts += [f"{name}.{index}." for index, member in enumerate(module) if any(True for _ in member.parameters())]
    return parts
