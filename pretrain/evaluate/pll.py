"""Pseudo-log-likelihoods: what a masked-LM gives each token of a text whose other tokens it sees, added up.

Each masked position is a row of its own, rows are packed by a budget of tokens as training's samples are, and the head
sees the masked positions only. Rows that two texts of a unit or two metrics share are run once. Which rows are run
together does not depend on the number of ranks, and log-probabilities are added as integers, so the sums are the same
to the bit on any number of ranks.

Shapes: T tokens of a text, R its scored tokens (rows), M rows run together, K values they give, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cloze.corpus.masking import Masks
from cloze.corpus.shards import Samples
from pretrain.data.loader import MicroBatch, bounded, pack
from pretrain.dist import Process
from pretrain.evaluate.results import WITHIN_WORD
from pretrain.model.loss import CHUNK_ELEMENTS

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

UNIT = 2.0**-32  # of a log-probability, nats: sums of so many integers are exact in fp64


class Metric(Enum):
    """What is hidden beside the token that is scored."""

    within_word_l2r = WITHIN_WORD  # the later pieces of its word (Kauf and Ivanova 2023)
    original = "original"  # nothing (Salazar et al. 2020, section 2)


class Encoded(NamedTuple):
    """A text as the model takes it."""

    ids_T: I64  # with [CLS] and [SEP]
    words_T: I64  # the number of each token's word; -1: not scored
    first: int  # tokens of the first segment, its [SEP] counted in

    @property
    def num_scored(self) -> int:
        return int((self.words_T >= 0).sum())


def encode(backend: Any, texts: Sequence[str]) -> list[Encoded]:
    """Texts by a `tokenizers.Tokenizer`, uncut; words are those of its pre-tokenizer."""
    backend.no_truncation()
    backend.no_padding()
    found = []
    for one in backend.encode_batch(list(texts)):
        words = [-1 if word is None else word for word in one.word_ids]
        found.append(Encoded(np.asarray(one.ids, np.int64), np.asarray(words, np.int64), len(words)))
    return found


def masked_rows(text: Encoded, metric: Metric, mask_id: int) -> tuple[I64, I64]:
    """(rows [R, T], the position that each is to predict [R])."""
    positions_R = np.flatnonzero(text.words_T >= 0)
    columns_T = np.arange(len(text.ids_T))
    hidden_RxT = columns_T == positions_R[:, None]
    if metric is Metric.within_word_l2r:
        same_word_RxT = text.words_T == text.words_T[positions_R, None]
        hidden_RxT |= same_word_RxT & (columns_T > positions_R[:, None])
    return np.where(hidden_RxT, mask_id, text.ids_T), positions_R


class Rows(NamedTuple):
    """Rows to run together, and which values are wanted of them."""

    rows: list[tuple[I64, int, int]]  # (masked ids, the position to predict, tokens of the first segment)
    index_K: list[int]  # row
    targets_K: list[int]  # token
    sums_K: list[int]  # number of the sum that the log-probability goes into

    def batch(self, mask_id: int) -> MicroBatch:
        lengths = [(first, len(ids)) for ids, _, first in self.rows]
        count = len(self.rows)
        samples = Samples(
            np.concatenate([ids for ids, _, _ in self.rows]),
            np.asarray(lengths, np.uint16),
            np.zeros(count, np.uint8),
            np.arange(count, dtype=np.uint64),
            None,
        )
        positions_M = np.asarray([position for _, position, _ in self.rows], np.uint16)
        return bounded(pack([(samples, Masks(np.ones(count, np.uint16), positions_M, np.full(count, mask_id)))]))


def packed_rows(
    units: Iterable[Sequence[Encoded]], metrics: Sequence[Metric], mask_id: int, row_tokens: int
) -> Iterator[Rows]:
    """The rows of all texts, in order, cut where `row_tokens` tokens are reached.

    Sum `i * len(metrics) + j` is that of text i (counted over all units) by metric j.
    """
    group, tokens, number = Rows([], [], [], []), 0, 0
    for unit in units:
        seen: dict[tuple[bytes, int], int] = {}  # rows of this unit in this group
        for text in unit:
            for metric in metrics:
                for ids_T, position in zip(*masked_rows(text, metric, mask_id), strict=True):
                    known = (ids_T.tobytes(), int(position))
                    if known not in seen:
                        if group.rows and tokens + len(ids_T) > row_tokens:
                            yield group
                            group, tokens, seen = Rows([], [], [], []), 0, {}
                        seen[known] = len(group.rows)
                        group.rows.append((ids_T, int(position), text.first))
                        tokens += len(ids_T)
                    group.index_K.append(seen[known])
                    group.targets_K.append(int(text.ids_T[position]))
                    group.sums_K.append(number)
                number += 1
    if group.rows:
        yield group


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model, and how it is run."""

    logits_of: Callable[[MicroBatch], Tensor]  # [at least M, V], of a batch on `device`
    mask_id: int
    max_positions: int  # tokens of the longest text
    row_tokens: int  # at most, run together; one row at least
    device: torch.device
    process: Process | None = None  # deals rows to ranks: then `score` is collective
    tick: Callable[[], None] = lambda: None  # called after each run

    def score(self, units: Sequence[Sequence[Encoded]], metrics: Sequence[Metric]) -> F64:
        """Pseudo-log-likelihoods in multiples of `UNIT` nats, [texts of all units, metrics]; NaN where the model's are.

        Every rank runs equally often, as ZeRO 3 demands: one without rows left runs others again, uncounted.
        """
        sums = np.zeros(sum(map(len, units)) * len(metrics))
        rank, world_size = (self.process.rank, self.process.world_size) if self.process else (0, 1)
        groups = packed_rows(units, metrics, self.mask_id, self.row_tokens)
        while round_ := list(islice(groups, world_size)):
            group = round_[min(rank, len(round_) - 1)]
            values_K = self._log_probabilities(group)
            if rank < len(round_):
                np.add.at(sums, group.sums_K, np.round(values_K / UNIT))
            self.tick()
        added = self.process.add(sums.tolist()) if self.process else sums
        return np.asarray(added).reshape(-1, len(metrics))

    @torch.no_grad()
    def _log_probabilities(self, group: Rows) -> F64:
        logits_MxV = self.logits_of(group.batch(self.mask_id).to(self.device))[: len(group.rows)].float()
        index_K = torch.tensor(group.index_K, device=self.device)
        targets_K = torch.tensor(group.targets_K, device=self.device)
        rows = max(1, CHUNK_ELEMENTS[self.device.type] // logits_MxV.shape[1])  # in the cache, pass after pass
        norms_M = torch.cat([part.logsumexp(-1) for part in torch.split(logits_MxV, rows)])
        values_K = logits_MxV[index_K, targets_K] - norms_M[index_K]
        found: F64 = values_K.double().cpu().numpy()
        return found
