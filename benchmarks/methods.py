"""The gain of each part of QuIP and QuIP#: incoherence × rounding × codebook, at 2, 3 and 4 bits, on a real model.

    python benchmarks/methods.py [FOLDER] [--quick] [--bits 2 3 4] [--only WORD ...] [--seed 0] [--list] [--table]

The text is described in protocol.py. The Hessians come from the dense model (calibrate_on="dense", as in the papers), so
every method rounds the same problem; they are computed once and cached in .cache/. Each finished run adds its row to
results/methods.json at once, and finished runs are not repeated: stop and continue as you like. Runs that decide the claims
of the papers, printed below the table, come first. If the processor has instructions for it, the linears of the evaluated
models multiply in bfloat16 (sums in float32), which is three times faster; the row "dense" shows the cost of that.

`--quick` calibrates on a quarter of the text and evaluates on a quarter; its rows are kept apart from the full ones.
`--only` makes the runs whose label holds all of these words, as `--list` prints them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from protocol import CALIBRATION_WINDOWS, EVALUATION_WINDOWS, Windows, load_windows
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_quip import QuipConfig
from transformers_quip.calibration import BlockHessians, capture_inputs, find_blocks
from transformers_quip.calibration.capture import linear_names
from transformers_quip.calibration.precision import cpu_matmul_precision, fast_cpu_linears
from transformers_quip.evaluation import perplexity, true_bits_per_weight
from transformers_quip.nn import replace
from transformers_quip.quantize.layer import quantize_weights

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import dense_folder

QUICK = 4
BATCH = 8
DENSE = "the dense model"
CACHE = Path(__file__).resolve().parent.parent / ".cache"


@dataclass(frozen=True)
class Method:
    """One row of the table. `sweeps` are passes of coordinate descent after the first rounding."""

    bits: int
    codebook: str
    rounding: str
    incoherence: str | tuple[str, str] = "hadamard"
    sweeps: int = 0
    rescale: bool = True

    @property
    def label(self) -> str:
        """A unique label, which --only searches."""
        sides = self.incoherence if isinstance(self.incoherence, str) else " in, ".join(self.incoherence) + " out"
        rescale = "" if self.rescale else ", not rescaled"
        return f"{self.bits} bits, {self.codebook}, {self.rounding} + {self.sweeps} sweeps, {sides}{rescale}"

    def config(self, seed: int) -> QuipConfig:
        """The options for [`quantize_weights`]."""
        return QuipConfig(
            bits=self.bits,
            codebook=self.codebook,
            rounding=self.rounding,
            incoherence=self.incoherence,
            refinement_sweeps=self.sweeps,
            rescale=self.rescale,
            calibrate_on="dense",
            seed=seed,
        )


# Sweeps as published: QuIP# makes 10 after LDLQ; QuIP's LDLQ-RG and greedy make about as many; LDLQ alone makes none.
ROUNDINGS = {"ldlq": 0, "greedy": 9, "nearest": 0, "ldlq-rg": 9, "quantease": 20, "convex": 0, "stochastic": 0}
NO_INCOHERENCE = {"incoherence": "none", "rescale": False}


def methods() -> list[Method]:
    """All rows, those that decide a claim first."""
    e8p, residual = "e8p", {3: "e8p-rvq3", 4: "e8p-rvq4"}
    rows = [Method(2, "scalar2", name) for name in ("ldlq", "greedy", "nearest")]
    rows += [Method(2, "scalar2", name, sweeps=9) for name in ("ldlq", "greedy")]
    rows += [Method(2, e8p, "ldlq"), Method(2, "d4", "ldlq"), Method(2, e8p, "ldlq", sweeps=10)]
    rows += [Method(2, "scalar2", name, sweeps=count, **NO_INCOHERENCE) for name, count in ROUNDINGS.items()]
    rows += [Method(2, "scalar2", name, sweeps=count) for name, count in ROUNDINGS.items()]
    rows += [Method(2, book, "ldlq", "kronecker") for book in ("scalar2", e8p)]
    rows += [Method(2, e8p, "ldlq", "kronecker", sweeps=10), Method(2, e8p, "ldlq", sweeps=10, **NO_INCOHERENCE)]
    rows += [Method(2, e8p, name, sweeps=ROUNDINGS[name]) for name in ("greedy", "nearest", "ldlq-rg", "quantease")]
    rows += [Method(2, e8p, "ldlq", ("hadamard", "none"), 10), Method(2, e8p, "ldlq", sweeps=10, rescale=False)]
    rows += [Method(2, "scalar2", name, "none", count) for name, count in ROUNDINGS.items()]
    rows += [Method(2, e8p, "ldlq", "none", sweeps=10)]
    for bits in (3, 4):
        scalar = f"scalar{bits}"
        rows += [Method(bits, book, "ldlq", sweeps=10) for book in (residual[bits], scalar)]
        rows += [Method(bits, book, "ldlq") for book in (residual[bits], scalar)]
        rows += [Method(bits, scalar, name, sweeps=ROUNDINGS[name]) for name in ("greedy", "nearest", "ldlq-rg")]
        rows += [Method(bits, scalar, "ldlq", **NO_INCOHERENCE), Method(bits, scalar, "nearest", **NO_INCOHERENCE)]
        rows += [Method(bits, scalar, "ldlq", "kronecker"), Method(bits, residual[bits], "nearest")]
    rows += [Method(4, "half-integer", "ldlq", sweeps=10)]
    rows += [Method(2, "scalar2", name, "kronecker", count) for name, count in ROUNDINGS.items() if name != "ldlq"]
    rows += [Method(2, e8p, name, sweeps=ROUNDINGS[name], **NO_INCOHERENCE) for name in ("ldlq", "greedy", "nearest")]
    return list(dict.fromkeys(rows))


def hessian_files(model, name: str, windows: Windows) -> list[Path]:
    """A file for each block of the dense model: {"q_proj k_proj …": Hessian of their common input}; made if missing."""
    _, blocks = find_blocks(model)
    place = CACHE / f"hessians-{name}-{len(windows.calibration)}"
    files = [place / f"{index}.safetensors" for index in range(len(blocks))]
    if not all(file.is_file() for file in files):
        place.mkdir(parents=True, exist_ok=True)
        inputs = capture_inputs(model, blocks, windows.calibration, BATCH)
        for index, block in enumerate(tqdm(blocks, desc="Hessians", unit="block")):
            partial = files[index].with_suffix(".partial")
            save_file(_observe(index, block, inputs), partial)
            partial.replace(files[index])
    return files


@torch.no_grad()
def _observe(index: int, block: torch.nn.Module, inputs) -> dict[str, torch.Tensor]:
    hessians = BlockHessians().collect(block, linear_names(block), inputs.of_block(index), inputs.store)
    return {" ".join(names): hessians.pop(leader) for leader, names in hessians.groups.items()}


def evaluate(model, windows: Windows) -> dict[str, float]:
    """Perplexity on each text, with the linears' products in bfloat16 (see above)."""
    with fast_cpu_linears(model):
        return {name: perplexity(model, ids) for name, ids in windows.evaluation.items()}


def run_dense(folder: Path, windows: Windows) -> dict:
    """The row of the dense model, with the cost of the faster products."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    exact = {name: perplexity(model, ids) for name, ids in windows.evaluation.items()}
    return {"label": DENSE, "bits": 32, "perplexity": evaluate(model, windows), "perplexity_float32": exact}


def run(method: Method, folder: Path, windows: Windows, seed: int) -> dict:
    """Quantize all blocks and evaluate: the row of results/methods.json."""
    config = method.config(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks, _ = find_blocks(model)
    losses, cpu_seconds = [], 0.0
    for index, file in enumerate(tqdm(hessian_files(model, folder.name, windows), desc=method.label, unit="block")):
        for names, hessian in load_file(file).items():
            full_names = [f"{blocks}.{index}.{name}" for name in names.split()]
            weights = {name: model.get_submodule(name).weight.detach() for name in full_names}
            cpu = time.process_time()
            with cpu_matmul_precision("ieee"):
                results = quantize_weights(weights, hessian, config)
            cpu_seconds += time.process_time() - cpu
            for name, result in results.items():
                losses.append(result.statistics["proxy_loss"])
                replace.replace_linear(model, name, result, config)
    bits = true_bits_per_weight(model)
    replace.replace_by_dense(model, torch.float32)  # the same values, and faster to evaluate
    return {
        "label": method.label,
        "bits": method.bits,
        "codebook": method.codebook,
        "rounding": method.rounding,
        "incoherence": method.incoherence,
        "sweeps": method.sweeps,
        "rescale": method.rescale,
        "proxy_loss": statistics.mean(losses),
        "perplexity": evaluate(model, windows),
        "true_bits": bits,
        "cpu_seconds": cpu_seconds,
    }


def print_table(rows: list[dict]) -> None:
    """Markdown, best perplexity first within the same bits."""
    print("\n| method | mean proxy loss | wiki | news | true bits | rounding CPU s |\n|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["bits"], row["perplexity"]["wiki"])):
        wiki, news = (f"{row['perplexity'][name]:.4g}" for name in ("wiki", "news"))
        if row["label"] == DENSE:
            print(f"| {DENSE} | | {wiki} | {news} | {row['bits']} | |")
            continue
        loss, bits, seconds = f"{row['proxy_loss']:.4g}", f"{row['true_bits']:.3f}", f"{row['cpu_seconds']:.0f}"
        print(f"| {row['label']} | {loss} | {wiki} | {news} | {bits} | {seconds} |")


def comparisons(rows: list[dict]) -> list[dict]:
    """Each claim of the papers with the measured figures that bear on it.

    Returns:
        [{"claim", "sides": the labels in the claimed order, "figures": {measure: [a value for each side]}}], without the
        claims of which a side was not measured. One seed each; perplexities of two seeds differ by about 3 %.
    """
    found = {row["label"]: {"proxy loss": row.get("proxy_loss"), **row["perplexity"]} for row in rows}
    scalar = {name: Method(2, "scalar2", name, sweeps=count) for name, count in ROUNDINGS.items()}
    plain = {name: Method(2, "scalar2", name, sweeps=count, **NO_INCOHERENCE) for name, count in ROUNDINGS.items()}
    alone = {name: Method(2, "scalar2", name, "none", count) for name, count in ROUNDINGS.items()}
    e8p = {"rounding": "ldlq", "sweeps": 10, "rescale": False}
    chains = {"incoherence helps ldlq with E8P": (Method(2, "e8p", **e8p), Method(2, "e8p", incoherence="none", **e8p))}
    chains |= {f"incoherence helps {name}": (scalar[name], alone[name]) for name in ROUNDINGS}
    chains |= {f"incoherence and rescaling together help {name}": (scalar[name], plain[name]) for name in ROUNDINGS}
    for sweeps in (0, 9):  # a sweep of greedy descent is the same work after LDLQ as before it
        pair = (Method(2, "scalar2", name, sweeps=sweeps) for name in ("ldlq", "greedy"))
        chains[f"LDLQ ≥ greedy ≥ nearest, {1 + sweeps} passes each"] = (*pair, scalar["nearest"])
    for book, sweeps in (("scalar2", 0), ("e8p", 0), ("e8p", 10)):
        pair = (Method(2, book, "ldlq", side, sweeps) for side in ("hadamard", "kronecker"))
        chains[f"Hadamard ≥ Kronecker, {book} + {sweeps} sweeps"] = tuple(pair)
    chains["E8P > D4 > scalar"] = tuple(Method(2, book, "ldlq") for book in ("e8p", "d4", "scalar2"))
    measures = ("proxy loss", "wiki", "news")
    return [
        {
            "claim": claim,
            "sides": [method.label for method in chain],
            "figures": {measure: [found[method.label][measure] for method in chain] for measure in measures},
        }
        for claim, chain in chains.items()
        if all(method.label in found for method in chain)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a dense model; SmolLM2 by default")
    parser.add_argument("--quick", action="store_true", help="a quarter of the calibration and evaluation text")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the labels of the runs, without a run")
    parser.add_argument("--table", action="store_true", help="print the table of results/methods.json, without a run")
    options = parser.parse_args()
    chosen = [m for m in methods() if m.bits in options.bits and all(word in m.label for word in options.only)]
    if options.list:
        print("\n".join(method.label for method in chosen))
        return

    results = machine.RESULTS / "methods.json"
    share = QUICK if options.quick else 1
    scope = {"seed": options.seed, "num_samples": CALIBRATION_WINDOWS // share, "windows": EVALUATION_WINDOWS // share}

    def rows(everything: bool = False) -> list[dict]:
        found = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.is_file() else []
        return [row for row in found if everything or row.items() >= scope.items()]

    if not options.table:
        folder = options.folder or dense_folder()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        windows = load_windows(tokenizer, calibration=scope["num_samples"], evaluation=scope["windows"])
        for method in (None, *chosen):
            if (method.label if method else DENSE) not in {row["label"] for row in rows()}:
                row = run(method, folder, windows, options.seed) if method else run_dense(folder, windows)
                every = [*rows(everything=True), scope | row]
                of_scope = [row for row in every if row.items() >= scope.items()]
                machine.save("methods", {"comparisons": comparisons(of_scope), "rows": every})
                print(json.dumps(row), flush=True)
    print_table(rows())
    for found in comparisons(rows()):
        print(found["claim"], *(f"{measure}: {values}" for measure, values in found["figures"].items()), sep="; ")


if __name__ == "__main__":
    main()
