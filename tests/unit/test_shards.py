"""The block codec and its reader: round trips, plain webdataset, and everything a damaged or lying file can do."""

import hashlib
import io
import os
import pickle
import random
import shutil
import struct
import tarfile
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze.corpus.manifest import BlockIndex, Manifest, ShardEntry, read_manifest
from cloze.corpus.shards import Block, CorruptShard, ShardReader, Split, sample_ids, token_dtype, write_shard
from tests.support import default_masking, make_corpus, random_block, tokenizer_facts
from tests.unit.corpora import FUZZ

VOCAB = 61


def contract(**changes: Any) -> Manifest:
    """A manifest that says what a reader must know, and lists nothing."""
    values: dict[str, Any] = {
        "tokenizer": tokenizer_facts(VOCAB), "max_len": 24, "objective": "nsp", "masking": default_masking(),
        "baked_draws": 1, "seed": 0, "passes": 1, "source": {}, "documents": {}, "splits": {}, "shards": (),
    }  # fmt: skip
    return Manifest(**(values | changes))


def equal(one: Block, other: Block) -> bool:
    ours, theirs = ([*block[:3], *(part for masks in block.masks for part in masks)] for block in (one, other))
    return len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pass-00").mkdir()
    return tmp_path


def written(folder: Path, blocks: list[Block], name: str = "a.tar", shard_id: int = 0) -> ShardEntry:
    return write_shard(folder / "pass-00" / name, shard_id=shard_id, split="pass-00", name=name, blocks=blocks)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), max_size=4),
    st.sampled_from([30, 0x10000, 0x10001, 200_000]),
    st.integers(0, 3),
    st.sampled_from(["nsp", "none"]),
    st.integers(0, 2**32 - 1),
)
def test_round_trip(sizes: list[int], vocab_size: int, draws: int, objective: str, seed: int) -> None:
    rng = random.Random(seed)
    blocks = [
        random_block(rng, samples=n, max_len=24, vocab_size=vocab_size, objective=objective, baked_draws=draws)
        for n in sizes
    ]
    manifest = contract(tokenizer=tokenizer_facts(vocab_size), baked_draws=draws)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pass-00").mkdir()
        entry = written(folder, blocks)
        data = (folder / "pass-00" / "a.tar").read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert (entry.samples, entry.tokens) == (sum(sizes), sum(len(block.tokens_T) for block in blocks))
        reader = ShardReader(folder, entry, manifest)
        read = [reader.block(number) for number in range(len(sizes))]
        assert all(equal(a, b) for a, b in zip(blocks, read, strict=True))
        assert all(block.tokens_T.dtype == token_dtype(vocab_size) for block in read)


def test_a_shard_is_on_the_disk_when_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is synced before its writer returns: the caller's rename makes it count."""
    synced: dict[str, int] = {}
    monkeypatch.setattr(os, "fsync", lambda number: synced.update({_name_of(number): os.fstat(number).st_size}))
    entry = written(folder, [random_block(random.Random(1), samples=5, max_len=24, vocab_size=VOCAB)])
    assert synced == {"a.tar": entry.bytes}


def _name_of(descriptor: int) -> str:
    return Path(f"/proc/self/fd/{descriptor}").readlink().name


def test_ids_take_two_bytes_up_to_65536_tokens() -> None:
    assert [token_dtype(size).itemsize for size in (100, 0xFFFF, 0x10000, 0x10001)] == [2, 2, 2, 4]


def test_the_bytes_depend_on_the_content_alone(folder: Path) -> None:
    one, other = (
        written(folder, [random_block(random.Random(1), samples=9, max_len=24, vocab_size=VOCAB)], name)
        for name in ("a.tar", "b.tar")
    )
    assert replace(other, name="a.tar") == one
    assert (folder / "pass-00" / "a.tar").read_bytes() == (folder / "pass-00" / "b.tar").read_bytes()


def test_blocks_lie_where_the_index_says(folder: Path) -> None:
    rng = random.Random(2)
    entry = written(folder, [random_block(rng, samples=5, max_len=24, vocab_size=VOCAB) for _ in range(3)])
    data = (folder / "pass-00" / "a.tar").read_bytes()
    blocks = entry.blocks
    assert blocks.offsets.tolist() == [0, blocks.bytes[0], blocks.bytes[0] + blocks.bytes[1]]
    for offset, size, crc in zip(blocks.offsets, blocks.bytes, blocks.crc32, strict=True):
        assert zlib.crc32(data[offset : offset + size]) == crc
    assert data[blocks.offsets[2] + blocks.bytes[2] :] == bytes(1024)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_plain_webdataset_and_tar_read_it(folder: Path) -> None:
    rng = random.Random(3)
    blocks = [random_block(rng, samples=6, max_len=24, vocab_size=VOCAB, baked_draws=2) for _ in range(2)]
    path = folder / "pass-00" / "a.tar"
    written(folder, blocks, shard_id=12)
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 12
        assert tar.getnames()[0].startswith("000012-000000.")
    read = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == ["000012-000000", "000012-000001"]
    for sample, block in zip(read, blocks, strict=True):
        assert np.array_equal(sample["tokens.npy"], block.tokens_T)
        assert np.array_equal(sample["lengths.npy"], block.lengths_Nx2)
        assert np.array_equal(sample["random_next.npy"], block.random_next_N)
        assert np.array_equal(sample["mask_counts.npy"], np.stack([masks.counts_N for masks in block.masks]))
        for key, part in (("mask_positions.npy", 1), ("mask_tokens.npy", 2)):
            assert np.array_equal(sample[key], np.concatenate([masks[part] for masks in block.masks]))


# Gathering


@pytest.mark.parametrize("cached_blocks", [1, 8192])
@pytest.mark.parametrize("vocab_size", [61, 70_000])
def test_gather_equals_a_slow_list(tmp_path: Path, vocab_size: int, cached_blocks: int) -> None:
    manifest = make_corpus(
        tmp_path, samples=90, vocab_size=vocab_size, baked_draws=2, shards_per_split=3, samples_per_block=7
    )
    slow: list[tuple[list[int], list[int], int, int, list[list[tuple[int, int]]]]] = []
    for entry in manifest.split_shards("pass-00"):
        index = 0
        for number in range(len(entry.blocks.offsets)):
            block = ShardReader(tmp_path, entry, manifest).block(number)
            token, mask = 0, [0, 0]
            for i in range(len(block.lengths_Nx2)):
                length = int(block.lengths_Nx2[i, 1])
                draws = []
                for d, masks in enumerate(block.masks):
                    end = mask[d] + int(masks.counts_N[i])
                    draws.append(
                        list(
                            zip(
                                masks.positions_M[mask[d] : end].tolist(),
                                masks.tokens_M[mask[d] : end].tolist(),
                                strict=True,
                            )
                        )
                    )
                    mask[d] = end
                tokens = block.tokens_T[token : token + length].tolist()
                label, sample_id = int(block.random_next_N[i]), entry.id * 2**32 + index
                slow.append((tokens, block.lengths_Nx2[i].tolist(), label, sample_id, draws))
                token, index = token + length, index + 1
    assert len(slow) == 90

    split = Split(tmp_path, manifest, "pass-00", cached_blocks=cached_blocks)
    assert len(split) == 90
    rng = np.random.default_rng(0)
    for draw in (0, 1, 2):
        indices = rng.integers(0, 90, 40)
        got = split.gather(indices, draw)
        want = [slow[i] for i in indices]
        assert got.tokens_T.tolist() == [token for sample in want for token in sample[0]]
        assert got.lengths_Nx2.tolist() == [sample[1] for sample in want]
        assert got.random_next_N.tolist() == [sample[2] for sample in want]
        assert got.ids_N.tolist() == [sample[3] for sample in want]
        if draw == 2:  # not baked: to be drawn live
            assert got.masks is None
        else:
            assert got.masks is not None
            flat = [pair for sample in want for pair in sample[4][draw]]
            assert got.masks.counts_N.tolist() == [len(sample[4][draw]) for sample in want]
            assert list(zip(got.masks.positions_M.tolist(), got.masks.tokens_M.tolist(), strict=True)) == flat


def test_gather_nothing_and_outside(tmp_path: Path) -> None:
    split = Split(tmp_path, make_corpus(tmp_path, samples=5, val=0), "pass-00")
    assert len(split.gather(np.zeros(0, np.int64), 0).tokens_T) == 0
    for index in (-1, 5):
        with pytest.raises(IndexError):
            split.gather(np.asarray([0, index]), 0)


# Damage


def refused(action: Callable[[], object]) -> str:
    """The one line with which `action` is refused, having allocated next to nothing."""
    tracemalloc.start()
    try:
        with pytest.raises(CorruptShard) as caught:
            action()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000
    message = str(caught.value)
    assert "\n" not in message
    assert "copy or prepare the corpus again" in message
    return message


def read_all(folder: Path, entry: ShardEntry, manifest: Manifest) -> list[Block]:
    reader = ShardReader(folder, entry, manifest)
    return [reader.block(number) for number in range(len(entry.blocks.offsets))]


def test_every_flipped_byte_is_found(folder: Path) -> None:
    rng = random.Random(4)
    entry = written(
        folder, [random_block(rng, samples=8, max_len=24, vocab_size=VOCAB, baked_draws=1) for _ in range(2)]
    )
    path = folder / "pass-00" / "a.tar"
    data = path.read_bytes()
    inside = entry.blocks.offsets[1] + entry.blocks.bytes[1]
    for position in [0, inside - 1, *rng.sample(range(inside), 300)]:
        broken = bytearray(data)
        broken[position] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(CorruptShard, match=r"a\.tar: block [01]: its checksum differs"):
            read_all(folder, entry, contract())


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "folder"])
def test_a_file_of_another_size_is_refused(folder: Path, damage: str) -> None:
    block = random_block(random.Random(5), samples=8, max_len=24, vocab_size=VOCAB, baked_draws=1)
    entry = written(folder, [block])
    path = folder / "pass-00" / "a.tar"
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut": data[:-512], "longer": data + b"\0"}[damage])
    assert str(path) in refused(lambda: read_all(folder, entry, contract()))


def test_swapped_shards_of_one_size_are_refused(folder: Path) -> None:
    blocks = [
        random_block(random.Random(seed), samples=1, max_len=6, vocab_size=VOCAB, baked_draws=1) for seed in (1, 2)
    ]
    entries = [written(folder, [block], name) for block, name in zip(blocks, ("a.tar", "b.tar"), strict=True)]
    assert entries[0].bytes == entries[1].bytes
    one, other = folder / "pass-00" / "a.tar", folder / "pass-00" / "b.tar"
    one.rename(folder / "c"), other.rename(one), (folder / "c").rename(other)
    for entry in entries:
        assert "checksum" in refused(lambda entry=entry: read_all(folder, entry, contract()))


# Lies: the manifest's checksums are right, the content is not


def npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **({"version": (1, 0)} | options))
    return buffer.getvalue()


def npy_header(text: str, body: bytes = b"") -> bytes:
    header = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def honest() -> dict[str, bytes]:
    """Members of a right block of two samples of 4 and 5 tokens."""
    tokens = np.asarray([2, 9, 3, 10, 3, 2, 11, 12, 3], np.uint16)[[0, 1, 2, 4, 5, 6, 8, 7, 8]]
    return {
        "tokens.npy": npy(tokens),
        "lengths.npy": npy(np.asarray([[3, 4], [3, 5]], np.uint16)),
        "random_next.npy": npy(np.asarray([0, 1], np.uint8)),
        "mask_counts.npy": npy(np.asarray([[1, 1]], np.uint16)),
        "mask_positions.npy": npy(np.asarray([1, 3], np.uint16)),
        "mask_tokens.npy": npy(np.asarray([4, 4], np.uint16)),
    }


def tar_of(members: Mapping[str, bytes], key: str = "000000-000000.", **header: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name if name.startswith(("/", "..")) else key + name)
            info.size = len(payload)
            for attribute, value in header.items():
                setattr(info, attribute, value)
            tar.addfile(info, io.BytesIO(payload))
        return buffer.getvalue()[: tar.offset]


def listed(folder: Path, block: bytes, samples: int = 2, tokens: int = 9) -> ShardEntry:
    """Write a shard of one block and list it, checksums and all."""
    data = block + bytes(1024)
    (folder / "pass-00" / "a.tar").write_bytes(data)
    return ShardEntry(
        id=0,
        split="pass-00",
        name="a.tar",
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        samples=samples,
        tokens=tokens,
        blocks=BlockIndex(
            offsets=(0,), bytes=(len(block),), samples=(samples,), tokens=(tokens,), crc32=(zlib.crc32(block),)
        ),
    )


def test_the_honest_block_is_read(folder: Path) -> None:
    (block,) = read_all(folder, listed(folder, tar_of(honest())), contract())
    assert block.lengths_Nx2.tolist() == [[3, 4], [3, 5]]
    assert [masks.positions_M.tolist() for masks in block.masks] == [[1, 3]]


class Bomb:
    """Unpickling it fails the test."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pytest.fail, ("unpickled",)


TERA = "{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000,), }"
LIES: dict[str, dict[str, bytes | None]] = {
    "pickled array": {"tokens.npy": npy(np.asarray([Bomb()] * 9, dtype=object), allow_pickle=True)},
    "pickled member": {"tokens.pyd": pickle.dumps(Bomb())},
    "pickled instead": {"tokens.npy": None, "tokens.pkl": pickle.dumps(Bomb())},
    "float tokens": {"tokens.npy": npy(np.zeros(9, np.float16))},
    "signed tokens": {"tokens.npy": npy(np.zeros(9, np.int16))},
    "four bytes a token": {"tokens.npy": npy(np.zeros(9, np.uint32))},
    "big-endian tokens": {"tokens.npy": npy(np.zeros(9, ">u2"))},
    "structured tokens": {"tokens.npy": npy(np.zeros(9, [("a", "<u2")]))},
    "too few tokens": {"tokens.npy": npy(np.zeros(8, np.uint16))},
    "two dimensions": {"tokens.npy": npy(np.zeros((3, 3), np.uint16))},
    "column order": {"lengths.npy": npy(np.asfortranarray(np.asarray([[3, 4], [3, 5]], np.uint16)))},
    "terabyte header": {"tokens.npy": npy_header(TERA, bytes(18))},
    "header without end": {"tokens.npy": b"\x93NUMPY\x01\x00\xff\xff{'descr'"},
    "header of nothing": {"tokens.npy": npy_header("")},
    "header of nested brackets": {"tokens.npy": npy_header("(" * 190)},
    "header of minus signs": {"tokens.npy": npy_header("-" * 200 + "1")},
    "header with an open string": {"tokens.npy": npy_header("{'descr': '''")},
    "header with a bad indent": {"tokens.npy": npy_header("if 1:\n  1\n 2")},
    "header of Python 2": {"tokens.npy": npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (9L,), }")},
    "header that calls": {"tokens.npy": npy_header("__import__('os').abort()")},
    "version 2": {"tokens.npy": npy(np.zeros(9, np.uint16), version=(2, 0))},
    "body too long": {"tokens.npy": honest()["tokens.npy"] + b"\0"},
    "body too short": {"tokens.npy": honest()["tokens.npy"][:-1]},
    "no npy at all": {"tokens.npy": b"hello"},
    "empty member": {"tokens.npy": b""},
    "missing member": {"lengths.npy": None},
    "another member": {"word_starts.npy": npy(np.zeros(2, np.uint8))},
    "id outside the vocabulary": {"tokens.npy": npy(np.full(9, VOCAB, np.uint16))},
    "shown id outside the vocabulary": {"mask_tokens.npy": npy(np.asarray([4, VOCAB], np.uint16))},
    "lengths that do not add up": {"lengths.npy": npy(np.asarray([[3, 4], [3, 4]], np.uint16))},
    "sample of nine beyond max_len": {"lengths.npy": npy(np.asarray([[3, 0], [3, 9]], np.uint16))},
    "first segment longer than all": {"lengths.npy": npy(np.asarray([[5, 4], [3, 5]], np.uint16))},
    "first segment of one token": {"lengths.npy": npy(np.asarray([[1, 4], [3, 5]], np.uint16))},
    "label 2": {"random_next.npy": npy(np.asarray([0, 2], np.uint8))},
    "masked position outside": {"mask_positions.npy": npy(np.asarray([4, 3], np.uint16))},
    "too many masks": {"mask_counts.npy": npy(np.asarray([[1, 2]], np.uint16))},
    "two draws": {"mask_counts.npy": npy(np.asarray([[1, 1], [0, 0]], np.uint16))},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_member_is_refused(folder: Path, lie: str) -> None:
    members = {name: payload for name, payload in (honest() | LIES[lie]).items() if payload is not None}
    entry = listed(folder, tar_of(members))
    refused(lambda: read_all(folder, entry, contract()))


@pytest.mark.parametrize("name", ["../../tokens.npy", "/tokens.npy", "/etc/passwd", "..", "../x.npy"])
def test_a_member_that_points_elsewhere_is_refused(folder: Path, name: str) -> None:
    members = honest()
    payload = members.pop("tokens.npy")
    entry = listed(folder, tar_of({name: payload, **members}))
    refused(lambda: read_all(folder, entry, contract()))
    assert sorted(path.name for path in folder.rglob("*")) == ["a.tar", "pass-00"]


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_only_regular_members_are_read(folder: Path, kind: bytes) -> None:
    block = bytearray(tar_of(honest()))
    block[156:157] = kind
    entry = listed(folder, bytes(block))
    assert "tar header" in refused(lambda: read_all(folder, entry, contract()))


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "size", [b"-0000001000", b"-1", b"-777", b"77777777777", b"9", b"0x10", b"1_0", b"\x80" + b"\0" * 10 + b"\x01"]
)
def test_a_member_of_an_impossible_size_is_refused(folder: Path, size: bytes) -> None:
    block = bytearray(tar_of(honest()))
    block[124:136] = size.ljust(12, b"\0")
    entry = listed(folder, bytes(block))
    refused(lambda: read_all(folder, entry, contract()))


def test_members_of_two_samples_are_refused(folder: Path) -> None:
    members = list(honest().items())
    block = tar_of(dict(members[:3])) + tar_of(dict(members[3:]), key="000000-000001.")
    entry = listed(folder, block)
    assert "different keys" in refused(lambda: read_all(folder, entry, contract()))


@pytest.mark.parametrize(("samples", "tokens"), [(3, 9), (2, 10), (2**62, 9), (2, 2**62), (0, 0)])
def test_a_manifest_that_lies_about_counts_is_refused(folder: Path, samples: int, tokens: int) -> None:
    entry = listed(folder, tar_of(honest()), samples, tokens)
    refused(lambda: read_all(folder, entry, contract()))


@pytest.mark.parametrize("draws", [0, 2, 2**40])
def test_a_manifest_that_lies_about_draws_is_refused(folder: Path, draws: int) -> None:
    entry = listed(folder, tar_of(honest()))
    refused(lambda: read_all(folder, entry, contract(baked_draws=draws)))


PYTHONIC = "-0123456789(){}[]',:<u2iL \n"


@settings(max_examples=300 * FUZZ, deadline=None)
@given(st.data())
def test_any_block_is_read_or_refused(data: st.DataObject) -> None:
    """Bytes of a right block are overwritten, or there never was one; the checksums are right. Memory is bounded."""
    block = bytearray(tar_of(honest()) if data.draw(st.integers(0, 9)) else data.draw(st.binary(max_size=2000)))
    for _ in range(data.draw(st.integers(1, 3)) if len(block) > 2000 else 0):
        header = 512 * data.draw(st.sampled_from([0, 2, 4, 6, 8, 10]))
        near = data.draw(st.sampled_from([0, 100, 124, 156, 512, 520, 540, 600, 640]))
        position = header + near + data.draw(st.integers(0, 30))
        patch = data.draw(st.binary(min_size=1, max_size=6) | st.text(PYTHONIC, min_size=1, max_size=6).map(str.encode))
        block[position : position + len(patch)] = patch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pass-00").mkdir()
        entry = listed(folder, bytes(block))
        tracemalloc.start()
        with suppress(CorruptShard):
            (read,) = read_all(folder, entry, contract())
            assert len(read.tokens_T) == 9
            assert read.tokens_T.max() < VOCAB
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20


def test_a_shard_swapped_for_its_neighbour_after_the_manifest_was_read(tmp_path: Path) -> None:
    make_corpus(tmp_path, samples=40, val=0)
    manifest = read_manifest(tmp_path)
    shutil.copy(tmp_path / "pass-00" / "000000.tar", tmp_path / "pass-00" / "000001.tar")
    split = Split(tmp_path, manifest, "pass-00")
    assert len(split.gather(np.arange(20), 0).lengths_Nx2) == 20
    with pytest.raises(CorruptShard, match=r"000001\.tar"):
        split.gather(np.asarray([39]), 0)


def test_sample_ids_do_not_meet() -> None:
    assert sample_ids(3, 5, 2).tolist() == [3 * 2**32 + 5, 3 * 2**32 + 6]
