"""The plan of a preparation, and the claim to its output directory.

A plan says everything that the shards depend on: same plan, same bytes. It stands in `.work/plan.json` while work goes
on, and its hash in the finished manifest: that is how a second start knows whether to go on, to rest, or to refuse.

Where `out` is a URL, work goes on in a local directory; shards are uploaded as they are made, the manifest last.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cloze.corpus import manifest
from cloze.corpus.manifest import VAL, VAL_NAME, val_split
from cloze.corpus.tokenizer import CorpusTokenizer, Spelling, load_tokenizer
from cloze.errors import UserError
from cloze.files import write_whole
from cloze.ownership import CORPUS, remove_files
from cloze.ownership import WORK as UNFINISHED
from cloze.schema import CONF
from cloze.storage import download, is_remote, listed, local_path, put, remove
from data_prep.config import (
    ArrayConfig,
    MaskingStrategy,
    Objective,
    PrepConfig,
    SentenceRules,
    TokenizerConfig,
    TokenizerKind,
)
from data_prep.sources.base import InputFile, Source, Span
from data_prep.text.sentences import cut_by

WORK = ".work"
PLAN = "plan.json"
MOST_BUCKETS = 2048  # every bucket is read from every map task's file: beyond that, buckets grow


class ValSplit(NamedTuple):
    """A held-out split that one of `val_sources` makes."""

    name: str  # of the source; the split is `val-NAME`
    num_buckets: int


@dataclass(frozen=True)
class Plan:
    config: PrepConfig
    sources: tuple[Source, ...]
    files: tuple[InputFile, ...]
    tasks: tuple[tuple[Span, ...], ...]  # what each map task reads
    num_buckets: int  # of the training documents; those of the held-out ones follow
    num_val_buckets: int
    fingerprint: str | None  # of the tokenizer that was given; None: one is trained
    sentences: tuple[str, ...]  # where they end, of each source: "rules", "lines" or "pysbd"
    val_splits: tuple[ValSplit, ...]  # of the last sources, in order; their buckets and tasks are the last ones, too

    @property
    def text_bytes(self) -> int:
        """Size of the input, decompressed: an estimate."""
        return sum(file.text_bytes for file in self.files)

    @property
    def training_sources(self) -> tuple[Source, ...]:
        """Those of which `val_fraction` is held out, and nothing else."""
        return self.sources[: len(self.sources) - len(self.val_splits)]

    @property
    def training_files(self) -> tuple[InputFile, ...]:
        return tuple(file for file in self.files if file.source < len(self.training_sources))

    @property
    def num_training_tasks(self) -> int:
        """Map tasks that read them: the first ones."""
        num_files = len(self.training_files)
        return sum(task[0].file < num_files for task in self.tasks)

    @property
    def held_out_buckets(self) -> dict[str, range]:
        """The buckets of each held-out split, after those of the training documents."""
        splits = [ValSplit("", self.num_val_buckets), *self.val_splits]
        edges = accumulate((split.num_buckets for split in splits), initial=self.num_buckets)
        return {
            val_split(split.name) if split.name else VAL: range(begin, end)
            for split, (begin, end) in zip(splits, pairwise(edges), strict=True)
        }

    @property
    def num_all_buckets(self) -> int:
        return self.num_buckets + self.num_val_buckets + sum(split.num_buckets for split in self.val_splits)

    def val_split_of(self, source: int) -> str | None:
        """The split that all of a source makes; None of a training source."""
        number = source - len(self.training_sources)
        return val_split(self.val_splits[number].name) if number >= 0 else None

    @property
    def remote(self) -> str | None:
        """Where the corpus goes, if `out` is a URL."""
        return self.config.out.rstrip("/") if is_remote(self.config.out) else None

    @property
    def out(self) -> Path:
        """Where the corpus is made: `out`, or the folder of `work` that belongs to its URL."""
        if self.remote is None:
            return local_path(self.config.out)
        name = hashlib.sha256(self.remote.encode()).hexdigest()[:8]
        return Path(self.config.work).expanduser() / f"{self.remote.rpartition('/')[2]}-{name}"

    @property
    def home(self) -> str:
        """`out`, be it a URL or not."""
        return self.remote or str(self.out)

    @property
    def work(self) -> Path:
        return self.out / WORK

    def identity(self, with_versions: bool = True) -> str:
        """The plan as JSON, without what changes no byte of the shards (where they go, who makes them)."""
        config = asdict(self.config)
        del config["out"], config["work"], config["executor"], config["tokenizer"]["path"]
        del config["diagnosis"], config["preview"]
        if self.config.tokenizer.kind is TokenizerKind.wordpiece or self.fingerprint:
            del config["tokenizer"]["kind"]  # so that plans of before are the same
        del config["source"], config["sources"], config["val_sources"]
        sources = [asdict(source) for source in self.sources]
        for source in sources:
            del source["paths"], source["max_bad_fraction"]
            if source.get("separator", "") is None:
                del source["separator"]  # so that plans of before are the same
        body: dict[str, Any] = {
            "config": config,
            "sources": sources,
            "sentences": self.sentences,
            "tokenizer": self.fingerprint,
            "buckets": [self.num_buckets, self.num_val_buckets],
            "versions": {name: _version(name) for name in self._libraries()} if with_versions else {},
            "files": self.files,
            "tasks": self.tasks,
        }
        if self.val_splits:
            body["val_splits"] = self.val_splits
        return json.dumps(body, sort_keys=True, separators=(",", ":"))

    def _libraries(self) -> Iterator[str]:
        """What the shards' bytes depend on besides the configuration and the input."""
        yield from ("cloze", "python", "numpy", "tokenizers")
        yield from sorted({source.library for source in self.sources if source.library})
        if self.config.masking.strategy != MaskingStrategy.token and self.config.masking.chinese_words:
            yield "jieba"
        if self.config.clean.near_duplicates is not None:
            yield "rensa"
        if self.config.sentences is SentenceRules.pysbd:
            yield "pysbd"

    def sha256(self) -> str:
        """What the finished manifest records: a later version of Cloze leaves a finished corpus alone."""
        return hashlib.sha256(self.identity(with_versions=False).encode()).hexdigest()


def megabytes(size: float) -> str:
    """`12.0 MB` of bytes; of few, `0.011 MB`."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e6:.2g} MB"


def make_plan(config: PrepConfig) -> Plan:
    """Look at the input and decide. Raises `UserError` for input or a tokenizer that will not do; writes nothing."""
    fingerprint = None
    if config.tokenizer.path is not None:
        facts = given_tokenizer(config.tokenizer).facts
        fingerprint = facts.fingerprint
        if not facts.separators and config.objective is not Objective.none:
            raise UserError(
                f"objective={config.objective}: the tokenizer of {config.tokenizer.path} lays pairs out neither as "
                "[CLS] A [SEP] B [SEP] nor with two [SEP]s between; set objective=none, or change its post-processor"
            )
    cut_by(config.sentences, config.language)  # tells now if it cannot
    sources, held_out = list(mixture(config)), val_sources(config)
    num_training = len(sources)
    sources += held_out.values()
    sentences: list[str] = []
    files: list[InputFile] = []
    tasks: list[tuple[Span, ...]] = []  # each of one source
    for number, source in enumerate(sources):
        with _told_as(f"val_sources[{number - num_training}]: ") if number >= num_training else nullcontext():
            found = [file._replace(source=number) for file in source.find_inputs()]
            if number >= num_training and not any(file.bytes for file in found):
                raise UserError(f"source.paths: {len(found)} files, all of them empty; name files that hold text")
            source, shown = source.looked_at(found)
        sources[number] = source
        sentences.append(shown if config.sentences is SentenceRules.auto else config.sentences.value)
        shifted = ([span._replace(file=span.file + len(files)) for span in task] for task in source.split(found))
        tasks += [tuple(task) for task in shifted]
        files += found
    if not any(file.bytes for file in files if file.source < num_training):
        count = sum(file.source < num_training for file in files)
        raise UserError(f"source.paths: {count} files, all of them empty; name files that hold text")
    if config.objective is Objective.none and config.passes > 1 and all(source.weight % 1 == 0 for source in sources):
        raise UserError(
            f"passes={config.passes}: objective=none pairs nothing, so every pass would hold the same; set passes=1"
        )

    def buckets(*numbers: int) -> int:
        """How many the documents of these sources fill."""
        size = sum(file.text_bytes * max(1.0, sources[file.source].weight) for file in files if file.source in numbers)
        return min(MOST_BUCKETS, max(1, math.ceil(size / (config.bucket_mib * 2**20))))

    num_buckets = buckets(*range(num_training))
    return Plan(
        config=config,
        sources=tuple(sources),
        files=tuple(files),
        tasks=tuple(tasks),
        num_buckets=num_buckets,
        num_val_buckets=max(1, round(num_buckets * config.val_fraction)) if config.val_fraction else 0,
        fingerprint=fingerprint,
        sentences=tuple(sentences),
        val_splits=tuple(ValSplit(name, buckets(num_training + number)) for number, name in enumerate(held_out)),
    )


@lru_cache(maxsize=1)
def given_tokenizer(config: TokenizerConfig) -> CorpusTokenizer:
    """What `tokenizer.path` names: loaded once, so that what is planned with is what is used."""
    assert config.path is not None
    return load_tokenizer(Path(config.path).expanduser(), spelling_of(config))


def spelling_of(config: TokenizerConfig) -> Spelling:
    return Spelling(config.lowercase, config.strip_accents, config.chinese_characters)


def mixture(config: PrepConfig) -> tuple[Source, ...]:
    """`sources`, each with what conf/source says where it is silent; else the one `source`."""
    if not config.sources:
        return (config.source,)
    from cloze import cli  # not above: workers import this module, and need no Hydra

    if config.source != cli.compose("prep", PrepConfig, ["out=any"]).source:
        raise UserError("sources: and source is given, too; put it into the list, [{kind: text, paths: [a.txt]}, …]")
    example = "{kind: jsonl, paths: [a.jsonl], weight: 2}"
    return tuple(_source(f"sources[{number}]", given, example) for number, given in enumerate(config.sources))


def val_sources(config: PrepConfig) -> dict[str, Source]:
    """`val_sources` by their names. Raises `UserError` for a name that will not do."""
    example = "{kind: text, paths: [dev.txt], name: news}"
    found: dict[str, Source] = {}
    for number, given in enumerate(config.val_sources):
        key = f"val_sources[{number}]"
        name = given.get("name") if isinstance(given, Mapping) else None
        if name is None:
            raise UserError(f"{key}: has no name; write {example}")
        if not isinstance(name, str) or not VAL_NAME.fullmatch(name):
            raise UserError(
                f"{key}: name={name}: must be a lowercase letter and at most 31 more, digits, - or _: {example}"
            )
        if name in found:
            raise UserError(f"{key}: name={name}: is taken by val_sources[{[*found].index(name)}]; choose another")
        source = _source(key, {inner: value for inner, value in given.items() if inner != "name"}, example)
        if source.weight != 1:
            raise UserError(f"{key}: weight={source.weight:g}: what is held out stands there once; leave it out")
        found[name] = source
    return found


def _source(key: str, given: Any, example: str) -> Source:
    """A source that stands in a list, at `key`: what conf/source says where it is silent."""
    from cloze import cli  # not above: workers import this module, and need no Hydra

    kind = given.get("kind") if isinstance(given, Mapping) else None
    if not isinstance(kind, str) or kind not in Source.kinds:
        told = "has no kind"
        if isinstance(kind, str):
            told = f"kind={kind}: no such kind{cli.nearest(kind, [*Source.kinds], 'source')}"
        raise UserError(f"{key}: {told}; write {example}; kinds are {', '.join(Source.kinds)}")
    silent = yaml.safe_load((CONF / "source" / f"{kind}.yaml").read_text(encoding="utf-8"))
    with _told_as(f"{key}: "):
        source: Source = cli.typed({**silent, **given}, Source.kinds[kind])
    return source


@contextmanager
def _told_as(place: str) -> Iterator[None]:
    """What a source complains of, as `source.…` if it is a key, is at `place`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}{str(error).removeprefix('source.')}") from error


@contextmanager
def claimed(plan: Plan) -> Iterator[bool]:
    """Hold the output directory for this plan; yields True if it holds the finished corpus already.

    Raises `UserError` if anything else is there, or if another process is at work on it.
    """
    out = plan.out
    if _finished(plan):
        yield True
        return
    if plan.out.exists() and not plan.out.is_dir():
        raise UserError(f"out={plan.out}: is a file; name a directory")
    found = listed(plan.home) - {WORK}
    if found and download(_record_place(plan)) is None:
        raise UserError(
            f"out={plan.config.out}: is not empty ({min(found)}) and no preparation of ours; name a new directory"
        )
    _refuse_foreign_work(plan)
    plan.work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(plan.work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        several = isinstance(plan.config.executor, ArrayConfig)
        locked = _lock(descriptor, out, fcntl.LOCK_SH if several else fcntl.LOCK_EX)
        if _finished(plan):  # meanwhile, by the process that held the lock
            yield True
            return
        _record(plan)
        if locked and not several:
            remove_files(plan.work, UNFINISHED, "tmp")  # of a run that was killed
        yield False
    finally:
        os.close(descriptor)


def _version(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def finished_manifest(plan: Plan) -> manifest.Manifest | None:
    """The manifest of the finished corpus; None as long as there is none. Raises `UserError` if it is damaged."""
    place = f"{plan.home}/{manifest.NAME}"
    found = download(place)
    return None if found is None else manifest.parse_manifest(found, place)


def _finished(plan: Plan) -> bool:
    found = finished_manifest(plan)
    if found is not None and found.source.get("plan_sha256") != plan.sha256():
        raise UserError(
            f"out={plan.config.out}: holds a finished corpus of another plan; name a new directory or remove it"
        )
    return found is not None


def _lock(descriptor: int, out: Path, kind: int) -> bool:
    """Whether the lock is ours: not on a file system without any, where two at work do no harm, only work twice."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"out={out}: another preparation is at work on it; wait for it or name a new directory"
        ) from None
    except OSError:
        return False
    return True


def _refuse_foreign_work(plan: Plan) -> None:
    """Raises `UserError` where the folder for unfinished work holds files, and no plan of ours: they are removed later.

    Of ours only the lock, which is empty, and a plan that was half written are there before the plan.
    """
    if (plan.work / PLAN).exists():
        return
    for path in sorted(plan.work.rglob("*")):
        full = path.is_symlink() or (path.is_file() and path.stat().st_size > 0)
        if full and not path.name.startswith(f".{PLAN}."):
            other = path.relative_to(plan.out).as_posix()
            raise UserError(f"out={plan.out}: holds {other}, which no preparation wrote; name a new directory")


def _record_place(plan: Plan) -> str:
    return f"{plan.home}/{WORK}/{PLAN}"


def _record(plan: Plan) -> None:
    """Write plan.json where work goes on, and to `out` if that is a URL; or check that it is the same."""
    path, identity = plan.work / PLAN, plan.identity()
    at_out, at_work = download(_record_place(plan)), download(str(path))
    for place, recorded in ((plan.config.out, at_out), (str(plan.out), at_work)):
        if recorded not in (None, identity.encode()):
            try:
                differing = ", ".join(_differing(json.loads(recorded or b""), json.loads(identity)))
                what = f"holds an unfinished preparation of another plan (other {differing})"
            except ValueError:
                what = f"holds an unfinished preparation whose {WORK}/{PLAN} is damaged"
            raise UserError(f"out={place}: {what}; name a new directory or remove it")
    if at_work is None:
        write_whole(path, identity.encode())
    if plan.remote and at_out is None:
        remove_files(plan.work, UNFINISHED, "reduce")  # of shards that someone has removed since
        put(path, _record_place(plan))


def clear_up(plan: Plan) -> None:
    """Remove what the finished corpus needs no longer; plan.json first, by which other calls know that it is done."""
    (plan.work / PLAN).unlink(missing_ok=True)
    with suppress(OSError):
        remove_files(plan.work, UNFINISHED)
        if plan.remote:
            remove_files(plan.out, CORPUS)
    if plan.remote:
        remove(_record_place(plan))


def abandon(plan: Plan) -> None:
    """Remove an unfinished preparation that can never be finished, since its input is refused: another may follow.

    Its plan goes when the results are gone: it is the proof that they are ours.
    """
    for folder in listed(str(plan.work)):
        remove_files(plan.work, UNFINISHED, folder)
    clear_up(plan)
    with suppress(OSError):
        remove_files(plan.out, CORPUS)


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of what differs, of the configuration key by key."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differing(before, after, "" if key == "config" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
