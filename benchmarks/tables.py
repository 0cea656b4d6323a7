"""Write every table of README.md and docs from results/*.json, each between two markers of its name.

    python benchmarks/tables.py [--check]

Nothing outside the markers is touched. With --check nothing is written, and the exit code is 1 if a page does not show
the content of the files.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import fuzz_tables
import serving
from markdown_tables import figure, load, machine_line, number, table
from quality import groups
from speed_tables import llama_cpp, narrow, speed

ROOT = Path(__file__).resolve().parent.parent
PAGES = tuple(ROOT / page for page in ("README.md", "docs/results.md", "docs/how_it_works.md", "docs/serving.md"))
SHOWN = ("dense", "text", "trellis", "trellis-yaqa", "trellis-yaqa-256", "self", "none")  # settings in README
NOTHING = "Not measured yet: `make bench` makes these figures.\n"

_MARKED = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def _perplexities(rows: list[dict]) -> list[str]:
    return [figure([row["perplexity"][name] for row in rows]) for name in ("wiki", "news")]


def summary() -> str:
    """README's quality table: one line for each number of bits, and one peer."""
    quality = load("quality")
    if quality is None:
        return ""
    lines = []
    for (setting, bits), rows in groups(quality["rows"]).items():
        if setting not in SHOWN:
            continue
        name = quality["settings"][setting] + ("" if setting == "dense" else f", {bits:g} bits")
        true = f"{rows[0]['true_bits']:.2f}" if "true_bits" in rows[0] else "32"
        lines.append([name, true, *(number(statistics.mean(r["perplexity"][t] for r in rows)) for t in ("wiki", "news"))])
    for row in (load("finetune") or {"rows": []})["rows"]:
        if row["epochs"]:
            code = " with trellis codes" if row["codebook"] == "trellis" else ""
            blocks = "block by block and " if row["mode"] == "full" else ""
            code += ", rounded for the model's output" if row["rounding"] == "yaqa" else ""
            what = "embeddings too, " if row["embeddings"] else ""
            windows = (
                f"{row['tuning_samples']} windows {'of Wikipedia' if row['setting'] == 'text' else 'that the model wrote'}"
            )
            name = f"QuIP#{code}, tuned {blocks}end to end ({what}{windows}), {row['bits']:g} bits"
            lines.append([name, f"{row['true_bits']:.2f}", *_perplexities([row])])
    peers = load("peers")
    for row in (peers or {"rows": []})["rows"]:
        if row.get("in_readme"):
            lines.append([row["name"], f"{row['true_bits']:.2f}", *_perplexities([row])])
    return table(["SmolLM2-135M-Instruct", "true bits", "wiki perplexity", "news perplexity"], lines)


def quality() -> str:
    """Every setting, with the range over seeds."""
    content = load("quality")
    if content is None:
        return ""
    lines = []
    for (setting, bits), rows in groups(content["rows"]).items():
        name = content["settings"][setting] + ("" if setting == "dense" else f", {bits:g} bits")
        true = f"{rows[0]['true_bits']:.3f}" if "true_bits" in rows[0] else "32"
        found = [row["divergence"] for row in rows if "divergence" in row]
        means = (statistics.mean(row[text] for row in found) for text in ("wiki", "news")) if found else ()
        divergence = " / ".join(f"{mean:.3f}" for mean in means)
        if found and "compared" not in rows[0]:
            divergence += " (8 windows)"
        lines.append([name, str(len(rows)), true, *_perplexities(rows), divergence])
    titles = ["SmolLM2-135M-Instruct", "seeds", "true bits", "wiki perplexity", "news perplexity", "KL wiki / news"]
    return table(titles, lines) + machine_line(content)


def proxy_loss() -> str:
    """The relative proxy loss of each kind of layer."""
    content = load("quality")
    rows = {key: rows[0]["proxy_loss"] for key, rows in groups((content or {"rows": []})["rows"]).items()
            if rows[0].get("proxy_loss")}  # fmt: skip
    kinds = list(dict.fromkeys(kind for losses in rows.values() for kind in losses))
    lines = [
        [f"{content['settings'][setting]}, {bits:g} bits", *(f"{losses[k]:.4f}" if k in losses else "" for k in kinds)]
        for (setting, bits), losses in rows.items()
    ]
    return table(["relative proxy loss, mean of all blocks", *kinds], lines)


def ablations() -> str:
    """The papers' claims: one line for each two sides that are compared, a column for each side of each measure."""
    content = load("methods")
    lines = []
    for found in (content or {"comparisons": []})["comparisons"]:
        count = len(found["sides"])
        for first in range(count - 1):  # a chain A ≥ B ≥ C is two comparisons
            sides = found["sides"][first : first + 2]
            cells = []
            for measure, show in (("proxy loss", "{:.4f}".format), ("wiki", number), ("news", number)):
                cells += [show(value) for value in found["figures"][measure][first : first + 2]]
            lines.append([found["claim"] if first == 0 else "", *sides, *cells])
    titles = ["claim", "with", "without", "proxy loss with", "without", "wiki with", "without", "news with", "without"]
    return table(titles, lines) + (machine_line(content) if content else "")


def methods() -> str:
    """Every method of the full protocol, best first within the same bits."""
    content = load("methods")
    if content is None:
        return ""
    most = max(row["windows"] for row in content["rows"])
    lines = []
    for row in sorted(content["rows"], key=lambda row: (row["bits"], row["perplexity"]["wiki"])):
        if row["windows"] < most:
            continue
        loss, true = row.get("proxy_loss"), row.get("true_bits")
        loss, true = "" if loss is None else f"{loss:.4f}", f"{true:.3f}" if true else f"{row['bits']}"
        lines.append([row["label"], loss, *_perplexities([row]), true])
    return table(["method", "mean proxy loss", "wiki perplexity", "news perplexity", "true bits"], lines)


def _codebook(row: dict) -> str:
    """The codebook of a row of finetune.json, and a rounding method other than the default."""
    name = "E8P" if row["codebook"] == "default" and row["bits"] == 2 else row["codebook"]
    return name if row["rounding"] == "ldlq" else f"{name}, {row['rounding']}"


def tuning() -> str:
    """Tuning after and while rounding, against its time."""
    content = load("finetune")
    if content is None:
        return ""
    source = {"text": "Wikipedia", "self": "self-written"}
    lines = []
    for row in sorted(content["rows"], key=lambda row: (row["bits"], row["setting"], -row["perplexity"]["wiki"])):
        blocks = ["blocks"] if row["mode"] == "full" else []
        trained = "vectors and embeddings" if row["embeddings"] else "vectors"
        read = f"{trained}, {row['epochs']:g} x {row['tuning_samples']} windows"
        read += f", {row['reverse']:.0%} KL(quantized ‖ dense)" if row["reverse"] else ""
        read += f", {row['own_windows']} written by the quantized model" if row.get("own_windows") else ""
        read += f", batches of {row['batch_size']}" if row.get("batch_size", 4) != 4 else ""
        read += f", {row['codes']['moved']} of {row['codes']['blocks']} blocks moved" if row.get("code_rounds") else ""
        done = " and ".join(blocks + ([read] if row["epochs"] else [])) or "none"
        quantizing = f"{row['quantizing']['cpu'] / 60:.0f}" if "quantizing" in row else "not measured"
        lines.append(
            [
                f"{row['bits']:g}",
                _codebook(row),
                source[row["setting"]],
                done,
                f"{quantizing} + {row.get('cpu_seconds', 0) / 60:.0f}",
                *_perplexities([row]),
                f"{row['divergence']['wiki']:.3f} / {row['divergence']['news']:.3f}",
                f"{row['sampled_perplexity']:.2f}",
                f"{row['repetition']:.2f} ({row['own_repetition']:.2f})",
                f"{row['true_bits']:.3f}",
            ]
        )
    titles = [
        "bits",
        "codebook",
        "text",
        "tuning",
        "CPU minutes: quantizing + tuning",
        "wiki perplexity",
        "news perplexity",
        "KL wiki / news",
    ]
    titles += ["sampled text, times dense", "repeated 4-grams (dense)", "true bits"]
    return table(titles, lines) + machine_line(content)


def codebooks() -> str:
    """Every codebook on a Gaussian."""
    content = load("codebooks")
    if content is None:
        return ""
    lines = [
        [row["codebook"], f"{row['bits']:g}", f"{row['error']:.3g}", f"{row['bound']:.3g}", f"{row['speed_to_e8p']:.2g}"]
        for row in content["rows"]
    ]
    titles = ["codebook", "bits", "mean squared error on a Gaussian", "least possible", "encodes, times E8P"]
    return table(titles, lines) + machine_line(content)


def trellis() -> str:
    """Trellis codes on a Gaussian: errors, and speeds of their encoders."""
    content = load("trellis")
    if content is None:
        return ""
    lines = []
    for row in content["rows"]:
        speeds = row.get("weights_per_cpu_second", {})
        shown = [speeds.get(key) for key in ("avx512", "avx2", "plain PyTorch", "e8p")]
        cells = ["" if speed is None else f"{speed / 1000:,.1f}" for speed in shown]
        error = f"{row['error']:.3g} ({row['error'] / row['bound']:.3f})"
        published = f"{row['published']:.3g}" if "published" in row else ""
        lines.append([row["codebook"], f"{row['bits']:g}", error, published, *cells])
    titles = ["codebook", "bits", "mean squared error (times the bound)", "published encoder"]
    titles += ["1000 weights per CPU second: AVX-512", "AVX2", "plain PyTorch", "E8P's search"]
    return table(titles, lines) + machine_line(content)


def peers() -> str:
    """Perplexities of other packages with this project's protocol."""
    content = load("peers")
    rows = (content or {"rows": []})["rows"]
    lines = [[row["name"], f"{row['true_bits']:.2f}", *_perplexity_cells(row)] for row in rows]
    return table(["", "true bits", "wiki perplexity", "news perplexity"], lines)


def _perplexity_cells(row: dict) -> list[str]:
    return [number(row["perplexity"][name]) if name in row["perplexity"] else "" for name in ("wiki", "news")]


def memory() -> str:
    """Peak memory of quantizing."""
    content = load("memory")
    if content is None:
        return ""
    lines = [[name, f"{value / 1e6:.0f} MB"] for name, value in content["summary"].items()]
    return table(["peak memory of quantizing SmolLM2", ""], lines) + machine_line(content)


def activations() -> str:
    """The cost of 8-bit activations."""
    content = load("activations")
    if content is None:
        return ""
    lines = [[row["kernels"], *(f"{row['cost'][name]:+.2%}" for name in ("wiki", "news"))] for row in content["rows"]]
    return table(["perplexity of int8 against exact activations, kernels", "wiki", "news"], lines) + machine_line(content)


def search() -> str:
    """Encoding and rounding on the CPU."""
    lines = []
    nearest, rounding = load("nearest"), load("rounding")
    for row in (nearest or {"rows": [None]})["rows"][1:]:
        per_second, times = row["weights_per_second"], row["times_plain"]
        lines.append([f"nearest point of E8P, {row['search']}", f"{per_second:.2g} weights/s, {times:.0f}x a table search"])
    if rounding:
        sweeps, seconds = rounding["refinement_sweeps"], rounding["cpu_seconds"]
        lines.append([f"rounding one decoder block of SmolLM2, LDLQ and {sweeps} sweeps", f"{seconds:.1f} CPU seconds"])
    return table(["on the CPU", ""], lines) + (machine_line(nearest) if nearest else "")


def again() -> str:
    """What sweeps and refits do to trellis codes."""
    content = load("rounding-trellis")
    if content is None:
        return ""
    lines = [
        [
            str(found["refinement_sweeps"]),
            str(found["refit"]),
            f"{found['proxy_loss']:.5f}",
            f"{found['fresh_loss']:.5f}",
            f"{found['cpu_seconds']:.0f}",
        ]
        for found in content["combinations"]
    ]
    titles = ["sweeps", "refits", "loss", "loss on other text", "CPU seconds a block"]
    return table(titles, lines) + machine_line(content)


def two_sided() -> str:
    """One-sided against two-sided rounding."""
    content = load("two_sided")
    if content is None:
        return ""
    lines = []
    for row in content["rows"]:
        name = row["rounding"] + (f", sketch {row['sketch']}, damping {row['damping']:g}" if row["sketch"] else "")
        kl = [f"{row['divergence'][text]:.3f}" for text in ("wiki", "news")]
        lines.append([name, *kl, f"{row['cpu_seconds'] / 60:.1f}"])
    titles = ["rounding", "KL wiki", "KL news", "CPU minutes"]
    return table(titles, lines) + machine_line(content)


def startup() -> str:
    """Seconds and memory of imports and of quick commands."""
    content = load("startup")
    if content is None:
        return ""
    lines = [[row["what"], f"{row['seconds']:.2g} s", f"{row['peak_rss'] / 1e6:.0f} MB"] for row in content["rows"]]
    return table(["", "seconds", "peak memory"], lines) + machine_line(content)


def loading() -> str:
    """Loading checkpoints of other packages."""
    content = load("loading")
    if content is None:
        return ""
    lines = [
        [row["family"], f"{row['megabytes']:.0f} MB", f"{row['peak']:.2f}", f"{row['seconds']:.1f} s"]
        for row in content["rows"]
    ]
    return table(["checkpoint", "file", "peak memory / file", "seconds"], lines) + machine_line(content)


def streaming() -> str:
    """Quantizing from folder to folder: time, memory, and the plan's memory."""
    lines, content = [], None
    for name in ("streaming", "streaming-smollm2-full", "streaming-smollm2"):
        content = load(name) or content
        for way, row in (load(name) or {"ways": {}})["ways"].items():
            sizes = content["arguments"]
            sequences = f"{sizes['samples']} x {sizes['tokens']}"
            peak, planned = f"{row['anonymous'] / 1e9:.2f} GB", row.get("predicted", {}).get("memory", "")
            lines.append([content["model"], sequences, way, f"{row['seconds'] / 60:.1f} min", peak, planned])
    titles = ["model", "sequences", "way", "time", "peak of private memory", "planned"]
    return table(titles, lines) + machine_line(content) if content else ""


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "quality": quality,
    "proxy-loss": proxy_loss,
    "ablations": ablations,
    "methods": methods,
    "codebooks": codebooks,
    "trellis": trellis,
    "tuning": tuning,
    "speed": speed,
    "speed-narrow": narrow,
    "llama-cpp": llama_cpp,
    "peers": peers,
    "memory": memory,
    "activations": activations,
    "search": search,
    "again": again,
    "two-sided": two_sided,
    "startup": startup,
    "loading": loading,
    "streaming": streaming,
    "mutations": fuzz_tables.mutations,
    "kills": fuzz_tables.kills,
    "serving": serving.shown,
}


def filled(text: str) -> str:
    """A page with every marked table made again. Raises `KeyError` for a marker of an unknown name."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]() or NOTHING}{found[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if options.check and filled(text) != text:
            sys.exit(f"{page.name} does not show benchmarks/results: run benchmarks/tables.py")
        if not options.check:
            page.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
