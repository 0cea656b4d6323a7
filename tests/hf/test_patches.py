"""What is replaced inside other packages: from one table, once, and put back by one call."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils
from transformers.utils import PushToHubMixin

import transformers_quip
from tests.models import save_tiny_model, tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.hf import patches
from transformers_quip.hf.patches import TABLE, restore, wrap_once


def found():
    """The object in the place of each function of the table."""
    places = [(patch, patch.owner(load=True)) for patch in TABLE]
    return {
        (patch.module, patch.name): inspect.getattr_static(owner, patch.attribute)
        for patch, owner in places
        if owner is not None
    }


@pytest.fixture
def originals():
    """Before: everything as Transformers and PyTorch have it. After: everything replaced."""
    restore()
    yield found()
    restore()
    patches.install()


def is_ours(function):
    return hasattr(getattr(function, "__func__", function), "_transformers_quip_replaces")


def test_restore_puts_the_objects_of_transformers_in_place(originals):
    assert not any(map(is_ours, originals.values()))
    for (module, name), function in originals.items():
        own = getattr(function, "__func__", function)
        assert own.__module__.startswith(module.partition(".")[0]), name
        assert "transformers_quip" not in own.__module__
    assert "_upload_modified_files" not in vars(PreTrainedModel)
    assert PreTrainedModel._upload_modified_files is PushToHubMixin._upload_modified_files
    assert modeling_utils.get_hf_quantizer.__module__ == "transformers.quantizers.auto"
    patches.install()
    assert all(map(is_ours, found().values()))
    patches.install()
    installed = found()
    patches.install()
    assert found() == installed
    assert transformers_quip.restore_transformers is restore
    transformers_quip.restore_transformers()
    assert found() == originals
    restore()
    assert found() == originals


def test_the_import_replaces_what_is_needed_to_recognise_a_checkpoint(originals):
    patches.install_on_import()
    ours = {name for (_, name), function in found().items() if is_ours(function)}
    assert ours == {"get_hf_quantizer", "load_state_dict", "PreTrainedModel.from_pretrained"}


def test_loading_a_quantized_model_installs_everything_again(originals, tmp_path):
    folder = save_tiny_model("llama", tmp_path / "dense")
    expected = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuipConfig(dataset=None, bits=4))
    assert all(map(is_ours, found().values()))
    expected.save_pretrained(tmp_path / "quantized")
    assert (tmp_path / "quantized/README.md").is_file()
    restore()
    assert found() == originals
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(model(tiny_ids()).logits, expected(tiny_ids()).logits)
    assert all(map(is_ours, found().values()))


def test_a_dense_model_does_not_replace_the_functions_for_quantized_ones(originals, tmp_path):
    patches.install_on_import()
    before = found()
    AutoModelForCausalLM.from_pretrained(save_tiny_model("llama", tmp_path))
    assert found() == before


def double(original):
    return lambda *args: 2 * original(*args)


def double_again(original):
    """The same by another import of the package."""
    return lambda *args: 2 * original(*args)


class Base:
    def inherited(self):
        return 3


def test_wrap_once_wraps_once():
    class Owner(Base):
        def method(self):
            """Says so."""
            return 1

        @classmethod
        def of_the_class(cls):
            return len(cls.__name__)

    module = SimpleNamespace(function=lambda: 5)
    for _ in range(3):
        for owner, names in ((Owner, ("method", "of_the_class", "inherited")), (module, ("function",))):
            for name in names:
                wrap_once(owner, name, double)
    assert (Owner().method(), Owner.of_the_class(), Owner().inherited(), module.function()) == (2, 10, 6, 10)
    assert Owner.method.__doc__ == "Says so."
    assert Base().inherited() == 3
    wrap_once(Owner, "method", double_again)  # takes the place of the first
    assert Owner().method() == 2


def test_what_another_package_puts_over_it_stays(caplog, monkeypatch):
    module = SimpleNamespace(function=lambda: 5)
    wrap_once(module, "function", double)
    ours = module.function

    @functools.wraps(ours)  # copies every attribute of the function
    def theirs():
        return ours() + 1

    module.function = theirs
    wrap_once(module, "function", double)
    assert module.function() == 11
    patch = patches.Patch("somewhere", "function", double, "now", "why")
    monkeypatch.setattr(patches, "TABLE", (patch,))
    monkeypatch.setattr(patches.Patch, "owner", lambda self, load: module)
    restore()
    assert module.function is theirs
    assert "somewhere.function was not restored" in caplog.text
    module.function = ours
    restore()
    assert module.function() == 5


def test_the_table_in_markdown():
    rows = list(patches.markdown_rows())
    assert len(rows) == 2 + len(TABLE)
    assert all(row.count("|") == 4 for row in rows)
    for patch, row in zip(TABLE, rows[2:], strict=True):
        assert row.startswith(f"| `{patch.module}.{patch.name}` | {patch.when} | ")
        assert patch.why.endswith(".")
