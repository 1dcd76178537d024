"""The mask function: which tokens BERT must guess, as a pure function of (seed, draw, sample id, length, words).

There is no random state: every decision is a counter-based hash (the splitmix64 finalizer, Steele, Lea and Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) of the sample's key and the token's position. So a draw
baked into a shard and the same draw made live in a training process are bit-identical, whatever the batch around it.

Shapes: N samples, T tokens of all samples one after another, W words of those, M masked positions of all samples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.integer]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NEVER = np.uint64(0xFFFFFFFFFFFFFFFF)
_SPAN = np.uint64(0xD1B54A32D192ED03)  # tells the hash of a span's length from that of its place

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the tokens to predict: shown as [MASK], as a random token; the rest as it is
STRATEGIES = ("token", "whole_word", "span")
MAX_SPAN_WORDS = 10
_SPAN_STOP = 0.2  # after each word of a span it ends with this probability (Joshi et al. 2020, section 3.1)


def _span_thresholds() -> U64:
    """Entry i: 32-bit hashes from here on make a span of more than i + 1 words, geometric and cut off at the most."""
    shares = _SPAN_STOP * (1 - _SPAN_STOP) ** np.arange(MAX_SPAN_WORDS)
    thresholds: U64 = np.rint(np.cumsum(shares)[:-1] / shares.sum() * 2**32).astype(np.uint64)
    return thresholds


_SPAN_THRESHOLDS = _span_thresholds()


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How to mask (Devlin et al. 2019, section 3.1): recorded in the manifest, obeyed by every later draw."""

    strategy: str  # one of STRATEGIES
    probability: float  # share of a sample's tokens to predict, specials counted in
    max_predictions: int  # at most so many per sample
    seed: int


@dataclass(frozen=True)
class MaskVocabulary:
    """What masking must know of the tokenizer."""

    mask_id: int
    vocab_size: int  # rows that hold real tokens: padded rows are never drawn
    special_ids: tuple[int, ...]  # never drawn as a random replacement
    separators: int = 1  # [SEP]s between two segments


class Masks(NamedTuple):
    """One draw over N samples."""

    counts_N: U16  # masked positions of each sample
    positions_M: U16  # position inside its sample, ascending within the sample
    tokens_M: U32  # the id shown to the model there


class MaskRates(NamedTuple):
    """Of each of N samples, f64, where they are not those of the corpus."""

    probability_N: npt.NDArray[np.float64]  # share of a sample's tokens to predict
    mask_share_N: npt.NDArray[np.float64]  # of those: shown as [MASK]
    random_share_N: npt.NDArray[np.float64]  # of those: shown as a random token


def num_predictions(
    lengths_N: Ints, masking: Masking, probability_N: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.int64]:
    """k = min(max_predictions, max(1, round(p * n))) per sample, n counting specials, as BERT does."""
    probability = masking.probability if probability_N is None else probability_N
    wanted = np.rint(lengths_N.astype(np.float64) * probability).astype(np.int64)
    return np.minimum(masking.max_predictions, np.maximum(1, wanted))


class Unmasked(NamedTuple):
    """N samples as a shard holds them, T tokens one after another."""

    tokens_T: Ints
    lengths_Nx2: Ints  # (length through the [SEP]s after the first segment, total length)
    ids_N: U64
    word_starts_T: npt.NDArray[np.bool_] | None = None  # where masking goes by words


def draw_masks(
    samples: Unmasked, draw: int, masking: Masking, vocabulary: MaskVocabulary, rates: MaskRates | None = None
) -> Masks:
    """Mask N samples for the `draw`-th time.

    "token" chooses exactly k positions of each sample (those with the k smallest hashes; never [CLS] or a [SEP]);
    "whole_word" and "span" choose whole words, at most k tokens, and need the samples' `word_starts_T`. A chosen token
    is shown as [MASK] with probability 0.8, as a random non-special token with 0.1, unchanged with 0.1. `rates` takes
    the place of these and of `masking.probability`; of equal ones come equal masks.
    """
    tokens_T, lengths_Nx2, sample_ids_N, word_starts_T = samples
    first_N = lengths_Nx2[:, 0].astype(np.int64)
    total_N = lengths_Nx2[:, 1].astype(np.int64)
    if len(total_N) == 0:
        return Masks(np.zeros(0, np.uint16), np.zeros(0, np.uint16), np.zeros(0, np.uint32))
    keys_N = sample_keys(masking.seed, draw, sample_ids_N)
    specials_NxC = _special_positions(first_N, total_N, vocabulary.separators)
    candidates_N = total_N - np.where(first_N == total_N, 2, 2 + vocabulary.separators)
    wanted_N = num_predictions(total_N, masking, rates.probability_N if rates else None)
    limits_N = np.minimum(wanted_N, candidates_N)
    if masking.strategy == "token":
        counts_N, positions_M = _choose_tokens(keys_N, total_N, limits_N, specials_NxC)
    else:
        assert word_starts_T is not None, f"masking {masking.strategy} needs to know where words start"
        longest = MAX_SPAN_WORDS if masking.strategy == "span" else 1
        layout = _Layout(first_N, total_N, specials_NxC, word_starts_T)
        counts_N, positions_M = _choose_words(keys_N, layout, limits_N, longest)
    sample_M = np.repeat(np.arange(len(total_N)), counts_N)
    starts_N = np.cumsum(total_N) - total_N
    originals_M = tokens_T[starts_N[sample_M] + positions_M].astype(np.uint32)
    fate_M = mix64(mix64(keys_N[sample_M] ^ _GOLDEN) + positions_M.astype(np.uint64) * _GOLDEN)
    ends = np.array([MASK_SHARE, MASK_SHARE + RANDOM_SHARE])
    if rates:
        ends = np.stack([rates.mask_share_N, rates.mask_share_N + rates.random_share_N])[:, sample_M]
    bounds = np.rint(ends * 2**32).astype(np.uint64)
    return Masks(counts_N.astype(np.uint16), positions_M, _shown(originals_M, fate_M, vocabulary, bounds))


class _Layout(NamedTuple):
    """Where what lies in each sample."""

    first_N: Ints  # length through the [SEP]s after the first segment
    total_N: Ints
    specials_NxC: Ints
    word_starts_T: npt.NDArray[np.bool_]


def _special_positions(first_N: Ints, total_N: Ints, separators: int) -> Ints:
    """Positions of [CLS] and of each [SEP], some of them twice."""
    columns = [np.zeros_like(total_N), total_N - 1, first_N - 1]
    if separators == 2:
        columns.append(np.where(first_N < total_N, first_N - 2, first_N - 1))
    return np.stack(columns, axis=1)


def _choose_tokens(keys_N: U64, total_N: Ints, counts_N: Ints, specials_NxC: Ints) -> tuple[Ints, U16]:
    """Of each sample the positions with the smallest hashes, exactly as many as `counts_N` says."""
    width = int(total_N.max())
    counters_L = np.arange(1, width + 1, dtype=np.uint64) * _GOLDEN
    ranked_NxL = mix64(keys_N[:, None] + counters_L[None, :])
    # The position rides in the low bits: one sort gives the order of the hashes and where they were.
    ranked_NxL &= ~np.uint64(0xFFFF)
    ranked_NxL |= np.arange(width, dtype=np.uint64)[None, :]
    ranked_NxL[np.arange(width)[None, :] >= total_N[:, None]] = _NEVER  # padding
    ranked_NxL[np.arange(len(total_N))[:, None], specials_NxC] = _NEVER

    most = int(counts_N.max())
    if most < width:
        ranked_NxL.partition(most - 1 if most else 0, axis=1)
    smallest_NxK = np.sort(ranked_NxL[:, :most], axis=1)
    chosen_NxK = np.arange(most)[None, :] < counts_N[:, None]
    positions_NxK = (smallest_NxK & np.uint64(0xFFFF)).astype(np.uint16)
    positions_NxK[~chosen_NxK] = 0xFFFF
    positions_NxK.sort(axis=1)
    return counts_N, positions_NxK[chosen_NxK]


def _choose_words(keys_N: U64, layout: _Layout, limits_N: Ints, longest: int) -> tuple[Ints, U16]:
    """Of each sample spans of up to `longest` whole words, at most `limits_N` tokens.

    Words come as anchors in the order of their hashes. A span begins at an anchor that is not masked yet and goes on
    while the next word is of the same segment, not masked, and still fits; an anchor that does not fit is passed over
    (as BERT does). Where nothing fits at all, the first tokens of the first anchor are masked: never none.
    """
    first_N, total_N, specials_NxC, word_starts_T = layout
    sample_T = np.repeat(np.arange(len(total_N)), total_N)
    starts_N = np.cumsum(total_N) - total_N
    position_T = np.arange(len(sample_T)) - starts_N[sample_T]
    special_T = np.zeros(len(sample_T), bool)
    special_T[starts_N[:, None] + specials_NxC] = True
    begins_T = ~special_T & (word_starts_T.astype(bool) | np.roll(special_T, 1))  # a sample begins with a special
    word_T = np.cumsum(begins_T) - 1
    head_W = np.flatnonzero(begins_T)
    sample_W, position_W = sample_T[head_W], position_T[head_W]
    length_W = np.bincount(word_T[~special_T], minlength=len(head_W))
    segment_W = 2 * sample_W + (position_W >= first_N[sample_W])
    counters_W = (position_W + 1).astype(np.uint64) * _GOLDEN
    hashes_W = mix64(keys_N[sample_W] + counters_W)
    order_W = np.lexsort(((hashes_W & ~np.uint64(0xFFFF)) | position_W.astype(np.uint64), sample_W))
    dice_W = mix64(mix64(keys_N[sample_W] ^ _SPAN) + counters_W) >> np.uint64(32)
    wanted_W = np.minimum(longest, 1 + np.searchsorted(_SPAN_THRESHOLDS, dice_W, side="right"))
    taken_W = _take_spans(order_W, length_W, segment_W, wanted_W, limits_N)
    chosen_T = ~special_T
    chosen_T[chosen_T] = taken_W[word_T[chosen_T]]
    counts_N = np.bincount(sample_T[chosen_T], minlength=len(total_N))
    first_word_N = np.searchsorted(sample_W, np.arange(len(total_N)))
    for sample in np.flatnonzero((counts_N == 0) & (limits_N > 0)).tolist():
        head = int(head_W[order_W[first_word_N[sample]]])
        counts_N[sample] = limits_N[sample]  # less than the length of that word, or it would have fitted
        chosen_T[head : head + int(limits_N[sample])] = True
    return counts_N, position_T[chosen_T].astype(np.uint16)


def _take_spans(
    order_W: Ints, length_W: Ints, segment_W: Ints, wanted_W: Ints, limits_N: Ints
) -> npt.NDArray[np.bool_]:
    """Which words are masked. Goes through all samples at once, the j-th anchor of each in the j-th round."""
    edges_N = np.searchsorted(segment_W, 2 * np.arange(len(limits_N) + 1))  # where each sample's words begin
    most, room_N = int(wanted_W.max(initial=0)), limits_N.copy()
    taken_W = np.zeros(len(order_W), bool)
    live = np.flatnonzero((np.diff(edges_N) > 0) & (room_N > 0))
    anchor = 0
    while len(live):
        head = order_W[edges_N[live] + anchor]
        sample, word = live, head
        for index in range(most):
            fits = (wanted_W[head] > index) & ~taken_W[word] & (length_W[word] <= room_N[sample])
            head, sample, word = head[fits], sample[fits], word[fits]
            if not len(word):
                break
            taken_W[word] = True
            room_N[sample] -= length_W[word]
            last = word + 1 == len(segment_W)
            goes_on = ~last & (segment_W[np.where(last, word, word + 1)] == segment_W[word])
            head, sample, word = head[goes_on], sample[goes_on], word[goes_on] + 1
        anchor += 1
        live = live[(room_N[live] > 0) & (edges_N[live] + anchor < edges_N[live + 1])]
    return taken_W


def sample_keys(seed: int, draw: int, sample_ids_N: U64) -> U64:
    """One 64-bit key per sample: everything random about the sample in this draw follows from it."""
    base = mix64(np.asarray([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
    base = mix64(base + np.asarray([draw], dtype=np.uint64) * _GOLDEN)
    return mix64(base + mix64(sample_ids_N.astype(np.uint64) + _GOLDEN))


def _shown(originals_M: U32, fate_M: U64, vocabulary: MaskVocabulary, bounds: U64) -> U32:
    """80/10/10: the high 32 bits decide what happens, the low 32 bits pick the random replacement.

    `bounds` are where [MASK] and where random tokens end, of 2^32: [2], or [2, M].
    """
    specials = sorted(set(vocabulary.special_ids))
    ordinary = np.uint64(vocabulary.vocab_size - len(specials))
    decision_M = fate_M >> np.uint64(32)
    random_M = ((fate_M & np.uint64(0xFFFFFFFF)) * ordinary) >> np.uint64(32)
    before = np.asarray(specials, np.uint64) - np.arange(len(specials), dtype=np.uint64)  # ordinary ids below each
    random_M += np.searchsorted(before, random_M, side="right").astype(np.uint64)
    shown_M = np.full(len(originals_M), vocabulary.mask_id, dtype=np.uint32)
    replaced_M, kept_M = decision_M >= bounds[0], decision_M >= bounds[1]
    shown_M[replaced_M] = random_M[replaced_M].astype(np.uint32)
    shown_M[kept_M] = originals_M[kept_M]
    return shown_M


def mix64(x: U64) -> U64:
    """The splitmix64 finalizer: a bijection of 64-bit words whose output bits all depend on all input bits.

    Products wrap around, which numpy does silently for arrays.
    """
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
