"""Stage reduce: the documents of a bucket -> shards: each text once, paired, masked and shuffled."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cloze.corpus.manifest import TokenizerFacts, as_list, is_held_out, pass_name
from cloze.corpus.masking import Masking, Unmasked, draw_masks, mix64
from cloze.corpus.ragged import Ints, offsets
from cloze.corpus.shards import BLOCK_SAMPLES, Block, sample_ids, token_dtype, write_shard
from data_prep.config import MaskingStrategy
from data_prep.plan import Plan
from data_prep.stages.base import Stage, committed
from data_prep.stages.buckets import DIGESTS, Digests, Documents, Table, documents_table, read_bucket
from data_prep.stages.map import MAP, validation_paths
from data_prep.stages.near import NEAR
from data_prep.stages.pairs import Bucket, SegmentPairs, assemble, make_samples, sample_lengths, unpaired
from data_prep.stages.survey import fingerprints, modulus, packed
from data_prep.stages.tokenizer import tokenizer_directory, tokenizer_in

_LOOKED_AT_PAIRS = 20_000  # of the corpus, by whose lengths labels are guessed


class _Target(NamedTuple):
    """A shard to write from a bucket."""

    split: str
    name: str
    shard_id: int  # pass-major, what is held out last
    pass_index: int


def _targets(plan: Plan, bucket: int) -> list[_Target]:
    passes, buckets = plan.config.passes, plan.num_buckets
    for split, mine in plan.held_out_buckets.items():
        if bucket in mine:
            return [_Target(split, f"shard-{bucket - mine.start:05d}.tar", (passes - 1) * buckets + bucket, 0)]
    return [_Target(pass_name(p), f"shard-{bucket:05d}.tar", p * buckets + bucket, p) for p in range(passes)]


def _num_tasks(plan: Plan) -> int:
    return plan.num_all_buckets


def _run(plan: Plan, bucket: int, path: Path) -> None:
    facts = tokenizer_in(tokenizer_directory(plan)).facts
    table = documents_table(token_dtype(facts.vocab_size))
    num_buckets, sources = _num_tasks(plan), len(plan.sources)
    found, again = _distinct(table, read_bucket(table, MAP.results(plan), bucket, num_buckets), sources)
    documents = unseen = found
    if plan.val_splits:
        unseen = documents = _without(table, found, read_bucket(DIGESTS, validation_paths(plan), bucket, num_buckets))
    if plan.config.clean.near_duplicates is not None:
        documents = _without(table, unseen, read_bucket(DIGESTS, NEAR.results(plan), bucket, num_buckets))
    targets = _targets(plan, bucket)
    shards = [_make_shard(plan, facts, _weighted(plan, documents, t), bucket, t) for t in targets]
    lost_D = unpaired(plan.config.objective, _bucket(documents))
    tokens_D = np.diff(offsets(documents.lengths_S)[offsets(documents.sentences_D)])
    result = {
        "duplicate": again,  # per source
        "in_validation": (_of_each(found, sources) - _of_each(unseen, sources)).tolist(),
        "near_duplicate": (_of_each(unseen, sources) - _of_each(documents, sources)).tolist(),
        "one_sentence": np.bincount(documents.sources_D[lost_D], minlength=sources).tolist(),
        "vocabulary": _used(documents, facts.vocab_size) if bucket < plan.num_buckets else "",
        **fingerprints(documents, modulus(plan)),
        "tokens": np.bincount(documents.sources_D, tokens_D, minlength=sources).astype(int).tolist(),
        "shards": [shard for shard in shards if shard],
    }
    path.write_text(json.dumps(result, default=as_list))


REDUCE = Stage("reduce", _num_tasks, _run)


def _weighted(plan: Plan, documents: Documents, target: _Target) -> Documents:
    """The documents of one pass, each as often as its source's weight says; held-out ones once.

    Weight w makes floor(w) copies, and one more of the share w - floor(w) that a hash of text and pass picks.
    """
    weights_D = np.asarray([source.weight for source in plan.sources])[documents.sources_D]
    if is_held_out(target.split) or (weights_D == 1).all():
        return documents
    key_D = documents.digests_Dx2[:, 0] ^ (documents.digests_Dx2[:, 1] >> np.uint64(1))
    share_D = mix64(key_D + np.uint64(target.pass_index + 1)).astype(np.float64) / 2**64
    copies_D = np.floor(weights_D) + (share_D < weights_D % 1)
    return documents_table(documents.tokens_T.dtype).select(
        documents, np.repeat(np.arange(len(copies_D)), copies_D.astype(np.int64))
    )


def _distinct(table: Table[Documents], parts: Iterable[Documents], sources: int) -> tuple[Documents, list[int]]:
    """Each text once, and how often each source repeats one. The source that is named first keeps it.

    They come in the order of the digests: an order that no timing and no cutting into tasks can change.
    """
    seen: set[bytes] = set()
    kept: list[Documents] = []
    again = np.zeros(sources, np.int64)
    for part in parts:
        digests = [row.tobytes() for row in part.digests_Dx2]
        first = dict(zip(reversed(digests), reversed(range(len(digests))), strict=True))
        fresh = table.select(part, np.asarray(sorted(first[digest] for digest in first.keys() - seen), np.int64))
        again += _of_each(part, sources) - _of_each(fresh, sources)
        seen.update(first)
        kept.append(fresh)
    documents = table.concatenate(kept)
    order_D = np.lexsort((documents.digests_Dx2[:, 1], documents.digests_Dx2[:, 0]))
    return table.select(documents, order_D), again.tolist()


def _without(table: Table[Documents], documents: Documents, parts: Iterable[Digests]) -> Documents:
    """The documents whose hashes are not among those."""
    dropped = {row.tobytes() for part in parts for row in part.digests_Dx2}
    return table.select(documents, np.flatnonzero([row.tobytes() not in dropped for row in documents.digests_Dx2]))


def _of_each(documents: Documents, sources: int) -> Ints:
    """How many documents are of each source."""
    return np.bincount(documents.sources_D, minlength=sources)


def _make_shard(
    plan: Plan, facts: TokenizerFacts, documents: Documents, bucket: int, target: _Target
) -> dict[str, Any] | None:
    """Pair, mask, shuffle and write; returns what the manifest will say of the shard. None if it would be empty."""
    config = plan.config
    key = (config.seed, target.pass_index, bucket)
    samples = make_samples(
        config.objective, _bucket(documents), config.max_len, config.short_seq_prob, key, facts.separators
    )
    if not len(samples.label_N):
        return None
    blocks = _blocks(plan, facts, samples, documents, target.shard_id)
    with committed(plan, plan.out / target.split / target.name) as path:
        entry = write_shard(path, shard_id=target.shard_id, split=target.split, name=target.name, blocks=blocks)
    lengths_N = sample_lengths(samples, facts.separators)[:, 1]
    some = slice(_LOOKED_AT_PAIRS // plan.num_buckets + 1)  # they come in random order
    parts_Nx3 = np.concatenate([np.diff(samples.a_Nx2), np.diff(samples.b_Nx2), samples.label_N[:, None]], axis=1)
    return {
        "pairs": packed([parts_Nx3[some]]) if target.split == pass_name(0) else "",
        "entry": asdict(entry),
        "random_next": int(samples.label_N.sum()),
        "length_histogram": np.bincount(lengths_N, minlength=config.max_len + 1).tolist(),
    }


def _bucket(documents: Documents) -> Bucket:
    return Bucket(documents.sentences_D.astype(np.int64), documents.lengths_S.astype(np.int64), documents.origins_D)


def _used(documents: Documents, vocab_size: int) -> str:
    """One bit for each token of the vocabulary, in hexadecimal: whether it comes."""
    used_V = np.zeros(vocab_size, bool)
    used_V[documents.tokens_T] = True
    return np.packbits(used_V).tobytes().hex()


def _blocks(
    plan: Plan, facts: TokenizerFacts, samples: SegmentPairs, documents: Documents, shard_id: int
) -> Iterator[Block]:
    masking = masking_of(plan)
    for start in range(0, len(samples.label_N), BLOCK_SAMPLES):
        rows = slice(start, start + BLOCK_SAMPLES)
        part = SegmentPairs(samples.a_Nx2[rows], samples.b_Nx2[rows], samples.label_N[rows])
        tokens_T, lengths_Nx2 = assemble(part, documents.tokens_T, facts.cls_id, facts.sep_id, facts.separators)
        ids_N = sample_ids(shard_id, start, len(part.label_N))
        starts_T = None
        if masking.strategy != MaskingStrategy.token:  # the specials count as words of their own
            starts_T = assemble(part, documents.starts_T.astype(np.uint8), 1, 1, facts.separators)[0].astype(bool)
        masks = tuple(
            draw_masks(Unmasked(tokens_T, lengths_Nx2, ids_N, starts_T), draw, masking, facts.mask_vocabulary)
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
