"""Quantize a dense model in memory and tune it: the option `tune` of a config."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..calibration.dataset import load_token_ids
from ..config.tune import TuneOptions
from ..quantize.recipe import QuantizationReport, quantize_model
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
    model: PreTrainedModel, config: QuipConfig, data: tuple[torch.Tensor, str] | None = None
) -> QuantizationReport:
    """Quantize a model in place, and tune it as `config.tune` says.

    If vectors are tuned, the last windows of the data are held out: neither the Hessians nor the tuning see them.

    Args:
        model: dense, in memory.
        config: how; it is not changed.
        data: the result of [`load_token_ids`] with [`held_out_windows`]; None: it is made here.

    Returns:
        See [`quantize_model`]; with `tuning`, and the same in the config's record of its calibration.

    Raises:
        ValueError: see [`quantize_model`] and [`tune_vectors`]; too little text is found out before the work.
    """
    options = TuneOptions.parse(config.tune)
    if options.mode == "none":
        return quantize_model(model, config, data=data)
    ids, description = data or load_token_ids(config, model, held_out=held_out_windows(config))
    tuner = partial(BlockTuner, options) if options.tunes_blocks else None
    if not options.tunes_vectors:
        return quantize_model(model, config, data=(ids, description), tuner=tuner)
    options.check_windows(len(ids))
    teacher = record(model, ids)
    report = quantize_model(model, config, data=(ids[: -options.held_out], description), tuner=tuner)
    started = time.perf_counter()
    tuned = tune_vectors(model, teacher, options)
    report.seconds["tune"] += time.perf_counter() - started
    report.tuning = tuned.to_dict() | {"history": tuned.history}
    report.config.calibration = {**(report.config.calibration or {}), "tuning": tuned.to_dict()}
    return report
