"""convert SOURCE OUT: a checkpoint of another quantizer of this family into the native format, or that into EXL3."""

from __future__ import annotations

from pathlib import Path

import click

from ..text import size
from .console import json_option, show, show_json
from .destination import check_not_source, new_folder


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["native", "exl3"]),
    default="native",
    show_default=True,
    help="Format of OUT. exl3 takes a model in the native format with trellis codes of order exl3.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there, once the new model is complete.")
@json_option
def command(source: str, out: Path, to: str, overwrite: bool, as_json: bool) -> None:
    """Convert the quantized checkpoint SOURCE (a folder or an id on the Hub) into the native format in OUT, without loss.

    With --to exl3, a model in the native format becomes one for exllamav3 and TabbyAPI. It must have been quantized with
    a codebook trellis:…:exl3 and with incoherence hadamard-128.

    OUT appears only when it is complete; after an error or Ctrl-C it is as it was before.
    """
    from ..checkpoints.inventory import read_folder
    from ..hf.convert import convert
    from ..hub.model_card import try_to_write_card

    check_not_source(out, source)
    with new_folder(out, overwrite) as folder:
        convert(source, folder, to=to)
        if to == "native":
            try_to_write_card(folder)
    inventory = read_folder(out)
    count = sum(name.endswith(".codes" if to == "native" else ".trellis") for name in inventory.names)
    if as_json:
        show_json({"folder": str(out), "quantized_layers": count, "weight_bytes": inventory.total_bytes})
    else:
        show(f"{out}: {count} quantized layers, {size(inventory.total_bytes)}")
