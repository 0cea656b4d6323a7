"""Tuning after rounding: a quantized model learns to match the predictions of the dense model."""

from ..config.tune import TuneOptions
from .end_to_end import TuneReport, tune_vectors
from .guard import Verdict, window_divergences
from .teacher import Teacher, record

__all__ = ["Teacher", "TuneOptions", "TuneReport", "Verdict", "record", "tune_vectors", "window_divergences"]
