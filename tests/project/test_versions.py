"""The lowest versions that pyproject.toml allows are those that `make test-oldest` runs with."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent.parent


def pins(name: str) -> dict[str, Version]:
    """Package → the version that a file of constraints pins; of two lines with markers, that of the newest Python."""
    lines = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    return {package: Version(version) for package, version in reversed(lines)}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is part of Python since 3.11")
def test_lower_bounds_are_those_that_are_tested():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    oldest = pins("constraints-oldest.txt")
    for text in (*project["dependencies"], *extras["test"], *extras["data"], *extras["plot"]):
        requirement = Requirement(text)
        bounds = [specifier for specifier in requirement.specifier if specifier.operator == ">="]
        assert len(bounds) == 1, f"{text} has no lower bound"
        # a bound of `2.9` allows 2.9.0, but a release that only mends it may be the one that is tested
        lowest, tested = Version(bounds[0].version), oldest[requirement.name]
        assert tested.release[: len(lowest.release)] == lowest.release, f"{text}, but constraints-oldest.txt has {tested}"


def test_the_pinned_versions_are_not_older_than_the_oldest():
    pinned = pins("constraints.txt")
    assert all(pinned[name] >= version for name, version in pins("constraints-oldest.txt").items())


@pytest.mark.parametrize("name", ["transformers_quip", "kernels/torch-ext/quip_kernels"])
def test_types_are_shipped(name):
    assert (ROOT / name / "py.typed").is_file()
