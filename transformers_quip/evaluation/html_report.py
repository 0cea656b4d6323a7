"""One HTML file about a quantized model: error, size and weights of each layer. It needs only a browser."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import one_line
from ..version import __version__
from .report import layer_curves
from .size import linear_sizes, true_bits_per_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COLORS = 8
_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #222; --soft: #555; --stripe: #f6f6f6; --rule: #ddd; --grey: #babdb6;
  --c0: #3465a4; --c1: #cc5500; --c2: #4e9a06; --c3: #a40000; --c4: #75507b; --c5: #8f5902; --c6: #06989a; --c7: #555753;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #1b1d1f; --ink: #e8e8e8; --soft: #b0b0b0; --stripe: #25282b; --rule: #44484c; --grey: #73777b;
  --c0: #729fcf; --c1: #fcaf3e; --c2: #8ae234; --c3: #ef6f6f; --c4: #c9a0d0; --c5: #e9b96e; --c6: #34e2e2; --c7: #d3d7cf;
} }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: right; vertical-align: middle; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid var(--soft); }
.facts td { text-align: left; vertical-align: top; } .facts td:first-child { white-space: nowrap; }
.layers td, .layers th { white-space: nowrap; }
tr:nth-child(even) td { background: var(--stripe); }
.wide { overflow-x: auto; } svg { display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } .note { color: var(--soft); }
.key { display: inline-block; margin-right: 1rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; }
"""


def write_report(
    path: str | Path,
    model: PreTrainedModel,
    perplexities: Mapping[str, float] | None = None,
    records: Iterable[Mapping[str, Any]] | None = None,
    tuning: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of a calibrated run, or of tuning.

    Args:
        path: file to write; its folder is made if it is not there.
        model: quantized.
        perplexities: {name: perplexity} of this model and of peers, to be drawn side by side.
        records: a record for each quantized linear; None: the records of the run that has just made the model.
        tuning: the result of tuning (`finetune.TuneReport.to_dict()` with its "history"); None: of the same run.

    Returns:
        The path of the file.

    Raises:
        ValueError: the model was loaded, or quantized without calibration, and neither records nor tuning are given.
    """
    report = getattr(getattr(model, "hf_quantizer", None), "report", None)
    if tuning is None and report is not None:
        tuning = report.tuning
    if records is None:
        if report is None and tuning is None:
            raise ValueError(
                "nothing to report: only a run with calibration (dataset other than None) measures its layers, and a saved "
                "model does not keep the measurements"
            )
        records = () if report is None else report.modules
    bits = {size.name: size.bits for size in linear_sizes(model)}
    rows = [{**record, "bits": bits.get(record["name"])} for record in records]
    page = make_page(
        title=f"{type(model).__name__}, {true_bits_per_weight(model):.3f} bits per weight",
        facts=_facts(model, report, rows, tuning),
        records=rows,
        perplexities=perplexities or {},
        tuning=tuning or {},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def make_page(
    title: str,
    facts: Mapping[str, str],
    records: Sequence[Mapping[str, Any]],
    perplexities: Mapping[str, float],
    tuning: Mapping[str, Any],
) -> str:
    """The page as text; see [`write_report`]."""
    parts = [f"<h1>{_text(title)}</h1>", _fact_table(facts)]
    if perplexities:
        parts += ["<h2>Perplexity</h2>", _bars(perplexities)]
    if tuning.get("history"):
        parts += [
            "<h2>KL divergence to the dense model while tuning</h2>",
            '<p class="note">nats per token; over the steps. Step 0 is the model before tuning. The training text of '
            "a point is that of the steps since the point before</p>",
            _lines(_divergences(tuning), False),
        ]
    for key, heading, note, logarithmic in (
        ("relative_error", "Relative error of each layer's output", "the share of the output's energy that is lost", False),
        ("condition", "Condition of the Hessian", "largest by smallest eigenvalue, damped and after the transforms", True),
        (
            "seconds",
            "Seconds to round a layer",
            "layers that read one input are rounded together and share the time",
            False,
        ),
        ("bits", "True bits per weight", "codes, su and sv", False),
    ):
        curves = layer_curves(records, key)
        if curves:
            parts += [
                f"<h2>{heading}</h2>",
                f'<p class="note">{note}; over the decoder blocks</p>',
                _lines(curves, logarithmic),
            ]
    if records:
        parts += [
            "<h2>Layers</h2>",
            '<p class="note">Weights: w / rms over &plusmn;6 before (grey) and after the transforms (blue), which should '
            "be close to a normal distribution (line).</p>",
            _layer_table(records),
        ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f'<body>\n{body}\n<p class="note">transformers-quip {__version__}</p>\n</body></html>\n'
    )


def _divergences(tuning: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run: on held-out text from before the first step on, and on the text of the steps."""
    held_out = [(0, tuning["held_out_before"])] if "held_out_before" in tuning else []
    held_out += [(look["step"], look["held_out"]) for look in tuning["history"]]
    return {"held-out text": held_out, "training text": [(look["step"], look["train"]) for look in tuning["history"]]}


def _facts(
    model: PreTrainedModel, report: Any, records: Sequence[Mapping[str, Any]], tuning: Mapping[str, Any] | None
) -> dict[str, str]:
    config = model.config.quantization_config
    origin = config.origin or {}
    facts = {
        "made from": origin.get("base_model") or origin.get("folder") or "a dense model",
        "method": f"codebook {config.codebook}, incoherence {config.incoherence}, rounding {config.rounding}",
    }
    if records:
        facts["layers"] = str(len(records))
        facts["mean relative error"] = f"{sum(r['relative_error'] for r in records) / len(records):.4f}"
    if tuning:
        facts["KL divergence to the dense model"] = (
            f"{tuning['held_out_before']:.4f} before tuning, {tuning['held_out_after']:.4f} after, on held-out text"
            + ("" if tuning["kept"] else "; no gain, so the model is as it was before tuning")
        )
    if report is not None:
        facts["calibrated on"] = report.data
        facts["seconds"] = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in report.seconds.items())
    return facts


def _fact_table(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in facts.items())
    return f'<table class="facts">{rows}</table>'


def _bars(values: Mapping[str, float]) -> str:
    """One horizontal bar for each value."""
    finite = [value for value in values.values() if math.isfinite(value)]
    largest = max(finite, default=1.0) or 1.0
    height = 26 * len(values)
    parts = []
    for index, (name, value) in enumerate(values.items()):
        y = 26 * index
        width = 460 * min(value / largest, 1) if math.isfinite(value) else 460
        color = "--c0" if index == 0 else "--grey"
        parts.append(
            f'<text x="210" y="{y + 17}" text-anchor="end">{_text(name)}</text>'
            f'<rect x="220" y="{y + 4}" width="{width:.1f}" height="18" style="fill:var({color})"/>'
            f'<text x="{226 + width:.1f}" y="{y + 17}">{value:.4g}</text>'
        )
    return _drawing(760, height, parts)


def _drawing(width: int, height: int, parts: Iterable[str]) -> str:
    """A picture in its own size: on a narrow screen it is moved sideways, because its text would be too small."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<div class="wide"><svg {size}>{"".join(parts)}</svg></div>'


def _lines(curves: Mapping[str, list[tuple[int, float]]], logarithmic: bool) -> str:
    """A line for each kind of layer over the blocks."""
    left, top, width, height = 60, 10, 690, 190
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points if math.isfinite(y) and (y > 0 or not logarithmic)]
    low = math.floor(math.log10(min(ys))) if logarithmic and ys else 0.0
    step = _step(max(ys, default=1.0) or 1.0)
    high = (
        math.ceil(math.log10(max(ys)) + 1e-9) if logarithmic and ys else step * math.ceil(max(ys, default=1.0) / step or 1)
    )
    high = max(high, low + 1) if logarithmic else high
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        value = math.log10(y) if logarithmic else y
        return left + width * (x - first) / (last - first), top + height * (1 - (value - low) / (high - low))

    parts = []
    ticks = range(int(low), int(high) + 1) if logarithmic else [step * i for i in range(round(high / step) + 1)]
    for tick in ticks:
        y = top + height * (1 - (tick - low) / (high - low))
        label = f"1e{tick}" if logarithmic else f"{tick:.3g}"
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" style="stroke:var(--rule)"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for x in sorted({first, (first + last) // 2, last}):
        parts.append(f'<text x="{place(x, 1)[0]:.1f}" y="{top + height + 18}" text-anchor="middle">{x}</text>')
    keys = []
    for index, (kind, points) in enumerate(curves.items()):
        color = f"var(--c{index % _COLORS})"
        shown = [place(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not logarithmic)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in shown)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" style="fill:{color}"/>' for x, y in shown)
        parts.append(f'<polyline points="{path}" fill="none" style="stroke:{color}" stroke-width="1.4"/>{dots}')
        keys.append(f'<span class="key"><i style="background:{color}"></i>{_text(kind)}</span>')
    return f"{_drawing(760, top + height + 26, parts)}<p>{''.join(keys)}</p>"


def _step(largest: float) -> float:
    """A round distance of lines of which about four reach the largest value."""
    power = 10 ** math.floor(math.log10(largest / 4))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= largest / 4 * 0.999)


def _layer_table(records: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "<tr><th>layer</th><th>shape</th><th>bits</th><th>error</th><th>condition</th><th>seconds</th><th>weights</th></tr>"
    )
    rows = []
    for record in records:
        cells = (
            _text(record["name"]),
            " &times; ".join(map(str, record.get("shape", ()))),
            _number(record.get("bits"), ".3f"),
            _number(record.get("relative_error"), ".4f"),
            _number(record.get("condition"), ".2g"),
            _number(record.get("seconds"), ".2f"),
            _histograms(record.get("weights_before"), record.get("weights_after")),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table class="layers">{head}{"".join(rows)}</table></div>'


def _text(value: object) -> str:
    return html.escape(one_line(value))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _histograms(before: Sequence[float] | None, after: Sequence[float] | None) -> str:
    """Both on one small picture with the normal distribution; on a square-root scale, so that tails show."""
    if not before or not after:
        return ""
    width, height, span = 150, 40, 6.0

    def points(shares: Sequence[float]) -> str:
        step = width / len(shares)
        corners = [(0.0, float(height))]
        for index, share in enumerate(shares):
            y = height * (1 - math.sqrt(min(share * len(shares) / (2 * span) / 0.6, 1)))
            corners += [(index * step, y), ((index + 1) * step, y)]
        corners.append((float(width), float(height)))
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)

    normal = []
    for index in range(61):
        w = span * (index / 30 - 1)
        density = math.exp(-w * w / 2) / math.sqrt(2 * math.pi)
        normal.append(f"{width * index / 60:.1f},{height * (1 - math.sqrt(density / 0.6)):.1f}")
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<polygon points="{points(before)}" style="fill:var(--grey)"/>'
        f'<polygon points="{points(after)}" style="fill:var(--c0)" fill-opacity=".6"/>'
        f'<polyline points="{" ".join(normal)}" fill="none" style="stroke:var(--ink)" stroke-width=".8"/></svg>'
    )
