"""Shards: ordinary WebDataset tars whose tar *sample* is a block of up to 256 training samples.

Owns the block codec, the writer and the memory-mapped reader. One member per training sample would cost 4.5 to 13
times the bytes and read about 100 times slower; plain `webdataset` still reads these (README shows how).

Shapes: N samples of a block, T their tokens one after another, M masked positions of one draw.
"""

import hashlib
import io
import math
import mmap
import os
import re
import tarfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cloze import storage
from cloze.corpus.manifest import BlockIndex, Manifest, ShardEntry
from cloze.corpus.masking import MaskRates, Masks
from cloze.errors import UserError

BLOCK_SAMPLES = 256
_SAMPLE_BITS = 32  # sample id = (shard id << 32) | index in shard
_TAR_BLOCK = 512
_MASK_MEMBERS = ("mask_counts", "mask_positions", "mask_tokens")
_NPY_HEADER = re.compile(  # numpy's own parser evaluates Python, and can fail in more ways than it says
    rb"\x93NUMPY\x01\x00(?P<size>..)"
    rb"(?P<text>\{'descr': '(?P<dtype>[<>=|A-Za-z0-9]+)', 'fortran_order': False, "
    rb"'shape': \((?P<shape>[0-9, ]*)\), \} *\n)",
    re.DOTALL,
)


class Block(NamedTuple):
    """Up to `BLOCK_SAMPLES` training samples."""

    tokens_T: npt.NDArray[np.integer]  # u16, or u32 where the vocabulary needs it: unmasked ids with specials
    lengths_Nx2: npt.NDArray[np.uint16]  # (length through the [SEP]s after the first segment, total length)
    random_next_N: npt.NDArray[np.uint8]  # 1 = the second segment comes from another document
    masks: tuple[Masks, ...] = ()  # the baked draws
    word_starts_T: npt.NDArray[np.bool_] | None = None  # where words are masked whole: which tokens begin one


class CorruptShard(UserError):
    """A shard does not hold what the manifest says."""

    one_rank_only = True


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Two bytes where every id fits, else four."""
    return np.dtype("<u2") if vocab_size <= 0x10000 else np.dtype("<u4")


def sample_ids(shard_id: int, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Ids of `count` consecutive samples of a shard, from index `start`."""
    return np.uint64(shard_id << _SAMPLE_BITS) + np.arange(start, start + count, dtype=np.uint64)


def write_shard(path: Path, *, shard_id: int, split: str, name: str, blocks: Iterable[Block]) -> ShardEntry:
    """Write blocks as a WebDataset tar to `path` and return the manifest entry of `split`/`name`.

    The bytes depend on the arguments alone. `path` is fsynced; renaming it into place is the caller's.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    position, sha256 = 0, hashlib.sha256()
    with path.open("wb") as file:
        for number, block in enumerate(blocks):
            members = sorted(_encode(block).items())
            data = b"".join(_member(f"{shard_id:06d}-{number:06d}.{name}", payload) for name, payload in members)
            file.write(data)
            sha256.update(data)
            rows.append((position, len(data), len(block.lengths_Nx2), len(block.tokens_T), zlib.crc32(data)))
            position += len(data)
        end = bytes(2 * _TAR_BLOCK)
        file.write(end)
        sha256.update(end)
        file.flush()
        os.fsync(file.fileno())
    offsets, sizes, samples, tokens, crcs = np.asarray(rows, np.int64).reshape(-1, 5).T
    return ShardEntry(
        id=shard_id,
        split=split,
        name=name,
        bytes=position + len(end),
        sha256=sha256.hexdigest(),
        samples=int(samples.sum()),
        tokens=int(tokens.sum()),
        blocks=BlockIndex(offsets=offsets, bytes=sizes, samples=samples, tokens=tokens, crc32=crcs),
    )


def _encode(block: Block) -> dict[str, bytes]:
    arrays: dict[str, npt.NDArray[Any]] = {
        "tokens": block.tokens_T,
        "lengths": block.lengths_Nx2,
        "random_next": block.random_next_N,
    }
    if block.masks:
        arrays["mask_counts"] = np.stack([masks.counts_N for masks in block.masks])
        arrays["mask_positions"] = np.concatenate([masks.positions_M for masks in block.masks])
        shown = np.concatenate([masks.tokens_M for masks in block.masks])
        arrays["mask_tokens"] = shown.astype(block.tokens_T.dtype)
    if block.word_starts_T is not None:
        arrays["word_starts"] = np.packbits(block.word_starts_T)
    return {f"{name}.npy": _npy(array) for name, array in arrays.items()}


def _empty_header() -> bytes:
    """Of a file without name and size, as webdataset's TarWriter writes it, which would import torch."""
    header = tarfile.TarInfo()
    header.mode, header.uname, header.gname = 0o444, "bigdata", "bigdata"
    data = header.tobuf(tarfile.USTAR_FORMAT)
    return data[:148] + b" " * 8 + data[156:]  # the checksum is one of a header that has spaces in its place


_EMPTY_HEADER = _empty_header()


def _member(name: str, payload: bytes) -> bytes:
    """One file of a tar. `tarfile` takes as long for its header as the checksums of the file."""
    header = bytearray(_EMPTY_HEADER)
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % len(payload)
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header) + payload + bytes(-len(payload) % _TAR_BLOCK)


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class BlockFormat:
    """What the members of a block must look like in the shards of one manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self._tokens = token_dtype(manifest.tokenizer.vocab_size)
        self._vocab_size, self._max_len = manifest.tokenizer.vocab_size, manifest.max_len
        self._draws = manifest.baked_draws
        self._has_words = manifest.masking.strategy != "token"

    def decode(self, data: memoryview, samples: int, tokens: int, *, seen: bool = False) -> Block:
        """Arrays from a block's bytes, as views. Raises ValueError naming what is wrong.

        With `seen` the values are those of an earlier call, and are not checked again.
        """
        expected = {"tokens", "lengths", "random_next", *(_MASK_MEMBERS if self._draws else ())}
        expected |= {"word_starts"} if self._has_words else set()
        members = dict(_members(data))
        if set(members) != expected:
            raise ValueError(f"its members are {sorted(members)}, not {sorted(expected)}")
        tokens_T = _array(members, "tokens", self._tokens, (tokens,))
        lengths_Nx2 = _array(members, "lengths", np.dtype("<u2"), (samples, 2))
        random_next_N = _array(members, "random_next", np.dtype("u1"), (samples,))
        word_starts_T = None
        if self._has_words:
            bits = _array(members, "word_starts", np.dtype("u1"), (-(-tokens // 8),))
            word_starts_T = np.unpackbits(bits, count=tokens).view(bool)
        block = Block(tokens_T, lengths_Nx2, random_next_N, self._masks(members, samples), word_starts_T)
        if not seen:
            self._check(block)
        return block

    def _masks(self, members: Mapping[str, memoryview], samples: int) -> tuple[Masks, ...]:
        if not self._draws:
            return ()
        counts_DxN = _array(members, "mask_counts", np.dtype("<u2"), (self._draws, samples))
        ends = list(accumulate(counts_DxN.sum(axis=1, dtype=np.int64).tolist()))
        positions = _array(members, "mask_positions", np.dtype("<u2"), (ends[-1],))
        shown = _array(members, "mask_tokens", self._tokens, (ends[-1],))
        spans = zip([0, *ends], ends, strict=False)
        return tuple(Masks(counts_DxN[d], positions[i:j], shown[i:j]) for d, (i, j) in enumerate(spans))

    def _check(self, block: Block) -> None:
        """Values that readers rely on."""
        first_N, total_N = block.lengths_Nx2[:, 0], block.lengths_Nx2[:, 1]
        if total_N.sum(dtype=np.int64) != len(block.tokens_T) or total_N.max(initial=0) > self._max_len:
            raise ValueError("its lengths do not fit its tokens")
        if (first_N > total_N).any() or (first_N < 2).any():
            raise ValueError("a first segment is longer than its sample")
        if block.tokens_T.max(initial=0) >= self._vocab_size:
            raise ValueError("a token id is outside the vocabulary")
        if block.random_next_N.max(initial=0) > 1:
            raise ValueError("an NSP label is neither 0 nor 1")
        for masks in block.masks:
            if (masks.positions_M >= np.repeat(total_N, masks.counts_N)).any():
                raise ValueError("a masked position lies outside its sample")
            if masks.tokens_M.max(initial=0) >= self._vocab_size:
                raise ValueError("a shown token id is outside the vocabulary")


class ShardReader:
    """Memory-mapped access to one shard. A block's crc32 and values are checked when it is first touched."""

    def __init__(self, directory: Path, entry: ShardEntry, manifest: Manifest) -> None:
        self.entry = entry
        self.path: Path | str = directory / entry.split / entry.name
        self._format = BlockFormat(manifest)
        self._seen = bytearray(len(entry.blocks))
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CorruptShard(f"{self.path}: cannot be read ({error}); copy or prepare the corpus again") from error
        if len(self._map) != entry.bytes:
            raise CorruptShard(
                f"{self.path}: {len(self._map)} bytes, not {entry.bytes} as listed; copy or prepare the corpus again"
            )
        self._view = memoryview(self._map)

    def block(self, number: int) -> Block:
        """Decode block `number`; arrays are read-only views into the file where the format allows."""
        blocks = self.entry.blocks
        start, size = int(blocks.offsets[number]), int(blocks.bytes[number])
        block = self._decoded(number, self._view[start : start + size], seen=bool(self._seen[number]))
        self._seen[number] = True
        return block

    def _decoded(self, number: int, data: memoryview, *, seen: bool = False) -> Block:
        """Block `number` of these bytes, checked against the manifest unless they were `seen` before."""
        blocks = self.entry.blocks
        try:
            if not seen and zlib.crc32(data) != blocks.crc32[number]:
                raise ValueError("its checksum differs from the manifest's")
            return self._format.decode(data, int(blocks.samples[number]), int(blocks.tokens[number]), seen=seen)
        except ValueError as error:
            where = f"{self.path}: block {number}"
            raise CorruptShard(f"{where}: {error}; copy or prepare the corpus again") from error


class RemoteShardReader(ShardReader):
    """Access by range to one shard of a corpus at an fsspec URL. A block is checked whenever it is fetched."""

    def __init__(self, url: str, entry: ShardEntry, manifest: Manifest) -> None:
        self.entry = entry
        self.path = self._url = f"{url}/{entry.split}/{entry.name}"
        self._format = BlockFormat(manifest)

    def block(self, number: int) -> Block:
        blocks = self.entry.blocks
        start, size = int(blocks.offsets[number]), int(blocks.bytes[number])
        try:
            data = storage.patiently(lambda: storage.read_range(self._url, start, start + size))
        except UserError as error:
            raise CorruptShard(f"{self._url}: cannot be read ({error})") from error
        part = data[start : start + size] if len(data) > size else data  # some servers know no ranges
        return self._decoded(number, memoryview(part))


def _members(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    """(name without key and .npy, payload) of a block's tar members. Ustar headers, regular files only."""
    position, key = 0, b""
    while position < len(data):
        header = bytes(data[position : position + _TAR_BLOCK])
        full, _, _ = header[:100].partition(b"\0")
        this_key, _, name = full.partition(b".")
        if len(header) != _TAR_BLOCK or header[156:157] not in (b"0", b"\0") or not name.endswith(b".npy"):
            raise ValueError("a tar header is not one that Cloze writes")
        if key and this_key != key:
            raise ValueError("its members bear different keys")
        key, size = this_key, int(header[124:136].strip(b" \0") or b"0", 8)
        start = position + _TAR_BLOCK
        if not 0 <= size <= len(data) - start:
            raise ValueError("a member reaches past the block")
        yield name[:-4].decode("ascii", "replace"), data[start : start + size]
        position = start + -(-size // _TAR_BLOCK) * _TAR_BLOCK


def _array(
    members: Mapping[str, memoryview], name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """The member as a view. dtype, shape and size are checked before anything is allocated; nothing is unpickled."""
    payload = members[name]
    header = _NPY_HEADER.match(payload[:256])
    if not header or int.from_bytes(header["size"], "little") != len(header["text"]):
        raise ValueError(f"{name}: not an array in version 1.0 of the npy format")
    found_dtype = header["dtype"].decode("ascii", "replace")
    found_shape = tuple(int(axis) for axis in header["shape"].split(b",") if axis)
    if found_dtype != dtype.str or found_shape != shape:
        raise ValueError(f"{name}: {found_dtype}{found_shape} where {dtype.str}{shape} belongs")
    body = payload[header.end() :]
    if len(body) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{name}: {len(body)} bytes do not hold {dtype}{shape}")
    return np.frombuffer(body, dtype).reshape(shape)


class OpenBlock(NamedTuple):
    """A decoded block and where each of its n samples lies in it."""

    block: Block
    # i32 [n, 4 + 2 * draws]: length of the first segment, label, first token, end; first mask and end of each draw
    table: npt.NDArray[np.int32]
    first_id: int


class Samples(NamedTuple):
    """N samples gathered from anywhere in a split, as they lie in the shards: unmasked, one after another."""

    tokens_T: npt.NDArray[np.integer]
    lengths_Nx2: npt.NDArray[np.uint16]
    random_next_N: npt.NDArray[np.uint8]
    ids_N: npt.NDArray[np.uint64]
    masks: Masks | None  # the baked draw that was asked for, where the shards hold it
    word_starts_T: npt.NDArray[np.bool_] | None = None  # where the masking needs to know


def open_block(block: Block, first_id: int) -> OpenBlock:
    columns: list[npt.NDArray[np.integer]] = [block.lengths_Nx2[:, 0], block.random_next_N]
    for counts_N in (block.lengths_Nx2[:, 1], *(masks.counts_N for masks in block.masks)):
        ends_N = counts_N.cumsum(dtype=np.int32)
        columns += [ends_N - counts_N, ends_N]
    return OpenBlock(block, np.stack(columns, axis=1, dtype=np.int32), first_id)


def collect(rows: Sequence[tuple[OpenBlock, int]], draw: int, dtype: np.dtype[Any]) -> Samples:
    """The samples at (block, index in it), with baked draw `draw` where the blocks hold it."""
    if not rows:
        return Samples(
            np.zeros(0, dtype), np.zeros((0, 2), np.uint16), np.zeros(0, np.uint8), np.zeros(0, np.uint64), None
        )
    blocks = [opened.block for opened, _ in rows]
    table_NxC = np.concatenate([opened.table[i : i + 1] for opened, i in rows])
    first_N, labels_N, starts_N, ends_N = table_NxC[:, :4].T
    spans = list(map(slice, starts_N.tolist(), ends_N.tolist()))
    words = [block.word_starts_T for block in blocks if block.word_starts_T is not None]
    masks = None
    if draw < len(blocks[0].masks):
        drawn = [block.masks[draw] for block in blocks]
        mask_starts_N, mask_ends_N = table_NxC[:, 4 + 2 * draw : 6 + 2 * draw].T
        places = list(map(slice, mask_starts_N.tolist(), mask_ends_N.tolist()))
        masks = Masks(
            (mask_ends_N - mask_starts_N).astype(np.uint16),
            _pieces([one.positions_M for one in drawn], places),
            _pieces([one.tokens_M for one in drawn], places).astype(np.uint32),
        )
    return Samples(
        _pieces([block.tokens_T for block in blocks], spans),
        np.stack([first_N, ends_N - starts_N], axis=1).astype(np.uint16),
        labels_N.astype(np.uint8),
        np.asarray([opened.first_id + i for opened, i in rows], np.uint64),
        masks,
        _pieces(words, spans) if words else None,
    )


def masks_of(samples: Samples, manifest: Manifest, draw: int, rates: MaskRates | None = None) -> Masks:
    """Draw `draw` of the samples' masks: the one that the shards hold if `samples` brought it, else the same, live.

    With `rates` of their own they are drawn live.
    """
    if samples.masks and not rates:
        return samples.masks
    return manifest.draw(samples.tokens_T, samples.lengths_Nx2, samples.ids_N, draw, samples.word_starts_T, rates)


def _pieces(arrays: Sequence[npt.NDArray[Any]], spans: Sequence[slice]) -> npt.NDArray[Any]:
    return np.concatenate([array[span] for array, span in zip(arrays, spans, strict=True)])


class Split:
    """Random access to the samples of one pass, or of `val`, by index in the order of the manifest.

    `place` is a directory, or as text the URL of one.
    """

    def __init__(self, place: Path | str, manifest: Manifest, split: str, *, cached_blocks: int = 8192) -> None:
        shards = manifest.split_shards(split)
        self.name, self.baked_draws = split, manifest.baked_draws
        self._place, self._manifest, self._shards = place, manifest, shards
        counts = [np.zeros(0, np.int64), *(shard.blocks.samples for shard in shards)]
        self._block_ends = np.concatenate(counts).cumsum()
        self._block_starts = self._block_ends - np.concatenate(counts)
        self._first_blocks = [0, *accumulate(len(shard.blocks) for shard in shards)]
        self._readers: dict[int, ShardReader] = {}
        self._cache: OrderedDict[int, OpenBlock] = OrderedDict()
        self._cached_blocks = cached_blocks

    def __len__(self) -> int:
        return int(self._block_ends[-1]) if len(self._block_ends) else 0

    def gather(self, indices_N: npt.NDArray[np.int64], draw: int) -> Samples:
        """The samples at `indices_N`, with baked draw `draw` if the shards hold it.

        Raises `CorruptShard` when a block touched for the first time does not match the manifest.
        """
        if len(indices_N) and not 0 <= int(indices_N.min()) <= int(indices_N.max()) < len(self):
            raise IndexError(f"sample index outside 0 … {len(self) - 1}")
        blocks_N = np.searchsorted(self._block_ends, indices_N, side="right")
        opened = [self._cache.get(number) or self._open(number) for number in blocks_N.tolist()]
        rows = list(zip(opened, (indices_N - self._block_starts[blocks_N]).tolist(), strict=True))
        return collect(rows, draw, token_dtype(self._manifest.tokenizer.vocab_size))

    def blocks(self) -> Iterator[tuple[ShardEntry, int, Block]]:
        """Every block in order, with its shard and its first sample's index there: for verifying and looking."""
        for shard in self._shards:
            reader = self._reader(shard)
            start = 0
            for number, samples in enumerate(shard.blocks.samples.tolist()):
                yield shard, start, reader.block(number)
                start += samples

    def _reader(self, shard: ShardEntry) -> ShardReader:
        kind = RemoteShardReader if isinstance(self._place, str) else ShardReader
        return kind(self._place, shard, self._manifest)  # type: ignore[arg-type]

    def _open(self, number: int) -> OpenBlock:
        shard_number = bisect_right(self._first_blocks, number) - 1
        shard, first_block = self._shards[shard_number], self._first_blocks[shard_number]
        reader = self._readers.get(shard_number)
        if reader is None:
            reader = self._readers[shard_number] = self._reader(shard)
        block = reader.block(number - first_block)
        first = int(self._block_starts[number] - self._block_starts[first_block])
        opened = open_block(block, (shard.id << _SAMPLE_BITS) + first)
        self._cache[number] = opened
        if len(self._cache) > self._cached_blocks:
            self._cache.popitem(last=False)
        return opened
