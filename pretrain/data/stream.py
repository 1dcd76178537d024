"""Samples of a corpus that no node's disk can hold, read window by window from where it lies.

Each epoch the shards of its pass follow one another in a seeded order: the epoch's stream. The stream is cut into
`lanes` equal stretches that are read side by side, each in windows whose samples are shuffled. So which sample stands
at which position is still a pure function, every sample comes once an epoch, and resuming is starting at another
position; the shuffle is weaker than the mapped reader's. Positions are dealt to ranks in turns: where the world size
divides the lanes, each lane is read by one rank.

Bytes come by range from any fsspec path and are checked against the manifest's crc32. Windows to come, of the next
epoch too, are fetched by threads while the ones at hand are used.
"""

import zlib
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cloze import storage
from cloze.corpus.manifest import Manifest, ShardEntry, pass_name
from cloze.corpus.shards import BlockFormat, CorruptShard, OpenBlock, Samples, collect, open_block, token_dtype
from cloze.errors import UserError
from pretrain.data.order import epoch_offsets, lane_bounds, sample_at, window_order

I64 = npt.NDArray[np.int64]
Row = tuple[OpenBlock, int]  # a decoded block and the index of a sample in it

_SHARD_ORDER = 0x5AA4D  # keeps the order of shards apart from the order of samples
_THREADS = 16


class Window(NamedTuple):
    """Which window; they sort by when they are needed."""

    epoch: int
    number: int  # in its lane
    lane: int


class Streamed:
    """The training samples of a corpus by run position, fetched from `source` (a directory or an fsspec URL)."""

    def __init__(self, source: str, manifest: Manifest, seed: int, lanes: int, window: int) -> None:
        storage.require(source)
        self._manifest, self._seed, self._lanes, self._window = manifest, seed, lanes, window
        self._pass_sizes = [manifest.splits[pass_name(p)].samples for p in range(manifest.passes)]
        self._fetcher = _Fetcher(source, manifest)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="stream")
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[Window, Future[list[Row]]] = {}  # at hand or on their way
        self._dtype = token_dtype(manifest.tokenizer.vocab_size)

    def gather(self, positions_N: I64) -> Iterator[tuple[Samples, int]]:
        """(samples, draw) for each epoch that the ascending run positions touch. Quick where positions ascend.

        Sends for all windows that these positions need, then for those that the positions a window later will need:
        the same ranks' lanes, in the next epoch where this one ends. What is a quarter of a window behind is let go:
        lanes of a mixture are not all at the same sample. Raises `CorruptShard` for bytes that are not the manifest's.
        """
        wanted, within = self._places(positions_N)
        later, _ = self._places(positions_N + self._window * self._lanes)
        for window in sorted({*wanted}) + sorted({*later}):
            if window not in self._windows:
                self._windows[window] = self._pool.submit(self._epoch(window.epoch).read, window)
        behind, _ = self._places(np.maximum(positions_N[:1] - self._window * self._lanes // 4, 0))
        first = behind[0]._replace(lane=0)
        self._windows = {window: rows for window, rows in self._windows.items() if window >= first}
        self._epochs = {number: epoch for number, epoch in self._epochs.items() if number >= first.epoch}
        opened = {window: self._windows[window].result() for window in {*wanted}}
        for number in sorted({window.epoch for window in opened}):
            rows = [opened[window][i] for window, i in zip(wanted, within, strict=True) if window.epoch == number]
            draw = number // self._manifest.passes
            yield collect(rows, draw, self._dtype), draw

    def _places(self, positions_N: I64) -> tuple[list[Window], list[int]]:
        """The window of each run position, and where in it the sample lies."""
        epochs_N, offsets_N = epoch_offsets(positions_N, self._pass_sizes)
        indices_N, lanes_N = np.divmod(offsets_N, self._lanes)
        numbers_N, within_N = np.divmod(indices_N, self._window)
        windows = map(Window, epochs_N.tolist(), numbers_N.tolist(), lanes_N.tolist())
        return list(windows), within_N.tolist()

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            self._epochs[number] = _Epoch(number, self._manifest, self._seed, self._lanes, self._window, self._fetcher)
        return self._epochs[number]


class _Epoch:
    """One epoch's stream."""

    def __init__(
        self, number: int, manifest: Manifest, seed: int, lanes: int, window: int, fetcher: "_Fetcher"
    ) -> None:
        shards = manifest.split_shards(pass_name(number % manifest.passes))
        order = sample_at(seed ^ _SHARD_ORDER, number, np.arange(len(shards), dtype=np.int64), len(shards))
        self._shards = [shards[i] for i in order.tolist()]
        self._starts = np.concatenate([[0], np.cumsum([shard.samples for shard in self._shards])])
        self._bounds = lane_bounds(int(self._starts[-1]), lanes)
        self._seed, self._window, self._fetcher = seed, window, fetcher

    def read(self, window: Window) -> list[Row]:
        """The samples of a window, in the order in which they are used."""
        first = int(self._bounds[window.lane]) + window.number * self._window  # in the stream
        size = min(self._window, int(self._bounds[window.lane + 1]) - first)
        rows: list[Row] = []
        shard_number = int(np.searchsorted(self._starts, first, side="right")) - 1
        while len(rows) < size:
            shard, start = self._shards[shard_number], int(self._starts[shard_number])
            begin = first + len(rows) - start
            rows += self._fetcher.rows(shard, begin, min(shard.samples, begin + size - len(rows)))
            shard_number += 1
        return [rows[i] for i in window_order(self._seed, window.epoch, window.lane, window.number, size).tolist()]


class _Fetcher:
    """Ranges of shards, decoded."""

    def __init__(self, source: str, manifest: Manifest) -> None:
        self._source = source.rstrip("/")
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
        url = f"{self._source}/{shard.split}/{shard.name}"
        try:
            data = memoryview(storage.patiently(lambda: storage.read_range(url, start, end)))
        except UserError as error:
            raise CorruptShard(f"{url}: cannot be read ({error})") from error
        if len(data) > end - start:
            raise CorruptShard(f"{url}: its server ignores byte ranges; set data.access=mapped and data.cache_dir")
        if len(data) < end - start:
            raise CorruptShard(f"{url}: ends before byte {end}; upload the corpus again")
        return data

    def _open(self, shard: ShardEntry, number: int, data: memoryview, first_sample: int) -> OpenBlock:
        """Block `number` of a shard, which `data` begins with."""
        index = shard.blocks
        part = data[: int(index.bytes[number])]
        where = f"{self._source}/{shard.split}/{shard.name}: block {number}"
        if zlib.crc32(part) != index.crc32[number]:
            raise CorruptShard(f"{where}: its checksum differs from the manifest's; upload the corpus again")
        try:
            block = self._format.decode(part, int(index.samples[number]), int(index.tokens[number]))
        except ValueError as error:
            raise CorruptShard(f"{where}: {error}; upload the corpus again") from error
        return open_block(block, (shard.id << 32) + first_sample)
