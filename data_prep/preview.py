"""A look before the long part: what a few documents of every source tell of the corpus they would become.

Writes nothing. The same code reads, encodes and pairs as in a preparation; only less of it, in this process.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from cloze.corpus import diagnosis
from cloze.corpus.diagnosis import Finding, Level
from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.ragged import offsets
from cloze.corpus.shards import token_dtype
from cloze.corpus.tokenizer import CorpusTokenizer
from cloze.errors import ExitCode, UserError
from cloze.log import closing
from data_prep.config import Objective
from data_prep.plan import Plan, given_tokenizer, megabytes
from data_prep.stages.buckets import Documents, documents_table
from data_prep.stages.documents import Piece, Tally, pieces, source_of
from data_prep.stages.map import batches, encoded, longest_sentence
from data_prep.stages.pairs import Bucket, SegmentPairs, assemble, make_samples, sample_lengths
from data_prep.stages.sample import cuts_ideographs
from data_prep.stages.survey import Survey, merged
from data_prep.stages.tokenizer import learned, tokenizer_directory, tokenizer_in
from data_prep.text.encoder import Encoder
from data_prep.text.wordpiece import count_pieces

_SHOWN = 10  # samples
_EARLY = 500  # documents of each source, looked at before a long preparation
_BYTES_A_TOKEN = 2.7  # in shards, of two-byte ids with one draw of masks (docs/data.md)
_WORKER_MB = 100
_OF_THE_WHOLE = ("largest_document", "documents_per_file")  # findings that a part says nothing of
_LABELS = {
    Objective.nsp: ("is next", "random next"),
    Objective.sop: ("in order", "swapped"),
    Objective.none: ("one segment", ""),
}


@dataclass(frozen=True)
class _Look:
    """What was read, and what became of it."""

    tallies: Sequence[Tally]
    documents: Documents
    tokenizer: CorpusTokenizer
    findings: tuple[Finding, ...]
    objective: Objective


def preview(plan: Plan) -> int:
    """Print diagnosis, samples and costs; the exit code."""
    started = time.perf_counter()
    look = _look(plan, plan.config.preview)
    seconds = time.perf_counter() - started
    samples = _samples(plan, look.documents, look.tokenizer.facts)
    read, size = (sum(getattr(tally, key) for tally in look.tallies) for key in ("read", "bytes"))
    dropped = sum((tally.dropped for tally in look.tallies), Counter[str]())
    for reason, count in sorted(dropped.items()):
        print(f"dropped, {reason}: {count:,}")
    for text in _shown(look, samples):
        print(text)
    tokens = int(sample_lengths(samples, look.tokenizer.facts.separators)[:, 1].sum())
    growth = plan.text_bytes / max(1, size)
    shards = tokens * growth * _BYTES_A_TOKEN * plan.config.passes / 1e6
    hours = seconds * growth / 3600
    worker = _WORKER_MB + 1.7 * max(plan.config.bucket_mib, plan.text_bytes / plan.num_buckets / 2**20)
    print(f"{read:,} documents, {megabytes(size)} of about {megabytes(plan.text_bytes)} looked at")
    print(f"to expect: shards of about {shards:,.0f} MB, {hours:,.2f} core hours, {worker:,.0f} MB of memory a worker")
    diagnosis.tell(look.findings, plan.config.diagnosis.ignore)
    closing(
        f"out={plan.config.out}: nothing is written; the same command without preview={plan.config.preview} prepares it"
    )
    return ExitCode.OK


def early_findings(plan: Plan) -> tuple[Finding, ...]:
    """Of a few documents of every source, encoded with the corpus's tokenizer: only what they would be refused for."""
    found = _look(plan, _EARLY, tokenizer_in(tokenizer_directory(plan))).findings
    return tuple(finding for finding in found if finding.level is Level.refusal)


def _look(plan: Plan, count: int, tokenizer: CorpusTokenizer | None = None) -> _Look:
    tallies: list[Tally] = []
    found: list[Piece] = []
    for number in range(len(plan.training_sources)):
        tally = Tally()
        tallies.append(tally)
        found += islice(_pieces(plan, number, tally), count)
    if not found:
        raise UserError("source: no document is left to train on; name files that hold text")
    if tokenizer is None:
        tokenizer = given_tokenizer(plan.config.tokenizer) if plan.config.tokenizer.path else _trained(plan, found)
    encoder = Encoder(tokenizer.backend, tokenizer.vocabulary)
    dtype = token_dtype(tokenizer.facts.vocab_size)
    survey = Survey(1, tokenizer.backend, tokenizer.facts.unk_id)
    parts = []
    for batch in batches(found):
        documents = encoded(
            batch,
            lambda sentences: (*encoder.encode(sentences), np.zeros(0, bool)),
            longest_sentence(plan, tokenizer.facts),
            dtype,
        )
        survey.add(batch, documents)
        parts.append(documents)
    table = documents_table(dtype)
    documents = table.concatenate(parts)
    documents = table.select(documents, np.flatnonzero(documents.sentences_D))
    counts, files = merged([survey.counts]), len(plan.training_files)
    told = diagnosis.from_text(counts, tokenizer.spelling, files, plan.config.objective)
    findings = [finding for finding in told if finding.name not in _OF_THE_WHOLE]
    if plan.config.objective is Objective.nsp:
        samples = _samples(plan, documents, tokenizer.facts)
        lengths_Nx2 = np.concatenate([np.diff(samples.a_Nx2), np.diff(samples.b_Nx2)], axis=1)
        findings.append(diagnosis.random_next(int(samples.label_N.sum()), len(samples.label_N), "nsp"))
        findings += diagnosis.pairs_guessed(lengths_Nx2, samples.label_N)
    return _Look(tallies, documents, tokenizer, tuple(findings), plan.config.objective)


def _pieces(plan: Plan, source: int, tally: Tally) -> Iterator[Piece]:
    for task in range(len(plan.tasks)):
        if source_of(plan, task) == source:
            yield from pieces(plan, task, tally)


def _trained(plan: Plan, found: Sequence[Piece]) -> CorpusTokenizer:
    config = plan.config.tokenizer
    counted = count_pieces((s for piece in found for s in piece.sentences), cuts_ideographs(config))
    return learned(config, lambda: [(counted, 1.0)])


def _samples(plan: Plan, documents: Documents, facts: TokenizerFacts) -> SegmentPairs:
    config = plan.config
    bucket = Bucket(documents.sentences_D.astype(np.int64), documents.lengths_S.astype(np.int64), documents.origins_D)
    key = (config.seed, 0, 0)
    return make_samples(config.objective, bucket, config.max_len, config.short_seq_prob, key, facts.separators)


def _shown(look: _Look, samples: SegmentPairs) -> Iterator[str]:
    """Ten samples as text."""
    facts, backend = look.tokenizer.facts, look.tokenizer.backend
    some = SegmentPairs(samples.a_Nx2[:_SHOWN], samples.b_Nx2[:_SHOWN], samples.label_N[:_SHOWN])
    tokens_T, lengths_Nx2 = assemble(some, look.documents.tokens_T, facts.cls_id, facts.sep_id, facts.separators)
    edges = offsets(lengths_Nx2[:, 1].astype(np.int64)).tolist()
    for begin, end, label in zip(edges, edges[1:], some.label_N.tolist(), strict=False):
        text = backend.decode(tokens_T[begin:end].tolist(), skip_special_tokens=False)
        yield f"{_LABELS[look.objective][label]}: {text}"
