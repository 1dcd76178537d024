"""Intermediate files: encoded documents on their way from map tasks to reduce tasks.

One file per map task, in segments (one per `flush`, which bounds memory), each segment with its documents sorted by
bucket, so that a reduce task finds its share in one run per column. Nothing outlives the preparation: no version, no
checksum, and a file that is there is whole, since it was renamed into place.

Shapes: D documents, S their sentences, T their tokens, all one after another; B buckets.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.corpus.ragged import Ints, offsets, ranges

_FLUSH_TOKENS = 4_000_000


class Documents(NamedTuple):
    """Encoded documents."""

    digests_Dx2: npt.NDArray[np.uint64]  # 128-bit hash of the text
    origins_D: npt.NDArray[np.uint64]  # equal for the parts of one long document
    sources_D: npt.NDArray[np.uint16]
    sentences_D: npt.NDArray[np.uint32]
    lengths_S: npt.NDArray[np.uint16]  # tokens per sentence
    tokens_T: npt.NDArray[np.unsignedinteger]  # u16 or u32
    starts_T: npt.NDArray[np.bool_]  # tokens that begin a word; empty where masking need not know


def select(documents: Documents, order_D: Ints) -> Documents:
    """The documents at `order_D`, in that order."""
    sentence_starts = offsets(documents.sentences_D)
    token_starts = offsets(documents.lengths_S)[sentence_starts]
    sentences_D = documents.sentences_D[order_D]
    begins, ends = token_starts[order_D].tolist(), token_starts[order_D + 1].tolist()

    def selected(values_T: npt.NDArray[Any]) -> npt.NDArray[Any]:  # slices: indices take ten times the tokens' memory
        return np.concatenate([values_T[:0], *map(values_T.__getitem__, map(slice, begins, ends))])

    return Documents(
        documents.digests_Dx2[order_D],
        documents.origins_D[order_D],
        documents.sources_D[order_D],
        sentences_D,
        documents.lengths_S[ranges(sentence_starts[order_D], sentences_D.astype(np.int64))],
        selected(documents.tokens_T),
        selected(documents.starts_T),
    )


def concatenate(parts: Sequence[Documents]) -> Documents:
    """All documents of at least one part, in order."""
    return Documents(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class BucketWriter:
    """Writes one intermediate file."""

    def __init__(self, file: BinaryIO, num_buckets: int) -> None:
        self._file = file
        self._num_buckets = num_buckets
        self._parts: list[Documents] = []
        self._buckets: list[Ints] = []
        self._num_tokens = 0
        self._segments: list[int] = []
        self._has_words = False

    def add(self, documents: Documents, bucket_D: Ints) -> None:
        """Documents, and the bucket of each."""
        self._parts.append(documents)
        self._buckets.append(bucket_D)
        self._num_tokens += len(documents.tokens_T)
        if self._num_tokens >= _FLUSH_TOKENS:
            self._flush()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write what is left, and `facts` (JSON) for `read_facts`."""
        if self._parts:
            self._flush()
        end = self._file.tell()
        trailer = {"segments": self._segments, "has_words": self._has_words, "facts": facts}
        self._file.write(json.dumps(trailer).encode())
        self._file.write(end.to_bytes(8, "little"))

    def _flush(self) -> None:
        bucket_D = np.concatenate(self._buckets)
        order_D = np.argsort(bucket_D, kind="stable")
        documents = select(concatenate(self._parts), order_D)
        first_B = np.searchsorted(bucket_D[order_D], np.arange(self._num_buckets + 1))
        sentence_B = offsets(documents.sentences_D)[first_B]
        token_B = offsets(documents.lengths_S)[sentence_B]
        self._file.write(bytes(-self._file.tell() % 8))
        self._segments.append(self._file.tell())
        self._has_words = len(documents.starts_T) > 0
        for array in (np.stack([first_B, sentence_B, token_B], axis=1), *documents):
            self._file.write(array.tobytes())
        self._parts, self._buckets, self._num_tokens = [], [], 0


def read_facts(path: Path) -> dict[str, Any]:
    """What `finish` was given."""
    facts = _trailer(np.memmap(path, np.uint8, "r"))["facts"]
    assert isinstance(facts, dict)
    return facts


def read_bucket(
    paths: Iterable[Path], bucket: int, num_buckets: int, token_dtype: npt.DTypeLike
) -> Iterator[Documents]:
    """The documents of one bucket, intermediate file by intermediate file; the first part is empty."""
    dtypes = [np.dtype(name) for name in ("<u8", "<u8", "<u2", "<u4", "<u2", token_dtype, bool)]
    yield Documents(*(np.zeros(0, dtype) for dtype in dtypes))._replace(digests_Dx2=np.zeros((0, 2), dtypes[0]))
    for path in paths:
        data = np.memmap(path, np.uint8, "r")
        trailer = _trailer(data)
        for segment in trailer["segments"]:
            size = (num_buckets + 1) * 24
            table_Bx3 = data[segment : segment + size].view(np.int64).reshape(-1, 3)
            (d0, s0, t0), (d1, s1, t1), (num_d, num_s, num_t) = table_Bx3[[bucket, bucket + 1, num_buckets]].tolist()
            if d0 == d1:
                continue
            columns, position = [], segment + size
            spans = [(2 * d0, 2 * d1, 2 * num_d), *[(d0, d1, num_d)] * 3, (s0, s1, num_s), (t0, t1, num_t)]
            spans.append((t0, t1, num_t) if trailer["has_words"] else (0, 0, 0))
            for dtype, (begin, end, total) in zip(dtypes, spans, strict=True):
                width = dtype.itemsize
                run = data[position + begin * width : position + end * width]
                columns.append(np.frombuffer(run.tobytes(), dtype))
                position += total * width
            columns[0] = columns[0].reshape(-1, 2)
            yield Documents(*columns)


def _trailer(data: npt.NDArray[np.uint8]) -> dict[str, Any]:
    start = int.from_bytes(data[-8:].tobytes(), "little")
    trailer = json.loads(data[start:-8].tobytes())
    assert isinstance(trailer, dict)
    return trailer
