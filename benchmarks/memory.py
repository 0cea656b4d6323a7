"""Peak memory of quantizing a model: with calibration, and without it while loading.

    python benchmarks/memory.py [FOLDER] [--num-samples N] [--modes import dense none text self]

Each mode runs in a fresh process. Two peaks are reported, in MB (10^6 bytes): RSS as the system counts it (ru_maxrss),
which includes pages of the model's file that happen to be mapped and can be dropped at any time, and anonymous memory
(RssAnon, read every 10 ms), which cannot.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import machine

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import dense_folder

MODES = {
    "import": "import the packages, load nothing",
    "dense": "load the dense model in float32 and run one window of 512 tokens",
    "none": "dataset=None: quantize while loading",
    "text": "calibrate on the protocol's text",
    "self": "calibrate on text that the model writes (the default)",
}


class AnonymousPeak(threading.Thread):
    """Watches this process's anonymous memory; `peak` is in bytes, 0 where the system does not tell."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.stopped = threading.Event()

    def run(self):
        status = Path("/proc/self/status")
        while status.exists() and not self.stopped.wait(0.01):
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)


def child(options: argparse.Namespace) -> dict:
    """Run the mode in this process and return its peaks."""
    watch = AnonymousPeak()
    watch.start()
    start, cpu = time.perf_counter(), time.process_time()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from transformers_quip import QuipConfig

    model = None
    if options.mode == "dense":
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
        with torch.no_grad():
            model(torch.arange(512)[None] % model.config.vocab_size)
    elif options.mode != "import":
        dataset = {"none": None, "self": "self"}.get(options.mode)
        if options.mode == "text":
            from protocol import load_windows

            tokenizer = AutoTokenizer.from_pretrained(options.folder)
            dataset = load_windows(tokenizer, calibration=options.num_samples, evaluation=1).calibration
        config = QuipConfig(bits=2, dataset=dataset, num_samples=options.num_samples)
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, quantization_config=config)
    watch.stopped.set()
    watch.join()
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_anonymous": watch.peak,
        # tied parameters once, as in memory
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()) if model is not None else 0,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a dense model; SmolLM2 by default")
    parser.add_argument("--num-samples", type=int, default=256, help="calibration sequences of 512 tokens")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--mode", choices=list(MODES), help=argparse.SUPPRESS)  # the child's
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(child(options)))
        return

    folder = options.folder or dense_folder()
    results = {}
    print(f"{'mode':8s} {'peak RSS':>9s} {'anonymous':>10s} {'model':>8s} {'wall s':>8s} {'CPU s':>8s}")
    for mode in options.modes:
        command = [sys.executable, __file__, str(folder), "--mode", mode, "--num-samples", str(options.num_samples)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        row = results[mode] = json.loads(output.splitlines()[-1])
        sizes = [row[key] / 1e6 for key in ("peak_rss", "peak_anonymous", "model_bytes")]
        print("{:8s} {:9.0f} {:10.0f} {:8.0f}".format(mode, *sizes), end=" ")
        print(f"{row['seconds']:8.1f} {row['cpu_seconds']:8.1f}", flush=True)

    summary = {}
    for mode in ("text", "self"):
        if mode in results and "dense" in results:
            summary[f"{mode} above dense"] = results[mode]["peak_rss"] - results["dense"]["peak_rss"]
    if "none" in results and "import" in results:
        for peak in ("peak_rss", "peak_anonymous"):
            above = results["none"][peak] - results["import"][peak]
            summary[f"none above import and quantized size ({peak})"] = above - results["none"]["model_bytes"]
    for name, value in summary.items():
        print(f"{name}: {value / 1e6:.0f} MB")
    machine.save("memory", {"num_samples": options.num_samples, "modes": MODES, "results": results, "summary": summary})


if __name__ == "__main__":
    main()
