"""Text that a smaller model writes for a larger one."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import transformers_quip
from tests.models import VOCABULARY, save_tiny_model, tiny_tokenizer
from transformers_quip import QuipConfig
from transformers_quip.calibration import load_token_ids, write_text

OPTIONS = {"num_samples": 3, "sequence_length": 20, "batch_size": 2, "refinement_sweeps": 0, "seed": 5}


def shifted_tokenizer():
    """Every character of ASCII is its code from the other end of the vocabulary."""
    vocabulary = {chr(code): VOCABULARY + 2 - code for code in range(3, VOCABULARY)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>")


@pytest.fixture
def folders(tmp_path):
    for name, arch in (("large", "llama"), ("small", "qwen3")):
        save_tiny_model(arch, tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def test_the_same_vocabulary(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "large")
    config = QuipConfig(dataset=f"self:{folders / 'small'}", **OPTIONS)
    ids, description = load_token_ids(config, model)
    small = AutoModelForCausalLM.from_pretrained(folders / "small")
    how = {"document_length": 128, "greedy_tokens": 4}
    assert torch.equal(ids, write_text(small, 3, 20, 5, progress=False, **how))
    assert "tokens written by" in description


def test_another_vocabulary(folders):
    """Its text is tokenized again: the same characters, by other numbers."""
    shifted_tokenizer().save_pretrained(folders / "large")
    model = AutoModelForCausalLM.from_pretrained(folders / "large")
    ids, _ = load_token_ids(QuipConfig(dataset=f"self:{folders / 'small'}", **OPTIONS), model)
    assert ids.shape == (3, 20)
    small, theirs = (kind.from_pretrained(folders / "small") for kind in (AutoModelForCausalLM, AutoTokenizer))
    written = write_text(small, 4, 20, 5, progress=False, document_length=128, greedy_tokens=4)  # 1.5 times as many
    characters = [c for row in written.tolist() for c in row if c > 2]
    expected = [VOCABULARY + 2 - code for code in characters][:60]
    assert ids.flatten().tolist() == expected
    assert theirs.get_vocab() != AutoTokenizer.from_pretrained(folders / "large").get_vocab()


def test_from_folder_to_folder(folders):
    config = QuipConfig(dataset=f"self:{folders / 'small'}", **OPTIONS)
    transformers_quip.quantize(folders / "large", folders / "streamed", config)
    AutoModelForCausalLM.from_pretrained(folders / "large", quantization_config=config).save_pretrained(folders / "memory")
    files = [(folders / name / "model.safetensors").read_bytes() for name in ("streamed", "memory")]
    assert files[0] == files[1]


def test_a_writer_that_does_not_exist(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "large")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        load_token_ids(QuipConfig(dataset=f"self:{folders / 'none'}", **OPTIONS), model)
