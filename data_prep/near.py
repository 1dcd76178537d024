"""Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997), inside the MapReduce and in bounded memory.

A map task leaves the signatures of its documents. A `near` task takes the band keys of one bucket from all of them:
documents that share a key, and whose signatures agree on at least the threshold, are near-duplicates, of which the one
with the smallest digest stays. What it drops goes, by the documents' own buckets, to the reduce tasks.

Shapes: D documents, K values of a signature, R (band, document) records of one task.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError
from data_prep.masking import mix64
from data_prep.ragged import Ints, offsets

U64 = npt.NDArray[np.uint64]

NUM_VALUES, _BANDS = 64, 16  # bands of 4 values: documents 0.8 alike share one with a probability of 0.9998
_SHINGLE_WORDS = 5


class Signatures(NamedTuple):
    """MinHash signatures of documents."""

    digests_Dx2: U64
    values_DxK: npt.NDArray[np.uint32]


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


def write_signatures(path: Path, signatures: Signatures) -> None:
    with path.open("wb") as file:
        file.write(len(signatures.digests_Dx2).to_bytes(8, "little"))
        file.write(signatures.digests_Dx2.astype("<u8").tobytes())
        file.write(signatures.values_DxK.astype("<u4").tobytes())


def _read_signatures(path: Path) -> Signatures:
    data = np.memmap(path, np.uint8, "r")
    count = int.from_bytes(data[:8].tobytes(), "little")
    digests_Dx2 = data[8 : 8 + 16 * count].view("<u8").reshape(-1, 2)
    return Signatures(digests_Dx2, data[8 + 16 * count :].view("<u4").reshape(-1, NUM_VALUES))


def near_duplicates(paths: Iterable[Path], number: int, tasks: int, threshold: float) -> U64:
    """Digests [n, 2] of the documents to drop, as far as the band keys of task `number` of `tasks` tell."""
    keys, digests, values = [], [], []
    for path in paths:
        found = _read_signatures(path)
        band_keys_DxB = _band_keys(found.values_DxK)
        document_R, band_R = np.nonzero(band_keys_DxB % np.uint64(tasks) == np.uint64(number))
        keys.append(band_keys_DxB[document_R, band_R])
        digests.append(found.digests_Dx2[document_R])
        values.append(found.values_DxK[document_R])
    key_R, digest_Rx2, values_RxK = np.concatenate(keys), np.concatenate(digests), np.concatenate(values)
    order_R = np.lexsort((digest_Rx2[:, 1], digest_Rx2[:, 0], key_R))
    key_R, digest_Rx2, values_RxK = key_R[order_R], digest_Rx2[order_R], values_RxK[order_R]
    dropped: list[U64] = []
    _, first, counts = np.unique(key_R, return_index=True, return_counts=True)
    for begin, count in zip(first[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        kept = [begin]
        for row in range(begin + 1, begin + count):
            alike = (values_RxK[kept] == values_RxK[row]).mean(axis=1).max()
            if alike < threshold:
                kept.append(row)
            elif not (digest_Rx2[kept] == digest_Rx2[row]).all(axis=1).any():  # not the same text once more
                dropped.append(digest_Rx2[row])
    return np.unique(np.stack(dropped), axis=0) if dropped else np.zeros((0, 2), np.uint64)


def _band_keys(values_DxK: npt.NDArray[np.uint32]) -> U64:
    """One key per band, different for different bands: [D, bands]."""
    bands_DxBxV = values_DxK.reshape(len(values_DxK), _BANDS, -1).astype(np.uint64)
    keys_DxB = np.broadcast_to(mix64(np.arange(1, _BANDS + 1, dtype=np.uint64)), bands_DxBxV.shape[:2])
    for value in range(bands_DxBxV.shape[2]):
        keys_DxB = mix64(keys_DxB ^ bands_DxBxV[:, :, value])
    return keys_DxB


def write_dropped(path: Path, digests_Dx2: U64, bucket_D: Ints, num_buckets: int) -> None:
    """Digests to drop, each bucket's together."""
    order_D = np.argsort(bucket_D, kind="stable")
    edges = offsets(np.bincount(bucket_D, minlength=num_buckets))
    path.write_bytes(edges.astype("<i8").tobytes() + digests_Dx2[order_D].astype("<u8").tobytes())


def read_dropped(paths: Iterable[Path], bucket: int, num_buckets: int) -> set[bytes]:
    """Digests to drop of one bucket, 16 bytes each."""
    found: set[bytes] = set()
    for path in paths:
        data = np.memmap(path, np.uint8, "r")
        edges = data[: 8 * (num_buckets + 1)].view("<i8")
        rows = data[8 * (num_buckets + 1) :].reshape(-1, 16)[edges[bucket] : edges[bucket + 1]]
        found.update(row.tobytes() for row in rows)
    return found
