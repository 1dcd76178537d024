"""The mask function: which tokens BERT must guess, as a pure function of (seed, draw, sample id, length).

There is no random state: every decision is a counter-based hash (the splitmix64 finalizer, Steele, Lea and Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) of the sample's key and the token's position. So a draw
baked into a shard and the same draw made live in a training process are bit-identical, whatever the batch around it.

Shapes: N samples, T tokens of all samples one after another, M masked positions of all samples.
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


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How to mask (Devlin et al. 2019, section 3.1): recorded in the manifest, obeyed by every later draw."""

    strategy: str  # "token"
    probability: float  # share of a sample's tokens to predict, specials counted in
    max_predictions: int  # at most so many per sample
    seed: int


@dataclass(frozen=True, kw_only=True)
class MaskVocabulary:
    """What masking must know of the tokenizer."""

    mask_id: int
    vocab_size: int  # rows that hold real tokens: padded rows are never drawn
    special_ids: tuple[int, ...]  # never drawn as a random replacement


class Masks(NamedTuple):
    """One draw over N samples."""

    counts_N: U16  # masked positions of each sample
    positions_M: U16  # position inside its sample, ascending within the sample
    tokens_M: U32  # the id shown to the model there


def num_predictions(lengths_N: Ints, masking: Masking) -> npt.NDArray[np.int64]:
    """k = min(max_predictions, max(1, round(p * n))) per sample, n counting specials, as BERT does."""
    wanted = np.rint(lengths_N.astype(np.float64) * masking.probability).astype(np.int64)
    return np.minimum(masking.max_predictions, np.maximum(1, wanted))


def draw_masks(
    tokens_T: Ints,
    lengths_Nx2: Ints,
    sample_ids_N: U64,
    draw: int,
    masking: Masking,
    vocabulary: MaskVocabulary,
) -> Masks:
    """Mask N samples. `lengths_Nx2` holds (length through the first [SEP], total length), as a shard does.

    Exactly k positions of each sample are chosen (those with the k smallest hashes; never [CLS] or a [SEP]); each is
    shown as [MASK] with probability 0.8, as a random non-special token with 0.1, unchanged with 0.1.
    """
    first_N = lengths_Nx2[:, 0].astype(np.int64)
    total_N = lengths_Nx2[:, 1].astype(np.int64)
    if len(total_N) == 0:
        return Masks(np.zeros(0, np.uint16), np.zeros(0, np.uint16), np.zeros(0, np.uint32))
    keys_N = sample_keys(masking.seed, draw, sample_ids_N)
    width = int(total_N.max())

    counters_L = np.arange(1, width + 1, dtype=np.uint64) * _GOLDEN
    hashes_NxL = mix64(keys_N[:, None] + counters_L[None, :])
    # The position rides in the low bits: one sort gives the order of the hashes and where they were.
    positions_L = np.arange(width, dtype=np.uint64)
    ranked_NxL = (hashes_NxL & ~np.uint64(0xFFFF)) | positions_L[None, :]
    ranked_NxL[np.arange(width)[None, :] >= total_N[:, None] - 1] = _NEVER  # padding, and the last [SEP]
    rows = np.arange(len(total_N))
    ranked_NxL[rows, 0] = _NEVER  # [CLS]
    ranked_NxL[rows, first_N - 1] = _NEVER  # the first [SEP]

    candidates_N = total_N - np.where(first_N == total_N, 2, 3)
    counts_N = np.minimum(num_predictions(total_N, masking), candidates_N)
    most = int(counts_N.max())
    if most < width:
        ranked_NxL.partition(most - 1 if most else 0, axis=1)
    smallest_NxK = np.sort(ranked_NxL[:, :most], axis=1)
    chosen_NxK = np.arange(most)[None, :] < counts_N[:, None]
    positions_NxK = (smallest_NxK & np.uint64(0xFFFF)).astype(np.uint16)
    positions_NxK[~chosen_NxK] = 0xFFFF
    positions_NxK.sort(axis=1)
    positions_M = positions_NxK[chosen_NxK]

    sample_M = np.repeat(rows, counts_N)
    starts_N = np.cumsum(total_N) - total_N
    originals_M = tokens_T[starts_N[sample_M] + positions_M].astype(np.uint32)
    fate_M = mix64(mix64(keys_N[sample_M] ^ _GOLDEN) + positions_M.astype(np.uint64) * _GOLDEN)
    return Masks(counts_N.astype(np.uint16), positions_M, _shown(originals_M, fate_M, vocabulary))


def sample_keys(seed: int, draw: int, sample_ids_N: U64) -> U64:
    """One 64-bit key per sample: everything random about the sample in this draw follows from it."""
    base = mix64(np.asarray([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
    base = mix64(base + np.asarray([draw], dtype=np.uint64) * _GOLDEN)
    return mix64(base + mix64(sample_ids_N.astype(np.uint64) + _GOLDEN))


def _shown(originals_M: U32, fate_M: U64, vocabulary: MaskVocabulary) -> U32:
    """80/10/10: the high 32 bits decide what happens, the low 32 bits pick the random replacement."""
    specials = sorted(set(vocabulary.special_ids))
    ordinary = np.uint64(vocabulary.vocab_size - len(specials))
    decision_M = fate_M >> np.uint64(32)
    random_M = ((fate_M & np.uint64(0xFFFFFFFF)) * ordinary) >> np.uint64(32)
    for special in specials:  # skip over the specials: ascending, so each shift sees those before it
        random_M += random_M >= np.uint64(special)
    shown_M = np.full(len(originals_M), vocabulary.mask_id, dtype=np.uint32)
    replaced_M = decision_M >= np.uint64(round(0.8 * 2**32))
    kept_M = decision_M >= np.uint64(round(0.9 * 2**32))
    shown_M[replaced_M] = random_M[replaced_M].astype(np.uint32)
    shown_M[kept_M] = originals_M[kept_M]
    return shown_M


def mix64(x: U64) -> U64:
    """The splitmix64 finalizer: a bijection of 64-bit words whose output bits all depend on all input bits.

    Products wrap around, which numpy does silently for arrays.
    """
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
