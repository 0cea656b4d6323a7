"""README.md: it opens as promised, its code is valid, and its figures are those in benchmarks/results."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import readme_table

from transformers_quip import QuipConfig

README = Path(readme_table.README).read_text(encoding="utf-8")
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


def test_the_results_are_those_of_the_benchmarks():
    _, _, rest = README.partition(readme_table.BEGIN + "\n")
    shown, end, _ = rest.partition(readme_table.END)
    assert end
    assert shown == readme_table.region()


def test_tables_from_results(tmp_path, monkeypatch):
    machine = {"processor": "P", "cores": 2, "python": "3.11", "versions": {"torch": "2.13.0"}}
    row = {"setting": "text", "bits": 2.0, "true_bits": 2.09, "wall_seconds": 100, "cpu_seconds": 200, "threads": 2}
    row["proxy_loss"] = {"q": 0.01234}
    quality = {
        "machine": machine,
        "settings": {"dense": "dense model", "text": "on text"},
        "rows": [
            {**row, "seed": 0, "perplexity": {"wiki": 50.0, "news": 100.0}},
            {**row, "seed": 0, "bits": 2.5, "true_bits": 2.59, "perplexity": {"wiki": 40.0, "news": 80.0}},
            {**row, "seed": 1, "perplexity": {"wiki": 52.0, "news": 20000.0}, "threads": 1, "wall_seconds": 999},
            {
                "setting": "dense",
                "bits": 32,
                "seed": 0,
                "perplexity": {"wiki": 17.76, "news": 30.85},
                "wall_seconds": 1,
                "cpu_seconds": 1,
                "threads": 2,
            },
        ],
    }
    (tmp_path / "quality.json").write_text(json.dumps(quality))
    (tmp_path / "rounding.json").write_text(json.dumps({"refinement_sweeps": 10, "cpu_seconds": 3.21}))
    method = {
        "label": "a method",
        "bits": 2,
        "true_bits": 2.0917,
        "proxy_loss": 0.03130,
        "cpu_seconds": 99.7,
        "windows": 40,
    }
    method["perplexity"] = {"wiki": 48.98, "news": 112.9}
    methods = {"claims": ["A > B, wiki: holds (1 | 2)"], "rows": [method, {**method, "label": "quick", "windows": 10}]}
    (tmp_path / "methods.json").write_text(json.dumps(methods))
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    lines = readme_table.region().splitlines()
    assert "- A > B, wiki: holds (1 | 2)" in lines
    assert "| a method | 0.0313 | 49.0 | 112.9 | 2.092 | 100 |" in lines
    assert not any("quick" in line for line in lines)
    assert "| dense model | 32 | 17.8 | 30.9 |  |  |" in lines
    assert "| on text, 2 bits, 2 seeds | 2.090 | 51.0 (50.0 to 52.0) | 10050 (100.0 to 20000) | 100 | 200 |" in lines
    assert "| on text, 2.5 bits | 2.590 | 40.0 | 80.0 | 100 | 200 |" in lines
    assert "| on text, 2 bits | 0.0123 |" in lines
    assert "- Rounding one decoder block (LDLQ and 10 sweeps): 3.2 CPU seconds." in lines
    assert lines[-1] == "Machine: P, 2 cores; Python 3.11, torch 2.13.0."


def test_only_the_region_is_written(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path / "none")
    monkeypatch.setattr(readme_table, "README", readme)
    monkeypatch.setattr("sys.argv", ["readme_table.py", "--check"])
    with pytest.raises(SystemExit, match="does not show"):
        readme_table.main()
    monkeypatch.setattr("sys.argv", ["readme_table.py"])
    readme_table.main()
    expected = f"before\n{readme_table.BEGIN}\n{readme_table.NOTHING}{readme_table.END}\nafter\n"
    assert readme.read_text() == expected
