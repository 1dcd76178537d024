"""What is fit or unfit about a corpus, as data: findings with their numbers, thresholds, meanings and remedies.

Pure but for `from_shards`, which looks at samples. Who counts what stands elsewhere (`data_prep.stages.survey`); the
manifest keeps the findings, preparation prints them, training and the page about a corpus repeat them.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloze.corpus.manifest import Manifest, pass_name
from cloze.corpus.ragged import Ints
from cloze.corpus.scripts import ACCENTED
from cloze.corpus.shards import Split
from cloze.corpus.tokenizer import Spelling
from cloze.log import log

_FEWEST_PAIRS = 500  # from which it is worth fitting anything to their lengths
_FEWEST_RANDOM = 0.4
_SMALL_VOCABULARY = 1000  # tokens: smaller ones are an alphabet, mostly
_LONGEST_WORD = 100  # characters, to WordPiece
_LOOKED_AT = 20_000  # samples, evenly from the first pass, for what the manifest does not tell
_UNFIT_REPAIRS = ("invalid_utf8", "lone_surrogates", "nul_characters", "control_characters", "replaced_before")


class Level(StrEnum):
    note = auto()
    warning = auto()
    refusal = auto()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number about a corpus."""

    name: str  # what `diagnosis.refuse` and `diagnosis.ignore` take
    value: float
    meaning: str  # what the number says, figures included
    remedy: str
    warn_above: float | None = None
    warn_below: float | None = None
    refuse_above: float | None = None
    where: str | None = None  # file and place of the first instance
    examples: tuple[str, ...] = field(default=())

    @property
    def level(self) -> Level:
        if self.refuse_above is not None and self.value > self.refuse_above:
            return Level.refusal
        above = self.warn_above is not None and self.value > self.warn_above
        below = self.warn_below is not None and self.value < self.warn_below
        return Level.warning if above or below else Level.note

    @property
    def line(self) -> str:
        """All of it, in one line: what is the matter and what to do, if anything is."""
        text = f"{self.name}: {self.meaning}"
        if self.examples:
            text += f" ({', '.join(self.examples)})"
        if self.level is Level.note:
            return text
        return text + (f"; first: {self.where}" if self.where else "") + f"; {self.remedy}"


NAMES = (
    *("unknown_tokens", "dropped", "repaired", "random_next", "one_sentence", "documents_per_file"),
    *("sentences_per_document", "tokens_per_sentence", "largest_document", "held_out", "short_samples"),
    *("marks_stripped", "dotless_i", "scripts", "repeated_lines", "near_duplicates", "unused_vocabulary", "leakage"),
    *("mojibake", "length_guess", "invisible"),
)


def stored(manifest: Manifest) -> tuple[Finding, ...]:
    """The findings that a manifest keeps; of one without, those that the manifest itself shows."""
    if not manifest.diagnosis:
        return from_manifest(manifest)
    return tuple(Finding(**{**row, "examples": tuple(row["examples"])}) for row in manifest.diagnosis)


def as_data(findings: Iterable[Finding]) -> tuple[Mapping[str, Any], ...]:
    """For the manifest."""
    return tuple({**asdict(finding), "examples": list(finding.examples)} for finding in findings)


def warnings(findings: Iterable[Finding], ignore: Collection[str] = ()) -> list[Finding]:
    """Those that are more than notes, the gravest first."""
    found = [finding for finding in findings if finding.level is not Level.note and finding.name not in ignore]
    return sorted(found, key=lambda finding: finding.level is not Level.refusal)


def refused(findings: Iterable[Finding], refuse: Collection[str], ignore: Collection[str]) -> Finding | None:
    """The first finding that no corpus should be made with: beyond its bound for refusal, or a warning in `refuse`."""
    for finding in warnings(findings, ignore):
        if finding.level is Level.refusal or finding.name in refuse:
            return finding
    return None


def tell(findings: Iterable[Finding], ignore: Collection[str] = ()) -> None:
    """One line each: notes, then warnings."""
    found = list(findings)
    for finding in found:
        if finding.level is Level.note:
            log.info(finding.line)
    for finding in warnings(found, ignore):
        log.warning(finding.line)


def shares_of_scripts(findings: Iterable[Finding]) -> dict[str, float]:
    """By script its share of the letters, as far as the finding names them; {} where there is none."""
    meaning = next((finding.meaning for finding in findings if finding.name == "scripts"), "")
    return {script: float(share) / 100 for script, share in re.findall(r"([a-z][a-z -]*) ([0-9.]+)%", meaning)}


# -- from the manifest ------------------------------------------------------------------------------------------------


def from_manifest(manifest: Manifest) -> tuple[Finding, ...]:
    """What its totals tell."""
    documents = manifest.documents
    first = manifest.splits[pass_name(0)]
    findings = [
        _share_of_reasons(
            "dropped", documents.get("dropped", {}), documents.get("read", 0), 0.5,
            "see docs/data.md for each reason; mend the input, or loosen the filter",
        ),
        _share_of_reasons(
            "repaired", documents.get("repaired", {}), documents.get("read", 0), 0.01,
            "a text in another encoding looks like this: name it, or mend the files",
        ),
    ]  # fmt: skip
    if manifest.objective != "none":
        findings.append(random_next(first.random_next, first.samples, manifest.objective))
    held_out = sum(manifest.splits[split].samples for split in manifest.held_out)
    findings.append(
        Finding(
            name="held_out",
            value=held_out,
            warn_below=1,
            meaning=f"{held_out:,} samples are held out for evaluation",
            remedy="there will be no evaluation: raise val_fraction",
        )
    )
    histogram = np.asarray(first.length_histogram)
    short = float(histogram[: manifest.max_len // 4].sum() / max(1, histogram.sum()))
    findings.append(
        Finding(
            name="short_samples",
            value=short,
            warn_above=0.5,
            meaning=f"{short:.1%} of the samples are shorter than a quarter of max_len={manifest.max_len}",
            remedy="a smaller max_len trains the same for less; or let documents be longer (source.document)",
        )
    )
    return tuple(findings)


def random_next(count: int, pairs: int, objective: str) -> Finding:
    """`count` of the pairs have label 1 under "nsp" or "sop"."""
    share = count / max(1, pairs)
    what = "have a B from another document" if objective == "nsp" else "are swapped"
    remedy = "documents of many sentences balance it (of plain text: source.document, sentences)"
    if share < _FEWEST_RANDOM:
        remedy = (
            "more documents, of which none is a large share of the text, balance it (of plain text: source.document)"
        )
    return Finding(
        name="random_next",
        value=share,
        warn_above=0.6,
        warn_below=_FEWEST_RANDOM,
        meaning=f"{share:.1%} of the pairs {what}",
        remedy=f"a model learns to say always the same: {remedy}, or set objective=none",
    )


def _share_of_reasons(name: str, reasons: Mapping[str, int], read: int, most: float, remedy: str) -> Finding:
    what = "were dropped" if name == "dropped" else "held what no text holds"
    counted = reasons if name == "dropped" else {key: n for key, n in reasons.items() if key in _UNFIT_REPAIRS}
    share = sum(counted.values()) / max(1, read)
    every = tuple(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
    return Finding(
        name=name,
        value=share,
        warn_above=most,
        meaning=f"{share:.1%} of {read:,} documents {what}",
        remedy=remedy,
        examples=every,
    )


# -- from samples -----------------------------------------------------------------------------------------------------


def from_shards(directory: Path, manifest: Manifest) -> tuple[Finding, ...]:
    """What a sample of the shards tells, of a corpus whose manifest keeps no findings."""
    split = Split(directory, manifest, pass_name(0))
    indices = np.unique(np.linspace(0, max(0, len(split) - 1), min(len(split), _LOOKED_AT)).astype(np.int64))
    facts = manifest.tokenizer
    uses_V = np.zeros(facts.vocab_size, np.int64)
    lengths, labels = [], []
    for part in np.array_split(indices, -(-len(indices) // 1024)):
        samples = split.gather(part, 0)
        uses_V += np.bincount(samples.tokens_T, minlength=facts.vocab_size)
        first_N, total_N = samples.lengths_Nx2.astype(np.int64).T
        lengths.append(np.stack([first_N, total_N - first_N], axis=1))
        labels.append(samples.random_next_N)
    ordinary = int(uses_V.sum() - uses_V[[facts.cls_id, facts.sep_id]].sum())
    findings = [unknown_tokens(int(uses_V[facts.unk_id]), ordinary)]
    if manifest.objective == "nsp":
        findings += pairs_guessed(np.concatenate(lengths), np.concatenate(labels))
    return tuple(findings)


def unknown_tokens(
    unknown: int, tokens: int, words: Sequence[tuple[str, int]] = (), where: str | None = None
) -> Finding:
    """`words` with how often each was seen, the commonest first."""
    share = unknown / max(1, tokens)
    remedy = (
        "the vocabulary lacks what this text is written in: leave tokenizer.path out, so that one is trained on "
        "it, or raise tokenizer.vocab_size or tokenizer.limit_alphabet; where one was, there is too little text"
    )
    if 2 * sum(count for word, count in words if len(word) > _LONGEST_WORD) > sum(count for _, count in words):
        remedy = (
            f"WordPiece knows no word of more than {_LONGEST_WORD} characters: of a script without spaces leave "
            "tokenizer.path out, so that one is trained on it, of anything else set tokenizer.kind=bpe"
        )
    return Finding(
        name="unknown_tokens",
        value=share,
        warn_above=0.01,
        refuse_above=0.5,
        meaning=f"{share:.2%} of the tokens are [UNK]",
        remedy=remedy,
        where=where,
        examples=tuple(f"{word[:24]!r} {count:,}" for word, count in words[:10]),
    )


def unused_vocabulary(used: int, vocab_size: int) -> Finding:
    share = 1 - used / vocab_size
    return Finding(
        name="unused_vocabulary",
        value=share,
        warn_above=0.5 if vocab_size >= _SMALL_VOCABULARY else None,
        meaning=f"{vocab_size - used:,} of {vocab_size:,} tokens of the vocabulary never come",
        remedy="a vocabulary trained on this text (leave tokenizer.path out), or a smaller one, would do",
    )


def pairs_guessed(lengths_Nx2: Ints, labels_N: npt.NDArray[np.uint8]) -> list[Finding]:
    """How well the lengths of A and B alone tell a random next; nothing of fewer than 500 pairs, or of one label."""
    if len(labels_N) < _FEWEST_PAIRS or labels_N.min() == labels_N.max():
        return []
    share = length_guess(lengths_Nx2, labels_N)
    return [
        Finding(
            name="length_guess",
            value=share,
            warn_above=0.55,
            meaning=f"from the lengths of A and B alone, {share:.1%} of the pairs can be told",
            remedy="documents of many sentences make pairs that only their text tells; or set objective=none",
        )
    ]


def length_guess(lengths_Nx2: Ints, labels_N: npt.NDArray[np.uint8]) -> float:
    """Share of the labels that a logistic regression on both lengths gets right (Newton's method, lightly damped)."""
    x_Nx2 = lengths_Nx2.astype(np.float64)
    x_Nx2 = (x_Nx2 - x_Nx2.mean(0)) / (x_Nx2.std(0) + 1e-9)
    x_Nx3 = np.concatenate([np.ones((len(x_Nx2), 1)), x_Nx2], axis=1)
    weights = np.zeros(3)
    for _ in range(12):
        chance_N = 1 / (1 + np.exp(-np.clip(x_Nx3 @ weights, -30, 30)))
        gradient = x_Nx3.T @ (chance_N - labels_N) + 1e-3 * weights
        curvature = (x_Nx3 * (chance_N * (1 - chance_N))[:, None]).T @ x_Nx3 + 1e-3 * np.eye(3)
        weights -= np.linalg.solve(curvature, gradient)
    return float(((x_Nx3 @ weights > 0) == (labels_N > 0)).mean())


# -- from the text ----------------------------------------------------------------------------------------------------


def from_text(counts: Mapping[str, Any], spelling: Spelling, files: int, objective: str) -> tuple[Finding, ...]:
    """What a survey of the documents tells; `counts` as `data_prep.stages.survey.Survey.counts` has them."""
    words = sorted(counts["unknown_words"].items(), key=lambda item: (-item[1], item[0]))
    return (
        unknown_tokens(counts["unknown"], counts["tokens"], words, counts["first"].get("unknown")),
        *_layout(counts, files, objective),
        *_spelling(counts, spelling),
        _encoding(counts),
        _invisible(counts),
    )


def _layout(counts: Mapping[str, Any], files: int, objective: str) -> Iterator[Finding]:
    """Whether files, documents and sentences are what they were taken for."""
    documents, sentences, pairs = max(1, counts["documents"]), max(1, counts["sentences"]), objective != "none"
    per_file, per_document = documents / max(1, files), counts["parts"] / documents
    alone, per_sentence = counts["one_sentence"] / documents, counts["tokens"] / sentences
    size, place = counts["largest"]
    share = size / max(1, counts["bytes"])
    yield Finding(
        name="documents_per_file",
        value=per_file,
        meaning=f"{per_file:,.1f} documents in each of {files:,} files",
        remedy="",
    )
    yield Finding(
        name="sentences_per_document",
        value=per_document,
        warn_below=2 if pairs else None,
        meaning=f"{per_document:.1f} sentences in a document",
        remedy="nothing follows on a single sentence: where paragraphs of one plain text stand apart by blank lines "
        "set source.document=file, where sentences end unmarked see sentences, else set objective=none",
    )
    yield Finding(
        name="one_sentence",
        value=alone,
        warn_above=0.5 if pairs else None,
        meaning=f"{alone:.1%} of the documents have one sentence, on which only a random one can follow",
        remedy="set objective=none, or join what belongs together (of plain text: source.document=file)",
    )
    yield Finding(
        name="tokens_per_sentence",
        value=per_sentence,
        warn_above=64,
        meaning=f"{per_sentence:.1f} tokens in a sentence",
        remedy="where sentences end was not seen, mostly: look at samples with data_prep.peek, and set sentences",
    )
    yield Finding(
        name="largest_document",
        value=share,
        warn_above=0.1,
        meaning=f"the largest document is {share:.1%} of the text",
        remedy="a whole corpus read as one document looks like this: set source.document (of plain text), or leave "
        "it if it is one",
        where=place,
    )


def _spelling(counts: Mapping[str, Any], spelling: Spelling) -> Iterator[Finding]:
    """Which scripts there are, and what lower-casing and the stripping of accents take from them."""
    letters, marks, first = counts["letters"], counts["marks"], counts["first"]
    total = max(1, sum(letters.values()))
    commonest = sorted(letters, key=lambda script: (-letters[script], script))
    yield Finding(
        name="scripts",
        value=len(commonest),
        meaning=", ".join(f"{script} {letters[script] / total:.1%}" for script in commonest[:8]) or "no letters",
        remedy="",
    )
    if spelling.strip_accents:
        lost = {script: marks[script] / letters[script] for script in marks if letters.get(script)}
        lost = {script: share for script, share in lost.items() if script not in ACCENTED or share > 0.1}
        worst = sum(marks[script] for script in lost) / total
        yield Finding(
            name="marks_stripped",
            value=worst,
            warn_above=0.01,
            meaning=f"{worst:.1%} of the letters lose marks that belong to them",
            remedy="set tokenizer.strip_accents=false",
            where=first.get("marks"),
            examples=tuple(f"{script} {marks[script]:,}" for script in sorted(lost, key=lambda s: -marks[s])),
        )
    if spelling.lowercase:
        dotless = counts["dotless"] / max(1, letters.get("latin", 0))
        yield Finding(
            name="dotless_i",
            value=dotless,
            warn_above=0.005,
            meaning=f"{dotless:.2%} of the Latin letters are the dotless or the dotted capital i of Turkish",
            remedy="lower-casing makes one letter of two there: set tokenizer.lowercase=false",
            where=first.get("dotless"),
        )


def _encoding(counts: Mapping[str, Any]) -> Finding:
    mojibake = counts["mojibake"] / max(1, counts["looked_at"])
    return Finding(
        name="mojibake",
        value=mojibake,
        warn_above=0.01,
        meaning=f"{mojibake:.2%} of the documents hold UTF-8 that was read as another encoding once",
        remedy="mend the text first (the library ftfy does)",
        where=counts["first"].get("mojibake"),
        examples=tuple(counts["garbled"][:5]),
    )


def _invisible(counts: Mapping[str, Any]) -> Finding:
    share = counts.get("invisible", 0) / max(1, counts.get("characters", 0))
    return Finding(
        name="invisible",
        value=share,
        warn_above=0.01,
        meaning=f"{share:.2%} of the characters show nothing: zero-width ones, marks of direction, tags",
        remedy="BERT's normalizer drops them, other tokenizers do not: take them out of the text",
        where=counts["first"].get("invisible"),
    )


def from_fingerprints(
    lines: Mapping[int, int], sketches: Sequence[tuple[int, int, int]], runs: Collection[int], held_out: Collection[int]
) -> tuple[Finding, ...]:
    """Of a sample of the training documents how often each long sentence comes, and the sketch of each document; of
    both sides which runs of 50 tokens come.
    """
    total = max(1, sum(lines.values()))
    repeated = (total - max(1, len(lines))) / total
    alike = (len(sketches) - len(set(sketches))) / max(1, len(sketches))
    findings = [
        Finding(
            name="repeated_lines",
            value=repeated,
            warn_above=0.2,
            meaning=f"{repeated:.1%} of the sentences of eight tokens or more stand there before",
            remedy="menus and boilerplate look like this: set clean.max_repeated_lines, or clean the source",
        ),
        Finding(
            name="near_duplicates",
            value=alike,
            warn_above=0.1,
            meaning=f"about {alike:.1%} of the documents are much like another",
            remedy="set clean.near_duplicates=0.8",
        ),
    ]
    if held_out:
        leaked = len(set(held_out) & set(runs)) / len(held_out)
        findings.append(
            Finding(
                name="leakage",
                value=leaked,
                warn_above=0.05,
                meaning=f"{leaked:.1%} of the held-out runs of 50 tokens stand in the training text, too",
                remedy="evaluation will flatter: set clean.near_duplicates=0.8",
            )
        )
    return tuple(findings)
