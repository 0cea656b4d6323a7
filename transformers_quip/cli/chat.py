"""chat MODEL: talk to a model; the reply appears as it is written."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ..text import printable
from .console import json_option, show_json, tell
from .loading import find_tokenizer, load_model, running_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HELP = "Type a message.  /reset forgets the conversation, /exit or Ctrl-D quits, Ctrl-C stops a reply."


@click.command()
@click.argument("model")
@click.option("--prompt", help="Send this message, print the reply, and quit.")
@click.option("--system", help="System prompt.")
@click.option("--max-new-tokens", default=512, show_default=True, help="Tokens in one reply at most.")
@click.option("--temperature", default=0.7, show_default=True, help="0: always the likeliest token.")
@running_options
@json_option
def command(
    model: str,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    dtype: str,
    device_map: str | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Talk to MODEL (a folder or an id on the Hub).

    A model without a chat template continues your text instead of answering it.
    """
    from ..checkpoints.headers import check_is_there

    if as_json and prompt is None:
        raise click.UsageError("--json needs --prompt")
    if temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {temperature:g}")
    check_is_there(model)
    source: dict[str, Any] = {"revision": revision, "token": token}
    tokenizer = find_tokenizer(model, **source)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, so it cannot chat: add the tokenizer's files to it")
    loaded = load_model(model, dtype=dtype, device_map=device_map, **source)
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    talk = Talk(loaded, tokenizer, system, max_new_tokens, temperature)
    if prompt is not None:
        reply = talk.say(prompt, stream=not as_json)
        if as_json:
            show_json({"prompt": prompt, "reply": reply})
        return
    _converse(talk)


def _converse(talk: Talk) -> None:
    if talk.template is None:
        tell("This model has no chat template: it continues your text.")
    tell(_HELP)
    while True:
        try:
            line = input(click.style("you  ", fg="green", bold=True) if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip() in ("/exit", "/quit"):
            return
        if line.strip() == "/reset":
            talk.reset()
            tell("(forgotten)")
        elif line.strip().startswith("/"):
            tell(_HELP)
        elif line.strip():
            click.echo(click.style("it   ", fg="cyan", bold=True) if sys.stdout.isatty() else "", nl=False)
            try:
                talk.say(line)
            except KeyboardInterrupt:
                talk.forget_last()
                tell("\n(stopped)")


class Talk:
    """One conversation.

    Args:
        system: the system prompt, used if the model has a chat template.
        temperature: 0 for greedy replies.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, system: str | None, max_new_tokens: int, temperature: float):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        self.template = getattr(tokenizer, "chat_template", None)
        self.system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = list(self.system)

    def forget_last(self) -> None:
        """Forget the last message that was not answered."""
        self.messages = self.messages[:-1]

    def say(self, text: str, stream: bool = True) -> str:
        """Send a message; the reply goes to stdout as it is written, and is returned."""
        import torch

        self.messages.append({"role": "user", "content": text})
        inputs = self._inputs(text).to(self.model.device)
        streamer = _streamer(self.tokenizer) if stream else None
        with torch.no_grad():
            written = self.model.generate(
                **inputs,
                **self.sampling,
                max_new_tokens=self.max_new_tokens,
                streamer=streamer,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        reply = self.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": reply})
        return reply

    def _inputs(self, text: str) -> Any:
        if self.template is None:
            return self.tokenizer(text, return_tensors="pt")
        return self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


def _streamer(tokenizer: Any) -> Any:
    """Prints a reply as it is written; control characters are shown, not obeyed."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
