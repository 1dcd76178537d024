"""Samples of a corpus that no node's disk can hold, read window by window from where it lies.

Each epoch the shards of its pass follow one another in a seeded order: the epoch's stream. The stream is cut into
`lanes` equal stretches that are read side by side, each in windows whose samples are shuffled. So which sample stands
at which position is still a pure function, every sample comes once an epoch, and resuming is starting at another
position; the shuffle is weaker than the mapped reader's. Positions are dealt to ranks in turns: where the world size
divides the lanes, each lane is read by one rank.

Bytes come by range from any fsspec path, are checked against the manifest's crc32, and go through webdataset's own tar
reader. Windows to come are fetched by threads while the ones at hand are used.
"""

import io
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import webdataset

from data_prep.manifest import Manifest, ShardEntry, pass_name
from data_prep.shards import BlockFormat, CorruptShard, OpenBlock, Samples, collect, open_block, token_dtype
from pretrain.order import epoch_offsets, lane_bounds, sample_at, window_order

I64 = npt.NDArray[np.int64]
Row = tuple[OpenBlock, int]  # a decoded block and the index of a sample in it

_SHARD_ORDER = 0x5AA4D  # keeps the order of shards apart from the order of samples
_END_OF_ARCHIVE = bytes(1024)
_FETCH_TRIES = 3
_THREADS = 16


class Streamed:
    """The training samples of a corpus by run position, fetched from `source` (a directory or an fsspec URL)."""

    def __init__(self, source: str, manifest: Manifest, seed: int, lanes: int, window: int) -> None:
        self._manifest, self._seed, self._lanes, self._window = manifest, seed, lanes, window
        self._pass_sizes = [manifest.splits[pass_name(p)].samples for p in range(manifest.passes)]
        self._fetcher = _Fetcher(source, manifest)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="stream")
        self._epochs: dict[int, _Epoch] = {}
        self._dtype = token_dtype(manifest.tokenizer.vocab_size)

    def gather(self, positions_N: I64) -> Iterator[tuple[Samples, int]]:
        """(samples, draw) for each epoch that the ascending run positions touch. Quick where positions ascend.

        Raises `CorruptShard` for bytes that are not the manifest's.
        """
        epochs_N, offsets_N = epoch_offsets(positions_N, self._pass_sizes)
        for number in np.unique(epochs_N).tolist():
            epoch = self._epoch(number)
            rows = [epoch.row(offset) for offset in offsets_N[epochs_N == number].tolist()]
            draw = number // self._manifest.passes
            yield collect(rows, draw, self._dtype), draw

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            self._epochs = {n: epoch for n, epoch in self._epochs.items() if n == number - 1}
            self._epochs[number] = _Epoch(
                number, self._manifest, self._seed, self._lanes, self._window, self._fetcher, self._pool
            )
        return self._epochs[number]


class _Epoch:
    """One epoch's stream and the windows of it that are at hand or on their way."""

    def __init__(
        self,
        number: int,
        manifest: Manifest,
        seed: int,
        lanes: int,
        window: int,
        fetcher: "_Fetcher",
        pool: ThreadPoolExecutor,
    ) -> None:
        shards = manifest.split_shards(pass_name(number % manifest.passes))
        order = sample_at(seed ^ _SHARD_ORDER, number, np.arange(len(shards), dtype=np.int64), len(shards))
        self._shards = [shards[i] for i in order.tolist()]
        self._starts = np.concatenate([[0], np.cumsum([shard.samples for shard in self._shards])])
        self._bounds = lane_bounds(int(self._starts[-1]), lanes)
        self._number, self._seed, self._lanes, self._window = number, seed, lanes, window
        self._fetcher, self._pool = fetcher, pool
        self._current: dict[int, tuple[int, list[Row]]] = {}  # by lane: (number of the window, its rows)
        self._coming: dict[int, tuple[int, Future[list[Row]]]] = {}

    def row(self, offset: int) -> Row:
        """The sample at an offset of the epoch."""
        index, lane = divmod(offset, self._lanes)
        window, within = divmod(index, self._window)
        if self._current.get(lane, (-1,))[0] != window:
            self._advance(lane, window)
        return self._current[lane][1][within]

    def _advance(self, lane: int, window: int) -> None:
        """Make `window` the lane's current one and send for the one after it."""
        coming = self._coming.pop(lane, None)
        if coming is None or coming[0] != window:
            coming = (window, self._send(lane, window))
        self._current[lane] = (window, coming[1].result())
        if self._span(lane, window + 1)[1] > 0:
            self._coming[lane] = (window + 1, self._send(lane, window + 1))

    def _send(self, lane: int, window: int) -> "Future[list[Row]]":
        return self._pool.submit(self._read, lane, window)

    def _span(self, lane: int, window: int) -> tuple[int, int]:
        """(first sample in the stream, number of samples) of a window."""
        first = int(self._bounds[lane]) + window * self._window
        return first, min(self._window, int(self._bounds[lane + 1]) - first)

    def _read(self, lane: int, window: int) -> list[Row]:
        first, size = self._span(lane, window)
        rows: list[Row] = []
        shard_number = int(np.searchsorted(self._starts, first, side="right")) - 1
        while len(rows) < size:
            shard, start = self._shards[shard_number], int(self._starts[shard_number])
            begin = first + len(rows) - start
            rows += self._fetcher.rows(shard, begin, min(shard.samples, begin + size - len(rows)))
            shard_number += 1
        return [rows[i] for i in window_order(self._seed, self._number, lane, window, size).tolist()]


class _Fetcher:
    """Ranges of shards, decoded."""

    def __init__(self, source: str, manifest: Manifest) -> None:
        self._filesystem, self._root = fsspec.url_to_fs(source.rstrip("/"))
        self._format = BlockFormat(manifest)

    def rows(self, shard: ShardEntry, begin: int, end: int) -> list[Row]:
        """Samples begin … end-1 of a shard."""
        index = shard.blocks
        edges = [0, *np.cumsum(index.samples).tolist()]
        first, last = (bisect_right(edges, sample) - 1 for sample in (begin, end - 1))
        data = self._bytes(shard, int(index.offsets[first]), int(index.offsets[last] + index.bytes[last]))
        rows: list[Row] = []
        for number in range(first, last + 1):
            opened = self._open(shard, number, data[int(index.offsets[number] - index.offsets[first]) :], edges[number])
            inside = range(max(begin, edges[number]), min(end, edges[number + 1]))
            rows += [(opened, sample - edges[number]) for sample in inside]
        return rows

    def _bytes(self, shard: ShardEntry, start: int, end: int) -> memoryview:
        path = f"{self._root}/{shard.split}/{shard.name}"
        for attempt in range(_FETCH_TRIES):
            try:
                data = memoryview(self._filesystem.cat_file(path, start=start, end=end))
            except (OSError, ValueError) as error:
                if attempt + 1 == _FETCH_TRIES:
                    raise CorruptShard(f"{path}: cannot be read ({error}); check the path and the network") from error
            else:
                if len(data) == end - start:
                    return data
        raise CorruptShard(f"{path}: ends before byte {end}; upload the corpus again")

    def _open(self, shard: ShardEntry, number: int, data: memoryview, first_sample: int) -> OpenBlock:
        """Block `number` of a shard, which `data` begins with."""
        index = shard.blocks
        part = data[: int(index.bytes[number])]
        where = f"{self._root}/{shard.split}/{shard.name}: block {number}"
        if zlib.crc32(part) != index.crc32[number]:
            raise CorruptShard(f"{where}: its checksum differs from the manifest's; upload the corpus again")
        try:
            block = self._format.decode(_members(part), int(index.samples[number]), int(index.tokens[number]))
        except ValueError as error:
            raise CorruptShard(f"{where}: {error}; upload the corpus again") from error
        return open_block(block, (shard.id << 32) + first_sample)


def _members(data: memoryview) -> dict[str, memoryview]:
    """The members of one block by name, through webdataset's tar pipeline; payloads are left as bytes."""
    stream: Any = io.BytesIO(bytes(data) + _END_OF_ARCHIVE)
    files = webdataset.tariterators.tar_file_expander([{"url": "", "stream": stream}])
    samples = list(webdataset.tariterators.group_by_keys(files))
    if len(samples) != 1:
        raise ValueError(f"it holds {len(samples)} WebDataset samples, not one")
    return {
        name.removesuffix(".npy"): memoryview(payload)
        for name, payload in samples[0].items()
        if name.endswith(".npy") and not name.startswith("__")
    }
