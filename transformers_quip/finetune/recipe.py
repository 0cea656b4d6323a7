"""Quantize a dense model in memory and tune it: the option `tune` of a config."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..calibration.dataset import load_token_ids
from ..calibration.inputs import GivenInputs
from ..config.tune import TuneOptions
from ..quantize.recipe import QuantizationReport, quantize_model
from ..quantize.residence import IN_MEMORY, Residence
from .blockwise import BlockTuner
from .end_to_end import tune_vectors
from .teacher import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import QuipConfig


def held_out_windows(config: QuipConfig) -> int:
    """How many windows of text the tuning of this config holds out; 0 without tuning."""
    options = TuneOptions.parse(config.tune)
    return options.held_out if options.tunes_vectors else 0


def quantize_and_tune(
    model: PreTrainedModel,
    config: QuipConfig,
    data: tuple[torch.Tensor | GivenInputs, str] | None = None,
    residence: Residence = IN_MEMORY,
    state: Path | None = None,
) -> QuantizationReport:
    """Quantize a model in place, and tune it as `config.tune` says.

    If vectors are tuned, the last windows of the data are held out: neither the Hessians nor the tuning see them.

    Args:
        model: dense.
        config: how; it is not changed.
        data: the result of [`load_data`] with [`held_out_windows`]; None: it is made here.
        residence: where the weights are.
        state: a folder for the dense model's states and for the state of the tuning, so that a stopped run resumes.

    Returns:
        See [`quantize_model`]; with `tuning`, and the same in the config's record of its calibration.

    Raises:
        ValueError: see [`quantize_model`] and [`tune_vectors`]; too little text is found out before the work.
    """
    options = TuneOptions.parse(config.tune)
    if options.mode == "none":
        return quantize_model(model, config, data=data, residence=residence)
    ids, description = data or load_token_ids(config, model, held_out=held_out_windows(config))
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"tune={config.tune!r} needs token ids or texts as dataset, not arguments of the model")
    tuner = partial(BlockTuner, options) if options.tunes_blocks else None
    if not options.tunes_vectors:
        return quantize_model(model, config, data=(ids, description), tuner=tuner, residence=residence)
    options.check_windows(len(ids))
    with residence.whole():
        teacher = record(model, ids, None if state is None else state / "teacher.bin")
    report = quantize_model(model, config, data=(ids[: -options.held_out], description), tuner=tuner, residence=residence)
    started = time.perf_counter()
    with residence.results():
        tuned = tune_vectors(model, teacher, options, state)
    report.seconds["tune"] += time.perf_counter() - started
    report.tuning = tuned.to_dict() | {"history": tuned.history}
    report.config.calibration = {**(report.config.calibration or {}), "tuning": tuned.to_dict()}
    return report
