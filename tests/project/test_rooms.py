"""The import contracts of pyproject.toml name every room and module: none can be added beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "transformers_quip"
# docs/architecture.md: who knows that Transformers exists. `config` derives its config from Transformers' base class.
ALLOWED_ROOMS = {"calibration", "cli", "evaluation", "finetune", "hf", "hub", "peft", "vllm"}
ALLOWED_MODULES = {"config", "nn.replace", "nn.experts"}
# Rooms without imports from the house: the entry of `python -m`, and a file that Python runs when it starts.
OUTSIDE = {"__main__", "startup"}


@pytest.fixture(scope="module")
def contracts():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    return {contract["id"]: contract for contract in content["contracts"]}


def rooms():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return (folders | {path.stem for path in PACKAGE.glob("*.py")}) - {"__init__"} - OUTSIDE


def modules(room):
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in (PACKAGE / room).rglob("*.py")]
    return {".".join(path.parts).removesuffix(".__init__") for path in paths}


def named(contract):
    return {name.removeprefix("transformers_quip.") for name in contract["source_modules"]}


def test_no_contract_has_an_exception(contracts):
    assert set(contracts) == {"floors", "kernels", "transformers", "transformers-in-parts"}
    assert not [contract for contract in contracts.values() if "ignore_imports" in contract]


def test_every_room_has_its_place(contracts):
    layers = " | ".join(contracts["floors"]["layers"]).replace("(", "").replace(")", "").split(" | ")
    assert len(layers) == len(set(layers))
    assert rooms() <= set(layers)
    assert set(contracts["floors"]["exhaustive_ignores"]) == OUTSIDE


def test_every_module_is_either_allowed_to_import_transformers_or_forbidden(contracts):
    whole, parts = named(contracts["transformers"]), named(contracts["transformers-in-parts"])
    in_parts = rooms() - whole - ALLOWED_ROOMS
    assert in_parts == {name.partition(".")[0] for name in ALLOWED_MODULES}
    assert parts == {module for room in in_parts for module in modules(room)} - ALLOWED_MODULES


def test_the_contracts_are_kept():
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels/torch-ext")])}
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
