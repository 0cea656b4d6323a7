"""push FOLDER REPO: a saved model to the Hub, with its model card."""

from __future__ import annotations

from pathlib import Path

import click

from .console import json_option, show_json, tell, token_option


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="Branch to push to; created if it does not exist.  [default: main]")
@click.option("--message", default="Upload model", show_default=True, help="Message of the commit.")
@click.option("--base-model", help="Id of the dense model, if config.json does not know it.")
@click.option("--overwrite-card", is_flag=True, help="Replace a model card (README.md) that somebody has edited.")
@token_option
@json_option
def command(
    folder: Path,
    repo: str,
    private: bool,
    revision: str | None,
    message: str,
    base_model: str | None,
    overwrite_card: bool,
    token: str | None,
    as_json: bool,
) -> None:
    """Push the quantized model in FOLDER to the repository REPO (owner/name).

    The folder is checked first, and its model card is written or refreshed; a card with somebody's own text is left
    alone. Files that are already on the Hub are not sent again, so an interrupted push continues where it stopped.
    """
    from huggingface_hub import HfApi

    from ..hub.model_card import make_card, write_card

    make_card(folder, base_model=base_model)  # raises if there is nothing to push, before anything is created on the Hub
    api = HfApi(token=token)
    repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    if not write_card(folder, repo_id=repo, base_model=base_model, overwrite=overwrite_card):
        tell("README.md has a text of its own and is pushed as it is.")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        revision=revision,
        commit_message=message,
        ignore_patterns=[".*", "*.partial", "__pycache__/*"],
    )
    if as_json:
        show_json({"repo": repo, "commit": commit.oid, "url": str(commit.commit_url)})
    else:
        click.echo(str(commit.commit_url))
