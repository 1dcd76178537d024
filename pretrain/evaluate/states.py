"""The hidden states of a frozen encoder in Hugging Face's format, each text read once.

Texts of like length share a batch, so that next to nothing of it is padding, whatever the architecture. Knows no task.
Shapes: N texts, T tokens of the longest in a batch, W words, H width, L layers and the embeddings below them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from cloze.errors import UserError
from cloze.log import log
from pretrain.evaluate.frozen_config import Pooling
from pretrain.export.hugging_face import be_quiet, load_tokenizer, loading
from pretrain.export.positions import num_positions

Floats = npt.NDArray[np.float32]

_BATCH_TOKENS = 4096
_MUCH_UNKNOWN = 0.05  # share of [UNK] that is warned of


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model without a head, its tokenizer, and how long a text may be."""

    folder: Path
    model: Any
    tokenizer: Any
    max_len: int

    @property
    def num_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Texts as the encoder takes them: the tokenizer's columns, a list of N lists each."""

    columns: dict[str, list[list[int]]]
    words: list[list[int | None]] | None = None  # of texts given as words: the word of each token

    def __len__(self) -> int:
        return len(self.columns["input_ids"])


def load_encoder(folder: Path, max_len: int, key: str = "model") -> Encoder:
    """The encoder in `folder`, in evaluation mode, on a GPU if there is one.

    Raises `UserError` where there is none, or where weights are missing (but the pooler's, which nothing here reads).
    """
    be_quiet()
    tokenizer = load_tokenizer(folder, key)
    with loading(folder, key):
        model, told = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(name for name in told["missing_keys"] if not name.startswith("pooler.")):
        raise UserError(
            f"{key}={folder}: has no {missing[0]}, nor {len(missing) - 1} other weights; name another model"
        )
    return Encoder(
        folder=folder,
        model=model.eval().to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer=tokenizer,
        max_len=min(max_len, num_positions(folder) or max_len),
    )


def random_encoder(encoder: Encoder, seed: int) -> Encoder:
    """Fresh weights of the same architecture, with the same tokenizer: what pretraining is held against."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(AutoConfig.from_pretrained(encoder.folder)).eval()
    return replace(encoder, model=model.to(encoder.model.device))


def encode(encoder: Encoder, texts: Sequence[str] | Sequence[Sequence[str]], name: str) -> Encoded:
    """Tokens of texts, or of texts that are cut into words already. `name` is theirs, for warnings: of texts that are
    too long and are cut, of a tokenizer that knows little of them; empty: nobody is warned (again).
    """
    tokenizer, into_words = encoder.tokenizer, not isinstance(texts[0], str)
    if into_words and "ByteLevel" in repr(tokenizer.backend_tokenizer.pre_tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(encoder.folder, add_prefix_space=True)
    encoded = tokenizer(
        [list(text) if into_words else text for text in texts],
        is_split_into_words=into_words,
        truncation=True,
        max_length=encoder.max_len,
    )
    longest = sum(len(ids) == encoder.max_len for ids in encoded["input_ids"])
    if name and longest:
        log.warning(
            f"{name}: {longest} of {len(texts)} texts have {encoder.max_len} tokens or more; the rest is cut off"
        )
    ids = np.concatenate([np.asarray(row) for row in encoded["input_ids"]])
    unknown = float(np.mean(ids == tokenizer.unk_token_id)) if tokenizer.unk_token_id is not None else 0.0
    if name and unknown > _MUCH_UNKNOWN:
        log.warning(f"{name}: {unknown:.0%} of the tokens are unknown to the tokenizer of {encoder.folder}")
    words = [encoded.word_ids(i) for i in range(len(texts))] if into_words else None
    return Encoded(columns={key: encoded[key] for key in tokenizer.model_input_names}, words=words)


def text_states(encoder: Encoder, encoded: Encoded, pooling: Pooling) -> Floats:
    """The vector of each text at each layer, the embeddings' first: [L, N, H]."""
    found = np.empty((encoder.num_layers + 1, len(encoded), encoder.model.config.hidden_size), np.float32)
    for rows, states, mask_NT in _batches(encoder, encoded):
        for layer, states_NTH in enumerate(states):
            found[layer, rows] = pooled(states_NTH, mask_NT, pooling).cpu().numpy()
    return found


def text_vectors(encoder: Encoder, encoded: Encoded, pooling: Pooling) -> Floats:
    """The vector of each text at the last layer, scaled to length 1: [N, H]. One of length 0 stays as it is."""
    found = np.empty((len(encoded), encoder.model.config.hidden_size), np.float32)
    for rows, states, mask_NT in _batches(encoder, encoded, all_layers=False):
        found[rows] = torch.nn.functional.normalize(pooled(states[-1], mask_NT, pooling), dim=-1).cpu().numpy()
    return found


def pooled(states_NTH: Tensor, mask_NT: Tensor, pooling: Pooling) -> Tensor:
    """[N, H]. The mean is over tokens that are no padding."""
    if pooling is Pooling.cls:
        return states_NTH[:, 0]
    mask_NT1 = mask_NT[..., None].to(states_NTH.dtype)
    return (states_NTH * mask_NT1).sum(1) / mask_NT1.sum(1)


def word_states(encoder: Encoder, encoded: Encoded) -> tuple[Floats, list[list[int]]]:
    """The state of each word's first token at each layer, [L, W, H], and which words of each text have one."""
    assert encoded.words is not None
    firsts: list[list[int]] = []
    kept: list[list[int]] = []
    for words in encoded.words:
        places = [at for at, word in enumerate(words) if word is not None and (not at or words[at - 1] != word)]
        firsts.append(places)
        kept.append([word for at in places if (word := words[at]) is not None])
    ends = np.cumsum([len(places) for places in firsts])
    found = np.empty((encoder.num_layers + 1, int(ends[-1]), encoder.model.config.hidden_size), np.float32)
    for rows, states, _ in _batches(encoder, encoded):
        own = np.concatenate([np.arange(ends[row] - len(firsts[row]), ends[row]) for row in rows])
        at_N = np.repeat(np.arange(len(rows)), [len(firsts[row]) for row in rows])
        at_T = np.concatenate([np.asarray(firsts[row], np.int64) for row in rows])
        for layer, states_NTH in enumerate(states):
            found[layer, own] = states_NTH[at_N, at_T].cpu().numpy()
    return found, kept


def _batches(
    encoder: Encoder, encoded: Encoded, *, all_layers: bool = True
) -> Iterator[tuple[npt.NDArray[np.int64], Sequence[Tensor], Tensor]]:
    """(rows, the states of each layer or of the last alone [N, T, H], which tokens are no padding [N, T])."""
    lengths_N = np.asarray([len(ids) for ids in encoded.columns["input_ids"]])
    order_N = np.argsort(lengths_N, kind="stable")
    start = 0
    while start < len(order_N):
        stop = start + 1
        while stop < len(order_N) and lengths_N[order_N[stop]] * (stop + 1 - start) <= _BATCH_TOKENS:
            stop += 1
        rows = order_N[start:stop]
        columns = {name: [values[row] for row in rows] for name, values in encoded.columns.items()}
        inputs = encoder.tokenizer.pad(columns, return_tensors="pt").to(encoder.model.device)
        with torch.inference_mode():
            output = encoder.model(**inputs, output_hidden_states=all_layers)
        states = output.hidden_states if all_layers else (output.last_hidden_state,)
        yield rows, states, inputs["attention_mask"]
        start = stop
