"""A mixture of corpora: which corpus the sample at a position of the run comes from, and how many-th of it that is.

Both are pure functions of the position. Positions come in blocks; of each block every corpus has its share to within a
sample, and what is left over is dealt so that it evens out over the blocks (a golden-ratio rotation); inside the block
a keyed permutation says where which corpus stands. So each corpus is read in its own exact order, epoch after epoch,
and how much of each came before a block is a sum that is looked up: nothing is replayed to resume.

Where corpora are streamed, positions take turns in lanes, each dealt by itself in blocks of its own, and what a lane of
the run reads of a corpus is one lane of that corpus' stream: so a rank that meets the same lanes again and again reads
no other lanes of any corpus, however much each of them weighs. Read whole, a corpus is one lane.
Shapes: N positions, K blocks, L lanes, C corpora.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cloze.corpus.manifest import VAL, val_name, val_split
from cloze.errors import UserError
from pretrain.curves import Curve
from pretrain.data.live_masks import LiveMasks
from pretrain.data.loader import MicroBatch, Streaming, TrainingCorpus, pack
from pretrain.data.order import sample_at
from pretrain.mixture import Part, Weights

I64 = npt.NDArray[np.int64]

BLOCK = 16_384  # positions
LANE_BLOCK = 2_048  # of each lane, where there are several
_LEAST_BLOCK, _LEAST_BLOCKS = 16, 1_024  # where weights change over the run: it has so many blocks, or the smallest
_PARTS = 4_096  # of a run, in which weights stay what they are in its middle
_UNIT_BITS = 32
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio
_DEAL = 0x6D1C5  # keeps the order of corpora apart from the order of samples
_KEPT_BLOCKS = 4


class MixtureOrder:
    """Which sample of which corpus stands at which position of a run, for ever."""

    def __init__(self, weights: Weights, seed: int, total_samples: int, lanes: int = 1) -> None:
        """`total_samples` of the run: what weights that change stretch over, of no matter to others."""
        self._weights, self._seed, self._total, self._lanes = weights, seed, total_samples, lanes
        self._size = BLOCK if lanes == 1 else LANE_BLOCK
        if not weights.is_constant:
            wanted = max(1, total_samples // lanes // _LEAST_BLOCKS)
            self._size = min(self._size, max(_LEAST_BLOCK, 1 << (wanted.bit_length() - 1)))
        self._edges_KxLxC = self._before_KxLxC = np.zeros((0, 0, 0), np.int64)
        self._blocks: dict[int, tuple[I64, I64]] = {}

    def deal(self, positions_N: I64) -> tuple[I64, I64]:
        """(number of the corpus, position in that corpus' own order) of run positions, each [N]."""
        turns_N, lanes_N = np.divmod(positions_N, self._lanes)
        blocks_N, within_N = np.divmod(turns_N, self._size)
        numbers_N = blocks_N * self._lanes + lanes_N
        corpora_N, own_N = np.empty_like(positions_N), np.empty_like(positions_N)
        for number in np.unique(numbers_N).tolist():
            here = numbers_N == number
            block, lane = divmod(number, self._lanes)
            dealt, ranks = self._block(block, lane)
            corpora_N[here] = dealt[within_N[here]]
            turns = self._before_KxLxC[block, lane][corpora_N[here]] + ranks[within_N[here]]
            own_N[here] = turns * self._lanes + lane
        return corpora_N, own_N

    def counts(self, position: int) -> list[int]:
        """How many samples of each corpus stand before a run position."""
        found = np.zeros(len(self._weights.shares(0.0)), np.int64)
        for lane in range(self._lanes):
            block, within = divmod(-(-(position - lane) // self._lanes), self._size)
            dealt, _ = self._block(block, lane)
            found += self._before_KxLxC[block, lane] + np.bincount(dealt[:within], minlength=len(found))
        return [int(count) for count in found]

    def _block(self, block: int, lane: int) -> tuple[I64, I64]:
        """Of each turn in a block of a lane: its corpus, and how many samples of that come before it in the block."""
        if block >= len(self._edges_KxLxC):
            self._look_ahead(2 * block + 1)
        number = block * self._lanes + lane
        if number not in self._blocks:
            turns, edges = np.arange(self._size, dtype=np.int64), self._edges_KxLxC[block, lane]
            places = sample_at(self._seed ^ _DEAL, number, turns, self._size)
            dealt = np.searchsorted(edges[1:], places, side="right")
            order, ranks = np.argsort(dealt, kind="stable"), np.empty_like(turns)
            ranks[order] = turns - edges[dealt[order]]
            kept = [*self._blocks.items()][1 - _KEPT_BLOCKS * self._lanes :]
            self._blocks = dict(kept) | {number: (dealt, ranks)}
        return self._blocks[number]

    def _look_ahead(self, blocks: int) -> None:
        """Where each corpus' part of each lane's first blocks begins and ends, and how much of it came before."""
        numbers_K = np.arange(blocks, dtype=np.int64)
        if self._weights.is_constant:
            shares_GxC, parts_K = np.array([self._weights.shares(0.0)]), np.zeros_like(numbers_K)
        else:
            shares_GxC = np.array([self._weights.shares((part + 0.5) / _PARTS) for part in range(_PARTS)])
            done_K = (numbers_K + 0.5) * (self._size * self._lanes / max(1, self._total))
            parts_K = np.minimum(done_K * _PARTS, _PARTS - 1).astype(np.int64)
        ends_GxC = np.rint(np.cumsum(shares_GxC, axis=1) * 2**_UNIT_BITS).astype(np.int64)
        ends_GxC[:, -1] = 2**_UNIT_BITS
        apart_L = np.arange(self._lanes, dtype=np.int64) * (2**_UNIT_BITS // self._lanes)  # evens out over the lanes
        left_KxL = (numbers_K[:, None] * _GOLDEN + apart_L) & (2**_UNIT_BITS - 1)
        edges_KxLxC = (ends_GxC[parts_K][:, None] * self._size + left_KxL[:, :, None]) >> _UNIT_BITS
        self._edges_KxLxC = np.pad(edges_KxLxC, ((0, 0), (0, 0), (1, 0)))
        counts_KxLxC = np.diff(self._edges_KxLxC, axis=2)
        self._before_KxLxC = np.cumsum(counts_KxLxC, axis=0) - counts_KxLxC


class MixedCorpus(TrainingCorpus):
    """Several corpora as one: `directory` and `manifest` are the first's, `max_len` the longest's.

    Held-out splits are those of all, with the names of their corpora before their own.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        directories: Sequence[Path],
        temperature: Curve,
        seed: int,
        total_samples: int,
        lanes: int = 1,
    ) -> None:
        """`lanes`: those of the streams that it is to read, 1 where it is read whole.

        Raises `UserError` where the corpora do not fit each other, or one of them is no corpus.
        """
        super().__init__(directories[0])
        self._opener = partial(MixedCorpus, parts, directories, temperature, seed, total_samples, lanes)
        self.names, self.seed, self.total_samples = tuple(part.name for part in parts), seed, total_samples
        self.corpora = tuple(TrainingCorpus(directory) for directory in directories)
        for corpus in self.corpora:
            require_alike(corpus, self, "data.mixture: ")
        longest = max(corpus.manifest.max_len for corpus in self.corpora)
        self.manifest = replace(self.manifest, max_len=longest)
        self.weights = Weights.of(parts, [corpus.epoch_samples for corpus in self.corpora], temperature)
        self.order, self.lanes = MixtureOrder(self.weights, seed, total_samples, lanes), lanes
        told = [self.weights, "" if self.weights.is_constant else total_samples, *(one.sha256 for one in self.corpora)]
        self.sha256 = hashlib.sha256(repr(told).encode()).hexdigest()
        self._held_out = {
            val_split("-".join(filter(None, (part.name, val_name(split))))): (corpus, split)
            for part, corpus in zip(parts, self.corpora, strict=True)
            for split in corpus.held_out
        }
        self.held_out = {label: corpus.held_out[split] for label, (corpus, split) in self._held_out.items()}
        self.averaged = tuple(label for label, (_, split) in self._held_out.items() if split == VAL)

    @property
    def opener(self) -> Callable[[], TrainingCorpus]:
        return self._opener

    def training_batch(self, seed: int, positions_N: I64) -> MicroBatch:
        assert seed == self.seed, "a mixture is dealt by the seed that its samples are ordered by"
        corpora_N, own_N = self.order.deal(positions_N)
        found, places = [], []
        for number, corpus in enumerate(self.corpora):
            here = np.flatnonzero(corpora_N == number)
            if len(here):
                here = here[np.argsort(own_N[here])]  # another order than the run's where there are lanes
                found += corpus.training_parts(seed, own_N[here], positions_N[here])
                places.append(here)
        return pack(found, self.manifest.tokenizer.token_types, np.concatenate(places))

    def val_batch(self, indices_N: I64, split: str = VAL) -> MicroBatch:
        corpus, own = self._held_out[split]
        return corpus.val_batch(indices_N, own)

    def sample_batch(self) -> MicroBatch:
        return self.corpora[0].sample_batch()

    def mask_live(self, live_masks: LiveMasks | None) -> None:
        for corpus in self.corpora:
            corpus.mask_live(live_masks)

    def stream(self, seed: int, streaming: Streaming) -> None:
        assert streaming.lanes == self.lanes, "a mixture is dealt by the lanes that its corpora are streamed in"
        for corpus, source in zip(self.corpora, streaming.sources, strict=True):
            corpus.stream(seed, streaming._replace(sources=(source,)))

    def progress(self, samples: int) -> dict[str, float]:
        """Metrics: samples and epochs of each corpus when the run has consumed so many."""
        found: dict[str, float] = {}
        for name, corpus, count in zip(self.names, self.corpora, self.order.counts(samples), strict=True):
            found |= {f"mixture/{name}/samples": count, f"mixture/{name}/epochs": count / corpus.epoch_samples}
        return found

    def told(self) -> list[str]:
        counts, ends = self.order.counts(self.total_samples), [self.weights.shares(share) for share in (0.0, 1.0)]
        lines = []
        for number, (name, corpus) in enumerate(zip(self.names, self.corpora, strict=True)):
            first, last = (f"{shares[number]:.1%}" for shares in ends)
            lines.append(
                f"{name} {first if first == last else f'{first} to {last}'}: {sum(corpus.pass_sizes):,} samples of up "
                f"to {corpus.manifest.max_len} tokens, {counts[number] / corpus.epoch_samples:.2f} epochs "
                f"({corpus.directory})"
            )
        return lines


def require_alike(corpus: TrainingCorpus, first: TrainingCorpus, where: str) -> None:
    """Raises `UserError`, beginning with `where`, unless one run can read both: one tokenizer, one objective."""
    theirs, ours = corpus.manifest, first.manifest
    if theirs.tokenizer != ours.tokenizer:
        raise UserError(
            f"{where}{corpus.directory} has another tokenizer than {first.directory}, so ids would mean other "
            f"words; prepare it with tokenizer.path={first.directory / 'tokenizer'}"
        )
    if theirs.objective != ours.objective:
        raise UserError(
            f"{where}{corpus.directory} was prepared with objective={theirs.objective}, {first.directory} with "
            f"objective={ours.objective}; prepare them alike"
        )
