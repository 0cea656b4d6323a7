"""End-to-end tuning: su, sv and the norms of a quantized model follow the output distribution of the dense model.

The loss is the mean of KL(dense ‖ quantized) over all tokens, as in QuIP# (arXiv 2402.04396, section 5) and in knowledge
distillation, with a share of KL(quantized ‖ dense) mixed in (generalized knowledge distillation, arXiv 2306.13649): it
punishes tokens that the quantized model would write and the dense one would not. Only vectors are trained, on request the
embeddings too, so that Adam's state is small and the stored codes do not change.
"""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..calibration.device import evaluating
from ..config import QuipConfig
from ..config.tune import TuneOptions
from ..evaluation.kept import logit_map
from ..nn.replace import quantized_linears
from ..text import duration, size
from . import processes
from .codes import CodesReport, check_movable, move_codes
from .guard import Verdict, restored_unless_kept, window_divergences
from .head import CHUNK, Head, hidden_states
from .loss import divergence_of, window_order
from .memory import Estimate, blocks_of, decoded_bytes, estimate, fits, recomputed
from .product import FrozenProduct, product_dtype
from .state import Run, fingerprint, load, save
from .student import Student, TrainedLinear, embedding_weights, tuned
from .teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Tokens of the forward pass that finds out which linears read which tensors.
_PROBE_TOKENS = 8


@dataclass
class TuneReport:
    """The result of tuning.

    Attributes:
        verdict: the comparison on held-out windows; whether the result was kept.
        trained: the number of trained parameters.
        windows, tokens: the numbers of training windows and tokens, each counted once.
        steps: the number of steps.
        history: [{"step", "windows", "seconds", "train", "held_out"}], divergences in nats per token.
        seconds: total wall time.
        codes: the result of moving codes afterwards; None if that was not asked for.
    """

    verdict: Verdict
    trained: int
    windows: int
    tokens: int
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    codes: CodesReport | None = None

    @property
    def is_better(self) -> bool:
        """Whether anything was kept."""
        return self.verdict.accepted or (self.codes is not None and self.codes.moved > 0)

    def to_dict(self) -> dict[str, Any]:
        """For config.json and reports: JSON-serializable."""
        codes = {} if self.codes is None else {"codes": self.codes.to_dict()}
        return {
            "held_out_before": round(self.verdict.before, 5),
            "held_out_after": round(self.verdict.after, 5),
            "kept": self.verdict.accepted,
            "trained": self.trained,
            "tokens": self.tokens,
            "steps": self.steps,
            **codes,
        }


@torch.inference_mode(False)
@torch.enable_grad()
def tune_vectors(
    model: PreTrainedModel,
    teacher: Teacher,
    options: TuneOptions,
    state: str | os.PathLike | None = None,
    progress: bool = True,
    shard: bool | None = None,
) -> TuneReport:
    """Tune the vectors of a quantized model, in place.

    The last `options.held_out` windows of the teacher are never trained on. The tuned model, merged and in its stored
    dtype, is compared with the model before on them. Unless it is better by more than the noise, the model stays as it was.
    With `options.code_rounds`, codes move afterwards, see [`move_codes`].

    Args:
        model: quantized by this package.
        teacher: the dense model's states over windows of text.
        options: of the tuning.
        state: a folder for the state of the run. A stopped run resumes from there with the same result, if model, text and
            options are the same.
        progress: show a tqdm bar.
        shard: in several processes (torchrun, `accelerate launch`), which read a part of each batch each: shard the decoded
            weights over them (FSDP2). None: if accelerate was told to use FSDP.

    Raises:
        ValueError: too few windows, no quantized linears, other vocabularies, a model whose logits are not understood, a
            batch that the processes cannot share out evenly, or `code_rounds` that cannot be made ([`check_movable`]).
    """
    with torch.autocast(model.device.type, enabled=False):  # the products choose their dtype themselves
        return _tune_vectors(model, teacher, options, state, progress, shard)


def _tune_vectors(
    model: PreTrainedModel,
    teacher: Teacher,
    options: TuneOptions,
    state: str | os.PathLike | None,
    progress: bool,
    shard: bool | None,
) -> TuneReport:
    started = time.perf_counter()
    count = len(teacher.ids) - options.held_out
    options.check_windows(len(teacher.ids))
    if options.code_rounds:
        check_movable(model)
    if options.batch_size % processes.count():
        raise ValueError(
            f"batch_size={options.batch_size} must be a multiple of the {processes.count()} processes that share it out"
        )
    shard = processes.count() > 1 and (processes.wants_sharding() if shard is None else shard)
    held_out = range(count, len(teacher.ids))
    probe = teacher.ids[:1, :_PROBE_TOKENS].to(model.device)
    trained = embedding_weights(model) if options.embeddings else {}
    head = student_head(model, teacher, probe, options.embeddings)
    reading = time.perf_counter()
    before = window_divergences(model, teacher, head, held_out)
    reading = time.perf_counter() - reading
    report = TuneReport(Verdict.of(before, before), 0, count, count * teacher.ids.shape[1], options.steps(count))
    folder = None if state is None else Path(state)
    mark = {} if folder is None else fingerprint(model, teacher, options)
    with restored_unless_kept(model, trained) as result:
        keep = shard or processes.from_first(lambda: _keep_decoded(model, options))
        with tuned(model, probe, options.norms, keep, options.embeddings) as student:
            report.trained = sum(value.numel() for value in student.trained().values())
            found = _estimate(model, student, teacher, options, probe)
            if shard:
                processes.shard(student)
                found = replace(found, weights=found.weights // processes.count() + found.largest)
            # processes that shard weights must read them equally often
            recompute = options.memory == "low" or processes.from_first(
                lambda: options.memory == "auto" and not fits(found.total(keep, False), model.device)
            )
            logger.info(
                "Tuning: %d steps of %d windows, %s of memory in addition to the quantized model, about %s.",
                report.steps,
                options.batch_size,
                size(found.total(keep, recompute)),
                duration(_windows_read(options, report.steps) * reading / len(held_out)),
            )
            with recomputed(blocks_of(model, student.linears)) if recompute else nullcontext():
                _Trainer(model, student, teacher, head, options, report, folder, mark).run(progress)
        report.verdict = Verdict.of(before, window_divergences(model, teacher, head, held_out))
        if report.verdict.accepted:
            result.keep()
    if not report.verdict.accepted:
        logger.warning("Tuning did not help, so the model is unchanged. %s.", report.verdict)
    else:
        logger.info("%s.", report.verdict)
    if options.code_rounds:
        report.codes = move_codes(model, teacher, head, options, folder, mark, progress)
        logger.info("%d of %d blocks moved. %s.", report.codes.moved, report.codes.blocks, report.codes.verdict)
    report.seconds = time.perf_counter() - started
    _note(model, report)
    return report


def _windows_read(options: TuneOptions, steps: int) -> int:
    """The number of windows that all of it reads, where a backward pass counts as two, and one with weights as three."""
    vectors = 3 * steps * options.batch_size + options.held_out * (options.looks + 1)
    return vectors + options.code_rounds * (4 * options.code_windows + options.held_out)


def _note(model: PreTrainedModel, report: TuneReport) -> None:
    """Record the result in the model's config, for config.json and the model card; a gain replaces an earlier result."""
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, QuipConfig):
        calibration = config.calibration or {}
        if report.is_better or "tuning" not in calibration:
            config.calibration = {**calibration, "tuning": report.to_dict()}


def student_head(model: PreTrainedModel, teacher: Teacher, probe: torch.Tensor, trained: bool = False) -> Head:
    """The function that computes the logits of the quantized model.

    Raises:
        ValueError: they have another size than the teacher's, or are made in an unknown way.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise ValueError(f"{type(model).__name__} has no language modelling head, so it cannot be tuned")
    rows = output.weight.shape[0]
    if rows != len(teacher.weight):
        raise ValueError(
            f"the model predicts {rows} tokens and its teacher {len(teacher.weight)}: both must have one vocabulary"
        )
    if trained:
        return Head(TrainedLinear(output, copy=False), logit_map(model, probe))
    if type(output) is nn.Linear:  # the same product as for the teacher, without rounding twice
        weight, bias = output.weight.detach().to(product_dtype(output.weight.device)), output.bias

        def project(hidden: torch.Tensor) -> torch.Tensor:
            z = FrozenProduct.apply(hidden, weight)
            return z if bias is None else z + bias

        return Head(project, logit_map(model, probe))
    return Head(output, logit_map(model, probe))


def _keep_decoded(model: PreTrainedModel, options: TuneOptions) -> bool:
    linears = quantized_linears(model).values()
    return options.memory == "fast" or (options.memory == "auto" and fits(decoded_bytes(linears), model.device))


def _estimate(
    model: PreTrainedModel, student: Student, teacher: Teacher, options: TuneOptions, probe: torch.Tensor
) -> Estimate:
    """The memory of a step, from that of the probe."""
    step = options.batch_size // processes.count() * teacher.ids.shape[1]
    logits = 6 * 4 * CHUNK * len(teacher.weight)  # of both models, their softmax and a gradient
    blocks = blocks_of(model, student.linears)
    with evaluating(model):
        return estimate(blocks, student, lambda: hidden_states(model, probe), (probe.numel(), step), logits)


class _Trainer:
    """All steps of one run; see [`tune_vectors`]."""

    def __init__(
        self,
        model: PreTrainedModel,
        student: Student,
        teacher: Teacher,
        head: Head,
        options: TuneOptions,
        report: TuneReport,
        folder: Path | None,
        mark: dict[str, Any],
    ):
        self.model, self.student, self.teacher, self.head = model, student, teacher, head
        self.options, self.report, self.folder, self.mark = options, report, folder, mark
        self.groups = student.groups(options.learning_rate, embedding_rate=options.embedding_rate)
        self.highest = [group["lr"] for group in self.groups]
        self.optimizer = torch.optim.Adam(self.groups, betas=(0.9, 0.95))
        self.best, self.best_loss = student.snapshot(), math.inf
        self.recent: list[float] = []

    def run(self, progress: bool) -> None:
        """Train; the student is left in the state that was best on the held-out windows."""
        steps, size = self.report.steps, self.options.batch_size
        order = window_order(self.report.windows, steps * size, self.options.seed)
        looks = {round(steps * (look + 1) / self.options.looks) for look in range(self.options.looks)}
        first, hidden = self._resume(), not (progress and processes.is_first())
        with (
            evaluating(self.model),
            tqdm(total=steps, initial=first, desc="Tuning", unit="step", disable=hidden) as bar,
        ):
            started = time.perf_counter()
            for step in range(first, steps):
                self._step(step, order[step * size : (step + 1) * size])
                if step + 1 in looks:
                    self._look(step + 1, time.perf_counter() - started, bar)
                bar.update()
        self.student.load(self.best)

    def _step(self, step: int, chosen: list[int]) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = rate * self.options.factor(step, self.report.steps)
        tokens = len(chosen) * self.teacher.ids.shape[1]
        loss = divergence_of(self.model, self.teacher, self.head, processes.mine(chosen), self.options.reverse)
        loss = loss / tokens
        loss.backward()
        loss = processes.add_up_gradients(self.student.trained().values(), loss)
        torch.nn.utils.clip_grad_norm_(list(self.student.trained().values()), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.recent.append(loss.item())

    def _look(self, step: int, seconds: float, bar: tqdm) -> None:
        """Read the held-out windows, keep the best state, and write the run down."""
        held_out = range(self.report.windows, len(self.teacher.ids))
        held = window_divergences(self.model, self.teacher, self.head, held_out).mean().item()
        if held < self.best_loss:
            self.best, self.best_loss = self.student.snapshot(), held
        train = sum(self.recent) / len(self.recent)
        windows = step * self.options.batch_size
        self.report.history.append({"step": step, "windows": windows, "seconds": seconds, "train": train, "held_out": held})
        self.recent = []
        bar.set_postfix_str(f"KL divergence {train:.3f}, held out {held:.3f}")
        if self.folder is not None and processes.is_first():
            states = {name: self.optimizer.state[value] for name, value in self.student.trained().items()}
            moments = {name: (state["exp_avg"], state["exp_avg_sq"]) for name, state in states.items()}
            values = self.student.snapshot()
            save(self.folder, Run(step, values, self.best, moments, self.best_loss, self.report.history), self.mark)

    def _resume(self) -> int:
        """The first step: after the steps of the run in the folder, whose state is restored."""
        run = None if self.folder is None else load(self.folder, self.mark)
        if run is None:
            return 0
        self.student.load(run.values)
        for name, value in self.student.trained().items():
            first, second = (moment.to(value.device) for moment in run.moments[name])
            step = torch.tensor(float(run.step))
            self.optimizer.state[value] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        self.best, self.best_loss = run.best, run.best_loss
        self.report.history = run.history
        logger.info("Tuning resumes after step %d of %d.", run.step, self.report.steps)
        return run.step
