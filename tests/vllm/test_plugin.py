"""The plugin is found by its entry point, and nothing but vLLM imports it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def test_the_entry_point_is_a_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"quip": "transformers_quip.vllm:register"}
    tree = ast.parse((ROOT / "transformers_quip/vllm/__init__.py").read_text(encoding="utf-8"))
    assert "register" in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_no_other_part_of_the_package_imports_it():
    program = (
        "import sys, transformers_quip, transformers_quip.cli, transformers_quip.hf.quantizer, transformers_quip.hf.modes\n"
        "print([name for name in sys.modules if name.startswith(('vllm', 'transformers_quip.vllm'))])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
