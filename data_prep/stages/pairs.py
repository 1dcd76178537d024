"""Documents -> training samples: next sentence prediction, sentence order, or full sentences. Pure.

Works on places, not on tokens: a bucket's tokens lie in one flat array, sentences of a document side by side, so a
segment is a range of that array and a sample is two ranges. Nothing is copied until `assemble` writes the ids out.

Shapes: D documents, S sentences of them one after another, N samples, T tokens of those.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.corpus.ragged import Ints, offsets, ranges

SPECIALS_OF_ONE = 2  # [CLS] A [SEP]; of a pair, [CLS] A [SEP] B [SEP], as many more as stand between A and B

_PLACES = 4  # looked at for a random B
_SIZES = 64  # of A: bits of its length
_PATIENCE = 64  # chunks over which an excess of random ones is made up for


@dataclass(frozen=True)
class Bucket:
    """The documents that meet in one bucket."""

    sentences_D: Ints  # how many each document has, at least one
    lengths_S: Ints  # tokens of each sentence, at least one
    origins_D: npt.NDArray[np.uint64]  # equal for the parts of one long document: never random to each other


class SegmentPairs(NamedTuple):
    """SegmentPairs as ranges of the bucket's tokens; B is empty where there is no second segment."""

    a_Nx2: Ints  # first token, one past the last
    b_Nx2: Ints
    label_N: npt.NDArray[np.uint8]  # NSP: 1 = B is from another document. SOP: 1 = B came before A


def make_samples(
    objective: str, bucket: Bucket, max_len: int, short_seq_prob: float, key: tuple[int, ...], separators: int = 1
) -> SegmentPairs:
    """All samples of a bucket for one pass, in random order: a pure function of its arguments.

    `objective` is "nsp", "sop" or "none"; `separators` [SEP]s are to stand between A and B. `key` names the
    randomness (seed, pass, bucket). What cannot be paired makes no sample: under "sop" a document's lone last
    sentence, under "nsp" such a one where there is no other document.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    room = max_len - SPECIALS_OF_ONE - (separators if objective != "none" else 0)
    if objective == "none":
        rows = _full_sentences(bucket, room)
    elif objective == "sop":
        rows = _sentence_order(bucket, room, short_seq_prob, _uniforms(generator))
    else:
        rows = _next_sentence(bucket, room, short_seq_prob, _uniforms(generator))
    table_Nx5 = np.fromiter(chain.from_iterable(rows), np.int64).reshape(-1, 5)
    if objective == "nsp":
        _choose_places(table_Nx5, bucket, generator)
    table_Nx5 = table_Nx5[generator.permutation(len(table_Nx5))]
    a_Nx2, b_Nx2 = table_Nx5[:, 0:2], table_Nx5[:, 2:4]
    if objective != "none":
        _truncate(a_Nx2, b_Nx2, room, generator)
    return SegmentPairs(a_Nx2, b_Nx2, table_Nx5[:, 4].astype(np.uint8))


def assemble(
    samples: SegmentPairs, tokens_T: npt.NDArray[np.integer], cls_id: int, sep_id: int, separators: int = 1
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.uint16]]:
    """The samples' ids with specials, one after another in `tokens_T`'s dtype, and their lengths.

    Lengths are u16 [N, 2]: through the [SEP]s after A, and in all. An empty B adds nothing, not even its [SEP].
    """
    lengths_Nx2 = sample_lengths(samples, separators)
    first_N, total_N = lengths_Nx2.T
    edges_N = offsets(total_N)
    # The specials' neighbours in the text first, then the specials over them.
    begins_Nx2 = np.stack([samples.a_Nx2[:, 0] - 1, samples.b_Nx2[:, 0]], axis=1)
    runs_Nx2 = np.stack([first_N, total_N - first_N], axis=1)
    result_T = tokens_T.take(ranges(begins_Nx2.ravel(), runs_Nx2.ravel()), mode="clip")
    result_T[edges_N[:-1]] = cls_id
    result_T[edges_N[1:] - 1] = sep_id
    for n in range(separators):
        result_T[edges_N[:-1] + first_N - 1 - np.where(first_N < total_N, n, 0)] = sep_id
    return result_T, lengths_Nx2.astype(np.uint16)


def sample_lengths(samples: SegmentPairs, separators: int = 1) -> Ints:
    """Tokens through the [SEP]s after A, and in all, specials counted in: [N, 2]."""
    second_N = np.diff(samples.b_Nx2)[:, 0]
    is_pair_N = second_N > 0
    first_N = np.diff(samples.a_Nx2)[:, 0] + SPECIALS_OF_ONE + is_pair_N * (separators - 1)
    return np.stack([first_N, first_N + second_N + is_pair_N], axis=1)


Row = tuple[int, int, int, int, int]  # a begin, a end, b begin, b end, label; a random B: see `_choose_places`


def _next_sentence(bucket: Bucket, room: int, short_seq_prob: float, uniform: Iterator[float]) -> Iterator[Row]:
    """BERT's sentence pairs (Devlin et al. 2019, appendix A.2), before truncation, made so that lengths tell nothing.

    Gather sentences up to a target length; split them at random; half the time, and always for a lone sentence, B
    starts at a random sentence of another document, and what it displaced is gathered again. BERT's coin is fair and
    the lone sentences come on top; `_Coin` makes up for them. BERT fills B up to the target; here it is to be as long
    as a true one would be, and of a few random places the one that comes nearest is taken: else a short B, or a short
    A, gives the answer away.
    """
    ends = np.cumsum(bucket.lengths_S).tolist()  # token where each sentence ends; it starts where the last one ended
    starts = [0, *ends]
    documents = offsets(bucket.sentences_D).tolist()
    has_others_D = _Others(bucket.origins_D).exist_D.tolist()
    coin = _Coin()
    true_lengths = [room // 2] * _SIZES  # of the last true B beside an A of each size
    for d, (first, last) in enumerate(pairwise(documents)):
        target = _target(room, short_seq_prob, uniform)
        fewest = 1 if has_others_D[d] else 2  # without another document, B can only be what follows A
        begin = first
        while last - begin >= fewest:
            end = _gathered(starts, ends, begin, last, target, 2)  # a short target must not make lone sentences
            lone = end - begin == 1
            split = begin + 1 if lone else begin + 1 + int(next(uniform) * (end - begin - 1))
            a_begin, a_end = starts[begin], starts[split]
            size = (a_end - a_begin).bit_length()
            if fewest == 2 or not coin.says_random(size, lone, uniform):
                true_lengths[size] = ends[end - 1] - a_end
                yield a_begin, a_end, a_end, ends[end - 1], 0
                begin = end
                continue
            length = true_lengths[size] if lone else ends[end - 1] - a_end
            yield a_begin, a_end, d, length, 1  # where B lies is chosen later, for all of them at once
            begin = split


def _choose_places(table_Nx5: Ints, bucket: Bucket, generator: np.random.Generator) -> None:
    """Put a random B, in place, where a row with label 1 holds A's document and the length that B is to have.

    Of `_PLACES` random sentences of other documents that one where B, up to the end of a sentence, comes nearest to it.
    """
    rows = np.flatnonzero(table_Nx5[:, 4])
    document_R, length_R = table_Nx5[rows, 2], table_Nx5[rows, 3]
    edges_S, edges_D = offsets(bucket.lengths_S), offsets(bucket.sentences_D)  # token, sentence where each begins
    uniform_Px2xR = generator.random((_PLACES, 2, len(rows)))
    others = _Others(bucket.origins_D)
    nearest_R = np.full(len(rows), np.iinfo(np.int64).max)
    for which_R, place_R in uniform_Px2xR:
        other_R = others.pick(document_R, which_R)
        first_R = edges_D[other_R] + (place_R * bucket.sentences_D[other_R]).astype(np.int64)
        begin_R, last_R = edges_S[first_R], edges_S[edges_D[other_R + 1]]
        end_R = np.minimum(edges_S[np.searchsorted(edges_S[1:-1], begin_R + length_R) + 1], last_R)
        distance_R = np.abs(end_R - begin_R - length_R)
        better = distance_R < nearest_R
        nearest_R[better] = distance_R[better]
        table_Nx5[rows[better], 2:4] = np.stack([begin_R, end_R], axis=1)[better]


class _Coin:
    """Says which chunks get a random next, so that labels are half and half, over all and beside an A of any size.

    Where a share s of the chunks so far was lone sentences, which have no choice, the others are random with (0.5 - s)
    / (1 - s): counted apart for each size of A (powers of two), since lone sentences are short. Sizes for which that is
    below 0 leave an excess, which the others make up for. Documents come in the order of their hashes, so that any
    beginning is a fair sample; what a random next displaces, which makes lone sentences, is counted as it happens.
    """

    def __init__(self) -> None:
        self._chunks, self._lone = [0] * _SIZES, [0] * _SIZES
        self._excess = 0.0  # random ones to be expected so far, above half of the chunks

    def says_random(self, size: int, lone: bool, uniform: Iterator[float]) -> bool:
        self._chunks[size] += 1
        if lone:
            self._lone[size] += 1
            self._excess += 0.5
            return True
        share = self._lone[size] / self._chunks[size]
        chance = (0.5 - share) / (1 - share) - self._excess / _PATIENCE
        chance = 0.0 if chance < 0 else 1.0 if chance > 1 else chance  # this comes once a chunk: calls would tell
        self._excess += chance - 0.5
        return next(uniform) < chance


def unpaired(objective: str, bucket: Bucket) -> npt.NDArray[np.bool_]:
    """Which documents make no sample, bool [D]: those of one sentence, where a pair needs two."""
    if objective == "none":
        return np.zeros(len(bucket.sentences_D), bool)
    alone = objective == "sop" or bool((bucket.origins_D == bucket.origins_D[:1]).all())
    return np.asarray((bucket.sentences_D == 1) & alone, bool)


def _sentence_order(bucket: Bucket, room: int, short_seq_prob: float, uniform: Iterator[float]) -> Iterator[Row]:
    """Two consecutive segments, half the time swapped (ALBERT, Lan et al. 2020, section 3.1), before truncation."""
    ends = np.cumsum(bucket.lengths_S).tolist()
    starts = [0, *ends]
    documents = offsets(bucket.sentences_D).tolist()
    for begin, last in pairwise(documents):
        target = _target(room, short_seq_prob, uniform)
        while last - begin >= 2:
            end = _gathered(starts, ends, begin, last, target, 2)
            split = begin + 1 + int(next(uniform) * (end - begin - 1))
            front, back = (starts[begin], starts[split]), (starts[split], ends[end - 1])
            yield (*back, *front, 1) if next(uniform) < 0.5 else (*front, *back, 0)
            begin = end


def _full_sentences(bucket: Bucket, room: int) -> Iterator[Row]:
    """As many whole sentences as fit, never across documents (RoBERTa, Liu et al. 2019, "DOC-SENTENCES").

    A sentence longer than `room` is cut into pieces of `room` tokens.
    """
    ends = np.cumsum(bucket.lengths_S).tolist()
    starts = [0, *ends]
    documents = offsets(bucket.sentences_D).tolist()
    for first, last in pairwise(documents):
        begin = starts[first]
        for sentence in range(first, last):
            if ends[sentence] - begin > room and starts[sentence] > begin:
                yield begin, starts[sentence], 0, 0, 0
                begin = starts[sentence]
            while ends[sentence] - begin > room:
                yield begin, begin + room, 0, 0, 0
                begin += room
        if ends[last - 1] > begin:
            yield begin, ends[last - 1], 0, 0, 0


def _gathered(starts: list[int], ends: list[int], begin: int, last: int, target: int, at_least: int) -> int:
    """One past the last sentence, gathering from `begin` until `target` tokens and `at_least` sentences, or `last`."""
    reached = bisect_left(ends, starts[begin] + target, begin, last) + 1
    if reached < begin + at_least:
        reached = begin + at_least
    return reached if reached < last else last


def _target(room: int, short_seq_prob: float, uniform: Iterator[float]) -> int:
    return 2 + int(next(uniform) * (room - 1)) if next(uniform) < short_seq_prob else room


class _Others:
    """Picks documents of another origin, uniformly and without trying twice."""

    def __init__(self, origins_D: npt.NDArray[np.uint64]) -> None:
        _, first, group_D = np.unique(origins_D, return_index=True, return_inverse=True)
        group_D = first[group_D]  # named by its first document: what the origins are called must not show
        sorted_D = np.sort(group_D)
        self._by_group: Ints = np.argsort(group_D, kind="stable")
        self._first: Ints = np.searchsorted(sorted_D, group_D, side="left")
        self._last: Ints = np.searchsorted(sorted_D, group_D, side="right")

    @property
    def exist_D(self) -> npt.NDArray[np.bool_]:
        """Whether there is a document of another origin."""
        return self._last - self._first < len(self._by_group)

    def pick(self, document_R: Ints, uniform_R: npt.NDArray[np.float64]) -> Ints:
        first_R, last_R = self._first[document_R], self._last[document_R]
        index_R = (uniform_R * (len(self._by_group) - (last_R - first_R))).astype(np.int64)
        picked: Ints = self._by_group[np.where(index_R < first_R, index_R, index_R + (last_R - first_R))]
        return picked


def _truncate(a_Nx2: Ints, b_Nx2: Ints, room: int, generator: np.random.Generator) -> None:
    """Shorten, in place, pairs of more than `room` tokens: one token at a time off the longer (B if equal), from its
    front or its back with equal chance. The order of those choices does not show, so counts are drawn instead.
    """
    long_A, long_B = np.diff(a_Nx2)[:, 0], np.diff(b_Nx2)[:, 0]
    excess = np.maximum(long_A + long_B - room, 0)
    # Off the longer until both are equal, then in turns, B first.
    level = np.minimum(np.abs(long_A - long_B), excess)
    rest = excess - level
    off_a = np.where(long_A > long_B, level, 0) + rest // 2
    off_b = excess - off_a
    for segment_Nx2, off in ((a_Nx2, off_a), (b_Nx2, off_b)):
        front = generator.binomial(off, 0.5)
        segment_Nx2[:, 0] += front
        segment_Nx2[:, 1] -= off - front


def _uniforms(generator: np.random.Generator) -> Iterator[float]:
    """Floats in [0, 1), drawn many at a time: one call per number would cost more than the pairing."""
    while True:
        yield from generator.random(4096).tolist()
