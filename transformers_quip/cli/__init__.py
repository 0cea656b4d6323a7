"""The command line: `transformers-quip COMMAND`, and the same as `optimum-cli quip COMMAND`.

One module for each command. It holds a click command called `command`, is imported only for that command, and imports
heavy packages only when it runs, so that `--help` answers at once.

Exit codes: 0 done; 2 the command line is wrong; 3 a value, a model or a file cannot be used (the message says why);
4 something could not be read, written or reached; 130 stopped by Ctrl-C, 143 by SIGTERM; 1 an error of this program.
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from collections.abc import Sequence

import click

from ..version import __version__

USAGE, UNUSABLE, UNREACHABLE, STOPPED, TERMINATED = 2, 3, 4, 130, 143
# Name → its line in the help.
COMMANDS = {
    "quantize": "Quantize a model and save it.",
    "tune": "Train su, sv and the norms of a quantized model.",
    "evaluate": "Measure perplexity, divergence, speed and size.",
    "inspect": "Show the content of a saved model without loading it.",
    "compare": "Put two models side by side.",
    "convert": "Re-pack a checkpoint of another package, without loss, or write one for exllamav3.",
    "push": "Push a saved model to the Hub.",
    "chat": "Talk to a model.",
    "serve": "Serve a model with an OpenAI-compatible API.",
    "run": "Run another program with transformers_quip loaded.",
    "doctor": "Show versions, devices, and the kernels that compute here.",
}
# `run` is a name of this module already.
_MODULES = {"run": "run_program"}


class _Commands(click.Group):
    """Imports the module of a command when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}").command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))  # click's own imports every command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 2 wrong usage, 3 unusable value or model, 4 cannot read or reach, 130 stopped.",
)
@click.version_option(__version__, prog_name="transformers-quip")
def commands() -> None:
    """Quantize language models to 2 bits with QuIP#, and look at, measure, share and run the result."""


def main(arguments: Sequence[str] | None = None, program: str = "transformers-quip") -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None: the arguments of the process.
        program: its name in the help.

    Returns:
        The exit code. Internal errors propagate.
    """
    from .console import complain

    try:
        with _terminable():
            result = commands.main(args=arguments, prog_name=program, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        complain("stopped")
        return STOPPED
    except _Terminated:
        complain("terminated")
        return TERMINATED
    except OSError as error:  # huggingface_hub's errors are OSErrors too
        complain(str(error) + _remedy(error))
        return UNREACHABLE
    except (ValueError, TypeError, ImportError) as error:
        complain(str(error))
        return UNUSABLE


def _remedy(error: OSError) -> str:
    """The remedy if the Hub refuses access; the messages of other errors name theirs."""
    if getattr(getattr(error, "response", None), "status_code", None) not in (401, 403):
        return ""
    return "\nIs it the right access token? --token gives one, and so do HF_TOKEN and `hf auth login`."


def run() -> None:
    """The entry point of the console script."""
    sys.exit(main())


class _Terminated(BaseException):
    """SIGTERM, as an exception: a command cleans up as after Ctrl-C."""


class _terminable:
    """A context in which SIGTERM raises."""

    def __enter__(self) -> None:
        self.active = threading.current_thread() is threading.main_thread()
        if self.active:
            self.before = signal.signal(signal.SIGTERM, self._raise)

    def __exit__(self, *_) -> None:
        if self.active:
            signal.signal(signal.SIGTERM, self.before)

    @staticmethod
    def _raise(*_) -> None:
        raise _Terminated
