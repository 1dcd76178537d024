"""One self-contained HTML page to look at a finished corpus with.

Lengths, tokens per source, drops by reason, use of the vocabulary, what masks and pairs are against what was asked for,
and decoded samples. Needs no network to make or to read; bars are CSS, so that they follow the reader's theme.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from cloze.corpus.diagnosis import Finding, Level, from_manifest, from_shards, stored
from cloze.corpus.manifest import Manifest, pass_name, read_manifest
from cloze.corpus.masking import num_predictions
from cloze.corpus.peek import peek
from cloze.corpus.ragged import Ints
from cloze.corpus.shards import Split
from cloze.corpus.tokenizer import CorpusTokenizer, load_tokenizer
from cloze.corpus.vocabulary import Cutting, cutting
from cloze.ownership import page_mark
from cloze.templates import render

PAGE_MARK = page_mark("report on a corpus")
EARLIER_MARK = "--bar: #4a7ebb"  # of pages made before they bore one
_LOOKED_AT = 20_000  # samples, taken evenly from the first pass, for what the manifest does not tell
_BINS = 32
_SAMPLES = 20
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
    sections: list[Section] = [
        ("Corpus", _overview(manifest)),
        ("Diagnosis", [_findings(of_corpus(directory, manifest))]),
        ("Sources", [_sources(manifest)]),
        ("Dropped and repaired documents", [_drops(manifest)]),
        ("Lengths", [_lengths(manifest)]),
        *_looked_at(directory, manifest, tokenizer),
    ]
    samples = _decoded(directory, manifest)
    return render(
        __file__, "report.html", mark=PAGE_MARK, title=directory.resolve().name, sections=sections, samples=samples
    )


def _overview(manifest: Manifest) -> list[Table]:
    size = sum(shard.bytes for shard in manifest.shards)
    tokens = sum(split.tokens for split in manifest.splits.values())
    width = 2 if manifest.tokenizer.vocab_size <= 0x10000 else 4
    facts = Table(
        ("", ""),
        [
            ("objective", manifest.objective),
            ("masking", f"{manifest.masking.strategy}, {manifest.masking.probability:.0%}"),
            ("tokenizer", f"{manifest.tokenizer.vocab_size:,} tokens, {manifest.tokenizer.fingerprint[:12]}"),
            ("longest sample", f"{manifest.max_len} tokens"),
            (
                "shards",
                f"{len(manifest.shards)}, {size / 1e6:,.1f} MB: {size / max(1, width * tokens):.3f} x the tokens",
            ),
        ],
    )
    rows = [(name, split.samples, split.tokens) for name, split in manifest.splits.items()]
    return [facts, Table(("split", "samples", "tokens"), rows)]


def of_corpus(directory: Path, manifest: Manifest) -> tuple[Finding, ...]:
    """What preparation found; of a corpus whose manifest keeps nothing of it, what can be counted still."""
    if manifest.diagnosis:
        return stored(manifest)
    return (*from_manifest(manifest), *from_shards(directory, manifest))


def _findings(findings: Iterable[Finding]) -> Table:
    """Warnings first, each with what it was seen in and what to do."""
    order = [Level.refusal, Level.warning, Level.note]
    rows = [
        (
            finding.level.value,
            finding.name,
            finding.meaning,
            ", ".join(finding.examples),
            finding.where or "",
            "" if finding.level is Level.note else finding.remedy,
        )
        for finding in sorted(findings, key=lambda finding: order.index(finding.level))
    ]
    return Table(("", "finding", "what it is", "examples", "first seen", "what to do"), rows)


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


def _lengths(manifest: Manifest) -> Table:
    histogram = np.asarray(manifest.splits[pass_name(0)].length_histogram)
    step = -(-len(histogram) // _BINS)
    counts = [int(histogram[start : start + step].sum()) for start in range(0, len(histogram), step)]
    most = _scale(counts)
    rows = [
        (
            f"{i * step} to {min((i + 1) * step, len(histogram)) - 1}" + (", bar cut" if count > most else ""),
            count,
            min(1.0, count / most),
        )
        for i, count in enumerate(counts)
    ]
    return Table(("tokens", f"samples of {pass_name(0)}", ""), rows)


def words_of(directory: Path, manifest: Manifest, tokenizer: CorpusTokenizer) -> Cutting:
    """How the words of some samples are cut."""
    split = Split(directory, manifest, pass_name(0))
    return cutting((split.gather(part, 0).tokens_T for part in _parts(len(split))), tokenizer)


def _parts(samples: int) -> list[Ints]:
    """Indices of those that are looked at, some at a time."""
    indices = np.unique(np.linspace(0, max(0, samples - 1), min(samples, _LOOKED_AT)).astype(np.int64))
    return np.array_split(indices, -(-len(indices) // 1024))


def _scale(counts: Sequence[int]) -> int:
    """What the longest bar stands for: full samples are so many that on their own scale no other bar would show."""
    *_, second, most = sorted([0, 0, *counts])
    return max(1, min(most, 3 * second or most))


def _looked_at(directory: Path, manifest: Manifest, tokenizer: CorpusTokenizer) -> list[Section]:
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
        ("Words", _words(words_of(directory, manifest, tokenizer))),
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


def _decoded(directory: Path, manifest: Manifest) -> list[str]:
    splits = [pass_name(0), *manifest.held_out]
    return [text.plain for name in splits for text in peek(directory, name, _SAMPLES // len(splits), 0)]
