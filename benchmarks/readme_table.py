"""Write the README's results from results/*.json: the region between the two markers, and nothing else.

    python benchmarks/readme_table.py [--check]

With --check nothing is written, and the exit code is 1 if the README does not show what the files hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from quality import groups

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parent.parent / "README.md"
BEGIN = "<!-- results: written by benchmarks/readme_table.py -->"
END = "<!-- end of results -->"
NOTHING = "No results yet: `make bench` makes them.\n"


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def figure(values: list[float]) -> str:
    """One figure, or the mean with the range of several, to a sensible number of digits."""

    def text(value: float) -> str:
        return f"{value:.1f}" if value < 1000 else f"{value:.0f}"

    mean = text(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({text(min(values))} to {text(max(values))})"


def quality_table(quality: dict) -> str:
    lines = [
        "| SmolLM2-135M-Instruct | true bits | wiki perplexity | news perplexity | wall s | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for (setting, bits), rows in groups(quality["rows"]).items():
        description = quality["settings"][setting]
        if setting != "dense":
            description += f", {bits:g} bits"
        seeds = f", {len(rows)} seeds" if len(rows) > 1 else ""
        true = f"{rows[0]['true_bits']:.3f}" if "true_bits" in rows[0] else "32"
        wiki, news = (figure([row["perplexity"][name] for row in rows]) for name in ("wiki", "news"))
        timed = [row for row in rows if row["threads"] == max(other["threads"] for other in rows)]
        wall, cpu = (f"{statistics.mean(row[key] for row in timed):.0f}" for key in ("wall_seconds", "cpu_seconds"))
        if setting == "dense":
            wall = cpu = ""
        lines.append(f"| {description}{seeds} | {true} | {wiki} | {news} | {wall} | {cpu} |")
    return "\n".join(lines) + "\n"


def proxy_loss_table(quality: dict) -> str:
    rows = {key: rows[0]["proxy_loss"] for key, rows in groups(quality["rows"]).items() if rows[0].get("proxy_loss")}
    if not rows:
        return ""
    kinds = list(dict.fromkeys(kind for losses in rows.values() for kind in losses))
    lines = [
        "| relative proxy loss, mean of all blocks | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for (setting, bits), losses in rows.items():
        cells = (f"{losses[kind]:.4f}" if kind in losses else "" for kind in kinds)
        lines.append(f"| {quality['settings'][setting]}, {bits:g} bits | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Markdown; nothing where there are no rows."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) if rows else ""


def methods_table(methods: dict) -> str:
    """Every row of the full protocol, best first within the same bits, folded; and what the papers' claims come to."""
    rows = []
    full = [row for row in methods["rows"] if row["windows"] == max(other["windows"] for other in methods["rows"])]
    for row in sorted(full, key=lambda row: (row["bits"], row["perplexity"]["wiki"])):
        true, loss, seconds = (row.get(key) for key in ("true_bits", "proxy_loss", "cpu_seconds"))
        rows.append(
            [
                row["label"],
                f"{loss:.4f}" if loss is not None else "",
                figure([row["perplexity"]["wiki"]]),
                figure([row["perplexity"]["news"]]),
                f"{true:.3f}" if true else f"{row['bits']}",
                f"{seconds:.0f}" if seconds else "",
            ]
        )
    titles = ["method", "mean proxy loss", "wiki perplexity", "news perplexity", "true bits", "rounding CPU s"]
    claims = "".join(f"- {claim}\n" for claim in methods["claims"])
    rows_folded = folded("All methods", table(titles, rows))
    return f"What each part buys, all with the Hessians of the dense model:\n\n{claims}\n{rows_folded}"


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def codebooks_table(books: dict) -> str:
    titles = [
        "codebook",
        "bits",
        "mean squared error on a Gaussian",
        "least possible at any block size",
        "encodes, times E8P",
    ]
    return table(
        titles,
        [
            [
                row["codebook"],
                f"{row['bits']:g}",
                f"{row['error']:.3g}",
                f"{row['bound']:.3g}",
                f"{row['speed_to_e8p']:.2g}",
            ]
            for row in books["rows"]
        ],
    )


def speed_table(generate: dict) -> str:
    titles = ["on the CPU", "activations", "tokens/s", "times dense bfloat16"]
    return table(
        titles,
        [
            [f"{row['model']}, {row['kind']}", row["way"], f"{row['tokens_per_second']:.1f}", f"{row['times_dense']:.2f}"]
            for row in generate["rows"]
            if row["way"] != "dense bfloat16"
        ],
    )


def other_figures() -> str:
    lines = []
    if nearest := load("nearest"):
        for row in nearest["rows"][1:]:
            lines.append(
                f"- Nearest-point search, {row['search']}: {row['weights_per_second']:.2g} weights/s, "
                f"{row['times_plain']:.0f} times the plain table search."
            )
    if rounding := load("rounding"):
        lines.append(
            f"- Rounding one decoder block (LDLQ and {rounding['refinement_sweeps']} sweeps): "
            f"{rounding['cpu_seconds']:.1f} CPU seconds."
        )
    if memory := load("memory"):
        lines += [f"- Peak memory, {name}: {value / 1e6:.0f} MB." for name, value in memory["summary"].items()]
    if activations := load("activations"):
        for row in activations["rows"]:
            cost = ", ".join(f"{name} {value:+.2%}" for name, value in row["cost"].items())
            lines.append(f"- Perplexity of 8-bit instead of exact activations, in kernels {row['kernels']}: {cost}.")
    if startup := load("startup"):
        before = ""
        for row in startup["rows"]:
            what = row["what"].replace("... import transformers_quip", f"After `{before}`, `import transformers_quip`")
            before = row["what"]
            lines.append(f"- {what}: {row['seconds']:.2g} s, peak memory {row['peak_rss'] / 1e6:.0f} MB.")
    return "\n".join(lines) + "\n" if lines else ""


def machine_line(content: dict) -> str:
    found = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"Machine: {found['processor']}, {found['cores']} cores; Python {found['python']}, {versions}.\n"


def region() -> str:
    quality = load("quality")
    parts = [quality_table(quality), proxy_loss_table(quality)] if quality else []
    for name, show in (("methods", methods_table), ("codebooks", codebooks_table), ("generate", speed_table)):
        if content := load(name):
            parts.append(show(content))
    parts.append(other_figures())
    if quality:
        parts.append(machine_line(quality))
    return "\n".join(part for part in parts if part) or NOTHING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"README.md has not both markers: {BEGIN} and {END}")
    wanted = f"{before}{BEGIN}\n{region()}{END}{after}"
    if options.check:
        sys.exit(0 if wanted == text else "README.md does not show benchmarks/results: run benchmarks/readme_table.py")
    README.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
