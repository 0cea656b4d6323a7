"""Calibration data in the forms that people have: each gives the ids that are written down here."""

from __future__ import annotations

from collections import UserDict, deque

import numpy as np
import pytest
import torch

from tests.calibration.test_dataset import BOS, LetterTokenizer, config
from tests.models import tiny_model
from transformers_quip.calibration import load_token_ids

datasets = pytest.importorskip("datasets")

PADDED = [[5, 6, 7, 8, 0, 0], [0, 0, 9, 10, 11, 12], [0, 13, 14, 15, 16, 0]]
MASK = [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]]
ROWS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
BOTH = {"input_ids": PADDED, "attention_mask": MASK}
DICTIONARIES = [{"input_ids": i, "attention_mask": m} for i, m in zip(PADDED, MASK, strict=True)]
TABLE = datasets.Dataset.from_dict({**BOTH, "other": ["a", "b", "c"], "text": ["a"] * 3})


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def load(dataset, model, **options):
    return load_token_ids(config(dataset, **{"num_samples": 3, "sequence_length": 4, **options}), model, LetterTokenizer())


def batch_encoding():
    from transformers import BatchEncoding

    return BatchEncoding(BOTH)


@pytest.mark.parametrize(
    "dataset",
    [
        BOTH,
        UserDict(BOTH),
        batch_encoding(),
        {name: torch.tensor(value) for name, value in BOTH.items()},
        {name: np.array(value) for name, value in BOTH.items()},
        {"input_ids": torch.tensor(PADDED), "attention_mask": torch.tensor(MASK).bool()},
        {"input_ids": ROWS},
        TABLE,
        TABLE.with_format("torch"),
        TABLE.with_format("numpy"),
        TABLE.to_iterable_dataset(),
        datasets.Dataset.from_dict({"input_ids": ROWS}),
        DICTIONARIES,
        [{name: torch.tensor(value) for name, value in row.items()} for row in DICTIONARIES],
        iter(DICTIONARIES),
        [BOTH],
        torch.utils.data.DataLoader(TABLE.with_format("torch").select_columns(list(BOTH)), batch_size=2),
        deque(ROWS),
        iter(ROWS),
        iter([torch.tensor(ROWS)]),
        [*ROWS[:1], [], *ROWS[1:]],
        [ROWS[0][:3], ROWS[0][3:], ROWS[1], ROWS[2]],
    ],
    ids=lambda value: type(value).__name__,
)
def test_token_ids_without_their_padding(model, dataset):
    ids, _ = load(dataset, model)
    assert sorted(ids.tolist()) == ROWS


def test_text_column_names_token_ids_chats_or_texts(model):
    table = datasets.Dataset.from_dict({"input_ids": ROWS, "tokens": [row[::-1] for row in ROWS], "body": ["abc"] * 3})
    assert sorted(load(table, model, text_column="tokens")[0].tolist()) == sorted(row[::-1] for row in ROWS)
    assert load(table, model, text_column="body")[0].tolist() == [[BOS, 10, 11, 12]] * 3
    assert sorted(load(table, model)[0].tolist()) == ROWS


class Endless:
    """Rows for ever, counted."""

    def __init__(self, row):
        self.row = row
        self.read = 0

    def __iter__(self):
        while True:
            self.read += 1
            yield self.row


@pytest.mark.parametrize("row", ["abc", {"text": "abc"}, [BOS, 10, 11, 12], {"input_ids": [BOS, 10, 11, 12]}])
def test_streams_are_read_as_far_as_needed(model, row):
    stream = Endless(row)
    ids, description = load(stream, model, num_samples=100)
    assert ids.tolist() == [[BOS, 10, 11, 12]] * 100
    assert stream.read == 128  # two reads of 64
    assert "stream" in description


def test_streamed_tables_are_read_as_far_as_needed(model):
    read = []

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"text": "abc", "other": None}

    ids, _ = load(datasets.IterableDataset.from_generator(rows), model, num_samples=10)
    assert ids.tolist() == [[BOS, 10, 11, 12]] * 10
    assert len(read) < 200


class Chats(LetterTokenizer):
    """Writes a chat as u:…|a:…| and texts without BOS where special tokens are not wanted."""

    chat_template = "given"

    def __call__(self, texts, add_special_tokens=True, **options):
        rows = super().__call__(texts)["input_ids"]
        return {"input_ids": rows if add_special_tokens else [row[1:] for row in rows]}

    def apply_chat_template(self, messages, tools=None, tokenize=True):
        assert not tokenize
        assert [set(message) for message in messages] == [{"role", "content"}] * len(messages)
        tools = "".join(tools or [])
        return tools + "".join(f"{message['role'][0]}{message['content']}" for message in messages)


OPENAI = [{"role": "user", "content": "xy", "name": None}, {"role": "assistant", "content": "z"}]
SHAREGPT = [{"from": "human", "value": "xy"}, {"from": "gpt", "value": "z"}]


def letters(text):
    return [ord(letter) - ord("a") + 10 for letter in text]


@pytest.mark.parametrize(
    "dataset",
    [
        [OPENAI] * 3,
        [SHAREGPT] * 3,
        [{"messages": OPENAI}] * 3,
        [{"conversations": SHAREGPT}] * 3,
        {"messages": [OPENAI] * 3},
        datasets.Dataset.from_list([{"messages": OPENAI, "id": 1}] * 3),
        datasets.Dataset.from_list([{"conversations": SHAREGPT}] * 3),
        datasets.Dataset.from_list([{"messages": OPENAI}] * 3).to_iterable_dataset(),
        (row for row in [OPENAI] * 3),
    ],
    ids=["lists", "ShareGPT", "dicts", "conversations", "mapping", "table", "ShareGPT table", "streamed", "generator"],
)
def test_chats_go_through_the_template(model, dataset):
    options = {"num_samples": 3, "sequence_length": 5}
    ids, _ = load_token_ids(config(dataset, **options), model, Chats())
    assert ids.tolist() == [letters("uxyaz")] * 3


def test_tools_go_to_the_template(model):
    rows = [{"messages": OPENAI, "tools": ["t"]}] * 3
    ids, _ = load_token_ids(config(rows, num_samples=3, sequence_length=6), model, Chats())
    assert ids.tolist() == [letters("tuxyaz")] * 3


def test_chats_without_a_template(model):
    with pytest.raises(ValueError, match=r"dataset\[.\]\['messages'\] is a chat, and the tokenizer has no chat template"):
        load([{"messages": OPENAI}], model)


def test_a_chat_that_the_template_refuses(model):
    class Refusing(Chats):
        def apply_chat_template(self, *args, **kwargs):
            raise RuntimeError("roles must alternate")

    with pytest.raises(ValueError, match=r"cannot write this chat \(RuntimeError: roles must alternate\)"):
        load_token_ids(config([OPENAI]), model, Refusing())


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ({"input_ids": PADDED, "attention_mask": MASK[:2]}, "has 12 values in 2 rows, but the input_ids have 18 in 3 rows"),
        ({"input_ids": ROWS, "attention_mask": MASK}, "has 18 values in 3 rows, but the input_ids have 12 in 3 rows"),
        ([{"input_ids": [5, 6], "attention_mask": [1, 2]}], r"dataset\[0\]\['attention_mask'\] holds 2; it must be 1"),
        ({"input_ids": PADDED, "attention_mask": torch.zeros(3, 6, dtype=torch.long)}, "dataset is empty"),
        ([{"story": "a"}], "has no column text_column='text', nor 'input_ids', 'messages', 'conversations', only 'story'"),
        (TABLE.remove_columns(["input_ids", "text"]), "only 'attention_mask', 'other'"),
        (datasets.DatasetDict(a=TABLE, b=TABLE), r"splits a, b: choose one, such as dataset\['a'\]"),
        (iter(()), "dataset is empty.*A generator can be read once only"),
    ],
)
def test_data_that_cannot_be_used(model, dataset, said):
    with pytest.raises(ValueError, match=said):
        load(dataset, model)
