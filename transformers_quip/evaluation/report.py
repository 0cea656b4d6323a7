"""Pictures and tables of the error of each layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from ..text import one_line


class LayerRecord(TypedDict, total=False):
    """Measurements of one quantized linear; `name` is always present, the rest if it was measured.

    Attributes:
        name: full name of the module, such as `model.layers.3.self_attn.q_proj`.
        kind: linears that are compared with each other, such as `q_proj`; the name's last part if it is not given.
        proxy_loss: tr(E H Eᵀ) / tr(W H Wᵀ) with E = W - Ŵ and the damped Hessian, dimensionless.
        relative_error: the same with the Hessian as it was measured: the share of the output's energy that is lost.
        weight_error: ‖E‖² / ‖W‖², the same without a Hessian.
        bits: true bits per weight.
        seconds: wall seconds spent on rounding it.
    """

    name: str
    kind: str
    proxy_loss: float
    relative_error: float
    weight_error: float
    bits: float
    seconds: float


# The entries of a record that are drawn, and their titles.
ERRORS = {
    "proxy_loss": "relative proxy loss",
    "relative_error": "relative error of the output",
    "weight_error": "relative error of the weight",
}


def mean_by_kind(records: Iterable[Mapping], key: str = "proxy_loss") -> dict[str, float]:
    """Return {kind: mean of `key`} over the records that have `key`, kinds in the order they first occur."""
    values: dict[str, list[float]] = {}
    for record in records:
        if key in record:
            values.setdefault(_kind(record), []).append(float(record[key]))
    return {kind: sum(found) / len(found) for kind, found in values.items()}


def plot_relative_error(
    records: Iterable[Mapping],
    path: str | Path,
    keys: tuple[str, ...] = tuple(ERRORS),
    title: str = "Error of each layer",
) -> Path:
    """Draw the errors of every layer over the depth of the model and write the picture as PNG.

    One panel for each of `keys` that the records have, one line for each kind of layer; the block is the first number
    in the module's name (records without one are drawn at their position within their kind).

    Args:
        records: see LayerRecord.
        path: file to write; its folder is made if it is not there.
        keys: entries to draw, in this order.
        title: title of the picture.

    Returns:
        The path of the file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no record has any of the keys.
    """
    records = list(records)
    keys = tuple(key for key in keys if any(key in record for record in records))
    if not keys:
        raise ValueError(f"nothing to draw: {len(records)} records, none with any of {', '.join(ERRORS)}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'transformers-quip[plot]'") from error

    # a Figure of its own, not pyplot: no window system, and the caller's pyplot state is left alone
    figure = Figure(figsize=(8, 3.2 * len(keys)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_label(title))
    for axes, key in zip(figure.subplots(len(keys), 1, squeeze=False)[:, 0], keys, strict=True):
        for kind, points in layer_curves(records, key).items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=_label(kind))
        axes.set(xlabel="decoder block", ylabel=ERRORS.get(key, key))
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small", ncols=2)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    return path


def _label(text: str) -> str:
    """Text for matplotlib, which takes "$" for the beginning of a formula."""
    return one_line(text).replace("$", r"\$")


def _kind(record: Mapping) -> str:
    return record.get("kind") or record["name"].rsplit(".", 1)[-1]


def layer_curves(records: Iterable[Mapping], key: str) -> dict[str, list[tuple[int, float]]]:
    """{kind: [(block, value of `key`), ...] in the order of the blocks} over the records that have a value."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.get(key) is None:
            continue
        points = curves.setdefault(_kind(record), [])
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", record["name"])
        points.append((int(number.group(1)) if number else len(points), float(record[key])))
    return {kind: sorted(points) for kind, points in curves.items()}
