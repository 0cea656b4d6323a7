"""docs/architectures.md: one line for each architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import transformers

from tests.architectures.check import STAGES, TASKS, Result

_HEAD = """# Architectures

Which of Transformers' architectures work, tried on tiny models with random weights in float32 on a CPU (Transformers
{transformers}, PyTorch {torch}; `make test-architectures` writes this page). It says whether everything runs and is the
same after saving and loading. It says nothing about quality on real weights.

The stages: 2 and 4 bits without calibration, 4 bits calibrated on 8 sequences of 32 tokens, saving and reloading of both,
generating 5 tokens with a cache, dequantizing with saving and reloading. "refused" is a clear error before the work, with
the way out. "quantized" is the share of the weights outside the embeddings and the head; where it is below 90 %, a warning
says so and the last column names the largest part of the rest.

"""
# A clear refusal names what to do instead.
REFUSAL = re.compile(r"dataset=None|modules_to_not_convert|would be quantized")


def mark(result: Result, stage: str) -> str:
    """One cell."""
    error = result.errors.get(stage)
    if error is None:
        return "–"
    return (
        "yes" if not error else "refused" if error.startswith(("ValueError", "NotBlockByBlock")) and _clear(error) else "no"
    )


def _clear(error: str) -> bool:
    return bool(REFUSAL.search(error))


def table(results: Iterable[Result]) -> str:
    """The whole page."""
    results = list(results)
    tried = [result for result in results if not result.untestable]
    page = _HEAD.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])
    page += "| task | pass everything | a stage is refused | a stage fails | could not be tried |\n|---|---|---|---|---|\n"
    for task in dict.fromkeys(result.task for result in results):
        page += f"| {task} | {_counts([r for r in results if r.task == task])} |\n"
    page += f"| all | {_counts(results)} |\n"
    for task in dict.fromkeys(result.task for result in tried):
        page += f"\n## {TASKS[task][1]}\n\n"
        page += f"| type | {' | '.join(STAGES)} | quantized | calibrated | largest part of the rest |\n"
        page += "|---" * (len(STAGES) + 4) + "|\n"
        page += "".join(f"{_line(result)}\n" for result in tried if result.task == task)
    page += "\n## Errors\n\n" + "".join(f"- {line}\n" for result in tried for line in _errors(result))
    page += "\n## Not tried\n\nTransformers cannot make, run or reload a tiny model of these.\n\n"
    return page + "".join(f"- {r.task} {r.model_type}: {_text(r.untestable)}\n" for r in results if r.untestable)


def _counts(results: list[Result]) -> str:
    tried = [result for result in results if not result.untestable]
    failed = [r for r in tried if any(mark(r, stage) == "no" for stage in r.errors)]
    passed = [r for r in tried if not r.failed]
    counts = (len(passed), len(tried) - len(passed) - len(failed), len(failed), len(results) - len(tried))
    return " | ".join(map(str, counts))


def _line(result: Result) -> str:
    cells = [result.model_type, *(mark(result, stage) for stage in STAGES)]
    shares = [f"{result.share[key]:.0%}" if key in result.share else "–" for key in ("2 bits", "calibrated")]
    low = min(result.share.values(), default=1) < 0.9
    rest = next(iter(result.left), "") if low else ""
    return f"| {' | '.join([*cells, *shares, rest and f'`{rest}`'])} |"


def _errors(result: Result) -> Iterable[str]:
    seen = set()
    for stage, error in result.errors.items():
        if error and error not in seen:
            seen.add(error)
            yield f"{result.task} {result.model_type}, {stage}: {_text(error)}"


def _text(error: str) -> str:
    """An error in Markdown, without what would be markup."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", error[:250])
