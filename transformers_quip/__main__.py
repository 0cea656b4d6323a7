"""python -m transformers_quip COMMAND: the same as transformers-quip COMMAND."""

from .cli import run

run()
