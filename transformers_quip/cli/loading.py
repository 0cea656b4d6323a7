"""Models and tokenizers, as the commands load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from .console import revision_option, tell, token_option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = ("auto", "float32", "bfloat16", "float16")
dtype_option = click.option(
    "--dtype", type=click.Choice(_DTYPES), default="auto", show_default=True, help="Type of the numbers to compute with."
)
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


def read_config(source: str, **options: Any) -> dict[str, Any]:
    """The content of a model's config.json; options that are None are left out.

    Raises:
        OSError: there is no such folder, or the Hub cannot be reached.
    """
    from transformers import PreTrainedConfig

    from ..checkpoints.headers import check_is_there

    check_is_there(source)
    given = {name: value for name, value in options.items() if value is not None}
    return PreTrainedConfig.get_config_dict(source, **given)[0]


def check_dense(source: str, config: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the config of this model is that of a quantized one."""
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise ValueError(f"{source} is quantized already{f' ({method})' if method else ''}: give the dense model")
