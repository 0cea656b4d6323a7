"""README.md opens as promised, its code is valid, and all tables are those of benchmarks/results."""

from __future__ import annotations

import ast
import inspect
import json
import re

import markdown_tables
import pytest
import tables

from transformers_quip import QuipConfig

README = tables.PAGES[0].read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_it_opens_with_three_lines_and_two_commands():
    (first, code), (second, commands) = BLOCKS[:2]
    assert (first, second) == ("python", "bash")
    assert len(ast.parse(code).body) == 3
    assert [line.partition("#")[0].strip() for line in commands.splitlines()] == ["make demo", "make test"]


def test_every_config_in_it_is_valid():
    calls = [
        node
        for language, code in BLOCKS
        if language == "python"
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("QuipConfig")
    ]
    assert calls
    for call in calls:
        QuipConfig(**{argument.arg: ast.literal_eval(argument.value) for argument in call.keywords})


def test_every_option_it_advises_on_exists():
    table = README.partition("### Which option to choose when")[2].partition("\n\n`help(")[0]
    named = set()
    for row in table.splitlines():
        if row.startswith("| `"):
            named.update(re.findall(r"`([a-z_]+)(?:=[^`]*)?`", row.split("|")[1]))
    assert {"dataset", "num_samples", "seed"} <= named
    assert named <= set(inspect.signature(QuipConfig).parameters)


def test_it_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_benchmarks(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert tables.filled(text) == text


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of small results; returns the function that writes one."""
    monkeypatch.setattr(markdown_tables, "RESULTS", tmp_path)
    machine = {"processor": "P", "cores": 2, "python": "3.11", "versions": {"torch": "2.13.0"}}

    def write(name, **content):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": machine, **content}))

    return write


def test_quality(results):
    row = {"setting": "text", "bits": 2.0, "true_bits": 2.09, "proxy_loss": {"q": 0.01234}}
    rows = [
        {
            **row,
            "seed": 0,
            "perplexity": {"wiki": 50.0, "news": 100.0},
            "divergence": {"wiki": 0.5, "news": 1.25},
            "compared": 40,
        },
        {
            **row,
            "seed": 0,
            "bits": 2.5,
            "true_bits": 2.59,
            "perplexity": {"wiki": 40.0, "news": 123456.0},
            "divergence": {"wiki": 0.25, "news": 0.375},
        },
        {**row, "seed": 1, "perplexity": {"wiki": 52.0, "news": 20000.0}},
        {"setting": "dense", "bits": 32, "seed": 0, "perplexity": {"wiki": 17.76, "news": 30.85}},
    ]
    results("quality", settings={"dense": "dense model", "text": "on text"}, rows=rows)
    peer = {"name": "peer", "true_bits": 2.625, "perplexity": {"wiki": 54.3}}
    results("peers", rows=[{**peer, "perplexity": {"wiki": 54.3, "news": 103.4}, "in_readme": True}, peer])
    lines = tables.quality().splitlines()
    assert "| dense model | 1 | 32 | 17.8 | 30.9 |  |" in lines
    assert "| on text, 2 bits | 2 | 2.090 | 51.0 (50.0 to 52.0) | 10050 (100.0 to 20000) | 0.500 / 1.250 |" in lines
    assert "| on text, 2.5 bits | 1 | 2.590 | 40.0 | >10^5 | 0.250 / 0.375 (8 windows) |" in lines
    assert lines[-1] == "Measured on: P, 2 cores; Python 3.11, torch 2.13.0."
    lines = tables.summary().splitlines()
    assert "| on text, 2 bits | 2.09 | 51.0 | 10050 |" in lines
    assert [line for line in lines if "peer" in line] == ["| peer | 2.62 | 54.3 | 103.4 |"]
    assert "| peer | 2.62 | 54.3 |  |" in tables.peers().splitlines()
    assert "| on text, 2 bits | 0.0123 |" in tables.proxy_loss().splitlines()


def test_methods(results):
    row = {"label": "a method", "bits": 2, "true_bits": 2.0917, "proxy_loss": 0.03130, "windows": 40}
    row["perplexity"] = {"wiki": 48.98, "news": 112.9}
    figures = {"proxy loss": [0.1, 0.2, 0.3], "wiki": [10.0, 20.0, 3e6], "news": [11.0, 21.0, 31.0]}
    chain = {"claim": "A > B > C", "sides": ["A", "B", "C"], "figures": figures}
    results("methods", comparisons=[chain], rows=[row, {**row, "label": "quick", "windows": 10}])
    assert "| a method | 0.0313 | 49.0 | 112.9 | 2.092 |" in tables.methods().splitlines()
    assert "quick" not in tables.methods()
    lines = tables.ablations().splitlines()
    assert "| A > B > C | A | B | 0.1000 | 0.2000 | 10.0 | 20.0 | 11.0 | 21.0 |" in lines
    assert "|  | B | C | 0.2000 | 0.3000 | 20.0 | >10^5 | 21.0 | 31.0 |" in lines


def test_speed(results):
    ways = {"dense bfloat16": (10.0, 1.0), "2-bit exact": (21.0, 2.1), "2-bit int8": (25.0, 2.5)}
    rows = [
        {"model": "M", "kind": "generate", "way": way, "tokens_per_second": speed, "times_dense": times}
        for way, (speed, times) in ways.items()
    ]
    ways = [{"threads": 2, "busy": 0, "cpu_time": False}, {"threads": 1, "busy": 1, "cpu_time": False}]
    results("generate", rows=[row | way for way in ways for row in rows])
    lines = tables.speed().splitlines()
    assert "| M, generate | 2 | 10.0 | 21.0 (2.10x) | 25.0 (2.50x) |" in lines
    assert "| M, generate | 1, beside 1 busy process | 10.0 | 21.0 (2.10x) | 25.0 (2.50x) |" in lines


def test_speed_with_few_instructions(results):
    """Two tables, of models and of layers; either may be missing."""
    ways = {"dense bfloat16": 1.0, "avx2 int8 layer": 2.0, "avx2 exact layer": 1.6}
    ways |= {"avx2 expanded int8 layer": 8.0, "avx2 expanded exact layer": 4.0}
    rows = [
        {"shape": "16x8", "way": way, "microseconds": 80 / times, "times_dense_bfloat16": times}
        for way, times in ways.items()
    ]
    results("cpu_kernels-avx2", rows=rows)
    expected = "| 16x8 | 80 | 40 (2.0x) | 10 (8.0x) | 50 (1.6x) | 20 (4.0x) |"
    assert expected in tables.narrow().splitlines()
    rows = [
        {"model": "M", "kind": "generate", "way": way, "tokens_per_second": 10.0 * times, "times_dense": times}
        for way, times in {"dense bfloat16": 1.0, "2-bit exact": 2.1, "2-bit int8": 2.5}.items()
    ]
    results("generate-avx2", rows=[row | {"threads": 1, "busy": 0, "cpu_time": True} for row in rows])
    lines = tables.narrow().splitlines()
    assert expected in lines
    assert "| M, generate | 1 (CPU time) | 10.0 | 21.0 (2.10x) | 25.0 (2.50x) |" in lines


def test_serving(results):
    assert "Not measured yet" in tables.serving.shown()
    rows = [{"way": "plugin", "model": "quantized", "requests": 1, "seconds": 0.1, "vllm": "0.32.0"}]
    rows += [{"way": "vllm", "model": "quantized", "requests": 8, "seconds": 8.0, "tokens_per_second": 64.0}]
    rows += [{"way": "transformers", "model": "dense", "requests": 8, "seconds": 16.0, "tokens_per_second": 32.04}]
    results("serving", tokens=64, dtype="bfloat16", rows=rows)
    lines = tables.serving.shown().splitlines()
    assert "| vLLM 0.32.0, all at once | quantized | 8 | 64.0 |" in lines
    assert "| `generate()`, one after the other | dense | 8 | 32.0 |" in lines
    assert "Importing the plugin takes 0.10 s in each process of vLLM (median of 1)." in lines
    assert lines[-1] == "Measured on: P, 2 cores; Python 3.11, torch 2.13.0."


def test_only_the_marked_tables_are_written(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: quality -->\nold\n<!-- end of table -->\nafter\n")
    monkeypatch.setattr(markdown_tables, "RESULTS", tmp_path / "none")
    monkeypatch.setattr(tables, "PAGES", (page,))
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="does not show"):
        tables.main()
    monkeypatch.setattr("sys.argv", ["tables.py"])
    tables.main()
    expected = f"before\n<!-- table: quality -->\n{tables.NOTHING}<!-- end of table -->\nafter\n"
    assert page.read_text() == expected


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        tables.filled("<!-- table: nonsense -->\n<!-- end of table -->")
