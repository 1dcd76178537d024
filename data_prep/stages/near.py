"""Stage near: near-duplicates by MinHash and locality-sensitive hashing (Broder 1997), in bounded memory.

A map task scatters a record per document and band of its signature to the near tasks, by the band's key: documents
that share a key meet, and those of them whose signatures agree on at least the threshold are near-duplicates, of which
the one with the smallest digest stays. What is dropped goes, by the documents' own buckets, to the reduce tasks.

Shapes: D documents, K values of a signature, R records of one task.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.corpus.masking import mix64
from cloze.corpus.ragged import Ints
from cloze.errors import UserError
from data_prep.plan import MOST_BUCKETS, Plan
from data_prep.stages.base import Stage
from data_prep.stages.buckets import DIGESTS, BucketWriter, Column, Digests, Table, read_bucket

U64 = npt.NDArray[np.uint64]

NUM_VALUES, _BANDS = 64, 16  # bands of 4 values: documents 0.8 alike share one with a probability of 0.9998
_SHINGLE_WORDS = 5
_MOST_LEADERS = 100  # documents of one key, unlike each other, that the others are compared with: bounds time
_TASKS_OF_A_BUCKET = 4  # the records of short documents take many times the memory of their text


class BandRecords(NamedTuple):
    """Documents, once for each band of their signatures."""

    digests_Rx2: U64  # of the document's text
    keys_R: U64  # equal where documents agree on the band, and nowhere else but by chance
    buckets_R: npt.NDArray[np.uint16]  # where the document itself goes
    values_RxK: npt.NDArray[np.uint8]  # of its whole signature the lowest bytes (Li and König 2010)


BAND_RECORDS = Table(
    BandRecords, (Column("<u8", width=2), Column("<u8"), Column("<u2"), Column("u1", width=NUM_VALUES))
)


def bands_path(plan: Plan, number: int) -> Path:
    """The records that a map task makes."""
    return plan.work / "bands" / f"{number:06d}"


def _num_tasks(plan: Plan) -> int:
    return min(MOST_BUCKETS, _TASKS_OF_A_BUCKET * plan.num_buckets)


def _run(plan: Plan, number: int, path: Path) -> None:
    threshold = plan.config.clean.near_duplicates
    assert threshold is not None
    paths = (bands_path(plan, task) for task in range(plan.num_training_tasks))
    records = BAND_RECORDS.concatenate(list(read_bucket(BAND_RECORDS, paths, number, _num_tasks(plan))))
    found = near_duplicates(records, threshold)
    with path.open("wb") as file:
        writer = BucketWriter(file, DIGESTS, plan.num_all_buckets)
        writer.add(Digests(records.digests_Rx2[found]), records.buckets_R[found].astype(np.int64))
        writer.finish()


NEAR = Stage("near", _num_tasks, _run)


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


def band_records(texts: Sequence[str], digests_Dx2: U64, bucket_D: Ints) -> BandRecords:
    """The records of documents, `_BANDS` of each."""
    values_DxK = np.asarray([signature(text) for text in texts], np.uint32).reshape(-1, NUM_VALUES)
    return BandRecords(
        np.repeat(digests_Dx2, _BANDS, axis=0),
        _band_keys(values_DxK).reshape(-1),
        np.repeat(bucket_D, _BANDS).astype(np.uint16),
        np.repeat(values_DxK.astype(np.uint8), _BANDS, axis=0),
    )


def near_duplicates(records: BandRecords, threshold: float) -> Ints:
    """Which records are of documents to drop, as far as the keys of these records tell; none twice."""
    order_R = np.lexsort((records.digests_Rx2[:, 1], records.digests_Rx2[:, 0], records.keys_R))
    key_R, digests_Rx2 = records.keys_R[order_R], records.digests_Rx2[order_R]
    values_RxK = records.values_RxK[order_R]
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
