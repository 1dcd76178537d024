"""Is a corpus what its manifest says? Every checksum, count and mask is looked at."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cloze.corpus.manifest import Manifest, ShardEntry, read_manifest
from cloze.corpus.ragged import Ints, offsets
from cloze.corpus.shards import Block, ShardReader, sample_ids
from cloze.corpus.tokenizer import load_tokenizer
from cloze.errors import UserError


def faults(directory: Path) -> Iterator[str]:
    """Everything that is wrong with a corpus, one line each; nothing if it is sound."""
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        yield str(error)
        return
    yield from _tokenizer_faults(directory, manifest)
    totals = {split: np.zeros(manifest.max_len + 2, np.int64) for split in manifest.splits}  # random next, lengths
    for entry in manifest.shards:
        yield from _shard_faults(directory, entry, manifest, totals[entry.split])
    for split, statistics in manifest.splits.items():
        if totals[split].tolist() != [statistics.random_next, *statistics.length_histogram]:
            yield f"{directory}: split {split}: its length histogram or random-next count is not that of its shards"


def _tokenizer_faults(directory: Path, manifest: Manifest) -> Iterator[str]:
    try:
        found = load_tokenizer(directory / "tokenizer").facts
    except UserError as error:
        yield str(error)
        return
    if found != manifest.tokenizer:
        yield (
            f"{directory / 'tokenizer'}: fingerprint {found.fingerprint:.12}, not {manifest.tokenizer.fingerprint:.12} "
            "with which the shards were made; restore it"
        )


def _shard_faults(directory: Path, entry: ShardEntry, manifest: Manifest, totals: Ints) -> Iterator[str]:
    """Faults of one shard; adds its random-next count and lengths to `totals`."""
    path = directory / entry.split / entry.name
    try:
        reader = ShardReader(directory, entry, manifest)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except UserError as error:
        yield str(error)
        return
    if digest != entry.sha256:
        yield f"{path}: sha256 {digest:.12}…, not {entry.sha256:.12}… as listed; copy or prepare the corpus again"
    start = 0
    for number, samples in enumerate(entry.blocks.samples.tolist()):
        try:
            block = reader.block(number)
        except UserError as error:
            yield str(error)
        else:
            for what in _block_faults(block, entry.id, start, manifest):
                yield f"{path}: block {number}: {what}; prepare the corpus again"
            totals[0] += int(block.random_next_N.sum())
            totals[1:] += np.bincount(block.lengths_Nx2[:, 1], minlength=manifest.max_len + 1)
        start += samples


def _block_faults(block: Block, shard_id: int, start: int, manifest: Manifest) -> Iterator[str]:
    facts = manifest.tokenizer
    lengths_Nx2 = block.lengths_Nx2.astype(np.int64)
    starts_N = offsets(lengths_Nx2[:, 1])[:-1]
    if (block.tokens_T[starts_N] != facts.cls_id).any():
        yield "a sample does not begin with [CLS]"
    ends = starts_N[:, None] + lengths_Nx2 - 1
    if (block.tokens_T[ends] != facts.sep_id).any():
        yield "a segment does not end with [SEP]"
    elif (
        facts.separators == 2
        and (block.tokens_T[ends[:, 0] - (lengths_Nx2[:, 0] < lengths_Nx2[:, 1])] != facts.sep_id).any()
    ):
        yield "no two [SEP]s stand between its segments"
    if ((lengths_Nx2[:, 0] == lengths_Nx2[:, 1]) != (manifest.objective == "none")).any():
        yield f"its segments are not those of objective {manifest.objective}"
    ids_N = sample_ids(shard_id, start, len(lengths_Nx2))
    for draw, baked in enumerate(block.masks):
        drawn = manifest.draw(block.tokens_T, block.lengths_Nx2, ids_N, draw, block.word_starts_T)
        if [column.tolist() for column in baked] != [column.tolist() for column in drawn]:
            yield f"mask draw {draw} is not what the mask function gives"
