"""The mean over kinds by hand, and the picture as a file."""

from __future__ import annotations

import sys

import pytest

from transformers_quip.evaluation import mean_by_kind, plot_relative_error

RECORDS = [
    {"name": "model.layers.0.self_attn.q_proj", "proxy_loss": 0.01, "relative_error": 0.1},
    {"name": "model.layers.0.mlp.up_proj", "proxy_loss": 0.03},
    {"name": "model.layers.1.self_attn.q_proj", "proxy_loss": 0.02, "relative_error": 0.3},
    {"name": "model.layers.1.mlp.up_proj", "kind": "up", "proxy_loss": 0.07},
]


def test_mean_by_kind():
    assert mean_by_kind(RECORDS) == pytest.approx({"q_proj": 0.015, "up_proj": 0.03, "up": 0.07})
    assert mean_by_kind(RECORDS, "relative_error") == pytest.approx({"q_proj": 0.2})
    assert mean_by_kind(RECORDS, "seconds") == {}


def test_plot_writes_a_png_and_leaves_pyplot_alone(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    pyplot = sys.modules.pop("matplotlib.pyplot", None)
    try:
        path = plot_relative_error(RECORDS, tmp_path / "new" / "errors.png")
        assert "matplotlib.pyplot" not in sys.modules
    finally:
        if pyplot is not None:
            sys.modules["matplotlib.pyplot"] = pyplot
    assert path == tmp_path / "new" / "errors.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    two_panels = image.imread(path)
    one_panel = image.imread(plot_relative_error(RECORDS, tmp_path / "one.png", keys=("proxy_loss",)))
    assert two_panels.shape[0] == 2 * one_panel.shape[0]
    assert two_panels[..., :3].std() > 0.05  # something is drawn


def test_curves_follow_the_blocks(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn = {}

    def plot(self, x, y, *, label, **_):
        drawn[label] = (x, y)
        return original(self, x, y, label=label)

    original = axes.Axes.plot
    monkeypatch.setattr(axes.Axes, "plot", plot)
    plot_relative_error(reversed(RECORDS), tmp_path / "a.png", keys=("proxy_loss",))
    assert drawn["q_proj"] == ((0, 1), (0.01, 0.02))
    assert drawn["up"] == ((1,), (0.07,))


@pytest.mark.parametrize("records", [[], [{"name": "a", "bits": 2.0}]])
def test_nothing_to_draw(records, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_relative_error(records, tmp_path / "a.png")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"transformers-quip\[plot\]"):
        plot_relative_error(RECORDS, tmp_path / "a.png")
