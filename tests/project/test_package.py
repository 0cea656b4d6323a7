"""The wheel and the sdist as `python -m build` makes them, and the wheel in an environment of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from transformers_quip.version import __version__

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the sdist, built from a copy of the tracked files."""
    for name in ("build", "setuptools"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the package {name} is not installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    # the wheel from the sdist, as build does it; without isolation, because that would fetch setuptools
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def test_what_the_wheel_holds(built):
    (wheel,) = built.glob("*.whl")
    assert re.fullmatch(rf"transformers_quip-{re.escape(__version__)}-py3-none-\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"transformers_quip/__init__.py", "quip_kernels/__init__.py", "optimum/commands/register/quip.py"} <= names
    assert not [name for name in names if name.endswith("__init__.py") and name.startswith("optimum/")]
    packages = {name.partition("/")[0] for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert packages == {"transformers_quip", "quip_kernels", "optimum"}
    if shutil.which("cc"):
        assert "quip_kernels/_cpu.so" in names
    entry_points = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "transformers-quip = transformers_quip.cli:run" in entry_points


def test_every_module_of_the_source_is_in_it(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for root in (ROOT / "transformers_quip", ROOT / "kernels/torch-ext/quip_kernels"):
        for path in root.rglob("*.py"):
            assert path.relative_to(root.parent).as_posix() in names


def test_what_the_sdist_holds(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "kernels/cpu/linear.c", "tests/models.py", "examples/README.md", "docs/index.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.skipif(importlib.util.find_spec("auditwheel") is None, reason="auditwheel is not installed")
def test_the_library_needs_only_the_c_library(built):
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"consistent\s+with\s+the\s+following\s+platform\s+tag:\s+\"(manylinux|musllinux)_", result.stdout)


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_into_an_empty_environment(built, tmp_path, kind):
    """The dependencies are lent by this environment, the package is not."""
    (package,) = built.glob(kind)
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    # a venv made by a venv lends the first one's packages, so that of the running interpreter is named by a .pth file
    site = next((tmp_path / "venv/lib").glob("python3*")) / "site-packages"
    import torch

    (site / "lent.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Python 3.11 and older put a setuptools of theirs into a venv, which is too old to build with
    subprocess.run(
        [str(python), "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True, env=environment, cwd=tmp_path
    )
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", package]
    subprocess.run(list(map(str, install)), check=True, env=environment, cwd=tmp_path)
    code = (
        "import transformers_quip, quip_kernels\n"
        "from quip_kernels import cpu\n"
        "print(transformers_quip.__version__, transformers_quip.__file__, cpu.is_available())\n"
    )
    run = [str(python), "-c", code]
    shown = subprocess.run(run, check=True, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout.split()
    assert shown[0] == __version__
    assert str(tmp_path) in shown[1]
    assert shown[2] == str(shutil.which("cc") is not None)
    script = tmp_path / "venv/bin/transformers-quip"
    result = subprocess.run([script, "--version"], env=environment, capture_output=True, text=True, check=True)
    assert __version__ in result.stdout
