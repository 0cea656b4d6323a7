"""The checkpoints that are mutated: native ones of every codebook, converted ones, and every foreign family.

Most come from `tests/formats` and `tests/foreign.py`, which are written from the formats' descriptions; those of other
packages are taken where they are present (QUIP_GOLDEN).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import foreign
from tests.models import tiny_model
from transformers_quip import QuipConfig
from transformers_quip.hf.convert import convert

FORMATS = Path(__file__).resolve().parent.parent / "formats"
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}
_QUIP_PARAMS = {
    "codebook": "E8P12", "codebook_version": 1, "codesz": 8, "idx_dtype": "torch.int64", "packsz": 4, "lora_rank": 0,
    "rescale_WH": False, "model_version": 1, "outlier_channel_split": False, "fused": True, "resid_scale_override": -1,
}  # fmt: skip
# name → (architecture, what makes a linear, what config.json gets, options of `write_checkpoints`)
_FOREIGN: dict[str, tuple[str, Callable[[], foreign.Make], dict, dict]] = {
    "quip-for-all": ("llama", foreign.quip_for_all, foreign.quip_for_all_config(use_rand=False), {}),
    "quip-for-all-rand": (
        "llama",
        lambda: foreign.quip_for_all(use_rand=True),
        foreign.quip_for_all_config(use_rand=True),
        {},
    ),
    "quip-for-all-biased": ("gpt2", foreign.quip_for_all, foreign.quip_for_all_config(use_rand=False), {}),
    "quip-sharp": ("llama", foreign.quip_sharp, {"quip_params": _QUIP_PARAMS}, {"fuse": _FUSED, "intermediate_size": 128}),
    "qtip-3inst": ("llama", lambda: foreign.qtip("3inst", 2), foreign.qtip_config("3inst", 2), {}),
    "qtip-hyb": (
        "llama",
        lambda: foreign.qtip("quantlut_sym", 2, 2, 9),
        foreign.qtip_config("quantlut_sym", 2, 2, 9),
        {},
    ),
    "exl3": ("llama", foreign.exl3, {"quantization_config": {"quant_method": "exl3", "bits": 2.0}}, {}),
    "exl3-experts": ("mixtral", foreign.exl3, {"quantization_config": {"quant_method": "exl3", "bits": 2.0}}, {}),
}  # fmt: skip
CONVERTED = ("quip-for-all-rand", "quip-sharp", "exl3", "exl3-experts", "qtip-hyb")
QUICK = (
    "native-e8p-rvq3",
    "native-embeddings",
    "native-trellis",
    "native-e8p-sharded",
    "foreign-quip-sharp",
    "foreign-exl3",
)
_EVALUATION = {"results": [{"dataset": "wiki", "perplexity": 4.5, "dense_perplexity": 4.0, "protocol": "windows of 2048"}]}
_CARD = "---\nlicense: apache-2.0\ntags:\n- quip\n---\n\n# A model\n\nSomebody's own words.\n"


def make_specimens(out: Path, golden: Path | None = None, only: tuple[str, ...] = ()) -> list[Path]:
    """Write every specimen into `out`, one folder each.

    Args:
        out: exists, and is empty.
        golden: folder of the checkpoints that other packages wrote; None: without them.
        only: names; (): all.

    Returns:
        The folders, sorted by name.
    """
    for source in sorted(FORMATS.iterdir()):
        if (source / "config.json").is_file():
            _copy(source, out / f"native-{source.name}")
    _split(out / "native-e8p-rvq4", out / "native-e8p-sharded")
    _split(out / "native-trellis", out / "native-trellis-sharded")
    for name, made in _FOREIGN.items():
        if not only or {f"foreign-{name}", f"native-from-{name}"} & set(only):
            _write_foreign(name, *made, out)
    if not only:
        _quantized(out / "native-kronecker", incoherence="kronecker")
        _quantized(out / "native-experts", "mixtral")
        _quantized(out / "native-experts-trellis", "mixtral", codebook="trellis", bits=3)
        _quantized(out / "native-table-of-tiles", codebook="trellis", modules={"embed_tokens": {"bits": 4}})
        _quantized(out / "native-calibrated", dataset="self", num_samples=2, sequence_length=16, refinement_sweeps=0)
        _bin(out / "foreign-quip-for-all", out / "foreign-quip-for-all-bin")
        _split(out / "foreign-exl3", out / "foreign-exl3-sharded")
        for name in CONVERTED:
            convert(out / f"foreign-{name}", out / f"native-from-{name}")
        for source in sorted(golden.iterdir()) if golden is not None else ():
            if (source / "config.json").is_file():
                _copy(source, out / f"foreign-golden-{source.name}")
    else:
        for folder in list(out.iterdir()):
            if folder.name not in only:
                shutil.rmtree(folder)
    for folder in out.iterdir():
        if folder.name.startswith("native"):
            (folder / "quip_evaluation.json").write_text(json.dumps(_EVALUATION))
            (folder / "README.md").write_text(_CARD)
    return sorted(out.iterdir())


def _copy(source: Path, target: Path) -> None:
    ignored = shutil.ignore_patterns("expected.safetensors", "fixture.json")
    shutil.copytree(source, target, ignore=ignored, copy_function=shutil.copyfile)
    target.chmod(0o755)


def _split(source: Path, target: Path) -> None:
    """The same model in two files and an index."""
    _copy(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    places = {}
    for number in (0, 1):
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        names = sorted(tensors)[number::2]
        save_file({key: tensors[key] for key in names}, target / name, {"format": "pt"})
        places |= dict.fromkeys(names, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _bin(source: Path, target: Path) -> None:
    """The same model as `torch.save` writes it."""
    _copy(source, target)
    torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()


def _write_foreign(name: str, arch: str, make: Callable[[], foreign.Make], config: dict, options: dict, out: Path) -> None:
    work = out / f".{name}"
    work.mkdir()
    folder, _ = foreign.write_checkpoints(arch, work, make(), config, num_hidden_layers=1, **options)
    if name.startswith("exl3"):
        _write_storage(folder)
    folder.rename(out / f"foreign-{name}")
    shutil.rmtree(work)


def _write_storage(folder: Path) -> None:
    """The list of tensors that exllamav3 writes beside its checkpoints."""
    storage: dict[str, dict] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored = {"shape": list(tensor.shape), "n_bytes": tensor.nbytes, "dtype": str(tensor.dtype)}
        storage.setdefault(name.rpartition(".")[0], {"stored_tensors": {}})["stored_tensors"][name] = stored
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (folder / "quantization_config.json").write_text(json.dumps(config | {"tensor_storage": storage}, indent=1))


def _quantized(target: Path, arch: str = "llama", **options) -> None:
    """A tiny model that this package quantizes."""
    dense = target.with_name(f".{target.name}")
    tiny_model(arch, num_hidden_layers=1).save_pretrained(dense)
    config = QuipConfig(**{"dataset": None, **options})
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(target)
    shutil.rmtree(dense)
