"""Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997), inside the MapReduce and in bounded memory.

A map task scatters a record per document and band of its signature to the `near` tasks, by the band's key: documents
that share a key meet, and those of them whose signatures agree on at least the threshold are near-duplicates, of which
the one with the smallest digest stays. What is dropped goes, by the documents' own buckets, to the reduce tasks.

Records travel as buckets.py's documents: the key is the origin, the bucket of the document the source, and the lowest
byte of each value of the signature (Li and König 2010) a token.

Shapes: D documents, K values of a signature, R records of one task.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cloze.corpus.masking import mix64
from cloze.corpus.ragged import Ints
from cloze.errors import UserError
from data_prep.stages.buckets import Documents

U64 = npt.NDArray[np.uint64]

VALUE = np.dtype(np.uint8)
NUM_VALUES, _BANDS = 64, 16  # bands of 4 values: documents 0.8 alike share one with a probability of 0.9998
_SHINGLE_WORDS = 5
_MOST_LEADERS = 100  # documents of one key, unlike each other, that the others are compared with: bounds time


def signature(text: str) -> list[int]:
    """The signature of a text's overlapping runs of five words (characters, where there are no spaces)."""
    try:
        import rensa
    except ImportError:
        raise UserError("clean.near_duplicates: needs rensa: pip install 'cloze[dedup]'") from None
    words: Sequence[str] = text.lower().split()
    separator = " "
    if len(words) * 20 < len(text):  # not a language that has spaces between words
        words, separator = "".join(words), ""
    runs = [separator.join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))]
    sketch = rensa.RMinHash(num_perm=NUM_VALUES, seed=1)
    sketch.update(runs)
    return list(map(int, sketch.digest()))


def band_records(texts: Sequence[str], digests_Dx2: U64, bucket_D: Ints) -> Documents:
    """The records of documents, `_BANDS` of each."""
    values_DxK = np.asarray([signature(text) for text in texts], np.uint32).reshape(-1, NUM_VALUES)
    key_R = _band_keys(values_DxK).reshape(-1)
    return Documents(
        np.repeat(digests_Dx2, _BANDS, axis=0),
        key_R,
        np.repeat(bucket_D, _BANDS).astype(np.uint16),
        np.ones(len(key_R), np.uint32),
        np.full(len(key_R), NUM_VALUES, np.uint16),
        np.repeat(values_DxK.astype(VALUE), _BANDS, axis=0).reshape(-1),
        np.zeros(0, bool),
    )


def near_duplicates(records: Documents, threshold: float) -> Ints:
    """Which records are of documents to drop, as far as the keys of these records tell; none twice."""
    order_R = np.lexsort((records.digests_Dx2[:, 1], records.digests_Dx2[:, 0], records.origins_D))
    key_R, digests_Rx2 = records.origins_D[order_R], records.digests_Dx2[order_R]
    values_RxK = records.tokens_T.reshape(-1, NUM_VALUES)[order_R]
    enough = threshold + (1 - threshold) / 256  # one byte in 256 agrees by chance
    dropped = [order_R[:0]]
    _, first, counts = np.unique(key_R, return_index=True, return_counts=True)
    for begin, count in zip(first[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        left = np.arange(begin, begin + count)
        for _ in range(_MOST_LEADERS):
            leader, rest = left[0], left[1:]
            alike = (values_RxK[rest] == values_RxK[leader]).mean(axis=1) >= enough
            same = (digests_Rx2[rest] == digests_Rx2[leader]).all(axis=1)  # the same text once more
            dropped.append(rest[alike & ~same])
            left = rest[~alike]
            if len(left) < 2:
                break
    found = np.concatenate(dropped)
    _, once = np.unique(digests_Rx2[found], axis=0, return_index=True)
    return order_R[found[once]]


def _band_keys(values_DxK: npt.NDArray[np.uint32]) -> U64:
    """One key per band, different for different bands: [D, bands]."""
    bands_DxBxV = values_DxK.reshape(len(values_DxK), _BANDS, -1).astype(np.uint64)
    keys_DxB = np.broadcast_to(mix64(np.arange(1, _BANDS + 1, dtype=np.uint64)), bands_DxBxV.shape[:2])
    for value in range(bands_DxBxV.shape[2]):
        keys_DxB = mix64(keys_DxB ^ bands_DxBxV[:, :, value])
    return keys_DxB
