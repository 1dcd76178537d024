"""The stages of a preparation as tasks: pure functions of (plan, number), whose results appear whole or not at all.

sample -> (driver trains a tokenizer) -> map -> reduce -> finish. Who runs a task, when, and how often, changes nothing:
a result is written under a temporary name and renamed, so killing and running again is always safe.

Knows nothing of processes, progress or Hydra.
"""

import errno
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum, auto
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.buckets import BucketWriter, Documents, read_bucket, read_facts, select
from data_prep.cleaning import filters_for, judge, repair
from data_prep.config import MaskingConfig, MaskingStrategy, SourceConfig
from data_prep.encoder import Encoder, Ids
from data_prep.errors import DiskError, UserError
from data_prep.manifest import (
    NAME,
    VAL,
    BlockIndex,
    Manifest,
    ShardEntry,
    SplitStatistics,
    TokenizerFacts,
    as_list,
    pass_name,
    write_manifest,
)
from data_prep.masking import Masking, draw_masks, mix64
from data_prep.near import (
    NUM_VALUES,
    Signatures,
    near_duplicates,
    read_dropped,
    signature,
    write_dropped,
    write_signatures,
)
from data_prep.pairs import SPECIALS_OF_A_PAIR, Bucket, Samples, assemble, make_samples, sample_lengths
from data_prep.plan import PLAN, Plan, clear_up, given_tokenizer, spelling_of
from data_prep.ragged import Ints, offsets
from data_prep.sentences import cut_by, split_sentences
from data_prep.shards import BLOCK_SAMPLES, Block, sample_ids, token_dtype, write_shard
from data_prep.sources import Bad, read
from data_prep.storage import upload
from data_prep.tokenizer import WordPiece, load_tokenizer, save_tokenizer, train_tokenizer
from data_prep.words import WordEncoder

MAX_DOCUMENT_CHARACTERS = 2**20  # a longer document is cut, at a sentence end, into documents that scatter apart

_BATCH_CHARACTERS = 2**18  # encoded at a time
_SAMPLED_TASKS = 64  # map tasks from whose beginnings the tokenizer learns
_BAD = (
    "bad_json",
    "bad_xml",
    "no_text_field",
    "line_too_long",
    "unparsable",
)  # reasons that count towards max_bad_fraction
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class Stage(StrEnum):
    sample = auto()
    map = auto()
    near = auto()
    reduce = auto()


def num_tasks(plan: Plan, stage: Stage) -> int:
    if stage is Stage.sample:
        return min(len(plan.tasks), _SAMPLED_TASKS)
    if stage is Stage.map:
        return len(plan.tasks)
    return plan.num_buckets + (plan.num_val_buckets if stage is Stage.reduce else 0)


def result_path(plan: Plan, stage: Stage, number: int) -> Path:
    """What is there when, and only when, the task is done."""
    return plan.work / stage / f"{number:06d}"


def run_task(plan: Plan, stage: Stage, number: int) -> None:
    """Do one task. Raises `UserError` for bad input, `DiskError` for a full disk."""
    with finished_elsewhere(plan), disk_errors(plan), committed(plan, result_path(plan, stage, number)) as path:
        run = {Stage.sample: _sample, Stage.map: _map, Stage.near: _near, Stage.reduce: _reduce}[stage]
        run(plan, number, path)


@contextmanager
def finished_elsewhere(plan: Plan) -> Iterator[None]:
    """Where two calls do the same work, one may finish the corpus, and clear up, under the other's feet: no harm."""
    try:
        yield
    except FileNotFoundError:
        if (plan.work / PLAN).exists():
            raise


@contextmanager
def disk_errors(plan: Plan) -> Iterator[None]:
    """Tell a full disk, and a place where nothing can be written, from our own bugs."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskError(f"out={plan.out}: {error.strerror}; make room and run the same command again") from error
        if error.errno in _UNUSABLE:
            raise UserError(f"out={plan.out}: {error.strerror}: {error.filename}; name another directory") from error
        raise


@contextmanager
def committed(plan: Plan, path: Path) -> Iterator[Path]:
    """A temporary file to write; when the block ends well it is synced and becomes `path`, else it is removed.

    What belongs to a corpus whose `out` is a URL is uploaded instead of renamed.
    """
    temporary = plan.work / "tmp" / f"{os.uname().nodename}-{os.getpid()}-{path.parent.name}-{path.name}"
    for folder in (temporary.parent, path.parent):
        folder.mkdir(exist_ok=True)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if plan.remote and not path.is_relative_to(plan.work):
            upload(temporary, f"{plan.remote}/{path.relative_to(plan.out).as_posix()}")
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# -- documents ------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A document, or a part of a long one, cleaned and cut into sentences."""

    sentences: list[str]
    digest: bytes  # 16 bytes
    origin: int
    num_characters: int


class _Tally:
    """What became of the documents that a task read."""

    def __init__(self) -> None:
        self.read = self.bytes = self.bad = 0
        self.dropped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        self.first_bad: str | None = None

    def drop(self, reason: str, location: str) -> None:
        self.dropped[reason] += 1
        if reason in _BAD:
            self.bad += 1
            self.first_bad = self.first_bad or f"{reason} at {location}"


def _pieces(plan: Plan, task: int, tally: _Tally) -> Iterator[_Piece]:
    """The documents of a map task that are kept."""
    source = plan.sources[_source_of(plan, task)]
    clean = plan.config.clean
    filters = filters_for(
        source.min_characters,
        clean.scripts,
        clean.min_script_share,
        clean.max_symbols,
        clean.max_repeated_lines,
    )
    cut = cut_by(plan.config.sentences, plan.config.language)
    for item in read(plan.files, plan.tasks[task], source):
        tally.read += 1
        if isinstance(item, Bad):
            tally.drop(item.reason, item.location)
            continue
        text, repairs = repair(item.text, clean.nfc)
        tally.repaired.update(repairs + ("invalid_utf8",) * item.repaired)
        verdict = judge(text, filters)
        if verdict is not True:
            tally.drop(verdict[1], item.location)
            continue
        sentences = split_sentences(text, cut)
        parts = [sentences] if len(text) <= MAX_DOCUMENT_CHARACTERS else list(_parts(sentences))
        tally.read += len(parts) - 1
        for part in parts:
            data = (text if len(parts) == 1 else "\n".join(part)).encode()
            tally.bytes += len(data)
            yield _Piece(part, blake2b(data, digest_size=16).digest(), item.origin, len(data))


def _source_of(plan: Plan, task: int) -> int:
    return plan.files[plan.tasks[task][0].file].source


def _parts(sentences: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    characters = 0
    for sentence in sentences:
        part.append(sentence)
        characters += len(sentence)
        if characters >= MAX_DOCUMENT_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += piece.num_characters
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# -- sample: text for the tokenizer to learn from -------------------------------------------------------------------


def _sample(plan: Plan, number: int, path: Path) -> None:
    tasks = num_tasks(plan, Stage.sample)
    room = plan.config.tokenizer.sample_mib * 2**20 // tasks
    with path.open("w", encoding="utf-8") as file:
        for piece in _pieces(plan, number * len(plan.tasks) // tasks, _Tally()):
            for sentence in piece.sentences:
                file.write(sentence + "\n")
            room -= piece.num_characters
            if room <= 0:
                return


def make_tokenizer(plan: Plan) -> TokenizerFacts:
    """Put the tokenizer that was given, or one trained on the samples, into `out/tokenizer`, once."""
    config, directory = plan.config.tokenizer, plan.out / "tokenizer"
    if directory.is_dir():
        tokenizer = load_tokenizer(directory)
    else:
        if config.path is not None:
            tokenizer = given_tokenizer(config)
        else:
            tokenizer = train_tokenizer(
                lambda: _sampled_text(plan),
                config.vocab_size,
                spelling_of(config),
                min_frequency=config.min_frequency,
                limit_alphabet=config.limit_alphabet,
            )
        temporary = plan.work / f"tokenizer-{os.getpid()}"
        temporary.mkdir(exist_ok=True)
        save_tokenizer(tokenizer, temporary, plan.config.max_len)
        temporary.rename(directory)
    return tokenizer.facts


@lru_cache(maxsize=1)
def _tokenizer(directory: Path) -> WordPiece:
    """That of a corpus, once it is there. Loading costs as much as encoding a megabyte."""
    return load_tokenizer(directory)


def _sampled_text(plan: Plan) -> Iterator[str]:
    for number in range(num_tasks(plan, Stage.sample)):
        with result_path(plan, Stage.sample, number).open(encoding="utf-8") as file:
            while lines := file.readlines(2**14):
                yield "".join(lines)


# -- map: input -> encoded documents, scattered -----------------------------------------------------------------------


Encode = Callable[[Sequence[str]], tuple[Ids, Ints, npt.NDArray[np.bool_]]]


@lru_cache(maxsize=1)
def _encode(directory: Path, masking: MaskingConfig) -> tuple[Encode, TokenizerFacts]:
    """One per process: the encoder's memory is worth keeping."""
    tokenizer = _tokenizer(directory)
    encoder = Encoder(tokenizer.backend)
    if masking.strategy is MaskingStrategy.token:
        return lambda sentences: (*encoder.encode(sentences), np.zeros(0, bool)), tokenizer.facts
    return WordEncoder(encoder, tokenizer.backend, masking.chinese_words).encode, tokenizer.facts


def _map(plan: Plan, number: int, path: Path) -> None:
    encode, facts = _encode(plan.out / "tokenizer", plan.config.masking)
    tally = _Tally()
    longest = plan.config.max_len - SPECIALS_OF_A_PAIR
    with path.open("wb") as file:
        digests, signatures = bytearray(), array("I")
        writer = BucketWriter(file, plan.num_buckets + plan.num_val_buckets)
        for batch in _batches(_pieces(plan, number, tally)):
            documents = _encoded(batch, encode, longest, token_dtype(facts.vocab_size))
            documents = documents._replace(sources_D=np.full(len(batch), _source_of(plan, number), np.uint16))
            full_D = np.flatnonzero(documents.sentences_D)
            if len(full_D) < len(batch):
                tally.dropped["no_tokens"] += len(batch) - len(full_D)
                documents = select(documents, full_D)
            writer.add(documents, _buckets(plan, documents.digests_Dx2))
            if plan.config.clean.near_duplicates is not None:
                for piece in batch:
                    digests += piece.digest
                    signatures.extend(signature(" ".join(piece.sentences)))
        writer.finish(vars(tally))
    if plan.config.clean.near_duplicates is not None:
        found = Signatures(
            np.frombuffer(digests, "<u8").reshape(-1, 2), np.frombuffer(signatures, np.uint32).reshape(-1, NUM_VALUES)
        )
        with committed(plan, _signatures_path(plan, number)) as signatures_path:
            write_signatures(signatures_path, found)


def _signatures_path(plan: Plan, number: int) -> Path:
    return plan.work / "signatures" / f"{number:06d}"


def _near(plan: Plan, number: int, path: Path) -> None:
    threshold = plan.config.clean.near_duplicates
    assert threshold is not None
    maps = (_signatures_path(plan, task) for task in range(num_tasks(plan, Stage.map)))
    dropped_Dx2 = near_duplicates(maps, number, num_tasks(plan, Stage.near), threshold)
    write_dropped(path, dropped_Dx2, _buckets(plan, dropped_Dx2), plan.num_buckets + plan.num_val_buckets)


def _encoded(batch: list[_Piece], encode: Encode, longest: int, dtype: np.dtype[Any]) -> Documents:
    """Encode documents. Sentences without tokens vanish; those of more than `longest` tokens are cut, not truncated."""
    tokens_T, lengths_S, starts_T = encode([sentence for piece in batch for sentence in piece.sentences])
    document_S = np.repeat(np.arange(len(batch)), [len(piece.sentences) for piece in batch])
    pieces_S = -(-lengths_S // longest)  # 0 where there are no tokens
    document_S = np.repeat(document_S, pieces_S)
    last_S = np.cumsum(pieces_S)[pieces_S > 0] - 1
    cut_S = np.full(len(document_S), longest)
    cut_S[last_S] = (lengths_S - longest * (pieces_S - 1))[pieces_S > 0]
    return Documents(
        np.frombuffer(b"".join(piece.digest for piece in batch), "<u8").reshape(-1, 2),
        np.fromiter((piece.origin for piece in batch), np.uint64, len(batch)),
        np.zeros(len(batch), np.uint16),
        np.bincount(document_S, minlength=len(batch)).astype(np.uint32),
        cut_S.astype(np.uint16),
        tokens_T.astype(dtype),
        starts_T,
    )


def _buckets(plan: Plan, digests_Dx2: npt.NDArray[np.uint64]) -> Ints:
    """A document's bucket follows from its text alone: equal texts meet, and none is both trained on and held out."""
    held_out_D = digests_Dx2[:, 0] < np.uint64(int(plan.config.val_fraction * 2**64))
    choice_D = digests_Dx2[:, 1]
    training_D = choice_D % np.uint64(plan.num_buckets)
    val_D = np.uint64(plan.num_buckets) + choice_D % np.uint64(max(1, plan.num_val_buckets))
    return np.where(held_out_D, val_D, training_D).astype(np.int64)


def document_statistics(plan: Plan) -> dict[str, Any]:
    """What the map tasks read and dropped. Raises `UserError` if too much is malformed, or nothing is left."""
    tallies = [read_facts(result_path(plan, Stage.map, n)) for n in range(num_tasks(plan, Stage.map))]
    sources = []
    for number, source in enumerate(plan.sources):
        mine = [tally for task, tally in enumerate(tallies) if _source_of(plan, task) == number]
        sources.append(_source_statistics(source, mine))
    total = {key: sum(source[key] for source in sources) for key in ("read", "bytes")}
    dropped = sum((Counter(source["dropped"]) for source in sources), Counter[str]())
    repaired = sum((Counter(source["repaired"]) for source in sources), Counter[str]())
    kept = total["read"] - dropped.total()
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "there are none"
        raise UserError(f"source: no document is left to train on ({reasons}); name files that hold text")
    return {
        "read": total["read"],
        "kept": kept,
        "bytes": total["bytes"],
        "dropped": dict(dropped),
        "repaired": dict(repaired),
        "sources": sources,
    }


def _source_statistics(source: SourceConfig, tallies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was read of one source. Raises `UserError` if too much of it is malformed."""
    read, size, bad = (sum(tally[key] for tally in tallies) for key in ("read", "bytes", "bad"))
    if bad > source.max_bad_fraction * read:
        first = next(tally["first_bad"] for tally in tallies if tally["first_bad"])
        raise UserError(
            f"source: {bad} of {read} items are malformed (first: {first}), more than "
            f"source.max_bad_fraction={source.max_bad_fraction}; mend the input or raise the limit"
        )
    dropped = sum((Counter(tally["dropped"]) for tally in tallies), Counter[str]())
    return {
        "kind": source.kind,
        "paths": list(source.paths),
        "weight": source.weight,
        "read": read,
        "kept": read - dropped.total(),
        "bytes": size,
        "dropped": dict(dropped),
        "repaired": dict(sum((Counter(tally["repaired"]) for tally in tallies), Counter[str]())),
    }


# -- reduce: the documents of a bucket -> shards ----------------------------------------------------------------------


class _Target(NamedTuple):
    """A shard to write from a bucket."""

    split: str
    name: str
    shard_id: int  # pass-major, val last
    pass_index: int


def _targets(plan: Plan, bucket: int) -> list[_Target]:
    passes, buckets = plan.config.passes, plan.num_buckets
    if bucket >= buckets:
        return [_Target(VAL, f"shard-{bucket - buckets:05d}.tar", (passes - 1) * buckets + bucket, 0)]
    return [_Target(pass_name(p), f"shard-{bucket:05d}.tar", p * buckets + bucket, p) for p in range(passes)]


def _reduce(plan: Plan, bucket: int, path: Path) -> None:
    facts = _tokenizer(plan.out / "tokenizer").facts
    maps = (result_path(plan, Stage.map, number) for number in range(num_tasks(plan, Stage.map)))
    num_buckets = plan.num_buckets + plan.num_val_buckets
    found = read_bucket(maps, bucket, num_buckets, token_dtype(facts.vocab_size))
    documents = _distinct(found)
    sources = len(plan.sources)
    again = np.bincount(found.sources_D, minlength=sources) - np.bincount(documents.sources_D, minlength=sources)
    del found
    distinct = np.bincount(documents.sources_D, minlength=sources)
    if plan.config.clean.near_duplicates is not None:
        near = (result_path(plan, Stage.near, number) for number in range(num_tasks(plan, Stage.near)))
        dropped = read_dropped(near, bucket, num_buckets)
        stays_D = [digest.tobytes() not in dropped for digest in documents.digests_Dx2]
        documents = select(documents, np.flatnonzero(stays_D))
    targets = _targets(plan, bucket)
    shards = [_make_shard(plan, facts, _weighted(plan, documents, t), bucket, t) for t in targets]
    tokens_D = np.diff(offsets(documents.lengths_S)[offsets(documents.sentences_D)])
    result = {
        "duplicate": again.tolist(),  # per source
        "near_duplicate": (distinct - np.bincount(documents.sources_D, minlength=sources)).tolist(),
        "tokens": np.bincount(documents.sources_D, tokens_D, minlength=sources).astype(int).tolist(),
        "shards": [shard for shard in shards if shard],
    }
    path.write_text(json.dumps(result, default=as_list))


def _weighted(plan: Plan, documents: Documents, target: _Target) -> Documents:
    """The documents of one pass, each as often as its source's weight says; held-out ones once.

    Weight w makes floor(w) copies, and one more of the share w - floor(w) that a hash of text and pass picks.
    """
    weights_D = np.asarray([source.weight for source in plan.sources])[documents.sources_D]
    if target.split == VAL or (weights_D == 1).all():
        return documents
    key_D = documents.digests_Dx2[:, 0] ^ (documents.digests_Dx2[:, 1] >> np.uint64(1))
    share_D = mix64(key_D + np.uint64(target.pass_index + 1)).astype(np.float64) / 2**64
    copies_D = np.floor(weights_D) + (share_D < weights_D % 1)
    return select(documents, np.repeat(np.arange(len(copies_D)), copies_D.astype(np.int64)))


def _distinct(documents: Documents) -> Documents:
    """Each text once, in the order of the digests: an order that no timing and no cutting into tasks can change."""
    order_D = np.lexsort(
        (documents.origins_D, documents.sources_D, documents.digests_Dx2[:, 1], documents.digests_Dx2[:, 0])
    )
    sorted_Dx2 = documents.digests_Dx2[order_D]
    again_D = np.zeros(len(order_D), bool)
    again_D[1:] = (sorted_Dx2[1:] == sorted_Dx2[:-1]).all(axis=1)
    return select(documents, order_D[~again_D])


def _make_shard(
    plan: Plan, facts: TokenizerFacts, documents: Documents, bucket: int, target: _Target
) -> dict[str, Any] | None:
    """Pair, mask, shuffle and write; returns what the manifest will say of the shard. None if it would be empty."""
    config = plan.config
    texts = Bucket(documents.sentences_D.astype(np.int64), documents.lengths_S.astype(np.int64), documents.origins_D)
    key = (config.seed, target.pass_index, bucket)
    samples = make_samples(config.objective, texts, config.max_len, config.short_seq_prob, key)
    if not len(samples.label_N):
        return None
    blocks = _blocks(plan, facts, samples, documents, target.shard_id)
    with committed(plan, plan.out / target.split / target.name) as path:
        entry = write_shard(path, shard_id=target.shard_id, split=target.split, name=target.name, blocks=blocks)
    lengths_N = sample_lengths(samples)[:, 1]
    return {
        "entry": asdict(entry),
        "random_next": int(samples.label_N.sum()),
        "length_histogram": np.bincount(lengths_N, minlength=config.max_len + 1).tolist(),
    }


def _blocks(
    plan: Plan, facts: TokenizerFacts, samples: Samples, documents: Documents, shard_id: int
) -> Iterator[Block]:
    masking = masking_of(plan)
    for start in range(0, len(samples.label_N), BLOCK_SAMPLES):
        rows = slice(start, start + BLOCK_SAMPLES)
        part = Samples(samples.a_Nx2[rows], samples.b_Nx2[rows], samples.label_N[rows])
        tokens_T, lengths_Nx2 = assemble(part, documents.tokens_T, facts.cls_id, facts.sep_id)
        ids_N = sample_ids(shard_id, start, len(part.label_N))
        starts_T = None
        if masking.strategy != MaskingStrategy.token:  # the specials count as words of their own
            starts_T = assemble(part, documents.starts_T.astype(np.uint8), 1, 1)[0].astype(bool)
        masks = tuple(
            draw_masks(tokens_T, lengths_Nx2, ids_N, draw, masking, facts.mask_vocabulary, starts_T)
            for draw in range(plan.config.masking.baked_draws)
        )
        yield Block(tokens_T, lengths_Nx2, part.label_N, masks, starts_T)


def masking_of(plan: Plan) -> Masking:
    """What the manifest records of masking, and every later draw obeys."""
    masking = plan.config.masking
    return Masking(
        strategy=masking.strategy,
        probability=masking.probability,
        max_predictions=plan.config.max_predictions,
        seed=plan.config.seed,
    )


# -- finish: the manifest ---------------------------------------------------------------------------------------------


def finish(plan: Plan, facts: TokenizerFacts) -> Manifest:
    """Merge what the tasks left, write manifest.json last, clear up. Raises `UserError` if there are no samples."""
    config = plan.config
    documents = document_statistics(plan)
    results = [json.loads(result_path(plan, Stage.reduce, n).read_text()) for n in range(num_tasks(plan, Stage.reduce))]
    for number, source in enumerate(documents["sources"]):
        source["tokens"] = sum(result["tokens"][number] for result in results)
        for reason in ("duplicate", "near_duplicate"):
            count = sum(result[reason][number] for result in results)
            for table in (source, documents) if count else ():
                table["kept"] -= count
                table["dropped"][reason] = table["dropped"].get(reason, 0) + count
    shards = sorted((shard for result in results for shard in result["shards"]), key=lambda shard: shard["entry"]["id"])
    splits = {
        split: _split_statistics([shard for shard in shards if shard["entry"]["split"] == split])
        for split in sorted({shard["entry"]["split"] for shard in shards})
    }
    if pass_name(0) not in splits:
        raise UserError(
            f"source: {documents['kept']} documents make no training sample; add text, or lower val_fraction"
        )
    manifest = Manifest(
        tokenizer=facts,
        max_len=config.max_len,
        objective=config.objective,
        masking=masking_of(plan),
        baked_draws=config.masking.baked_draws,
        seed=config.seed,
        passes=config.passes,
        source={
            "kind": "+".join(source.kind for source in plan.sources),
            "paths": [path for source in plan.sources for path in source.paths],
            "files": len(plan.files),
            "bytes": sum(file.bytes for file in plan.files),
            "plan_sha256": plan.sha256(),
        },
        documents=documents,
        splits=splits,
        shards=tuple(_entry(shard["entry"]) for shard in shards),
    )
    if plan.remote:
        for file in sorted((plan.out / "tokenizer").iterdir()):
            upload(file, f"{plan.remote}/tokenizer/{file.name}")
        write_manifest(plan.work, manifest)
        upload(plan.work / NAME, f"{plan.remote}/{NAME}")
    else:
        write_manifest(plan.out, manifest)
    clear_up(plan)
    return manifest


def _split_statistics(shards: list[dict[str, Any]]) -> SplitStatistics:
    return SplitStatistics(
        samples=sum(shard["entry"]["samples"] for shard in shards),
        tokens=sum(shard["entry"]["tokens"] for shard in shards),
        random_next=sum(shard["random_next"] for shard in shards),
        length_histogram=tuple(map(sum, zip(*(shard["length_histogram"] for shard in shards), strict=True))),
    )


def _entry(table: dict[str, Any]) -> ShardEntry:
    return ShardEntry(**{**table, "blocks": BlockIndex(**table["blocks"])})
