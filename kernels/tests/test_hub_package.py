"""The package as the Kernel Hub loads it: from a folder, under a name of its own, next to the installed one.

The package `kernels` is not a dependency of this project: continuous integration installs it for this test.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quip_kernels

SOURCE = Path(quip_kernels.__file__).parent


def test_it_imports_itself_relatively_and_nothing_but_torch_and_triton():
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names or top in ("torch", "triton"), f"{file.name} imports {name}"


def test_it_defines_no_ops():
    """torch.ops is one for all, and a package may be loaded twice: transformers_quip alone defines ours."""
    code = (
        "import torch; before = set(torch._C._dispatch_get_all_op_names());"
        "import quip_kernels, importlib.util; quip_kernels.layout, quip_kernels.cpu;"
        "importlib.util.find_spec('triton') and quip_kernels.gpu;"
        "new = set(torch._C._dispatch_get_all_op_names()) - before; assert not new, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(SOURCE.parent), "PATH": ""})


def build(folder):
    """The output of `kernel-builder` for a kernel without compiled parts: a folder for each backend, with metadata."""
    for backend in ("cpu", "cuda", "rocm", "xpu"):
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(SOURCE, variant, ignore=shutil.ignore_patterns("__pycache__", "_cpu.*"))
        metadata = {
            "id": f"_quip_kernels_{backend}_test",
            "name": "quip-kernels",
            "version": 0,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata))
    return folder


# pytest makes a module `kernels` of our folder's name, so Hugging Face's package is only found in another process.
LOAD = """
import importlib.util, inspect, sys
from pathlib import Path
spec = importlib.util.find_spec("kernels")
if spec is None or spec.origin is None:
    sys.exit(77)
import kernels, torch
from quip_kernels import layout
folder = Path(sys.argv[1])
if hasattr(kernels._rust, "Build"):  # kernels 0.17: reads build.toml, and raises if kernel-builder would refuse it
    build = kernels._rust.Build.open(sys.argv[2])
    assert {str(backend).lower() for backend in build.general.backends} == {"cuda", "rocm", "xpu"}
old = "package_name" in inspect.signature(kernels.get_local_kernel).parameters  # before kernels 0.15
loaded = kernels.get_local_kernel(folder, *(["quip_kernels"] if old else []))
assert Path(loaded.__file__).is_relative_to(folder), loaded.__file__
assert loaded.layout is not layout
codes = torch.arange(-32768, 32768).to(torch.int16).view(256, 256)
assert torch.equal(loaded.layout.pack(codes), layout.pack(codes))
assert torch.equal(loaded.layout.unpack(loaded.layout.pack(codes), 2048), codes)
if importlib.util.find_spec("triton"):
    assert callable(loaded.gpu.matvec.matvec)
    assert loaded.gpu.matvec.__name__.startswith(loaded.__name__ + ".")
"""


def test_get_local_kernel(tmp_path):
    path = os.pathsep.join(filter(None, [str(SOURCE.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(build(tmp_path)), str(SOURCE.parents[1])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("the package kernels is not installed (pip install kernels)")
    assert done.returncode == 0, done.stderr
