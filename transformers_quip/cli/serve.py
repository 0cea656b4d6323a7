"""serve MODEL: Transformers' own server with this package loaded, and with limits that fit the machine's memory."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import click

from ..text import size
from .console import tell
from .inspect import read
from .loading import running_options
from .run_program import run_loaded

# The packages that `transformers serve` imports: module and name on PyPI.
_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "openai": "openai", "pydantic": "pydantic", "typer": "typer"}


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.argument("model")
@click.argument("others", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", default="localhost", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on.")
@click.option(
    "--continuous-batching/--one-by-one",
    default=True,
    show_default=True,
    help="Whether simultaneous requests are answered together, from one cache.",
)
@click.option("--cache-tokens", default=32768, show_default=True, help="Most tokens in that cache, of all requests.")
@running_options
def command(
    model: str,
    others: tuple[str, ...],
    host: str,
    port: int,
    continuous_batching: bool,
    cache_tokens: int,
    dtype: str,
    device_map: str | None,
    seed: int | None,
    revision: str | None,
    token: str | None,
) -> None:
    """Serve MODEL (a folder or an id on the Hub) at http://HOST:PORT/v1, as `transformers serve` does.

    Other options of `transformers serve` follow a "--", for example: -- --reasoning off --enable-cors. The cache of
    continuous batching has --cache-tokens tokens, or fewer where half of the free memory (four fifths on a GPU) does not
    hold them. Options --cb-... after the "--" are passed on unchanged, and no cache size is computed.
    """
    check_installed()
    arguments = ["--host", host, "--port", str(port), "--dtype", dtype]
    if device_map is not None:
        arguments += ["--device", device_map]
    if seed is not None:
        arguments += ["--default-seed", str(seed)]
    if continuous_batching and not any(other.startswith("--cb-") for other in others):
        arguments += _limited(read(model, revision, token), device_map, cache_tokens)
    elif continuous_batching:
        arguments.append("--continuous-batching")
    make_cache_folder()
    name = model if revision is None else f"{model}@{revision}"
    tell(f"http://{host}:{port}/v1 is going to serve {name}")
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve", name]
    run_loaded(program, [*arguments, *others], {} if token is None else {"HF_TOKEN": token})


def check_installed() -> None:
    """Refuse before a model is loaded.

    Raises:
        ImportError: a package that the server needs is not installed.
    """
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"serve needs {', '.join(missing)}: pip install 'transformers-quip[serve]'")


def make_cache_folder() -> None:
    """Make the folder of the Hub's cache: without it, the server of Transformers 5.23 answers /v1/models with an error."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        os.makedirs(HF_HUB_CACHE, exist_ok=True)
    except OSError as error:
        tell(f"{HF_HUB_CACHE} cannot be made ({error.strerror}): /v1/models may not list models")


def _limited(inventory: Any, device_map: str | None, cache_tokens: int) -> list[str]:
    """The options of continuous batching."""
    from .serving_memory import Memory, plan

    memory = Memory.of(device_map)
    found = plan(inventory, memory, cache_tokens)
    if found is None:
        tell("The cache size cannot be computed from this config.json: requests are answered one by one")
        return []
    tell(
        f"continuous batching: a cache of about {found.tokens} tokens, {size(found.bytes)} with the tensors of a batch, "
        f"of {size(memory.free)} that are free"
    )
    return [
        "--continuous-batching",
        "--cb-max-batch-tokens",
        str(found.batch_tokens),
        "--cb-max-memory-percent",
        f"{found.share:.5f}",
    ]
