"""The files of a model's folder besides its weights and its config.json that belong to the model, and may be copied.

A folder that was cloned or downloaded may hold anything. A copy of the model is likely to be published, so it gets only
the files that belong to a model: no hidden files (`.env`, `.git-credentials`), no file outside the folder that
a link leads to, no scripts and no pickles.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Configurations, vocabularies and merges, tokenizer models, chat templates, descriptions.
_KINDS = (".json", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".vocab", ".jinja", ".md")
_TEXTS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "README")
_WEIGHTS = (".safetensors", ".index.json")  # written again, so no message says that they are left out
_IMPORTS = re.compile(r"^\s*(?:from\s+\.([\w.]+)\s+import|from\s+\.\s+import\s+\(?([\w\s,]+))", re.MULTILINE)


def companions(folder: Path) -> list[Path]:
    """The files of a model's folder that belong to the model, sorted; without files of weights and their indices.

    A Python file belongs to it where an "auto_map" of its JSON files names it (the code of an architecture or of a
    tokenizer that Transformers does not have), and so do the files in the same folder that this one imports.

    Args:
        folder: an existing folder.
    """
    code = _code(folder)
    result = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.endswith(_WEIGHTS) or not path.is_file():
            continue
        if path.name not in code and not _is_plain(path.name):
            logger.info("%s is not copied: it is not a file that the model needs", path)
        elif not stays_inside(path, folder):
            logger.warning("%s is not copied: it is a link to %s, outside of the folder", path, path.resolve())
        else:
            result.append(path)
    return result


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads into the folder, or into the Hub cache's store of files that the folder links to."""
    target, root = path.resolve(), folder.resolve()
    if root in target.parents:
        return True
    # models--name/snapshots/revision/file is a link to models--name/blobs/hash
    return root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"


def _is_plain(name: str) -> bool:
    stem, dot, _ = name.partition(".")
    return name.endswith(_KINDS) or (not dot and stem.upper().startswith(_TEXTS))


def _code(folder: Path) -> set[str]:
    """Names of the Python files that the model needs."""
    found: set[str] = set()
    waiting = [name for path in folder.glob("*.json") if path.is_file() for name in _mapped(path)]
    while waiting:
        name = waiting.pop()
        path = folder / name
        if name in found or not path.is_file() or not stays_inside(path, folder):
            continue
        found.add(name)
        for module, other in _IMPORTS.findall(path.read_text(encoding="utf-8", errors="replace")):
            for part in re.findall(r"\w+", module.partition(".")[0] or other):
                waiting.append(f"{part}.py")
    return found


def _mapped(path: Path) -> Iterator[str]:
    """The Python files of this folder that the "auto_map" of a JSON file names: "module.Class" is in module.py."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # it is copied unchanged; the program that reads it reports the error
    mapped = content.get("auto_map") if isinstance(content, dict) else None
    if not isinstance(mapped, dict):
        return
    for value in mapped.values():
        for reference in value if isinstance(value, list) else [value]:
            if _is_local(reference):
                yield f"{reference.partition('.')[0]}.py"


def _is_local(reference: Any) -> bool:
    """Whether this is "module.Class"; with "--" it is of another repository."""
    return isinstance(reference, str) and re.fullmatch(r"\w+\.\w+", reference) is not None
