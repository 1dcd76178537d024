"""The same few held-out sentences at every evaluation, a word left out of each: what would the model put there?

Which they are follows from the corpus alone. The model sees them as in every evaluation, with the corpus' own masks; of
each sample one masked whole word near its middle is told of, and read beside the text as it was. Rank 0 writes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cloze.corpus.tokenizer import CorpusTokenizer, load_tokenizer
from cloze.errors import UserError
from pretrain.config import TrainConfig
from pretrain.data.loader import IGNORED, MicroBatch, TrainingCorpus, bounded
from pretrain.dist import Process
from pretrain.engine.engine import Engine
from pretrain.telemetry.predictions import Gap, Guess, write_gaps, write_guesses

_BEFORE, _AFTER = 12, 8  # tokens of context that are told


class Part(NamedTuple):
    """Some of the samples, as many as are run at once."""

    batch: MicroBatch
    rows: list[int]  # of the logits: one for each gap


class RunGaps:
    """The sentences of one run."""

    def __init__(self, parts: Sequence[Part], gaps: Sequence[Gap], tokenizer: CorpusTokenizer, folder: Path) -> None:
        self._parts, self.gaps, self._tokenizer, self._folder = parts, gaps, tokenizer, folder
        self._begun = self._off = False

    def evaluate(self, engine: Engine, process: Process, step: int) -> None:
        """Guess, and on rank 0 write the guesses down. Collective."""
        guesses = []
        for part in self._parts:
            logits_MV = engine.evaluate(part.batch.to(process.device))[0]
            likeliest = torch.softmax(logits_MV[part.rows].float(), dim=-1).max(dim=-1)
            for share, token in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
                guesses.append(Guess(self._tokenizer.backend.id_to_token(token) or "", share))
        if not process.is_main or self._off:
            return
        try:
            if not self._begun:
                write_gaps(self._folder, self.gaps)
                self._begun = True
            write_guesses(self._folder, step, guesses)
        except OSError as error:  # a picture of the run: not worth ending it
            self._off = True
            process.log.warning(f"{self._folder}: predictions are written no more ({error.strerror})")


def open_gaps(config: TrainConfig, corpus: TrainingCorpus, folder: Path) -> RunGaps | None:
    """Those of `eval.predictions`, on every rank the same; None without any, or without held-out samples."""
    split = next((split for split, count in corpus.held_out.items() if count), None)
    if not config.eval.predictions or split is None:
        return None
    try:
        tokenizer = load_tokenizer(corpus.directory / "tokenizer")
    except UserError:  # a run needs it for nothing else
        return None
    count = corpus.held_out[split]
    indices = np.unique(np.linspace(0, count - 1, min(count, config.eval.predictions)).astype(np.int64))
    parts, gaps = [], []
    for start in range(0, len(indices), config.micro_batch_size):
        batch = bounded(corpus.val_batch(indices[start : start + config.micro_batch_size], split))
        found = [
            chosen for sample in range(len(batch.nsp_labels_N)) if (chosen := _gap(batch, sample, tokenizer, corpus))
        ]
        parts.append(Part(batch, [row for row, _ in found]))
        gaps += [gap for _, gap in found]
    return RunGaps(parts, gaps, tokenizer, folder) if gaps else None


def _gap(batch: MicroBatch, sample: int, tokenizer: CorpusTokenizer, corpus: TrainingCorpus) -> tuple[int, Gap] | None:
    """(row of the logits, the gap) of the masked whole word nearest to the middle of a sample; None without one."""
    begin, end = batch.cu_seqlens[sample : sample + 2].tolist()
    places, labels = batch.masked_index_M.tolist(), batch.mlm_labels_M.tolist()
    tokens = batch.input_ids_T.tolist()
    facts, vocabulary = corpus.manifest.tokenizer, tokenizer.backend
    shown = {place: tokens[place] for place in places}
    for place, label in zip(places, labels, strict=True):
        if label != IGNORED:
            tokens[place] = label  # the text as it was

    def continues(place: int) -> bool:
        token = vocabulary.id_to_token(tokens[place]) or "" if place < end else ""
        return token[-1:].isalnum() and not tokenizer.kind.begins_word(token)

    words = [
        (abs(place - (begin + end) // 2), row, place)
        for row, (place, label) in enumerate(zip(places, labels, strict=True))
        if label != IGNORED and begin <= place < end and shown[place] == facts.mask_id
        if not continues(place) and not continues(place + 1)
        if tokenizer.kind.readable(vocabulary.id_to_token(label) or "").strip().isalpha()
    ]
    if not words:
        return None
    _, row, place = min(words)
    ends = {facts.cls_id, facts.sep_id}
    first = max((at + 1 for at in range(begin, place) if tokens[at] in ends), default=begin)
    last = min((at for at in range(place, end) if tokens[at] in ends), default=end)
    start, stop = max(first, place - _BEFORE), min(last, place + 1 + _AFTER)
    while start < place and continues(start):  # whole words only
        start += 1
    while stop < last and continues(stop):
        stop += 1
    before, after = vocabulary.decode(tokens[start:place]), vocabulary.decode(tokens[place + 1 : stop])
    return row, Gap(before, after, vocabulary.id_to_token(tokens[place]) or "")
