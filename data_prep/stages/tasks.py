"""The stages of a preparation as tasks: pure functions of (plan, number), whose results appear whole or not at all.

sample -> (driver trains a tokenizer) -> map -> near -> reduce. Who runs a task, when, and how often, changes nothing: a
result is written under a temporary name and renamed, so killing and running again is always safe.

Knows nothing of processes, progress or Hydra.
"""

import errno
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from enum import StrEnum, auto
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.corpus.manifest import VAL, TokenizerFacts, as_list, pass_name
from cloze.corpus.masking import Masking, draw_masks, mix64
from cloze.corpus.ragged import Ints, offsets
from cloze.corpus.shards import BLOCK_SAMPLES, Block, sample_ids, token_dtype, write_shard
from cloze.corpus.tokenizer import WordPiece, load_tokenizer, save_tokenizer
from cloze.errors import DiskError, UserError
from cloze.storage import put
from data_prep.config import MaskingConfig, MaskingStrategy
from data_prep.plan import MOST_BUCKETS, PLAN, Plan, finished_manifest, given_tokenizer, spelling_of
from data_prep.sources.files import FOREIGN, Bad, read
from data_prep.stages.buckets import BucketWriter, Documents, concatenate, read_bucket, select
from data_prep.stages.near_duplicates import VALUE, band_records, near_duplicates
from data_prep.stages.pairs import SPECIALS_OF_A_PAIR, Bucket, Samples, assemble, make_samples, sample_lengths
from data_prep.text.cleaning import filters_for, is_garbled, judge, repair
from data_prep.text.encoder import Encoder, Ids
from data_prep.text.sentences import cut_by, split_sentences
from data_prep.text.wordpiece import count_words, train_tokenizer
from data_prep.text.words import WordEncoder

MAX_DOCUMENT_CHARACTERS = 2**20  # a longer document is cut, at a sentence end, into documents that scatter apart

_BATCH_BYTES = 2**18  # encoded at a time
_NEAR_TASKS = 4  # per bucket: the records of short documents take many times the memory of their text
_SAMPLED_TASKS = 64  # map tasks from whose beginnings the tokenizer learns
_BAD = (
    "bad_json",
    "bad_xml",
    "no_text_field",
    "line_too_long",
    "unparsable",
    "not_text",
    *FOREIGN,
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
    if stage is Stage.near:
        return min(MOST_BUCKETS, _NEAR_TASKS * plan.num_buckets)
    return plan.num_buckets + plan.num_val_buckets


def result_path(plan: Plan, stage: Stage, number: int) -> Path:
    """What is there when, and only when, the task is done."""
    return plan.work / stage / f"{number:06d}"


def run_task(plan: Plan, stage: Stage, number: int) -> None:
    """Do one task. Raises `UserError` for bad input, `DiskError` for a full disk."""
    with disk_errors(plan), committed(plan, result_path(plan, stage, number)) as path:
        run = {Stage.sample: _sample, Stage.map: _map, Stage.near: _near, Stage.reduce: _reduce}[stage]
        run(plan, number, path)


@contextmanager
def disk_errors(plan: Plan) -> Iterator[None]:
    """Tell a full disk, and a place where nothing can be written, from our own bugs.

    Where two calls do the same work, one may finish the corpus, and clear up, under the other's feet: no harm.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskError(f"out={plan.out}: {error.strerror}; make room and run the same command again") from error
        gone = isinstance(error, FileNotFoundError) and not (plan.work / PLAN).exists()
        if gone and finished_manifest(plan) is not None:
            return
        if gone or error.errno in _UNUSABLE:
            raise UserError(f"out={plan.out}: {error.strerror}: {error.filename}; name another directory") from error
        raise


@contextmanager
def committed(plan: Plan, path: Path) -> Iterator[Path]:
    """A temporary file to write; when the block ends well it is synced and becomes `path`, else it is removed.

    What belongs to a corpus whose `out` is a URL is uploaded instead of renamed.
    """
    temporary = _temporary(plan, f"{path.parent.name}-{path.name}")
    path.parent.mkdir(exist_ok=True)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        inside = path.is_relative_to(plan.work)
        put(temporary, str(path) if inside else f"{plan.home}/{path.relative_to(plan.out).as_posix()}")
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(plan: Plan, name: str) -> Path:
    """A place that is no other process's."""
    folder = plan.work / "tmp"
    folder.mkdir(exist_ok=True)
    return folder / f"{os.uname().nodename}-{os.getpid()}-{name}"


# -- documents ------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A document, or a part of a long one, cleaned and cut into sentences."""

    sentences: list[str]
    digest: bytes  # 16 bytes
    side: int  # u64, of the document's first part: by it all of a document is held out, or trained on
    origin: int
    num_bytes: int


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
    source = plan.sources[source_of(plan, task)]
    clean = plan.config.clean
    filters = filters_for(
        source.min_characters,
        clean.scripts,
        clean.min_script_share,
        clean.max_symbols,
        clean.max_repeated_lines,
    )
    cut = cut_by(plan.config.sentences, plan.config.language)
    origin, side = None, 0  # of the document before
    for item in read(plan.files, plan.tasks[task], source):
        tally.read += 1
        if isinstance(item, Bad) or is_garbled(item.text):
            tally.drop(item.reason if isinstance(item, Bad) else "not_text", item.location)
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
            digest = blake2b(data, digest_size=16).digest()
            if item.origin != origin:
                origin, side = item.origin, int.from_bytes(digest[:8], "little")
            yield _Piece(part, digest, side, origin, len(data))


def source_of(plan: Plan, task: int) -> int:
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
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# -- sample: words for the tokenizer to learn from --------------------------------------------------------------------


def _sample(plan: Plan, number: int, path: Path) -> None:
    """Count the words of what a map task begins with, as far as it is trained on."""
    tasks = num_tasks(plan, Stage.sample)
    task = number * len(plan.tasks) // tasks
    room = plan.config.tokenizer.sample_mib * 2**20 // tasks

    def sentences() -> Iterator[str]:
        nonlocal room
        for piece in _pieces(plan, task, _Tally()):
            if room > 0 and not _held_out(plan, np.uint64(piece.side)):
                room -= piece.num_bytes
                yield from piece.sentences
            elif room <= 0:
                return

    path.write_text(json.dumps(count_words(sentences(), spelling_of(plan.config.tokenizer))))


def sampled_words(plan: Plan, number: int) -> dict[str, int]:
    """What a sample task counted."""
    words = json.loads(result_path(plan, Stage.sample, number).read_text())
    assert isinstance(words, dict)
    return words


def make_tokenizer(plan: Plan) -> TokenizerFacts:
    """Put the tokenizer that was given, or one trained on the samples, into `out/tokenizer`, once."""
    config, directory = plan.config.tokenizer, plan.out / "tokenizer"
    if not directory.is_dir():
        tokenizer = given_tokenizer(config) if config.path is not None else _trained(plan)
        temporary = _temporary(plan, "tokenizer")
        temporary.mkdir(exist_ok=True)
        save_tokenizer(tokenizer, temporary, plan.config.max_len)
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another call was quicker, with the same
                raise
        _tokenizers.clear()
        _tokenizers[directory] = tokenizer
    return _tokenizer(directory).facts


def _trained(plan: Plan) -> WordPiece:
    """A tokenizer of the words that the samples counted, each source's as often as a pass holds them."""
    tasks = num_tasks(plan, Stage.sample)
    most = max(source.weight for source in plan.sources)
    words: dict[str, float] = defaultdict(float)
    for number in range(tasks):
        weight = plan.sources[source_of(plan, number * len(plan.tasks) // tasks)].weight / most
        for word, count in sampled_words(plan, number).items():
            words[word] += count * weight
    config = plan.config.tokenizer
    return train_tokenizer(
        {word: round(count) for word, count in words.items()},
        config.vocab_size,
        spelling_of(config),
        min_frequency=config.min_frequency,
        limit_alphabet=config.limit_alphabet,
    )


_tokenizers: dict[Path, WordPiece] = {}  # the one this process has made or loaded: that costs as much as encoding a MB


def _tokenizer(directory: Path) -> WordPiece:
    """That of a corpus, once it is there."""
    if directory not in _tokenizers:
        _tokenizers.clear()
        _tokenizers[directory] = load_tokenizer(directory)
    return _tokenizers[directory]


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
    with ExitStack() as stack:
        writer = BucketWriter(stack.enter_context(path.open("wb")), plan.num_buckets + plan.num_val_buckets)
        bands = None
        if plan.config.clean.near_duplicates is not None:
            bands_path = stack.enter_context(committed(plan, _bands_path(plan, number)))
            bands = BucketWriter(stack.enter_context(bands_path.open("wb")), num_tasks(plan, Stage.near))
        for batch in _batches(_pieces(plan, number, tally)):
            documents = _encoded(batch, encode, longest, token_dtype(facts.vocab_size))
            documents = documents._replace(sources_D=np.full(len(batch), source_of(plan, number), np.uint16))
            bucket_D = _buckets(plan, batch, documents.digests_Dx2)
            if bands:
                texts = [" ".join(piece.sentences) for piece in batch]
                records = band_records(texts, documents.digests_Dx2, bucket_D)
                bands.add(records, (records.origins_D % np.uint64(num_tasks(plan, Stage.near))).astype(np.int64))
            full_D = np.flatnonzero(documents.sentences_D)
            if len(full_D) < len(batch):
                tally.dropped["no_tokens"] += len(batch) - len(full_D)
                documents, bucket_D = select(documents, full_D), bucket_D[full_D]
            writer.add(documents, bucket_D)
        writer.finish(vars(tally))
        if bands:
            bands.finish({})


def _bands_path(plan: Plan, number: int) -> Path:
    return plan.work / "bands" / f"{number:06d}"


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


def _buckets(plan: Plan, batch: Sequence[_Piece], digests_Dx2: npt.NDArray[np.uint64]) -> Ints:
    """A document's bucket follows from its text alone: equal texts meet, and none is both trained on and held out."""
    held_out_D = _held_out(plan, np.fromiter((piece.side for piece in batch), np.uint64, len(batch)))
    choice_D = digests_Dx2[:, 1]
    training_D = choice_D % np.uint64(plan.num_buckets)
    val_D = np.uint64(plan.num_buckets) + choice_D % np.uint64(max(1, plan.num_val_buckets))
    return np.where(held_out_D, val_D, training_D).astype(np.int64)


def _held_out(plan: Plan, side: Any) -> Any:
    """Whether documents of these sides, a u64 or many, are held out."""
    return side < np.uint64(int(plan.config.val_fraction * 2**64))


# -- near: band records -> documents to drop --------------------------------------------------------------------------


def _near(plan: Plan, number: int, path: Path) -> None:
    threshold = plan.config.clean.near_duplicates
    assert threshold is not None
    paths = (_bands_path(plan, task) for task in range(num_tasks(plan, Stage.map)))
    records = concatenate(list(read_bucket(paths, number, num_tasks(plan, Stage.near), VALUE)))
    dropped = select(records, near_duplicates(records, threshold))
    with path.open("wb") as file:
        writer = BucketWriter(file, plan.num_buckets + plan.num_val_buckets)
        writer.add(dropped, dropped.sources_D.astype(np.int64))
        writer.finish({})


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
    num_buckets, sources = plan.num_buckets + plan.num_val_buckets, len(plan.sources)
    found, again = _distinct(read_bucket(maps, bucket, num_buckets, token_dtype(facts.vocab_size)), sources)
    documents = found
    if plan.config.clean.near_duplicates is not None:
        near = (result_path(plan, Stage.near, number) for number in range(num_tasks(plan, Stage.near)))
        dropped = {row.tobytes() for part in read_bucket(near, bucket, num_buckets, VALUE) for row in part.digests_Dx2}
        documents = select(found, np.flatnonzero([row.tobytes() not in dropped for row in found.digests_Dx2]))
    targets = _targets(plan, bucket)
    shards = [_make_shard(plan, facts, _weighted(plan, documents, t), bucket, t) for t in targets]
    tokens_D = np.diff(offsets(documents.lengths_S)[offsets(documents.sentences_D)])
    result = {
        "duplicate": again,  # per source
        "near_duplicate": (
            np.bincount(found.sources_D, minlength=sources) - np.bincount(documents.sources_D, minlength=sources)
        ).tolist(),
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


def _distinct(parts: Iterable[Documents], sources: int) -> tuple[Documents, list[int]]:
    """Each text once, and how often each source repeats one. The source that is named first keeps it.

    They come in the order of the digests: an order that no timing and no cutting into tasks can change.
    """
    seen: set[bytes] = set()
    kept: list[Documents] = []
    again = np.zeros(sources, np.int64)
    for part in parts:
        digests = [row.tobytes() for row in part.digests_Dx2]
        first = dict(zip(reversed(digests), reversed(range(len(digests))), strict=True))
        fresh = select(part, np.asarray(sorted(first[digest] for digest in first.keys() - seen), np.int64))
        again += np.bincount(part.sources_D, minlength=sources) - np.bincount(fresh.sources_D, minlength=sources)
        seen.update(first)
        kept.append(fresh)
    documents = concatenate(kept)
    return select(documents, np.lexsort((documents.digests_Dx2[:, 1], documents.digests_Dx2[:, 0]))), again.tolist()


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
