"""The command line in a process of its own, which can be sent signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **variables}


def start(*arguments, before: str = "", **variables: str) -> subprocess.Popen:
    """Start `transformers-quip ARGUMENTS`; `before` is code that the process runs first."""
    code = f"import sys\n{before}\nfrom transformers_quip.cli import main\nsys.exit(main({list(map(str, arguments))!r}))\n"

    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background ignores Ctrl-C, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Read what it says until it has said this; a progress bar's lines count as lines."""
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    raise AssertionError(f"it never said {text!r}: {''.join(said)}")


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, what else it said on stderr)"""
    said = process.communicate(timeout=300)[1]
    return process.returncode, said
