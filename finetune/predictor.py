"""What a family's predictor is given and gives: a trained model, rows as features, the way back. Imports no torch."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.errors import UserError
from finetune.readers import Layout, Row

Arrays = tuple[npt.NDArray[np.float32], ...]
Feature = dict[str, list[int]]  # input_ids, and token_type_ids where the model has them


class Encoded(NamedTuple):
    """Some rows as features, of which a row has any number, and the way back."""

    features: Sequence[Feature]
    read: Callable[[int, Arrays], Any]  # of a feature's number and its outputs: what to keep of them until `answers`
    answers: Callable[
        [Sequence[Any]], Iterable[dict[str, Any]]
    ]  # of what was kept of each feature: new columns of each row
    cut: Sequence[int] = ()  # rows of which the model sees a part
    empty: Sequence[int] = ()  # rows with an empty text


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """How a family labels rows. `encode` raises `UserError`, with the row's place, for one that cannot be."""

    auto_class: str  # of transformers
    adds: Sequence[str]  # the columns that it gives, the answer first
    encode: Callable[[Sequence[Row]], Encoded]
    outputs: Sequence[str] = ("logits",)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model, from its directory."""

    folder: Path
    onnx: Path | None  # None: weights of PyTorch
    architectures: tuple[str, ...]  # of transformers; (): not told
    tokenizer: Any
    task: str | None  # None: an encoder without a task
    labels: tuple[str, ...]  # in the order of the logits
    layouts: tuple[Layout, ...]  # columns of texts, without labels, that rows may have
    max_len: int  # tokens
    stride: int  # tokens
    top_sentences: int
    has_no_answer: bool  # of questions: whether the model may say that there is none
    conll_columns: tuple[str, ...]  # the number of the words' column, and perhaps of the tags'; (): the first
    with_probabilities: bool


def chosen(layouts: Sequence[Layout], row: Row) -> Layout:
    """The first layout that the row has. Raises `UserError` with the columns that are there."""
    layout = next((names for names in layouts if {*names} <= row.columns.keys()), None)
    if layout is None:
        wanted = " or ".join(dict.fromkeys(", ".join(names) for names in layouts))
        there = ", ".join(filter(None, row.columns)) or "none"
        raise UserError(f"{row.place}: the columns {wanted} are needed, there are {there}; columns=[…] names others")
    return layout


def texts(rows: Sequence[Row], layout: Layout) -> list[tuple[str, ...]]:
    """The texts of these columns of each row. Raises `UserError` where there is none."""
    return [tuple(text_of(row, name) for name in layout) for row in rows]


def text_of(row: Row, name: str) -> str:
    """A missing value is an empty text, as in training. Halves of surrogate pairs, which JSON may hold, become "?"."""
    if name not in row.columns:
        raise UserError(f"{row.place}: has no {name}; there are {', '.join(filter(None, row.columns)) or 'none'}")
    value = row.columns[name]
    if isinstance(value, list | dict):
        raise UserError(f"{row.place}: {name} is {json.dumps(value)[:40]}; a text is needed there")
    return _whole("" if value is None else str(value))


def strings_of(row: Row, name: str) -> list[str]:
    """The list of texts in this column. Raises `UserError` where there is none."""
    value = row.columns.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{row.place}: {name} is {json.dumps(value)[:40]}; a list of texts is needed there")
    return [_whole(text) for text in value]


def _whole(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def encoded(found: Sequence[tuple[str, ...]], trained: Trained) -> tuple[list[Feature], list[int]]:
    """Features of texts or pairs, cut to `max_len` tokens, the longer text of a pair first; and which were cut."""
    features, encodings = pieces([one[0] if len(one) == 1 else one for one in found], trained)
    return features, [number for number, one in enumerate(encodings) if one.overflowing]


def pieces(found: Sequence[Any], trained: Trained, *, with_offsets: bool = False) -> tuple[list[Feature], list[Any]]:
    """Features of texts and pairs, and tokenizers' encodings, from which they are.

    By the tokenizer's backend: transformers' own call gives the same ids in twice the time.
    """
    tokenizer = trained.tokenizer
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(trained.max_len, direction=tokenizer.truncation_side)
    encodings = (backend.encode_batch if with_offsets else backend.encode_batch_fast)(found)
    if "token_type_ids" in tokenizer.model_input_names:
        features = [{"input_ids": one.ids, "token_type_ids": one.type_ids} for one in encodings]
    else:
        features = [{"input_ids": one.ids} for one in encodings]
    return features, encodings


def empty(found: Sequence[tuple[str, ...]]) -> list[int]:
    """The rows with an empty text."""
    return [number for number, one in enumerate(found) if not all(text.strip() for text in one)]
