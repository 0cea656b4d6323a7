"""The forms that calibration data come in: texts, chats and token ids, in lists, tables, tensors and streams."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

ALLOWED = (
    "'self' (text the model writes itself), 'self:NAME' (text that another model writes), the name of a data set that "
    "Optimum knows (wikitext2, c4, c4-new), a list of strings, of chats, of token id sequences or of dictionaries, a "
    "tensor [samples, tokens] of token ids, a tokenizer's output, a datasets.Dataset, or an iterable of such rows"
)
CHATS = ("messages", "conversations")
_DEFAULT_TEXT_COLUMN = "text"
_ROWS_AT_ONCE = 64


class Row(NamedTuple):
    """One text, one chat, or one sequence of token ids.

    Attributes:
        where: its place in the data, for error messages.
        text: the text, or None.
        chat: the messages of a chat, or None; tools: the functions that the model may call in it.
        ids: int64 [tokens], or None; mask: bool [tokens], False for padding, or None.
    """

    where: str
    text: str | None = None
    chat: Sequence[Mapping[str, Any]] | None = None
    tools: Any = None
    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        return "texts" if self.text is not None else "chats" if self.chat is not None else "token ids"


class Rows(NamedTuple):
    """Calibration data as rows, in batches.

    Attributes:
        kind: of the data, for messages.
        in_memory: whether all rows are token ids in memory, in the caller's order.
        batches: lists of rows, read on demand.
    """

    kind: str
    in_memory: bool
    batches: Iterator[list[Row]]


def read_rows(dataset: Any, text_column: str, seed: int) -> Rows:
    """The rows of everything that `dataset` may be, except for names.

    Token ids in memory keep their order. Rows of tables and lists of texts, chats and dictionaries come in an order that
    is drawn with the seed; a stream keeps its own order. Both are read only as far as the caller asks.

    Args:
        dataset: see `ALLOWED`.
        text_column: the column to read where rows are dictionaries; for "text", the default, a column "input_ids"
            (with "attention_mask") goes before it, and "messages" or "conversations" are used if "text" is missing.
        seed: of the order.

    Raises:
        ValueError: a missing column, several splits, a mask that does not fit its token ids.
        TypeError: `dataset` is, or a row is, something else; rows of several kinds.
    """
    if isinstance(getattr(dataset, "column_names", None), dict):
        splits = dataset.column_names
        raise ValueError(
            f"dataset is a {type(dataset).__name__} with the splits {', '.join(splits)}: choose one, such as "
            f"dataset[{next(iter(splits), 'train')!r}]."
        )
    if isinstance(dataset, (torch.Tensor, np.ndarray)):
        return Rows("token ids given by the caller", True, iter([_id_rows(dataset, "dataset")]))
    if hasattr(dataset, "iterrows") and hasattr(dataset, "columns"):  # pandas
        dataset = {name: dataset[name].tolist() for name in dataset.columns}
    if isinstance(dataset, Mapping):
        column = find_column(dataset, text_column, "dataset")
        if column == "input_ids":
            rows = _masked_rows(dataset, "dataset")
            return Rows("token ids given by the caller", True, iter([rows]))
        dataset = [{column: value} for value in dataset[column]]
    if _is_table(dataset):
        return _consistent("a datasets.Dataset given by the caller", _table_batches(dataset, text_column, seed))
    if isinstance(dataset, Sequence) and not isinstance(dataset, (str, bytes)):
        return _of_sequence(dataset, text_column, seed)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not hasattr(dataset, "__iter__"):
        return _of_sequence(dataset, text_column, seed)  # a torch.utils.data.Dataset
    if hasattr(dataset, "__iter__") and not isinstance(dataset, (str, bytes)):
        numbered = ((f"row {number} of dataset", row) for number, row in enumerate(dataset))
        return _consistent("a stream given by the caller", _batches(numbered, text_column))
    raise TypeError(f"dataset is a {type(dataset).__name__}, but must be {ALLOWED}.")


def find_column(columns: Iterable[str], text_column: str, where: str) -> str:
    """The column of a table, or the key of a row, that holds the data. Raises `ValueError` if it is missing."""
    columns = list(columns)
    wanted = [text_column]
    if text_column == _DEFAULT_TEXT_COLUMN:
        wanted = ["input_ids", text_column, *CHATS]
    found = next((name for name in wanted if name in columns), None)
    if found is None:
        others = f", nor {', '.join(map(repr, (n for n in wanted if n != text_column)))}" if len(wanted) > 1 else ""
        raise ValueError(
            f"{where} has no column text_column={text_column!r}{others}, only {', '.join(map(repr, columns)) or 'none'}."
        )
    return found


def _of_sequence(dataset: Any, text_column: str, seed: int) -> Rows:
    count = len(dataset)
    if count and all(_is_id(item) for item in itertools.islice(dataset, 2)):  # one sequence
        return Rows("token ids given by the caller", True, iter([_id_rows(dataset, "dataset")]))
    rows = _rows(dataset[0], text_column, "dataset[0]") if count else []
    if count and not isinstance(dataset[0], Mapping) and rows[0].ids is not None:
        numbered = ((f"dataset[{index}]", dataset[index]) for index in range(count))
        everything = _consistent("", _batches(numbered, text_column)).batches
        return Rows("token ids given by the caller", True, everything)
    numbered = ((f"dataset[{index}]", dataset[index]) for index in _order(count, seed))
    kind = f"{rows[0].kind if rows else 'rows'} given by the caller"
    return _consistent(kind, _batches(numbered, text_column), rows[0] if rows else None)


def _is_table(dataset: Any) -> bool:
    return hasattr(dataset, "column_names") and hasattr(dataset, "__iter__")


def _table_batches(table: Any, text_column: str, seed: int) -> Iterator[list[Row]]:
    """The rows of a `datasets.Dataset` or an `IterableDataset`; only the columns that are needed are read."""
    if hasattr(table, "with_format"):
        table = table.with_format(None)
    columns = table.column_names
    if columns is not None:
        column = find_column(columns, text_column, "dataset")
        extra = "attention_mask" if column == "input_ids" else "tools" if column in CHATS else None
        if hasattr(table, "select_columns"):
            table = table.select_columns([column] + [name for name in columns if name == extra])
    if not hasattr(table, "__len__"):
        return _batches(((f"row {number} of dataset", row) for number, row in enumerate(table)), text_column)
    order = _order(len(table), seed)
    chunks = (order[start : start + _ROWS_AT_ONCE] for start in range(0, len(order), _ROWS_AT_ONCE))

    def fetch() -> Iterator[tuple[str, Any]]:
        for chunk in chunks:
            values = table[chunk]
            for position, index in enumerate(chunk):
                yield f"dataset[{index}]", {name: values[name][position] for name in values}

    return _batches(fetch(), text_column)


def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _batches(numbered: Iterator[tuple[str, Any]], text_column: str) -> Iterator[list[Row]]:
    while chunk := list(itertools.islice(numbered, _ROWS_AT_ONCE)):
        yield [row for where, item in chunk for row in _rows(item, text_column, where)]


def _consistent(kind: str, batches: Iterator[list[Row]], first: Row | None = None) -> Rows:
    """Rows that are checked, while they are read, to be of one kind."""

    def checked() -> Iterator[list[Row]]:
        known = first
        for batch in batches:
            for row in batch:
                known = known or row
                if row.kind != known.kind:
                    raise TypeError(
                        f"{row.where} holds {row.kind}, but {known.where} holds {known.kind}: all rows of dataset must be "
                        "of one kind."
                    )
            yield batch

    return Rows(kind, False, checked())


def _rows(item: Any, text_column: str, where: str) -> list[Row]:
    """The rows in one item of the data: several if it is a batch of token ids."""
    if isinstance(item, Mapping):
        column = find_column(item, text_column, where)
        if column == "input_ids":
            return _masked_rows(item, where)
        value, where = item[column], f"{where}[{column!r}]"
        if column in CHATS and isinstance(value, (list, tuple)) and not value:
            return []
        return [row._replace(tools=item.get("tools")) for row in _rows_of_value(value, where)]
    return _rows_of_value(item, where)


def _rows_of_value(value: Any, where: str) -> list[Row]:
    if isinstance(value, str):
        return [Row(where, text=value)]
    if isinstance(value, (list, tuple)) and value and all(_is_message(message) for message in value):
        return [Row(where, chat=value)]
    return _id_rows(value, where)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _id_rows(value: Any, where: str) -> list[Row]:
    return [Row(where, ids=ids) for ids in _sequences(value, where)]


def _masked_rows(item: Mapping[str, Any], where: str) -> list[Row]:
    """The rows of a dictionary with "input_ids" and, optionally, "attention_mask"."""
    rows = _id_rows(item["input_ids"], f"{where}['input_ids']")
    mask = item.get("attention_mask")
    if mask is None:
        return rows
    name = f"{where}['attention_mask']"
    masks = _sequences(mask, name, is_mask=True)
    lengths, others = [len(row.ids) for row in rows if row.ids is not None], [len(one) for one in masks]
    if lengths != others:
        raise ValueError(
            f"{name} has {sum(others)} values in {len(others)} rows, but the input_ids have {sum(lengths)} in "
            f"{len(lengths)} rows; both must have one shape."
        )
    for one in masks:
        other = one[(one != 0) & (one != 1)]
        if len(other):
            raise ValueError(f"{name} holds {int(other[0])}; it must be 1 for tokens and 0 for padding.")
    return [row._replace(mask=one.bool()) for row, one in zip(rows, masks, strict=True)]


def _sequences(value: Any, where: str, is_mask: bool = False, depth: int = 2) -> list[torch.Tensor]:
    """Sequences of integers, int64 [tokens] each, from a tensor of one or two axes, from lists, or from lists of these."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and not (isinstance(value, np.ndarray) and value.dtype == object):
        array = torch.as_tensor(value)
        number = is_mask or array.dtype != torch.bool
        if array.is_floating_point() or array.is_complex() or not number or not 1 <= array.ndim <= depth:
            raise TypeError(
                f"{where} is a tensor of shape {list(array.shape)} and dtype {array.dtype}; it must be integers of shape "
                "[tokens] or [samples, tokens]."
            )
        return list(array.reshape(-1, array.shape[-1]).long().cpu()) if array.numel() else []
    if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes)):
        members = list(value)
        if all(_is_id(member) or (is_mask and isinstance(member, (bool, np.bool_))) for member in members):
            return [torch.tensor(members, dtype=torch.long)]
        if depth > 1 and not any(_is_id(member) for member in members):
            return [ids for i, one in enumerate(members) for ids in _sequences(one, f"{where}[{i}]", is_mask, depth - 1)]
    raise TypeError(
        f"{where} is a {type(value).__name__} that is not a {'mask' if is_mask else 'sequence of token ids'}; all rows "
        f"must be texts, or all of them chats, or all of them sequences of integers. dataset must be {ALLOWED}."
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
