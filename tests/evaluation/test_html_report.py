"""The HTML report: its numbers, that it needs nothing else, and how it looks in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model, tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.evaluation import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("dense"))
    config = QuipConfig(dataset=tiny_ids(4, 16, seed=5), num_samples=4, sequence_length=16, refinement_sweeps=1)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    return write_report(
        tmp_path_factory.mktemp("report") / "new" / "out.html", model, {"this model": 40.0, "a <peer>": 80.0}
    )


class Balanced(HTMLParser):
    """Counts tags and refuses one that is not closed in its place."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        """Nothing is left open."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_what_it_says(model, page):
    text = page.read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    for record in model.hf_quantizer.report.modules:
        row = next(line for line in re.findall(r"<tr>.*?</tr>", text) if record["name"] in line)
        assert f"{record['relative_error']:.4f}" in row
        assert f"{record['condition']:.2g}" in row
        assert row.count("<polygon") == 2
    assert "a &lt;peer&gt;" in text
    widths = {float(value) for value in re.findall(r'height="18" fill|width="([\d.]+)" height="18"', text) if value}
    assert widths == {230.0, 460.0}  # 40 and 80


TUNING = {
    "held_out_before": 2.0,
    "held_out_after": 0.5,
    "kept": True,
    "history": [{"step": 4, "train": 1.5, "held_out": 1.0}, {"step": 8, "train": 0.75, "held_out": 0.5}],
}


@pytest.mark.parametrize("kept", [True, False])
def test_the_divergence_while_tuning(model, tmp_path, kept):
    text = write_report(tmp_path / "out.html", model, records=(), tuning={**TUNING, "kept": kept}).read_text()
    assert "<h2>Layers</h2>" not in text
    assert "2.0000 before tuning, 0.5000 after" in text
    assert ("as it was before tuning" in text) is not kept
    # the axis of divergences ends at 2, 190 pixels above 0; that of steps goes from 0 to 8 over 690 pixels
    held_out, training = (
        re.findall(r"([\d.]+),([\d.]+)", line) for line in re.findall(r'<polyline points="([^"]*)"', text)
    )
    assert [tuple(map(float, point)) for point in held_out] == [(60, 10), (60 + 345, 105), (60 + 690, 152.5)]
    assert [tuple(map(float, point)) for point in training] == [(60 + 345, 57.5), (60 + 690, 128.8)]
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []


def test_it_is_one_file(page):
    text = page.read_text()
    assert not re.search(r"https?://(?!www\.w3\.org)|<script|<link|<img|@import|url\(", text)


def test_statistics_of_a_run(model):
    for record in model.hf_quantizer.report.modules:
        assert record["condition"] >= 1
        assert sum(record["weights_before"]) == pytest.approx(1, abs=1e-5)
        assert sum(record["weights_after"]) == pytest.approx(1, abs=1e-5)


def test_a_model_without_a_run_has_nothing_to_report(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuipConfig(dataset=None))
    with pytest.raises(ValueError, match="nothing to report: only a run with calibration"):
        write_report(tmp_path / "out.html", model)
    assert not (tmp_path / "out.html").exists()


def screenshot(page, tmp_path, width: int, scheme: str) -> torch.Tensor:
    """What a browser shows, [2600, width, 3] in 0 to 1."""
    image = pytest.importorskip("matplotlib.image")
    shot = tmp_path / "page.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},2600"]
    command.append(f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}")
    subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=300,
    )
    pixels = torch.from_numpy(image.imread(shot))[..., :3]
    assert pixels.shape[:2] == (2600, width)
    return pixels


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize(
    ("width", "scheme", "paper", "first", "peer", "lines"),
    [
        (1000, "light", "#ffffff", "#3465a4", "#babdb6", ("#cc5500", "#4e9a06", "#a40000", "#75507b")),
        (1000, "dark", "#1b1d1f", "#729fcf", "#73777b", ("#fcaf3e", "#8ae234", "#ef6f6f", "#c9a0d0")),
        (500, "light", "#ffffff", "#3465a4", "#babdb6", ("#cc5500", "#4e9a06", "#a40000", "#75507b")),
    ],
    ids=["light", "dark", "narrow"],
)
def test_in_a_browser(page, tmp_path, width, scheme, paper, first, peer, lines):
    pixels = screenshot(page, tmp_path, width, scheme)

    def count(color: str) -> int:
        wanted = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return ((pixels - wanted).abs().amax(-1) < 0.02).sum().item()

    assert count(paper) > 0.5 * pixels[..., 0].numel()  # a page of paper ...
    assert count(first) > 230 * 18 * 0.9  # ... with the first bar ...
    # ... the peer's, as far as a narrow window shows it (it begins at 220, behind 16 of margin), and lines of every color
    assert count(peer) > min(460, width - 2 * 16 - 220) * 18 * 0.9
    assert all(count(color) > 100 for color in lines)
    written = (pixels - pixels[0, 0]).abs().amax(-1) > 0.3
    assert written[:100].any()  # the heading
    assert not written[:, :8].any()  # nothing sticks out of the margin
    assert not written[:, -8:].any()
