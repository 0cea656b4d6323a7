"""Text that is written block by block is the text that the whole model writes."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

from tests.models import ARCHITECTURES, tiny_model
from transformers_quip.calibration import write_text
from transformers_quip.calibration.block_writer import BlockWriter
from transformers_quip.calibration.growing_cache import growing_cache


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_text(arch, tmp_path):
    model = tiny_model(arch)
    entered, now = [], []

    @contextmanager
    def part(prefix):
        entered.append(prefix)
        now.append(prefix)
        assert now == [prefix]
        yield
        now.remove(prefix)

    options = {"seed": 3, "document_length": 12, "greedy_tokens": 2, "batch_size": 3, "progress": False}
    expected = write_text(model, 5, 20, **options)
    found = write_text(model, 5, 20, **options, writer=BlockWriter(part, tmp_path))
    assert torch.equal(found, expected)
    # nine documents in three parts read each block once for each of the 11 tokens after the first
    assert len(entered) == 11 * len(set(entered))
    assert len(set(entered)) == model.config.num_hidden_layers
    assert list(tmp_path.iterdir()) == []


def test_keys_and_values_are_in_files(tmp_path):
    cache, plain = (growing_cache(tiny_model("llama").config, 5, folder) for folder in (tmp_path, None))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        keys, values = torch.randn(2, 3, 2, 1, 16, generator=generator)
        found, expected = (c.update(keys, values, 1) for c in (cache, plain))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["1.bin"]
    stored = torch.from_file(str(tmp_path / "1.bin"), size=2 * 3 * 2 * 5 * 16, dtype=torch.float32)
    assert torch.equal(stored.view(2, 3, 2, 5, 16)[0], found[0])


def test_files_are_deleted_after_an_error(tmp_path):
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        write_text(model, 2, 8, progress=False, writer=BlockWriter(lambda prefix: nullcontext(), tmp_path))
    assert list(tmp_path.iterdir()) == []
