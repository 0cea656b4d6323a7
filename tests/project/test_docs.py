"""README, docs and examples: every link leads somewhere, every command and option that they name exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from transformers_quip import cli
from transformers_quip.hf import patches

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("kernels/*.md")]
)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub and MyST make of the headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_pages():
    assert {"README.md", "docs/index.md", "docs/how_it_works.md", "examples/README.md"} <= {p.as_posix() for p in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in _LINK.findall(text_of(page)):
        if link.startswith(("http://", "https://")):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/[^\s]*)?", link), link
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target) if target else page
        assert (ROOT / path).exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {link}"


def test_every_page_is_in_the_table_of_contents():
    listed = re.search(r"```{toctree}.*?\n\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)[1].split()
    pages = {p.stem for p in PAGES if p.parts[0] == "docs" and p.stem not in ("index", "README")}
    assert set(listed) == pages


def commands() -> list[str]:
    """Every line of our command line in a code block of any page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
            found += [
                line.partition("#")[0].strip() for line in block.splitlines() if line.startswith("transformers-quip ")
            ]
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_that_are_shown_exist(line):
    _, name, *arguments = shlex.split(line)
    command = cli.commands.get_command(click.Context(cli.commands), name)
    assert command is not None
    if command.context_settings.get("allow_interspersed_args") is False:  # of `run`: the rest is the other program's
        arguments = list(itertools.takewhile(lambda argument: argument.startswith("-"), arguments))
    known = {option for parameter in command.params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_the_api_page_names_what_exists():
    """Every object that docs/api.md shows can be imported and has a docstring."""
    text = (ROOT / "docs/api.md").read_text()
    module = None
    for kind, name in re.findall(r"\.\. auto(module|class|function):: ([\w.]+)", text):
        if kind == "module":
            module = importlib.import_module(name)
            assert module.__doc__
        else:
            home, _, last = name.rpartition(".")
            assert getattr(importlib.import_module(home), last).__doc__, name
    assert module is not None


def test_examples_begin_with_their_output():
    for path in sorted((ROOT / "examples").glob("0*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert f"python examples/{path.name}" in docstring
        assert "\n\nOutput" in docstring
        assert path.name in (ROOT / "examples/README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="Sphinx is not installed (the extra docs)")
def test_the_pages_build_without_a_warning(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", ROOT / "docs", tmp_path]
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "QuipConfig" in (tmp_path / "api.html").read_text()


def test_the_architecture_page_lists_every_function_that_is_replaced():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- patches -->\n")[2].partition("\n<!-- end of patches -->")[0]
    assert shown.splitlines() == list(patches.markdown_rows())
    assert "hf.patches.restore()" in text
