"""One self-contained HTML page to look at a finished corpus with.

What is the matter with it first, then samples as a person reads them, lengths, tokens per source, scripts, drops by
reason, words, use of the vocabulary, and what masks and pairs are against what was asked for. Needs no network to make
or to read, and no script; bars are CSS and SVG, so that they follow the reader's theme.
"""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from cloze import drawing
from cloze.corpus.diagnosis import Finding, Level, from_manifest, from_shards, shares_of_scripts, stored
from cloze.corpus.manifest import Manifest, pass_name, read_manifest
from cloze.corpus.masking import num_predictions
from cloze.corpus.peek import Sample, read_samples
from cloze.corpus.ragged import Ints
from cloze.corpus.shards import Split
from cloze.corpus.tokenizer import CorpusTokenizer, load_tokenizer
from cloze.corpus.vocabulary import Cutting, Tokens, cutting
from cloze.ownership import page_mark
from cloze.templates import render

PAGE_MARK = page_mark("report on a corpus")
EARLIER_MARK = "--bar: #4a7ebb"  # of pages made before they bore one
_LOOKED_AT = 20_000  # samples, taken evenly from the first pass, for what the manifest does not tell
_BINS = 32
_SAMPLES = 20
_FAST_MAX_LEN = 128  # of conf/recipe/fast.yaml
_OPEN_SAMPLES = 6  # that are shown at once
_LEAST_SHOWN = 0.0005  # below it a share is no more than that
_GRAVEST = (Level.refusal, Level.warning, Level.note)
_LETTERS = 1.15, 0.85  # rem: of the commonest word more than the rarest shown
_ADDED = (100, 1000, 10_000)  # words, whose savings are told


class Table(NamedTuple):
    """Rows of words, whole numbers and bars: a float is the share of the widest one."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]


Section = tuple[str, list[Table]]  # under a heading


def report(directory: Path) -> str:
    """The page. Raises `UserError` if the corpus is unfinished or damaged."""
    manifest = read_manifest(directory)
    tokenizer = load_tokenizer(directory / "tokenizer")
    findings = sorted(of_corpus(directory, manifest), key=lambda finding: _GRAVEST.index(finding.level))
    found = words_of(directory, manifest, tokenizer)
    scripts = _scripts(findings)
    sections: list[Section] = [
        *([("Scripts", [scripts])] if scripts.rows else []),
        ("Dropped and repaired documents", [_drops(manifest)]),
        ("Splits", _splits(manifest)),
        *_looked_at(directory, manifest, tokenizer, found),
    ]
    levels = [finding.level for finding in findings]
    num_refusals, num_warnings = levels.count(Level.refusal), levels.count(Level.warning)
    edges, counts = _histogram(manifest)
    most = _scale(counts)
    title = directory.resolve().name
    return render(
        __file__,
        "report.html",
        mark=PAGE_MARK,
        title=f"Cloze: {title}",
        name=title,
        kind=f"{manifest.objective} · {manifest.masking.strategy} {manifest.masking.probability:.0%} · up to "
        f"{manifest.max_len} tokens a sample",
        verdict=_verdict(num_refusals, num_warnings),
        advice=_advice(num_refusals, num_warnings),
        command="" if num_refusals else shlex.join(train_command(directory, manifest)),
        num_refusals=num_refusals,
        num_warnings=num_warnings,
        figures=_figures(manifest),
        findings=findings,
        samples=_read_samples(directory, manifest),
        num_open=_OPEN_SAMPLES,
        first_pass=pass_name(0),
        lengths=_lengths(edges, counts, most),
        lengths_cut=any(count > most for count in counts),
        lengths_drawn=drawing.bars("lengths of the samples", edges, counts, most),
        sources=_sources(manifest),
        sections=sections,
        words=_sized(found.common),
    )


def _verdict(num_refusals: int, num_warnings: int) -> str:
    if num_refusals:
        return f"unfit in {num_refusals} ways" if num_refusals > 1 else "unfit in one way"
    return f"{num_warnings} warning" + "s" * (num_warnings > 1) if num_warnings else "nothing stands out"


def train_command(directory: Path, manifest: Manifest) -> tuple[str, ...]:
    """What trains on a corpus: the recipe for small machines, where the samples are as long as it expects."""
    name, how = directory.resolve().name, "recipe=fast" if manifest.max_len == _FAST_MAX_LEN else "model=tiny"
    return "python", "-m", "launch", f"data.path={directory}", f"run={name}", how


def _advice(num_refusals: int, num_warnings: int) -> str:
    if num_refusals:
        return "mend what stands below, then prepare it anew"
    return "read the warnings below, then train on it" if num_warnings else "look at the samples, then train on it"


def _figures(manifest: Manifest) -> list[tuple[str, str, str]]:
    """(what, how much, beside it) of the first screen."""
    train = manifest.splits[pass_name(0)]
    held_out = sum(manifest.splits[name].samples for name in manifest.held_out)
    documents = manifest.documents
    size = sum(shard.bytes for shard in manifest.shards)
    return [
        ("samples in a pass", f"{train.samples:,}", f"{held_out:,} held out"),
        ("tokens in a pass", f"{train.tokens:,}", f"mean length {train.tokens / max(1, train.samples):.1f}"),
        (
            "passes",
            f"{manifest.passes}",
            f"{manifest.baked_draws} mask draw{'s' * (manifest.baked_draws != 1)} in the shards",
        ),
        ("documents kept", f"{documents['kept']:,}", f"of {documents['read']:,} read"),
        ("vocabulary", f"{manifest.tokenizer.vocab_size:,}", f"tokenizer {manifest.tokenizer.fingerprint[:12]}"),
        ("shards", f"{len(manifest.shards):,}", f"{size / 1e6:,.1f} MB"),
    ]


def _sized(words: Sequence[tuple[str, int]]) -> list[tuple[str, int, float]]:
    """(word, how often, size of its letters): the commonest the largest."""
    most = max((times for _, times in words), default=1)
    return [(word, times, _LETTERS[1] + _LETTERS[0] * (times / most) ** 0.5) for word, times in words]


def _read_samples(directory: Path, manifest: Manifest) -> list[Sample]:
    splits = [pass_name(0), *manifest.held_out]
    return [one for name in splits for one in read_samples(directory, name, -(-_SAMPLES // len(splits)), 0)]


def of_corpus(directory: Path, manifest: Manifest) -> tuple[Finding, ...]:
    """What preparation found; of a corpus whose manifest keeps nothing of it, what can be counted still."""
    if manifest.diagnosis:
        return stored(manifest)
    return (*from_manifest(manifest), *from_shards(directory, manifest))


def _sources(manifest: Manifest) -> Table:
    """What each source is of a pass: its tokens as often as its weight says. Of held-out ones the split."""
    sources = manifest.documents.get("sources", [])
    passed = [0.0 if source.get("split") else source["tokens"] * source.get("weight", 1.0) for source in sources]
    total, most = sum(passed) or 1.0, max(passed, default=0.0) or 1.0
    return Table(
        ("kind", "first path", "weight", "read", "kept", "tokens", "of a pass", ""),
        [
            (
                s["kind"],
                (s["paths"] or [""])[0],
                s.get("split") or f"{s['weight']:g}",
                s["read"],
                s["kept"],
                s["tokens"],
                "" if s.get("split") else f"{weighted / total:.1%}",
                weighted / most,
            )
            for s, weighted in zip(sources, passed, strict=True)
        ],
    )


def _drops(manifest: Manifest) -> Table:
    documents = manifest.documents
    rows: list[Sequence[str | int | float]] = [("read", "", documents["read"], 1.0)]
    for what in ("dropped", "repaired"):
        for reason, count in sorted(documents.get(what, {}).items()):
            rows.append((what, reason, count, count / max(1, documents["read"])))
    rows.append(("kept", "", documents["kept"], documents["kept"] / max(1, documents["read"])))
    return Table(("", "reason", "documents", ""), rows)


def _histogram(manifest: Manifest) -> tuple[list[int], list[int]]:
    """Edges of bins of lengths (one more than bins), and the samples in each."""
    histogram = np.asarray(manifest.splits[pass_name(0)].length_histogram)
    step = -(-len(histogram) // _BINS)
    edges = [*range(0, len(histogram), step), len(histogram)]
    return edges, [int(histogram[low:high].sum()) for low, high in pairwise(edges)]


def _lengths(edges: Sequence[int], counts: Sequence[int], most: int) -> Table:
    rows = [
        (f"{low} to {high - 1}" + (", bar cut" if count > most else ""), count, min(1.0, count / most))
        for (low, high), count in zip(pairwise(edges), counts, strict=True)
    ]
    return Table(("tokens", f"samples of {pass_name(0)}", ""), rows)


def _scripts(findings: Iterable[Finding]) -> Table:
    """Whose letters the text has, as far as preparation counted them."""
    shares = shares_of_scripts(findings)
    most = max(shares.values(), default=1.0) or 1.0
    return Table(
        ("script", "of the letters", ""),
        [(name, f"{one:.1%}" if one >= _LEAST_SHOWN else "< 0.1%", one / most) for name, one in shares.items()],
    )


def _splits(manifest: Manifest) -> list[Table]:
    rows = [(name, split.samples, split.tokens) for name, split in manifest.splits.items()]
    return [Table(("split", "samples", "tokens"), rows)]


def words_of(directory: Path, manifest: Manifest, tokenizer: CorpusTokenizer) -> Cutting:
    """How the words of some samples are cut."""
    return cutting(tokens_of(directory, manifest), tokenizer)


def tokens_of(directory: Path, manifest: Manifest) -> Iterator[Tokens]:
    """The tokens of some samples."""
    split = Split(directory, manifest, pass_name(0))
    return (split.gather(part, 0).tokens_T for part in _parts(len(split)))


def _parts(samples: int) -> list[Ints]:
    """Indices of those that are looked at, some at a time."""
    indices = np.unique(np.linspace(0, max(0, samples - 1), min(samples, _LOOKED_AT)).astype(np.int64))
    return np.array_split(indices, -(-len(indices) // 1024))


def _scale(counts: Sequence[int]) -> int:
    """What the longest bar stands for: full samples are so many that on their own scale no other bar would show."""
    *_, second, most = sorted([0, 0, *counts])
    return max(1, min(most, 3 * second or most))


def _looked_at(directory: Path, manifest: Manifest, tokenizer: CorpusTokenizer, found: Cutting) -> list[Section]:
    """What only the samples themselves can tell: vocabulary, words, masks and pairs."""
    split = Split(directory, manifest, pass_name(0))
    facts = manifest.tokenizer
    uses = np.zeros(facts.vocab_size, np.int64)
    masked = tokens = as_mask = unchanged = wanted = baked = 0
    for part in _parts(len(split)):
        samples = split.gather(part, 0)
        uses += np.bincount(samples.tokens_T, minlength=facts.vocab_size)
        tokens += len(samples.tokens_T)
        totals_N = samples.lengths_Nx2[:, 1].astype(np.int64)
        wanted += int(num_predictions(totals_N, manifest.masking).sum())
        if samples.masks:
            starts_N = np.cumsum(totals_N) - totals_N
            places = np.repeat(starts_N, samples.masks.counts_N) + samples.masks.positions_M
            baked += len(part)
            masked += len(places)
            as_mask += int((samples.masks.tokens_M == facts.mask_id).sum())
            unchanged += int((samples.masks.tokens_M == samples.tokens_T[places]).sum())
    pairs: list[Sequence[str | int | float]] = []
    if baked:
        pairs = [
            ("masked tokens", f"{masked / tokens:.2%}", f"{wanted / tokens:.2%}"),
            ("of them [MASK]", f"{as_mask / masked:.2%}", "80.00%"),
            ("of them unchanged", f"{unchanged / masked:.2%}", "10.00%"),
            ("of them random", f"{1 - (as_mask + unchanged) / masked:.2%}", "10.00%"),
        ]
    label = {"nsp": ("random next", "50%"), "sop": ("swapped", "50%")}.get(manifest.objective)
    for name, statistics in manifest.splits.items() if label else ():
        assert label is not None
        pairs.append((f"{label[0]}, {name}", f"{statistics.random_next / max(1, statistics.samples):.2%}", label[1]))
    targets = Table(("", "found", "asked for"), pairs)
    return [
        ("Vocabulary", _vocabulary(uses, manifest, tokenizer.backend)),
        ("Words, and how they are cut", _words(found)),
        ("Masks and pairs against their targets", [targets]),
    ]


def _vocabulary(uses: Ints, manifest: Manifest, tokenizer: Tokenizer) -> list[Table]:
    facts = manifest.tokenizer
    ordinary = uses.copy()
    ordinary[[facts.cls_id, facts.sep_id]] = 0
    total = max(1, int(ordinary.sum()))
    seen = int((uses > 0).sum())
    words = [
        ("tokens looked at", f"{int(uses.sum()):,}"),
        ("vocabulary in use", f"{seen:,} of {facts.vocab_size:,} ({seen / facts.vocab_size:.1%})"),
        ("unknown", f"{int(uses[facts.unk_id]) / total:.4%}"),
    ]
    top = np.argsort(-ordinary, kind="stable")[:20].tolist()
    rows = [
        (tokenizer.id_to_token(i) or f"<{i}>", int(ordinary[i]), int(ordinary[i]) / max(1, int(ordinary[top[0]])))
        for i in top
    ]
    return [Table(("", ""), words), Table(("most frequent", "times", ""), rows)]


def _words(cutting: Cutting) -> list[Table]:
    facts = [
        ("words looked at", f"{cutting.words:,}"),
        ("pieces per word", f"{cutting.pieces / max(1, cutting.words):.3f}"),
        *((f"tokens that {count:,} added words would save", f"{cutting.saved(count):.2%}") for count in _ADDED),
    ]
    top = cutting.cut[:20]
    rows = [(word.text, word.times, word.pieces, word.saved / max(1, top[0].saved)) for word in top]
    return [Table(("", ""), facts), Table(("most tokens by being cut", "times", "pieces", ""), rows)]
