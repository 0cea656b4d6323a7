"""Perplexity of a quantized model, by the protocol in protocol.py, for several calibrations, bits and seeds.

    python benchmarks/quality.py [FOLDER] [--settings text trellis trellis-refit trellis-yaqa trellis-yaqa-256 eighths
        self none] [--bits 2 2.5 3 4] [--seeds 0 1 2] [--num-samples N] [--save FOLDER]

Settings: `text` calibrates on Wikipedia (256 x 512 tokens), `trellis` does so with codebook="trellis", `trellis-refit` fits
su to the codes as well, `trellis-yaqa` rounds for the model's output with gradients of 64 sequences, `trellis-yaqa-256` of
256, `eighths` has tensor_parallel=8 (transforms in 8 blocks on the side that is divided), `self` is the bare default (text
that the model writes itself), `none` is dataset=None. --save keeps the quantized models; those that are there already are
evaluated again, and what only quantizing measures stays in their rows. Each run is a fresh process. results/quality.json is
written after every run, and runs that it has already are replaced, so that a long series can be made in parts, also side by
side: no seconds are kept.
For the first seed of each setting at 2 bits, a picture of the errors of every layer is written to the same folder. If
text was measured at 2, 2.5 and 3 bits, the last line compares 2.5 bits with the line between 2 and 3.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import machine

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import dense_folder

SETTINGS = {
    "dense": "the dense model in float32",
    "text": "QuIP#, calibrated on Wikipedia text",
    "trellis": "QuIP# with trellis codes, calibrated on Wikipedia text",
    "trellis-refit": "QuIP# with trellis codes and su refitted, calibrated on Wikipedia text",
    "trellis-yaqa": "QuIP# with trellis codes, rounded for the model's output, calibrated on Wikipedia text",
    "trellis-yaqa-256": "QuIP# with trellis codes, rounded for the model's output with gradients of 256 sequences",
    "eighths": "QuIP#, calibrated on Wikipedia text, transforms in 8 blocks for tensor parallelism",
    "self": "QuIP#, calibrated on text the model wrote (default)",
    "none": "QuIP#, no calibration",
}

# Options of QuipConfig; the data are Wikipedia text unless they say something else.
OPTIONS = {
    "trellis": {"codebook": "trellis"},
    "trellis-refit": {"codebook": "trellis", "refit": 2},
    "trellis-yaqa": {"codebook": "trellis", "rounding": "yaqa"},
    "trellis-yaqa-256": {"codebook": "trellis", "rounding": "yaqa", "sketch_samples": 256},
    "eighths": {"tensor_parallel": 8},
    "self": {"dataset": "self"},
    "none": {"dataset": None},
}


def run(options: argparse.Namespace) -> dict:
    """Quantize and evaluate in this process; the row of results/quality.json."""
    import torch
    from protocol import load_windows
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from transformers_quip import QuipConfig
    from transformers_quip.evaluation import divergence, mean_by_kind, perplexity, plot_relative_error, true_bits_per_weight
    from transformers_quip.evaluation.report import ERRORS

    setting, bits, seed = options.run
    bits = float(bits)
    windows = load_windows(
        AutoTokenizer.from_pretrained(options.folder), calibration=options.num_samples, evaluation=options.windows
    )
    arguments = {"dtype": torch.float32}
    saved = None if options.save is None else options.save / f"{setting}-{bits:g}-{seed}"
    known = saved is not None and saved.is_dir()
    if setting != "dense" and not known:
        chosen = {"dataset": windows.calibration, **OPTIONS.get(setting, {})}
        arguments["quantization_config"] = QuipConfig(bits=bits, num_samples=options.num_samples, seed=int(seed), **chosen)
    model = AutoModelForCausalLM.from_pretrained(saved if known else options.folder, **arguments)
    row = {
        "setting": setting,
        "bits": bits if setting != "dense" else 32,
        "seed": int(seed),
        "windows": options.windows,
        "perplexity": {name: perplexity(model, ids) for name, ids in windows.evaluation.items()},
    }
    if setting == "dense":
        return row
    if saved is not None and not known:
        model.save_pretrained(saved)
        AutoTokenizer.from_pretrained(options.folder).save_pretrained(saved)
    dense = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    row["divergence"] = {name: divergence(model, dense, ids).mean for name, ids in windows.evaluation.items()}
    row["compared"] = options.windows
    row["num_samples"] = options.num_samples
    row["true_bits"] = true_bits_per_weight(model)
    records = layer_records(model, dense)
    for key in ERRORS:
        if losses := mean_by_kind(records, key):
            row[key] = losses
    if report := model.hf_quantizer.report:
        row["data"] = report.data
    if options.picture and not known:
        plot_relative_error(records, options.picture, title=f"{options.folder.name}, {bits:g} bits: {SETTINGS[setting]}")
    return row


def layer_records(model, dense) -> list[dict]:
    """Return the errors of each quantized linear, as transformers_quip.evaluation.LayerRecord.

    The quantizer measured proxy loss and relative error with its Hessians; without calibration they are missing. The
    errors of the weights are computed here, in the same way for all settings.
    """
    import torch

    from transformers_quip import QuipLinear
    from transformers_quip.nn.replace import dense_weight

    report = model.hf_quantizer.report
    measured = {record["name"]: record for record in report.modules} if report else {}
    records = []
    for name, module in model.named_modules():
        if isinstance(module, QuipLinear):
            weight = dense_weight(dense.get_submodule(name)).detach()
            error = (weight - module.dequantize(torch.float32)).square().sum() / weight.square().sum()
            found = {key: measured[name][key] for key in ("proxy_loss", "relative_error", "seconds") if name in measured}
            records.append({"name": name, "weight_error": error.item(), "bits": module.true_bits, **found})
    return records


def spread(values: list[float]) -> str:
    """Mean, and the range where there are several."""
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def groups(rows: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """(setting, bits) → its runs, in the order of SETTINGS and of bits."""
    result: dict[tuple[str, float], list[dict]] = {}
    for row in sorted(rows, key=lambda row: (list(SETTINGS).index(row["setting"]), row["bits"], row["seed"])):
        result.setdefault((row["setting"], row["bits"]), []).append(row)
    return result


def print_table(rows: list[dict]) -> None:
    columns = f"{'wiki':28s} {'news':28s} {'true bits':>9s}"
    print(f"\n{'setting':8s} {'bits':>4s} {'runs':>4s}  {columns}")
    for (setting, bits), found in groups(rows).items():
        wiki, news = (spread([row["perplexity"][name] for row in found]) for name in ("wiki", "news"))
        true = found[0].get("true_bits", 32)
        print(f"{setting:8s} {bits:4g} {len(found):4d}  {wiki:28s} {news:28s} {true:9.3f}")
    print_line(rows)


def print_line(rows: list[dict], low: float = 2, middle: float = 2.5, high: float = 3) -> None:
    """Compare the log perplexity at `middle` bits with the line between `low` and `high`, over true bits."""
    found = {bits: [row for row in rows if (row["setting"], row["bits"]) == ("text", bits)] for bits in (low, middle, high)}
    if not all(found.values()):
        return
    bits = {key: statistics.mean(row["true_bits"] for row in value) for key, value in found.items()}
    share = (bits[middle] - bits[low]) / (bits[high] - bits[low])
    for text in ("wiki", "news"):
        log = {key: statistics.mean(math.log(row["perplexity"][text]) for row in value) for key, value in found.items()}
        line = (1 - share) * log[low] + share * log[high]
        side = "below" if log[middle] < line else "ABOVE"
        print(f"{text}: {middle:g} bits has {math.exp(log[middle]):.2f}, {side} the line's {math.exp(line):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a dense model; SmolLM2 by default")
    parser.add_argument(
        "--settings", nargs="+", choices=list(SETTINGS), default=["dense", "text", "trellis", "self", "none"]
    )
    parser.add_argument("--bits", nargs="+", type=float, default=[2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-samples", type=int, default=256, help="calibration sequences of 512 tokens")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of each text")
    parser.add_argument("--name", default="quality", help="write results/NAME.json and results/NAME-*.png")
    parser.add_argument("--save", type=Path, help="keep every quantized model in FOLDER/SETTING-BITS-SEED")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # the child's setting, bits and seed
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options)))
        return

    folder = options.folder or dense_folder()
    results = machine.RESULTS / f"{options.name}.json"
    rows = []
    for setting, bits, seed in itertools.product(options.settings, options.bits, options.seeds):
        if setting == "dense" and (bits, seed) != (options.bits[0], options.seeds[0]):
            continue
        command = [sys.executable, __file__, str(folder), "--run", setting, str(bits), str(seed)]
        command += ["--num-samples", str(options.num_samples), "--windows", str(options.windows)]
        if options.save:
            command += ["--save", str(options.save)]
        if setting != "dense" and bits == 2 and seed == options.seeds[0]:
            command += ["--picture", str(machine.RESULTS / f"{options.name}-{setting}.png")]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        row = {**json.loads(output.splitlines()[-1]), "processor": machine.describe()["processor"]}
        rows = json.loads(results.read_text())["rows"] if results.is_file() else []  # others may write it meanwhile
        same = ("setting", "bits", "seed")
        before = [old for old in rows if [old[key] for key in same] == [row[key] for key in same]]
        rows = [old for old in rows if old not in before] + [{**(before[0] if before and options.save else {}), **row}]
        machine.save(options.name, {"settings": SETTINGS, "rows": list(itertools.chain(*groups(rows).values()))})
        print(json.dumps(row), flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()
