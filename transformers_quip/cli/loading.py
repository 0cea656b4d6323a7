"""Models and tokenizers, as the commands load them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .console import revision_option, tell, token_option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

dtype_option = click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16 or auto.")
device_option = click.option("--device-map", help="As in from_pretrained: auto, cpu, cuda:0, …")

seed_option = click.option("--seed", type=int, help="Makes replies repeatable.")


def running_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that generates text: dtype, device_map, seed, revision and token."""
    for option in (token_option, revision_option, seed_option, device_option, dtype_option):
        command = option(command)
    return command


def load_model(source: str, **options: Any) -> PreTrainedModel:
    """A causal language model, dense or quantized, in eval mode; options that are None are left out."""
    from transformers import AutoModelForCausalLM

    import transformers_quip  # noqa: F401 - makes Transformers understand quantized models

    given = {name: value for name, value in options.items() if value is not None}
    return AutoModelForCausalLM.from_pretrained(source, **given).eval()


def find_tokenizer(source: str, say: Callable[[str], None] = tell, **options: Any) -> Any:
    """The tokenizer of a model, or None; then `say` is called with the reason."""
    from transformers import AutoTokenizer

    given = {name: value for name, value in options.items() if value is not None}
    try:
        return AutoTokenizer.from_pretrained(source, **given)
    except (OSError, ValueError, ImportError) as error:
        say(f"no tokenizer: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return None
