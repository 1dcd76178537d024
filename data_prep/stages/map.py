"""Stage map: input -> encoded documents, scattered to buckets; and their near-duplicate records, to the near tasks.

What a val source holds goes to the buckets of its own split; its hashes go to the buckets where the same texts of
training sources end up, which drop them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloze.corpus.manifest import VAL, TokenizerFacts
from cloze.corpus.ragged import Ints
from cloze.corpus.shards import token_dtype
from data_prep.config import MaskingConfig, MaskingStrategy, Objective
from data_prep.plan import Plan
from data_prep.stages.base import Stage, committed
from data_prep.stages.buckets import DIGESTS, BucketWriter, Digests, Documents, documents_table
from data_prep.stages.documents import Piece, Tally, held_out, pieces, source_of
from data_prep.stages.near import BAND_RECORDS, NEAR, band_records, bands_path
from data_prep.stages.pairs import SPECIALS_OF_ONE
from data_prep.stages.survey import Survey, modulus
from data_prep.stages.tokenizer import tokenizer_directory, tokenizer_in
from data_prep.text.encoder import Encoder
from data_prep.text.words import Encode, word_encoder

_BATCH_BYTES = 2**18  # encoded at a time


@lru_cache(maxsize=1)
def _encode(directory: Path, masking: MaskingConfig) -> tuple[Encode, TokenizerFacts]:
    """One per process: the encoder's memory is worth keeping."""
    tokenizer = tokenizer_in(directory)
    if masking.strategy is MaskingStrategy.token:
        encoder = Encoder(tokenizer.backend, tokenizer.vocabulary)
        return lambda sentences: (*encoder.encode(sentences), np.zeros(0, bool)), tokenizer.facts
    return word_encoder(tokenizer, masking.chinese_words)[1], tokenizer.facts


def _num_tasks(plan: Plan) -> int:
    return len(plan.tasks)


def validation_paths(plan: Plan) -> list[Path]:
    """Where map tasks of val sources leave the hashes of what they hold."""
    return [_validation_path(plan, task) for task in range(plan.num_training_tasks, len(plan.tasks))]


def _validation_path(plan: Plan, task: int) -> Path:
    return plan.work / "validation" / f"{task:06d}"


def _run(plan: Plan, number: int, path: Path) -> None:
    encode, facts = _encode(tokenizer_directory(plan), plan.config.masking)
    tally = Tally()
    survey = Survey(modulus(plan), tokenizer_in(tokenizer_directory(plan)).backend, facts.unk_id)
    longest = longest_sentence(plan, facts)
    table = documents_table(token_dtype(facts.vocab_size))
    near_tasks = NEAR.num_tasks(plan)
    split = plan.val_split_of(source_of(plan, number))
    with ExitStack() as stack:
        writer = BucketWriter(stack.enter_context(path.open("wb")), table, plan.num_all_buckets)
        bands = held = None
        if split:
            file = stack.enter_context(committed(plan, _validation_path(plan, number)))
            held = BucketWriter(stack.enter_context(file.open("wb")), DIGESTS, plan.num_all_buckets)
        elif plan.config.clean.near_duplicates is not None:
            file = stack.enter_context(committed(plan, bands_path(plan, number)))
            bands = BucketWriter(stack.enter_context(file.open("wb")), BAND_RECORDS, near_tasks)
        for batch in batches(pieces(plan, number, tally)):
            documents = encoded(batch, encode, longest, token_dtype(facts.vocab_size))
            documents = documents._replace(sources_D=np.full(len(batch), source_of(plan, number), np.uint16))
            survey.add(batch, documents)
            bucket_D = _buckets(plan, batch, documents.digests_Dx2, split)
            if bands:
                texts = [" ".join(piece.sentences) for piece in batch]
                records = band_records(texts, documents.digests_Dx2, bucket_D)
                bands.add(records, (records.keys_R % np.uint64(near_tasks)).astype(np.int64))
            full_D = np.flatnonzero(documents.sentences_D)
            if len(full_D) < len(batch):
                tally.dropped["no_tokens"] += len(batch) - len(full_D)
                documents, bucket_D = table.select(documents, full_D), bucket_D[full_D]
            writer.add(documents, bucket_D)
            if held:
                for buckets in (range(plan.num_buckets), plan.held_out_buckets[VAL]):
                    if buckets:
                        held.add(Digests(documents.digests_Dx2), _within(buckets, documents.digests_Dx2))
        writer.finish({**vars(tally), "survey": survey.counts})
        for beside in (bands, held):
            if beside:
                beside.finish()


MAP = Stage("map", _num_tasks, _run)


def batches(found: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in found:
        batch.append(piece)
        size += piece.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def longest_sentence(plan: Plan, facts: TokenizerFacts) -> tuple[int, int]:
    """Tokens of the longest sentence that stays whole, and of the parts that a longer one is cut into.

    Where samples are pairs two parts fill one, so that text whose sentences have no end, or none that is seen, makes
    true pairs as well as random ones.
    """
    longest = plan.config.max_len - SPECIALS_OF_ONE - max(1, facts.separators)
    return longest, longest if plan.config.objective is Objective.none else longest // 2


def encoded(batch: list[Piece], encode: Encode, longest: tuple[int, int], dtype: np.dtype[Any]) -> Documents:
    """Encode documents. Sentences without tokens vanish; too long ones are cut (`longest_sentence`), not truncated."""
    most, part = longest
    tokens_T, lengths_S, starts_T = encode([sentence for piece in batch for sentence in piece.sentences])
    document_S = np.repeat(np.arange(len(batch)), [len(piece.sentences) for piece in batch])
    pieces_S = np.where(lengths_S > most, -(-lengths_S // part), lengths_S > 0)  # 0 where there are no tokens
    document_S = np.repeat(document_S, pieces_S)
    last_S = np.cumsum(pieces_S)[pieces_S > 0] - 1
    cut_S = np.full(len(document_S), part)
    cut_S[last_S] = (lengths_S - part * (pieces_S - 1))[pieces_S > 0]
    return Documents(
        np.frombuffer(b"".join(piece.digest for piece in batch), "<u8").reshape(-1, 2),
        np.fromiter((piece.origin for piece in batch), np.uint64, len(batch)),
        np.zeros(len(batch), np.uint16),
        np.bincount(document_S, minlength=len(batch)).astype(np.uint32),
        cut_S.astype(np.uint16),
        tokens_T.astype(dtype),
        starts_T,
    )


def _buckets(plan: Plan, batch: Sequence[Piece], digests_Dx2: npt.NDArray[np.uint64], split: str | None) -> Ints:
    """A document's bucket follows from its text alone: equal texts meet, and none is both trained on and held out.

    Of a val source all go to the buckets of its `split`.
    """
    if split:
        return _within(plan.held_out_buckets[split], digests_Dx2)
    held_out_D = held_out(plan, np.fromiter((piece.side for piece in batch), np.uint64, len(batch)))
    val_D = _within(plan.held_out_buckets[VAL], digests_Dx2)
    return np.where(held_out_D, val_D, _within(range(plan.num_buckets), digests_Dx2))


def _within(buckets: range, digests_Dx2: npt.NDArray[np.uint64]) -> Ints:
    """Which of some buckets each text belongs to."""
    return buckets.start + (digests_Dx2[:, 1] % np.uint64(max(1, len(buckets)))).astype(np.int64)
