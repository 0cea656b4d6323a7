"""The real huggingface_hub client, in a process of its own with the environment that a user would set.

`Client(environment)(function, ...)` runs one of the functions below there; PyTorch is imported once for all of them.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


class ClientError(Exception):
    """What the client raised: its type's name and its message (its own exceptions cannot all be pickled)."""


class Client:
    """One client process.

    Args:
        environment: variables to set there; None removes one.
    """

    def __init__(self, environment: dict[str, str | None]):
        before = dict(os.environ)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        try:
            self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            self(os.getpid)  # the process starts here, with these variables
        finally:
            os.environ.clear()
            os.environ.update(before)

    def __call__(self, function, *arguments, **options) -> Any:
        result, error = self.pool.submit(_guarded, function, arguments, options).result()
        if error:
            raise ClientError(error)
        return result


def _guarded(function, arguments, options):
    try:
        return function(*arguments, **options), None
    except Exception as error:
        causes = []
        while error is not None:
            causes.append(f"{type(error).__name__}: {error}")
            error = error.__cause__ or error.__context__
        return None, "\n".join(causes)


def _load(source: str, **options):
    import torch
    from transformers import AutoModelForCausalLM

    import transformers_quip  # noqa: F401

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(source, **options).eval()


def read_in_pieces(size: int) -> None:
    """What the client has of a broken connection is whole pieces of 10 MB; smaller ones make a small file do."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = size


def logits(source: str, ids: list[list[int]], **options) -> list:
    """What a model from a folder or the Hub computes."""
    import torch

    with torch.no_grad():
        return _load(source, **options)(torch.tensor(ids)).logits.tolist()


def logits_with_config(source: str, ids: list[list[int]], **options) -> list:
    """The same, where the user gives a config of ours without options."""
    from transformers_quip import QuipConfig

    return logits(source, ids, quantization_config=QuipConfig(), **options)


def upload(folder: str, repo: str, revision: str | None = None, inside: str = "", private: bool = False) -> None:
    """Upload a folder as it is, to a branch or into a folder of the repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, path_in_repo=inside or None, revision=revision)


def calibration_ids(source: str, dataset, tokenizer: str | None = None, **options) -> list[list[int]]:
    """The token ids that a calibrated run of a model would use; it ends when they are known."""
    from transformers import AutoModelForCausalLM

    from transformers_quip import QuipConfig
    from transformers_quip.hf import modes

    class Known(Exception):
        pass

    def load(*arguments, **keywords):
        raise Known(original(*arguments, **keywords)[0].tolist())

    original, modes.load_data = modes.load_data, load
    config = QuipConfig(dataset=dataset, tokenizer=tokenizer, num_samples=1, sequence_length=4)
    try:
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **options)
    except Known as known:
        return known.args[0]
    finally:
        modes.load_data = original
    raise AssertionError("nothing was calibrated")


def push(folder: str, repo: str, patient: bool = True, **options) -> str:
    """Load a folder and push the model; returns the commit."""
    import time

    model = _load(folder)
    sleep = time.sleep
    if not patient:
        time.sleep = lambda seconds: None  # the client waits 23 s before it gives a connection up
    try:
        return model.push_to_hub(repo, **options).oid
    finally:
        time.sleep = sleep


def save(folder: str, destination: str, **options) -> None:
    """Load a folder and save it again."""
    _load(folder).save_pretrained(destination, **options)


def save_and_push(folder: str, destination: str, repo: str) -> None:
    """The other way to push: as save_pretrained's option."""
    _load(folder).save_pretrained(destination, push_to_hub=True, repo_id=repo)


def snapshot(repo: str, **options) -> dict[str, bytes]:
    """Every file of a repository, through the cache."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, **options))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def validate_card(text: str) -> None:
    """huggingface_hub's own validation of a model card."""
    from types import SimpleNamespace

    from huggingface_hub import ModelCard, constants, repocard

    def post(url, **options):  # versions before 2 ask huggingface.co, whatever HF_ENDPOINT says
        return session.post(url.replace("https://huggingface.co", constants.ENDPOINT), **options)

    get_session, session = repocard.get_session, repocard.get_session()
    repocard.get_session = lambda: SimpleNamespace(post=post)
    try:
        ModelCard(text).validate()
    finally:
        repocard.get_session = get_session


def inspect(repo: str, **options) -> tuple[float, int, int]:
    """True bits, bytes and number of quantized linears, from a repository's headers alone."""
    from transformers_quip.checkpoints.inventory import read_repo

    inventory = read_repo(repo, **options)
    return inventory.true_bits, inventory.total_bytes, len(inventory.linears)


def command_line(*arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `transformers-quip ARGUMENTS`."""
    import contextlib
    import io

    from transformers_quip import cli

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(list(map(str, arguments)))
    return code, out.getvalue(), err.getvalue()
