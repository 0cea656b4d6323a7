"""Builds the optional CPU kernel library; everything else about the package is in pyproject.toml.

The C sources under kernels/cpu/ become one plain shared library, `quip_kernels/_cpu.so` (`_cpu.dll` on Windows),
that is loaded through ctypes: it uses neither Python's nor PyTorch's ABI, so one build serves every version of both.
Processor features are chosen at run time by function-level target attributes; no -march flag is wanted here.
A machine without a C compiler installs all the same: one log line, and the PyTorch path is used.
"""

import logging
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

SOURCE_FOLDER = Path("kernels/cpu")
LIBRARY = "quip_kernels._cpu"
log = logging.getLogger(__name__)


def cpu_library():
    """Return the Extension for the C sources that exist; an empty list where there are none."""
    sources = sorted(path.as_posix() for path in SOURCE_FOLDER.glob("*.c"))
    if not sources:
        return []
    posix = os.name == "posix"
    return [
        Extension(
            LIBRARY,
            sources=sources,
            depends=sorted(path.as_posix() for path in SOURCE_FOLDER.glob("*.h")),
            extra_compile_args=["-O3", "-fPIC", "-pthread", "-fopenmp-simd"] if posix else [],
            extra_link_args=["-pthread"] if posix else [],
            libraries=["m"] if posix else [],
            optional=True,
        )
    ]


class BuildLibrary(build_ext):
    """build_ext for a library that is not a Python module: a plain file name, and no failure without a compiler."""

    def get_ext_filename(self, ext_name):
        return os.path.join(*ext_name.split(".")) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext):
        return ext.export_symbols  # without a PyInit_ function

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CompileError, LinkError, PlatformError) as error:
            log.warning("quip_kernels: no CPU library was built, the PyTorch path will be used (%s)", error)


class PlatformWheel(bdist_wheel):
    """The wheel depends on the platform (where the library was built) but on no Python version."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(ext_modules=cpu_library(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel})
