"""manifest.json: the contract between whoever writes shards and whoever reads them.

A corpus directory is complete when, and only when, it holds a manifest; readers trust nothing that it does not list.
Format versions 1, 2 (held-out splits with names) and 3 (tokenizers that lay samples out in other ways than BERT's, or
have more special tokens); docs/formats.md describes them field by field.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloze.corpus.masking import STRATEGIES, Masking, MaskRates, Masks, MaskVocabulary, Unmasked, draw_masks
from cloze.errors import UserError
from cloze.files import write_whole
from cloze.ownership import told

FORMAT = "cloze-shards"
VERSIONS = 1, 2, 3  # that are read; the lowest one that does is written
NAME = "manifest.json"
VAL = "val"
VAL_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")  # of a held-out split with a name: the folder is val-NAME

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.tar")
_SPLIT = re.compile(rf"pass-[0-9]{{2,}}|{VAL}(-{VAL_NAME.pattern})?")
_HEX = re.compile(r"[0-9a-f]{64}")
_NEW_FACTS = ("separators", "token_types", "never_drawn")  # of a tokenizer, since version 3
_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})",')


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What training must know of the tokenizer without loading it."""

    fingerprint: str  # sha256 over vocabulary and options
    vocab_size: int  # real tokens, before any padding of the embedding matrix
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    separators: int = 1  # [SEP]s between two segments: 1 or 2; 0 where it lays pairs out in a way that is not ours
    token_types: bool = True  # whether the second segment has the token type 1; else all are 0
    never_drawn: tuple[int, ...] = ()  # ids besides the special ones that are no random replacements, ascending

    @property
    def special_ids(self) -> tuple[int, ...]:
        return (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)

    @property
    def mask_vocabulary(self) -> MaskVocabulary:
        special_ids = (*self.special_ids, *self.never_drawn)
        return MaskVocabulary(self.mask_id, self.vocab_size, special_ids, self.separators)

    @property
    def is_plain(self) -> bool:
        """Whether it is as BERT's are: what format versions 1 and 2 know."""
        return (self.separators, self.token_types, self.never_drawn) == (1, True, ())


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockIndex:
    """Where the blocks of a shard lie: one entry per block in each column, i64; made from any sequences of integers.

    A terabyte of text has ten million blocks, hence arrays.
    """

    offsets: npt.NDArray[np.int64]  # first byte of the block's first tar header
    bytes: npt.NDArray[np.int64]  # up to the end of the padding of its last member
    samples: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    crc32: npt.NDArray[np.int64]  # over all those bytes

    def __post_init__(self) -> None:
        for name in _COLUMNS:
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.int64))

    def __len__(self) -> int:
        return len(self.offsets)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockIndex) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in _COLUMNS
        )


_COLUMNS = tuple(field.name for field in fields(BlockIndex))


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar file. Sample i of it has the sample id (id << 32) | i."""

    id: int
    split: str  # "pass-00", "pass-01", …, "val" or "val-NAME": the folder it lies in
    name: str  # a plain file name
    bytes: int
    sha256: str
    samples: int
    tokens: int
    blocks: BlockIndex


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """Totals of one pass or of a held-out split."""

    samples: int
    tokens: int  # specials counted in
    random_next: int  # samples whose second segment comes from another document
    length_histogram: tuple[int, ...]  # entry n: samples of n tokens; max_len + 1 entries


@dataclass(frozen=True, kw_only=True)
class Manifest:
    tokenizer: TokenizerFacts
    max_len: int  # tokens of the longest sample, specials counted in
    objective: str  # "nsp", "sop" or "none"
    masking: Masking
    baked_draws: int  # draws 0 … baked_draws-1 of each pass stand in the shards
    seed: int
    passes: int
    source: Mapping[str, Any]  # what the corpus was made from, for people
    documents: Mapping[str, Any]  # {"read": n, "kept": n, "dropped": {reason: n}, "bytes": n}
    splits: Mapping[str, SplitStatistics]
    shards: tuple[ShardEntry, ...]
    diagnosis: tuple[Mapping[str, Any], ...] = ()  # findings, for people: see `cloze.corpus.diagnosis`

    @property
    def version(self) -> int:
        """Of the format that it needs."""
        if not self.tokenizer.is_plain:
            return 3
        return 2 if any(is_held_out(split) and split != VAL for split in self.splits) else 1

    @property
    def held_out(self) -> tuple[str, ...]:
        """The splits that are not trained on, `val` first."""
        return tuple(sorted(filter(is_held_out, self.splits)))

    def split_shards(self, split: str) -> tuple[ShardEntry, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def draw(
        self,
        tokens_T: Any,
        lengths_Nx2: Any,
        ids_N: Any,
        draw: int,
        word_starts_T: Any,
        rates: MaskRates | None = None,
    ) -> Masks:
        """Masks of samples of this corpus, by the mask function."""
        vocabulary = self.tokenizer.mask_vocabulary
        return draw_masks(Unmasked(tokens_T, lengths_Nx2, ids_N, word_starts_T), draw, self.masking, vocabulary, rates)


def pass_name(pass_index: int) -> str:
    return f"pass-{pass_index:02d}"


def val_split(name: str) -> str:
    """The held-out split of a val source."""
    return f"{VAL}-{name}"


def val_name(split: str) -> str | None:
    """What `val_split` was given; None for `val` itself."""
    return split.removeprefix(f"{VAL}-") if split != VAL else None


def is_held_out(split: str) -> bool:
    return split == VAL or split.startswith(f"{VAL}-")


def manifest_json(manifest: Manifest) -> str:
    """The manifest's text: the same for the same content."""
    body = asdict(manifest)
    if manifest.version < 3:
        for field in _NEW_FACTS:
            del body["tokenizer"][field]
    return sealed_json({"format": FORMAT, "version": manifest.version, **body})


def sealed_json(body: Mapping[str, Any]) -> str:
    """`body` as JSON with a `checksum` over all its other fields: a flipped digit must not pass for another seed."""
    fields = {key: value for key, value in body.items() if key != "checksum"}
    digest = hashlib.sha256(_canonical(fields).encode()).hexdigest()
    return _canonical({**fields, "checksum": digest}) + "\n"


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), default=as_list)


def as_list(array: npt.NDArray[Any]) -> Any:
    """An array as JSON knows it."""
    return array.tolist()


def write_manifest(directory: Path, manifest: Manifest) -> str:
    """Write manifest.json atomically, after everything it lists; return its sha256 (hex)."""
    data = manifest_json(manifest).encode()
    write_whole(directory / NAME, data)
    return hashlib.sha256(data).hexdigest()


def manifest_sha256(directory: Path) -> str:
    return hashlib.sha256((directory / NAME).read_bytes()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json; `UserError` names the first thing that is wrong with it."""
    path = directory / NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if (other := told(directory)) and not (directory / ".work").is_dir():
            raise UserError(
                f"{directory}: is {other}, no corpus; name a directory that `python -m data_prep` finished"
            ) from None
        hint = (
            "its preparation is unfinished: run the same data_prep command again"
            if (directory / ".work").is_dir()
            else "name a directory that `python -m data_prep` finished"
        )
        raise UserError(f"{path}: not there; {hint}") from None
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error}); restore it or prepare the corpus again") from error
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, path: str) -> Manifest:
    """The manifest that `data` holds, checked; `path` is for the message."""
    try:
        body = json.loads(data, object_hook=_columns_as_arrays)
    except (ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({error}); restore it or prepare the corpus again") from error
    try:
        manifest = _parse(body)
        _check_seal(data)
        return manifest
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: {problem}; restore it or prepare the corpus again") from error


def _columns_as_arrays(table: dict[str, Any]) -> Any:
    """Each block index as soon as it is parsed: as Python integers they would all take ten times the memory."""
    if table.keys() != set(_COLUMNS):
        return table
    if not all(isinstance(column, list) and set(map(type, column)) <= {int} for column in table.values()):
        raise ValueError("a column of a block index is not a list of integers")
    return BlockIndex(**table)


def _check_seal(data: bytes) -> None:
    """What `sealed_json` wrote is the canonical text with one more field: without it, it must hash to that field."""
    found = _CHECKSUM.search(data)
    digest = hashlib.sha256()
    if found:
        digest.update(data[: found.start()])
        digest.update(memoryview(data)[found.end() : -1])
    if not found or digest.hexdigest().encode() != found[1] or data[-1:] != b"\n":
        raise ValueError("its checksum does not fit its content")


def _parse(body: Any) -> Manifest:
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError("not a manifest of Cloze shards")
    version = body["version"]
    if type(version) is not int or version not in VERSIONS:
        *others, last = map(str, VERSIONS)
        raise ValueError(f"format version {version!r:.50}, this Cloze reads {', '.join(others)} and {last}")
    manifest = Manifest(
        tokenizer=_tokenizer(body["tokenizer"], version),
        max_len=_count(body, "max_len"),
        objective=_text(body, "objective", re.compile("nsp|sop|none")),
        masking=Masking(
            strategy=_text(body["masking"], "strategy", re.compile("|".join(STRATEGIES))),
            probability=float(body["masking"]["probability"]),
            max_predictions=_count(body["masking"], "max_predictions"),
            seed=_integer(body["masking"], "seed"),
        ),
        baked_draws=_count(body, "baked_draws"),
        seed=_integer(body, "seed"),
        passes=_count(body, "passes"),
        source=dict(body["source"]),
        documents=dict(body["documents"]),
        splits={name: _split(name, value) for name, value in dict(body["splits"]).items()},
        shards=tuple(_shard(value) for value in body["shards"]),
        diagnosis=tuple(dict(value) for value in body.get("diagnosis", ())),  # corpora of before have none
    )
    if manifest.version > version:
        raise ValueError(f"format version {version}, which has no split {manifest.held_out[-1]}")
    _check(manifest)
    return manifest


def _tokenizer(table: Any, version: int) -> TokenizerFacts:
    facts = TokenizerFacts(
        fingerprint=_text(table, "fingerprint", _HEX),
        vocab_size=_count(table, "vocab_size"),
        pad_id=_count(table, "pad_id"),
        unk_id=_count(table, "unk_id"),
        cls_id=_count(table, "cls_id"),
        sep_id=_count(table, "sep_id"),
        mask_id=_count(table, "mask_id"),
    )
    if version < 3:
        return facts
    token_types = table["token_types"]
    if type(token_types) is not bool:
        raise ValueError(f"token_types is {token_types!r:.50}, neither true nor false")
    never_drawn = _counts(table, "never_drawn")
    return replace(facts, separators=_count(table, "separators"), token_types=token_types, never_drawn=never_drawn)


def _split(name: str, value: Any) -> SplitStatistics:
    if not _SPLIT.fullmatch(name):
        raise ValueError(f"split name {name!r}")
    return SplitStatistics(
        samples=_count(value, "samples"),
        tokens=_count(value, "tokens"),
        random_next=_count(value, "random_next"),
        length_histogram=_counts(value, "length_histogram"),
    )


def _shard(value: Any) -> ShardEntry:
    entry = ShardEntry(
        id=_count(value, "id"),
        split=_text(value, "split", _SPLIT),
        name=_text(value, "name", _SHARD_NAME),
        bytes=_count(value, "bytes"),
        sha256=_text(value, "sha256", _HEX),
        samples=_count(value, "samples"),
        tokens=_count(value, "tokens"),
        blocks=value["blocks"],
    )
    where = f"shard {entry.split}/{entry.name}"
    blocks = entry.blocks
    if not isinstance(blocks, BlockIndex):
        raise ValueError(f"{where}: no block index")
    columns = [getattr(blocks, name) for name in _COLUMNS]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{where}: the columns of its block index differ in length")
    largest = 2**62, 2**32, 2**32, 2**32, 2**32  # so that no sum of them has more than 63 bits
    if any(
        len(blocks) and not 0 <= column.min() <= column.max() < most
        for column, most in zip(columns, largest, strict=True)
    ):
        raise ValueError(f"{where}: a number of its block index is out of range")
    if blocks.samples.sum() != entry.samples or blocks.tokens.sum() != entry.tokens:
        raise ValueError(f"{where}: its blocks do not add up to its samples and tokens")
    ends = blocks.offsets + blocks.bytes
    apart = (blocks.offsets[1:] >= ends[:-1]).all() and (blocks.offsets % 512 == 0).all()
    if not apart or ends.max(initial=0) > entry.bytes:
        raise ValueError(f"{where}: its blocks overlap or lie outside the file")
    return entry


def _check(manifest: Manifest) -> None:
    """Totals and ids must agree with each other."""
    facts = manifest.tokenizer
    if not all(special < facts.vocab_size for special in facts.special_ids):
        raise ValueError("a special token's id is outside the vocabulary")
    if facts.separators > 2 or (facts.separators == 0 and manifest.objective != "none"):
        raise ValueError(f"separators {facts.separators}, objective {manifest.objective}")
    if not all(token < facts.vocab_size for token in facts.never_drawn):
        raise ValueError("an id that is never drawn is outside the vocabulary")
    if facts.vocab_size > 2**31:
        raise ValueError(f"vocab_size {facts.vocab_size}: token ids have 31 bits")
    if any(max(shard.id, shard.samples) >= 2**32 for shard in manifest.shards):
        raise ValueError("a shard's id or count of samples has more than 32 bits")
    if len({shard.id for shard in manifest.shards}) != len(manifest.shards):
        raise ValueError("two shards bear the same id")
    if len({(shard.split, shard.name) for shard in manifest.shards}) != len(manifest.shards):
        raise ValueError("two shards bear the same name")
    if not 5 <= manifest.max_len <= 0xFFFF:
        raise ValueError(f"max_len {manifest.max_len}")
    if not 0 < manifest.masking.probability <= 1:
        raise ValueError(f"masking.probability {manifest.masking.probability}")
    passes = len(set(manifest.splits) - set(manifest.held_out))
    if manifest.passes != passes:
        raise ValueError(f"{manifest.passes} passes, but statistics of {passes}")
    names = {shard.split for shard in manifest.shards} | {pass_name(p) for p in range(manifest.passes)}
    if not names <= set(manifest.splits):
        raise ValueError(f"no statistics for {sorted(names - set(manifest.splits))}")
    for name, split in manifest.splits.items():
        shards = manifest.split_shards(name)
        if (sum(s.samples for s in shards), sum(s.tokens for s in shards)) != (split.samples, split.tokens):
            raise ValueError(f"split {name}: its shards do not add up to its statistics")


def _integer(table: Any, key: str) -> int:
    value = table[key]
    if type(value) is not int:
        raise ValueError(f"{key} is {value!r:.50}, not an integer")
    return value


def _count(table: Any, key: str) -> int:
    value = _integer(table, key)
    if not 0 <= value < 2**63:
        raise ValueError(f"{key} is {value!r:.50}, not a count")
    return value


def _counts(table: Any, key: str) -> tuple[int, ...]:
    values = table[key]
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        raise ValueError(f"{key} is not a list of counts")
    return tuple(values)


def _text(table: Any, key: str, pattern: re.Pattern[str]) -> str:
    value = table[key]
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{key} is {value!r:.50}")
    return value
