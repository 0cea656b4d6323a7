"""Every kind that `dataset` takes, on data small enough to write the expected ids down."""

import random
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.models import POSITIONS, VOCABULARY, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.calibration import load_token_ids, write_text

BOS = 1


class LetterTokenizer:
    """a -> 10, b -> 11, ...; a space is 3; each text starts with BOS, as Llama's tokenizer does."""

    def __call__(self, texts, **options):
        return {"input_ids": [[BOS, *(3 if c == " " else ord(c) - ord("a") + 10 for c in text)] for text in texts]}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def config(dataset, **options):
    defaults = {"tokenizer": None, "text_column": "text", "num_samples": 4, "sequence_length": 8, "seed": 0}
    return SimpleNamespace(dataset=dataset, **{**defaults, **options})


def windows_of(stream, length):
    return {tuple(stream[i : i + length]) for i in range(0, len(stream) - length + 1, length)}


def test_texts_are_tokenized_joined_and_cut(model):
    ids, description = load_token_ids(config(["abcdefg"] * 8, num_samples=5), model, LetterTokenizer())
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[BOS, 10, 11, 12, 13, 14, 15, 16]] * 5
    assert "texts given by the caller" in description
    assert "5 x 8 tokens" in description
    assert "seed 0" in description


def test_windows_run_over_the_ends_of_texts(model):
    ids, _ = load_token_ids(config(["ab", "ab", "ab", "ab"], num_samples=3, sequence_length=4), model, LetterTokenizer())
    assert ids.tolist() == [[1, 10, 11, 1], [10, 11, 1, 10], [11, 1, 10, 11]]


def test_windows_of_a_long_text_are_drawn_with_the_seed(model):
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=799))
    possible = windows_of([BOS, *(ord(c) - ord("a") + 10 for c in text)], 8)
    drawn = [load_token_ids(config([text], seed=s), model, LetterTokenizer())[0].tolist() for s in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    for ids in drawn:
        assert len({tuple(row) for row in ids}) == 4
        assert {tuple(row) for row in ids} <= possible


def test_only_as_many_texts_as_needed_are_tokenized(model):
    class Counting(LetterTokenizer):
        texts = 0

        def __call__(self, texts, **options):
            self.texts += len(texts)
            return super().__call__(texts, **options)

    tokenizer = Counting()
    load_token_ids(config(["abcdefg"] * 1000, num_samples=10), model, tokenizer)
    assert tokenizer.texts == 64


def test_empty_texts_are_left_out(model):
    ids, _ = load_token_ids(config(["", "abc", "  ", "\n"], num_samples=1, sequence_length=4), model, LetterTokenizer())
    assert ids.tolist() == [[1, 10, 11, 12]]


ROWS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]


@pytest.mark.parametrize(
    "dataset",
    [
        ROWS,
        tuple(map(tuple, ROWS)),
        [torch.tensor(row) for row in ROWS],
        [np.array(row, dtype=np.int32) for row in ROWS],
        [torch.tensor([row]) for row in ROWS],
        torch.tensor(ROWS),
        torch.tensor(ROWS, dtype=torch.int16),
        np.array(ROWS),
        torch.tensor(ROWS).flatten(),
        [i for row in ROWS for i in row],
        [np.int64(i) for row in ROWS for i in row],
    ],
    ids=["lists", "tuples", "tensors", "arrays", "1xT", "tensor", "int16", "array", "1-D", "ints", "numpy ints"],
)
def test_token_ids(model, dataset):
    ids, description = load_token_ids(config(dataset, num_samples=3, sequence_length=4), model)
    assert ids.tolist() == ROWS
    assert ids.dtype == torch.int64
    assert "token ids given by the caller" in description


def test_token_ids_of_other_lengths_are_cut_again(model):
    ids, _ = load_token_ids(config(ROWS, num_samples=2, sequence_length=6), model)
    assert ids.tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]


def test_the_callers_tensor_is_not_shared(model):
    dataset = torch.tensor(ROWS)
    ids, _ = load_token_ids(config(dataset, num_samples=3, sequence_length=4), model)
    ids.zero_()
    assert dataset.tolist() == ROWS


def test_datasets_dataset(model):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["abc"] * 3, "body": ["xyz"] * 3})
    options = {"num_samples": 3, "sequence_length": 4}
    assert load_token_ids(config(table, **options), model, LetterTokenizer())[0].tolist() == [[1, 10, 11, 12]] * 3
    ids, description = load_token_ids(config(table, text_column="body", **options), model, LetterTokenizer())
    assert ids.tolist() == [[1, 33, 34, 35]] * 3
    assert "datasets.Dataset" in description
    with pytest.raises(ValueError, match=r"no column text_column='story', only 'text', 'body'"):
        load_token_ids(config(table, text_column="story"), model, LetterTokenizer())
    with pytest.raises(
        ValueError, match=r"DatasetDict with the splits train, test: choose one, such as dataset\['train'\]"
    ):
        load_token_ids(config(datasets.DatasetDict(train=table, test=table)), model, LetterTokenizer())
    numbers = datasets.Dataset.from_dict({"text": [1, 2]})
    with pytest.raises(TypeError, match=r"dataset\[[01]\]\['text'\] is a int that is not a sequence of token ids"):
        load_token_ids(config(numbers), model, LetterTokenizer())


def test_self(model):
    ids, description = load_token_ids(config("self", seed=7), model)
    assert torch.equal(ids, write_text(model, 4, 8, seed=7, document_length=128, greedy_tokens=4, progress=False))
    assert "written by the model itself, seed 7" in description


def fake_optimum(monkeypatch, get_dataset):
    """Stand in for the data sets that Optimum would download."""
    package = types.ModuleType("optimum.gptq.data")
    package.get_dataset = get_dataset
    monkeypatch.setitem(sys.modules, "optimum.gptq", types.ModuleType("optimum.gptq"))
    monkeypatch.setitem(sys.modules, "optimum.gptq.data", package)


def test_named_data_set(model, monkeypatch):
    def get_dataset(name, tokenizer, nsamples, seqlen, seed):
        assert (name, nsamples, seqlen, seed) == ("wikitext2", 4, 8, 0)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.rand(3), random.random(), np.random.rand()
        return [{"input_ids": torch.arange(i, i + 8)[None], "attention_mask": torch.ones(1, 8)} for i in range(4)]

    fake_optimum(monkeypatch, get_dataset)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    ids, description = load_token_ids(config("wikitext2"), model, LetterTokenizer())
    assert ids.tolist() == [list(range(i, i + 8)) for i in range(4)]
    assert description.startswith("wikitext2: ")
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.random.get_rng_state(), states[2])


def test_named_data_set_that_cannot_be_loaded(model, monkeypatch):
    def get_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    fake_optimum(monkeypatch, get_dataset)
    with pytest.raises(ValueError, match="dataset='c4' could not be loaded .*Couldn't reach the Hub.*'self'") as caught:
        load_token_ids(config("c4"), model, LetterTokenizer())
    assert "second line" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_unknown_name_and_missing_package(model, monkeypatch):
    pytest.importorskip("optimum.gptq.data")
    with pytest.raises(ValueError, match="dataset='wikipedai' could not be loaded .*wikitext2"):
        load_token_ids(config("wikipedai"), model, LetterTokenizer())
    monkeypatch.setitem(sys.modules, "optimum.gptq.data", None)
    with pytest.raises(ValueError, match="need the packages optimum and datasets"):
        load_token_ids(config("wikitext2"), model, LetterTokenizer())


def test_sequence_length_beyond_the_models_positions_is_cut(model, caplog):
    ids, _ = load_token_ids(config(torch.full((2, 500), 9), num_samples=2, sequence_length=300), model)
    assert ids.shape == (2, POSITIONS)
    assert f"sequence_length=300 is more than the {POSITIONS} positions of LlamaForCausalLM" in caplog.text
    gpt2 = tiny_model("gpt2")
    assert load_token_ids(config("self", num_samples=1, sequence_length=300), gpt2)[0].shape == (1, POSITIONS)


def test_too_little_text_is_a_warning(model, caplog):
    ids, _ = load_token_ids(config(ROWS, sequence_length=4), model)
    assert len(ids) == 3
    assert "only 3 sequences of 4 tokens, not num_samples=4" in caplog.text
    ids, _ = load_token_ids(config([[5, 6, 7]], sequence_length=4), model)
    assert ids.tolist() == [[5, 6, 7]]
    assert "only 3 tokens, less than one sequence of 4" in caplog.text


@pytest.mark.parametrize("dataset", [[], [""], [[]], torch.empty(0, 4, dtype=torch.long), [" ", "\n"]])
def test_empty_data_is_an_error(model, dataset):
    with pytest.raises(ValueError, match="dataset is empty"):
        load_token_ids(config(dataset), model, LetterTokenizer())


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_token_ids_outside_the_vocabulary(model, token):
    with pytest.raises(ValueError, match=f"token id {token}, outside the model's vocabulary of {VOCABULARY}"):
        load_token_ids(config([[5] * 8, [5] * 7 + [token]]), model)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (5, "dataset is a int, but must be 'self'"),
        (b"text", "dataset is a bytes, but must be"),
        (["a", 5], r"dataset\[1\] is a int that is not a sequence of token ids"),
        ([5, "a"], "dataset.* is a (int|list) that is not a sequence of token ids"),
        ([[1, 2], "a"], r"dataset\[1\] holds texts, but dataset\[0\] holds token ids"),
        ([[1, 2.5]], r"dataset\[0\] is a list that is not a sequence of token ids"),
        ([[True, False]], r"dataset\[0\]\[0\] is a bool"),
        ([{"text": "a"}, {"text": [1, 2]}], r"dataset\[.\]\['text'\] holds .*, but dataset\[0\]\['text'\] holds texts"),
        ([None], r"dataset\[0\] is a NoneType"),
        (torch.rand(2, 3), r"tensor of shape \[2, 3\] and dtype torch.float32"),
        (torch.ones(2, 3, 4, dtype=torch.long), r"tensor of shape \[2, 3, 4\]"),
        ([np.ones((2, 2, 2), dtype=np.int64)], r"tensor of shape \[2, 2, 2\]"),
    ],
)
def test_wrong_types(model, dataset, message):
    with pytest.raises(TypeError, match=message):
        load_token_ids(config(dataset), model, LetterTokenizer())


def test_tokenizer_of_the_config_and_missing_tokenizer(model, tmp_path):
    texts = ["abcdefg"] * 4
    ids, _ = load_token_ids(config(texts, tokenizer=LetterTokenizer()), model)
    assert ids.tolist() == [[BOS, *range(10, 17)]] * 4
    with pytest.raises(ValueError, match="needs a tokenizer, .*tokenizer=.*dataset='self'"):
        load_token_ids(config(texts), model)
    with pytest.raises(ValueError, match="none could be loaded from"):
        load_token_ids(config(texts, tokenizer=str(tmp_path)), model)


def test_tokenizer_beside_the_model(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "one": 5, "two": 6, "three": 7}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"num_samples": 2, "sequence_length": 3}
    for place in (None, str(tmp_path)):
        ids, _ = load_token_ids(config(["one two three"] * 2, tokenizer=place, **options), model)
        assert ids.tolist() == [[5, 6, 7], [5, 6, 7]]


def test_held_out_sequences_are_others_than_those_drawn_without_them():
    rows = torch.arange(3, 103)[:, None].expand(100, 8).contiguous()
    config = QuipConfig(dataset=rows, num_samples=20, sequence_length=8, seed=3)
    model = tiny_model("llama")
    plain = load_token_ids(config, model)[0]
    both = load_token_ids(config, model, held_out=5)[0]
    assert torch.equal(both[:20], plain)
    assert len(both) == 25
    assert not set(both[20:, 0].tolist()) & set(plain[:, 0].tolist())
    # too few for both: those that are held out stay, and no sequence is in both parts
    few = load_token_ids(QuipConfig(dataset=rows[:22], num_samples=20, sequence_length=8), model, held_out=5)[0]
    assert sorted(few[:, 0].tolist()) == list(range(3, 25))
