"""The gain of tuning after rounding on SmolLM2: perplexity, KL divergence and generation against minutes.

    python benchmarks/finetune.py [FOLDER] [--settings text self] [--codebooks e8p trellis] [--modes vectors full]
                                  [--bits 2] [--epochs 0 1 2 4] [--tuning-samples N] [--quantized FOLDER] [--seed N]
                                  [--embeddings] [--reverse SHARE] [--batch-size N] [--own-windows N]
                                  [--code-rounds N] [--rounding yaqa] [--save FOLDER]

Settings: `text` quantizes and tunes on Wikipedia (256 x 512 tokens, by the protocol in protocol.py), `self` on text that
the dense model writes. Modes: `vectors` tunes end to end only, `full` also tunes each block while it is rounded. `epochs 0`
is the model before tuning end to end: with `vectors` the quantized model, with `full` the one after blockwise tuning.
--embeddings trains the embeddings as well, --reverse is the share of KL(quantized || dense) in the loss, --own-windows are
further windows that the quantized model writes, --code-rounds moves codes afterwards, and --rounding says how the model of
--quantized was rounded, or how it is to be.

Tuning end to end reads the windows that quantizing read, or with --tuning-samples more of the same source. --quantized is a
model that `quality.py --save` has made with the same windows, so that it need not be quantized again.
16 further windows of the same source decide about every state. Neither the Hessians nor the tuning use them, and the
evaluation text is different again. Everything is kept in .cache/finetune, so that a series can be made in parts. Rows that
are already in results/finetune.json are measured again only with --again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import machine
import torch
from protocol import load_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_quip import QuipConfig
from transformers_quip.calibration.dataset import load_token_ids
from transformers_quip.evaluation import divergence, generation_quality, perplexity, true_bits_per_weight
from transformers_quip.finetune import Teacher, TuneOptions, record, tune_vectors, window_divergences
from transformers_quip.finetune.end_to_end import student_head
from transformers_quip.nn.replace import quantized_linears

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import dense_folder

CACHE = Path(__file__).resolve().parent.parent / ".cache/finetune"
HELD_OUT = 16
PROMPTS, PROMPT_LENGTH, WRITTEN = 8, 32, 128
# Options that tell rows apart, besides the combinations; and their values in rows that were made before they were options.
CHOSEN = {"rounding": "ldlq", "embeddings": False, "reverse": 0.0, "batch_size": 4, "own_windows": 0, "code_rounds": 0}


def text(options: argparse.Namespace, setting: str, tokenizer) -> torch.Tensor:
    """Token ids [samples + HELD_OUT, 512], those of quantizing first; made once for each setting, number and seed."""
    count = options.tuning_samples + HELD_OUT
    if setting == "text":
        return load_windows(tokenizer, calibration=count).calibration
    path = CACHE / f"self-{count}-{options.seed}.pt"
    if not path.is_file():
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
        config = QuipConfig(num_samples=options.tuning_samples, seed=options.seed)
        ids, _ = load_token_ids(config, model, held_out=HELD_OUT)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(ids, path)
    return torch.load(path)


def quantized(options: argparse.Namespace, setting: str, codebook: str, mode: str, bits: float, ids: torch.Tensor) -> Path:
    """The folder of the quantized model without tuning end to end; made once."""
    folder = CACHE / f"{setting}-{codebook}-{options.rounding}-{mode}-{bits:g}-{options.num_samples}-{options.seed}"
    if not (folder / "seconds.json").is_file():
        config = QuipConfig(
            bits=bits,
            codebook=None if codebook == "default" else codebook,
            rounding=options.rounding,
            dataset=ids[: options.num_samples],
            num_samples=options.num_samples,
            tune="blocks" if mode == "full" else "none",
            seed=options.seed,
        )
        wall, cpu = time.perf_counter(), time.process_time()
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, quantization_config=config)
        seconds = {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            **model.hf_quantizer.report.seconds,
        }
        model.save_pretrained(folder)
        (folder / "seconds.json").write_text(json.dumps(seconds))
    return folder


def measure(options: argparse.Namespace, model, dense, evaluation: dict[str, torch.Tensor]) -> dict:
    """All measurements of a model."""
    prompts = evaluation["wiki"][:PROMPTS, :PROMPT_LENGTH]
    written = generation_quality(model, dense, prompts, WRITTEN, options.seed)
    return {
        "true_bits": true_bits_per_weight(model),
        "perplexity": {name: perplexity(model, ids) for name, ids in evaluation.items()},
        "divergence": {name: divergence(model, dense, ids[:8]).mean for name, ids in evaluation.items()},
        "sampled_perplexity": written.perplexity / written.own_perplexity,
        "repetition": written.repetition,
        "own_repetition": written.own_repetition,
    }


def stored_changes(model, teacher: Teacher) -> dict[str, dict[str, float]]:
    """What rounding su and sv to smaller dtypes does to the divergence on HELD_OUT windows: mean change, standard error."""
    windows = range(len(teacher.ids) - HELD_OUT, len(teacher.ids))
    head = student_head(model, teacher, teacher.ids[:1, :8])
    vectors = [vector for linear in quantized_linears(model).values() for vector in (linear.su, linear.sv)]
    exact = [vector.data.clone() for vector in vectors]
    before, result = window_divergences(model, teacher, head, windows), {}
    for dtype in (torch.float16, torch.bfloat16):
        for vector, value in zip(vectors, exact, strict=True):
            vector.data.copy_(value.to(dtype))
        change = window_divergences(model, teacher, head, windows) - before
        result[str(dtype).removeprefix("torch.")] = {
            "mean": change.mean().item(),
            "error": (change.std() / len(change) ** 0.5).item(),
        }
    for vector, value in zip(vectors, exact, strict=True):
        vector.data.copy_(value)
    return result


def run(options: argparse.Namespace, setting: str, codebook: str, mode: str, bits: float, epochs: float) -> dict:
    """One row of results/finetune.json."""
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = text(options, setting, tokenizer)
    folder = options.quantized or quantized(options, setting, codebook, mode, bits, ids)
    dense = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    row = {"setting": setting, "codebook": codebook, "mode": mode, "bits": bits, "epochs": epochs, "seed": options.seed}
    row |= {"num_samples": options.num_samples, "tuning_samples": options.tuning_samples if epochs else 0}
    row |= {name: getattr(options, name) for name in CHOSEN}
    if not options.quantized:
        row["quantizing"] = json.loads((folder / "seconds.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    if epochs:
        wall, cpu = time.perf_counter(), time.process_time()
        name = f"{setting}-{options.tuning_samples}-{options.seed}"
        if options.own_windows:
            own, _ = load_token_ids(QuipConfig(num_samples=options.own_windows, seed=options.seed), model, tokenizer)
            ids = torch.cat([own, ids])  # the last ones are held out
            name = f"own-{name}"
            row["own_text_cpu_seconds"] = time.process_time() - cpu
        teacher = record(dense, ids, CACHE / f"{name}.bin")
        row["teacher_cpu_seconds"] = time.process_time() - cpu
        chosen = TuneOptions(
            epochs=epochs,
            held_out=HELD_OUT,
            embeddings=options.embeddings,
            reverse=options.reverse,
            batch_size=options.batch_size,
            code_rounds=options.code_rounds,
            seed=options.seed,
        )
        report = tune_vectors(model, teacher, chosen)
        row |= {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        row |= {"threads": torch.get_num_threads(), **report.to_dict(), "history": report.history}
        if report.codes is not None:
            row["code_history"] = report.codes.history
        row["stored_changes"] = stored_changes(model, teacher)
    if options.save:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)
    return row | measure(options, model, dense, load_windows(tokenizer, evaluation=options.windows).evaluation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a dense model; SmolLM2 by default")
    parser.add_argument("--settings", nargs="+", choices=("text", "self"), default=["text", "self"])
    parser.add_argument("--codebooks", nargs="+", default=["default"], help="the option codebook of QuipConfig")
    parser.add_argument("--modes", nargs="+", choices=("vectors", "full"), default=["vectors"])
    parser.add_argument("--bits", type=float, nargs="+", default=[2])
    parser.add_argument("--epochs", type=float, nargs="+", default=[0, 2])
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--tuning-samples", type=int, help="windows for tuning end to end; --num-samples by default")
    parser.add_argument("--quantized", type=Path, help="a folder of quality.py --save: one codebook, bits and seed")
    parser.add_argument("--rounding", default="ldlq", help="the option rounding of QuipConfig")
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--reverse", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--own-windows", type=int, default=0)
    parser.add_argument("--code-rounds", type=int, default=0)
    parser.add_argument("--save", type=Path, help="keep the tuned model here")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    options.folder = options.folder or dense_folder()
    options.tuning_samples = options.tuning_samples or options.num_samples
    if options.tuning_samples < options.num_samples:
        parser.error("--tuning-samples must be at least --num-samples")
    if options.quantized and len(options.codebooks) * len(options.bits) * len(options.settings) > 1:
        parser.error("--quantized is one model: give one setting, codebook and number of bits")
    path = machine.RESULTS / "finetune.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    keys = ["setting", "codebook", "mode", "bits", "epochs", "seed", "num_samples", "tuning_samples"]
    wanted = itertools.product(options.settings, options.codebooks, options.modes, options.bits, options.epochs)
    for combination in wanted:
        key = [*combination, options.seed, options.num_samples, options.tuning_samples if combination[-1] else 0]
        key += [getattr(options, name) for name in CHOSEN]
        old = [
            row
            for row in rows
            if [row[name] for name in keys] + [row.get(name, default) for name, default in CHOSEN.items()] == key
        ]
        if old and not options.again:
            continue
        rows = [row for row in rows if row not in old] + [run(options, *combination)]
        machine.save("finetune", {"rows": rows})
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
