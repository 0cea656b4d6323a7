"""Saving a model so that its folder is a model only when all of it is written, and an old one stays complete until then.

Transformers writes config.json first, and then one file of weights after the other. A run that is killed meanwhile leaves a
description without weights; or, over another model, the new description with the old weights, or shards of both, which load
without an error and compute nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoints.unfinished import move_up, work_in

_CONFIG = "config.json"
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


@contextmanager
def replaced_model(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` to save into; its files take their places when the block ends without an error.

    Between the first file that is moved and the last one, which is config.json, the folder is not a model. Weights of the
    old model that the new one does not have are deleted; other files stay.

    Raises:
        OSError: another process is saving there, or a file cannot be written; after an error of the block the old model is
            as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with work_in(folder) as work:
        yield work
        if not (work / _CONFIG).is_file():
            return
        (folder / _CONFIG).unlink(missing_ok=True)
        for path in folder.iterdir():
            if _WEIGHTS.fullmatch(path.name) and not (work / path.name).exists():
                path.unlink()
        for _ in move_up(work, folder, last=_CONFIG):
            pass
