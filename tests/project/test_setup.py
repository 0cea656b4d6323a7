"""setup.py in a copy of the project: the library is built where there is a compiler, and only there."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = Path("kernels/torch-ext/quip_kernels/_cpu.so")
NO_LIBRARY = "no CPU library was built"

pytest.importorskip("setuptools", minversion="77", reason="setuptools is needed to run setup.py")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="compilers are called as on POSIX")


@pytest.fixture
def project(tmp_path):
    """A copy of the project's skeleton with a C source of two lines."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for package in ("transformers_quip", "kernels/torch-ext/quip_kernels"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    shutil.copy(ROOT / "transformers_quip/version.py", tmp_path / "transformers_quip/version.py")
    (tmp_path / "kernels/cpu").mkdir()
    (tmp_path / "kernels/cpu/answer.c").write_text("int quip_answer(void) { return 42; }\n")
    return tmp_path


def build(project, **environment):
    """Run build_ext in place and return what it printed."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(
        command, cwd=project, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_with_a_compiler(project):
    assert NO_LIBRARY not in build(project)
    assert ctypes.CDLL(str(project / LIBRARY)).quip_answer() == 42


@pytest.mark.parametrize("compiler", ["false", "/nonexistent/cc"])
def test_without_a_compiler_one_line_is_logged(project, compiler):
    output = build(project, CC=compiler)
    assert len([line for line in output.splitlines() if NO_LIBRARY in line]) == 1
    assert not (project / LIBRARY).exists()


def test_without_sources_there_is_nothing_to_build(project):
    shutil.rmtree(project / "kernels/cpu")
    assert NO_LIBRARY not in build(project)
    assert not (project / LIBRARY).exists()


def test_the_version_is_the_module_s(project):
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=project, capture_output=True, text=True, check=True
    )
    namespace = {}
    exec((ROOT / "transformers_quip/version.py").read_text(), namespace)
    assert result.stdout.split()[-1] == namespace["__version__"]


def test_the_wheel_has_two_packages_and_none_called_kernels():
    """`kernels` is Hugging Face's: a package of that name in our wheel would break theirs."""
    from setuptools.config.pyprojecttoml import read_configuration

    packages = read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]["packages"]
    assert {name.split(".")[0] for name in packages} == {"transformers_quip", "quip_kernels", "optimum"}
    # of Optimum, only a module in the namespace from which it reads commands
    assert [name for name in packages if name.startswith("optimum")] == ["optimum.commands.register"]
    assert not (ROOT / "optimum" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
