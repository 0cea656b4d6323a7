"""run PROGRAM: another program, which then can load quantized models, and so can the processes that it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import click


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-m", "--module", is_flag=True, help="PROGRAM is the name of a Python module, as for python -m.")
@click.option("--print-path", is_flag=True, help="Print the folder to put on PYTHONPATH, and run nothing.")
@click.argument("program", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(module: bool, print_path: bool, program: str | None, arguments: tuple[str, ...]) -> None:
    """Run PROGRAM (an evaluation harness, a trainer, a server) so that it can load quantized models.

    \b
    transformers-quip run lm_eval --model hf --model_args pretrained=MODEL --tasks arc_easy
    transformers-quip run accelerate launch train.py
    transformers-quip run -m lm_eval --model hf ...
    transformers-quip run my_script.py

    Every Python process that the program starts loads transformers_quip too, when it imports Transformers. It must have
    the package installed. A Python that ignores its environment (python -I, python -E) does not load it. Where a program
    cannot be started in this way (a service, a container), put the folder that --print-path prints on PYTHONPATH.
    """
    if print_path:
        click.echo(str(startup_folder()))
        return
    if program is None:
        raise click.UsageError("Missing argument 'PROGRAM'.")
    run_loaded(find_program(program, module), arguments)


def startup_folder() -> Path:
    """The folder whose sitecustomize.py loads the package."""
    return Path(__file__).resolve().parent.parent / "startup"


def find_program(program: str, module: bool = False) -> list[str]:
    """The command to execute.

    Args:
        program: a Python script, a program in this Python's folder or on PATH, or a module.

    Raises:
        ValueError: the program is not found.
    """
    if module:
        return [sys.executable, "-m", program]
    if program.endswith((".py", ".pyz")) and os.path.isfile(program):
        return [sys.executable, program]
    local = None if os.path.dirname(program) else shutil.which(program, path=os.path.dirname(sys.executable))
    found = local or shutil.which(program)
    if found is None:
        raise ValueError(f"program {program!r} is not on PATH (run a Python module with -m)")
    return [found]


def run_loaded(program: Sequence[str], arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> NoReturn:
    """Become this program, with the package loaded. Does not return: signals and the exit code are the program's own.

    Args:
        program: the result of [`find_program`].
        variables: more for its environment.

    Raises:
        OSError: it cannot be executed.
    """
    path = [str(startup_folder()), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **(variables or {}), "PYTHONPATH": os.pathsep.join(path)}
    command = [*program, *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # on Windows, exec returns to the shell before the program has ended
        sys.exit(subprocess.call(command, env=environment))
    os.execve(command[0], command, environment)
