"""The tokenizer of the model that is calibrated, and the token ids that it makes of texts and of chats."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

# Arguments of `from_pretrained` for access to any repository, and arguments that select a part of the model's own
# repository.
_ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_OF_THE_MODEL = ("revision", "subfolder", "code_revision")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, so that its tokenizer can be read from the same place in the same way.

    Attributes:
        name: folder, or id on the Hub; empty where it is not known.
        arguments: the arguments of `from_pretrained`.
    """

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


def find_tokenizer(given: Any, source: Source) -> Any:
    """The tokenizer to calibrate with.

    The model's own is read with the arguments with which the model was loaded: revision, subfolder, token, cache_dir,
    local_files_only, proxies, trust_remote_code. Another repository is read with the arguments that are not specific to
    the model. Code of a repository runs only if it is the model's and `trust_remote_code=True` was given: there is
    no question in the middle of the work.

    Args:
        given: a tokenizer or a processor (returned as it is, or its tokenizer), the name or folder of one, or None.
        source: of the model.

    Raises:
        ValueError: none could be loaded.
    """
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return getattr(given, "tokenizer", given)  # a processor holds one
    place = source.name if given is None else os.fspath(given)
    is_own = place == source.name
    names = (*_ACCESS, *_OF_THE_MODEL) if is_own else _ACCESS
    arguments = {name: source.arguments[name] for name in names if source.arguments.get(name) is not None}
    arguments["trust_remote_code"] = is_own and bool(source.arguments.get("trust_remote_code"))
    try:
        if not place:
            raise ValueError("the model does not know the folder it came from")
        return AutoTokenizer.from_pretrained(place, **arguments)
    except Exception as error:  # several libraries raise many kinds; all mean that no tokenizer was found
        told = {name: str(value) for name, value in arguments.items() if isinstance(value, (str, bool)) and value}
        shown = "".join(f", {name}={'…' if name == 'token' else value}" for name, value in told.items())
        way = "load the model with trust_remote_code=True" if is_own else "load the tokenizer yourself"
        code = f" It brings code of its own: {way} if you trust it." if "trust_remote_code" in str(error) else ""
        raise ValueError(
            f"Calibrating on text needs a tokenizer, and none could be loaded from {place!r}{shown} "
            f"({type(error).__name__}: {first_line(error)}).{code} Give one with tokenizer=..., or use dataset='self', "
            "which needs none."
        ) from error


def encode(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Token ids of each text, int64 [tokens], and their attention mask, if the tokenizer gives one.

    Args:
        options: of the tokenizer's call, such as add_special_tokens.
    """
    encoded = tokenizer(list(texts), verbose=False, **options)
    masks = encoded["attention_mask"] if "attention_mask" in encoded else [None] * len(texts)
    return [
        (torch.as_tensor(ids, dtype=torch.long), None if mask is None else torch.as_tensor(mask))
        for ids, mask in zip(encoded["input_ids"], masks, strict=True)
    ]


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any, where: str) -> str:
    """A chat as the text that the tokenizer's chat template makes of it.

    Args:
        messages: {"role": …, "content": …}, or {"from": …, "value": …} as in ShareGPT's data.
        tools: JSON schemas of the functions that the model may call, or None.
        where: the place of the chat in the data, for error messages.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the chat.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{where} is a chat, and the tokenizer has no chat template to write it as text. Give one with a template "
            "(tokenizer.chat_template), or a dataset of texts."
        )
    try:
        return tokenizer.apply_chat_template(
            [_message(message) for message in messages], tools=tools or None, tokenize=False
        )
    except Exception as error:  # the template's own (jinja2), or a key that it misses
        raise ValueError(
            f"{where}: the tokenizer's chat template cannot write this chat ({type(error).__name__}: {first_line(error)})."
        ) from error


# How ShareGPT's data call the speakers.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant", "observation": "tool"}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if "from" in message and "role" not in message:
        speaker = message["from"]
        return {"role": _ROLES.get(speaker, speaker), "content": message.get("value")}
    # Tables give each message all keys that any message has.
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]
