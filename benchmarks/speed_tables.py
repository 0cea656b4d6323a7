"""Tables of speed: whole models, and single layers with the instructions that most processors have."""

from __future__ import annotations

from markdown_tables import load, machine_line, table

# Ways of cpu_kernels.py, and their titles.
_LAYERS = {
    "avx2 int8 layer": "codes, int8",
    "avx2 expanded int8 layer": "expanded, int8 (default)",
    "avx2 exact layer": "codes, exact",
    "avx2 expanded exact layer": "expanded, exact",
}
_TRELLIS_LAYERS = {"avx2 layer": "codes", "avx2 bytes layer": "expanded to bytes (default)"}


def speed() -> str:
    """README's speed table: tokens per second of the dense model and of the quantized one."""
    return _models(load("generate"))


def narrow() -> str:
    """The same with AVX2 alone, and single layers in both forms of their codes."""
    parts = (_models(load("generate-avx2")), _layers(load("cpu_kernels-avx2")), _trellis_layers(load("cpu_trellis-avx2")))
    return "\n".join(part for part in parts if part)


def _models(content: dict | None) -> str:
    if content is None:
        return ""
    found = {(row["model"], row["kind"], _where(row), row["way"]): row for row in content["rows"]}
    lines = []
    for model, kind, where in dict.fromkeys(key[:3] for key in found):
        dense = found[model, kind, where, "dense bfloat16"]["tokens_per_second"]
        cells = [f"{model}, {kind}", where, f"{dense:.1f}"]
        for way in ("2-bit exact", "2-bit int8"):
            row = found[model, kind, where, way]
            cells.append(f"{row['tokens_per_second']:.1f} ({row['times_dense']:.2f}x)")
        lines.append(cells)
    titles = [
        "tokens per second",
        "threads",
        "dense bfloat16",
        "2 bits, exact activations",
        "2 bits, int8 activations (default)",
    ]
    return table(titles, lines) + machine_line(content)


def _where(row: dict) -> str:
    """The threads of a row, what else the machine did, and whether its seconds are those of the CPU."""
    beside = f", beside {row['busy']} busy process" if row["busy"] else ""
    return f"{row['threads']}{beside}{' (CPU time)' if row['cpu_time'] else ''}"


def _layers(content: dict | None) -> str:
    """Times of one layer for one vector."""
    if content is None:
        return ""
    found = {(row["shape"], row["way"]): row for row in content["rows"]}
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in content["rows"]):
        rows = [found[shape, way] for way in _LAYERS]
        lines.append(
            [
                shape,
                f"{found[shape, 'dense bfloat16']['microseconds']:.0f}",
                *(f"{row['microseconds']:.0f} ({row['times_dense_bfloat16']:.1f}x)" for row in rows),
            ]
        )
    return table(["microseconds of a layer", "dense bfloat16", *_LAYERS.values()], lines) + machine_line(content)


def _trellis_layers(content: dict | None) -> str:
    """The same for trellis codes, and how far the output of a layer is from that of float64."""
    if content is None:
        return ""
    found = {(row["codebook"], row["shape"], row["vectors"], row["way"]): row for row in content["rows"]}
    lines = []
    for key in dict.fromkeys(key[:3] for key in found):
        dense, rows = found[(*key, "dense bfloat16")], [found[(*key, way)] for way in _TRELLIS_LAYERS]
        cells = [f"{row['microseconds']:.0f} ({row['times_dense_bfloat16']:.1f}x)" for row in rows]
        errors = [f"{row['relative_error']:.2%}" for row in rows]
        vectors = f"{key[2]} vector{'s' if key[2] > 1 else ''}"
        lines.append([f"{key[0]}, {key[1]}, {vectors}", f"{dense['microseconds']:.0f}", *cells, " / ".join(errors)])
    titles = ["microseconds of a layer", "dense bfloat16", *_TRELLIS_LAYERS.values(), "error of codes / of bytes"]
    return table(titles, lines) + machine_line(content)


def llama_cpp() -> str:
    """Tokens per second beside llama.cpp, and where the time of our tokens goes."""
    content = load("llama_cpp-avx2")
    if content is None:
        return ""
    found = {(row["threads"], row["kind"], row["engine"]): row for row in content["rows"]}
    engines = list(dict.fromkeys(row["engine"] for row in content["rows"]))
    lines = []
    for threads, kind in dict.fromkeys(key[:2] for key in found):
        rows = [found[threads, kind, engine] for engine in engines]
        cells = []
        for row in rows:
            ratios = ", ".join(f"{ratio:.2f}x" for ratio in row["ours"])
            theirs = f" ({ratios})" if row["engine"].startswith("llama.cpp") else ""
            cells.append(f"{row['tokens_per_second']:.1f}{theirs}")
        lines.append([f"{kind}, threads: {threads}", *cells])
    seconds = "CPU second of one thread" if content["cpu_time"] else "second"
    shares = []
    for threads, ours in content["breakdown"].items():
        for name, spent in ours.items():
            *some, whole = spent.values()
            shares.append([name, threads, f"{whole:.1f}", *(f"{share:.0%}" for share in some)])
    *parts, total = next(iter(next(iter(content["breakdown"].values())).values()))
    return "\n".join(
        [
            table([f"tokens per {seconds} (ours to theirs)", *engines], lines),
            table(["", "threads", total, *parts], shares) + machine_line(content),
        ]
    )
