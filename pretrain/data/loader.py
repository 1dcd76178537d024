"""Micro-batch i of a rank as a pure function of (manifest, seed, i, rank, world size).

There is no shuffle buffer and no loader state: to resume is to start at another i.
Shapes: T tokens, N samples, M masked tokens.
"""

import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, count, pairwise, repeat
from multiprocessing import forkserver, parent_process, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from cloze.corpus.manifest import VAL, Manifest, manifest_sha256, pass_name, read_manifest
from cloze.corpus.masking import Masks
from cloze.corpus.ragged import ranges
from cloze.corpus.shards import Samples, Split, masks_of
from cloze.errors import DiskError, UserError
from pretrain.data.live_masks import LiveMasks
from pretrain.data.order import locate, micro_batch_positions
from pretrain.data.stream import Streamed
from pretrain.watchdog import STOP_SIGNALS

T = TypeVar("T")
I64 = npt.NDArray[np.int64]

IGNORED = -100  # the label of positions that do not count
TOKENS_MULTIPLE = 256  # `bounded` fills a row up to a multiple of it
_FEW_MASKED = 256
_MASKED_MULTIPLES = (16, 64)  # up to so few masked positions, and above: in a small step the head is most of the work
_LENGTH_MULTIPLE = 16
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # through which loader processes hand over what they made
_LOADER_FAULTS = re.compile("exited unexpectedly|killed by signal|shared memory|shm|No space left|oo many open files")
_LITTLE_MIB = 8
_FILES_PER_BATCH = 28  # a file for each of 7 tensors, in this process and in the one that made them, twice at a time
_OTHER_FILES = 128
_MANY_FILES = 1 << 16  # where there is no limit
CHUNK_SAMPLES = 512  # read, masked and packed at a time: numpy's cost per call is then nothing beside the work


class MicroBatch(NamedTuple):
    """Packed tensors of N samples and what the loop must know of them on the host."""

    input_ids_T: torch.Tensor  # i64, masks applied
    position_ids_T: torch.Tensor  # i64, from 0 in each sample
    token_type_ids_T: torch.Tensor  # i64, 0 through the [SEP]s after the first segment, then 1 where there are types
    cu_seqlens: torch.Tensor  # i32 [N + 1], first token of each sample, and the end
    masked_index_M: torch.Tensor  # i64, into the row of T tokens
    mlm_labels_M: torch.Tensor  # i64
    nsp_labels_N: torch.Tensor  # i64
    max_seqlen: int
    tokens_squared: int  # sum of squared sample lengths, for FLOPs
    num_tokens: int  # of samples: the tensors may be padded beyond (see `bounded`)
    num_masked: int

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(*(_moved(part, device) for part in self))

    def pin_memory(self) -> "MicroBatch":
        """Called by the DataLoader where batches go to a GPU."""
        return MicroBatch(*(_pinned(part) for part in self))


def _pinned(part: Any) -> Any:
    return part.pin_memory() if isinstance(part, torch.Tensor) else part


def _moved(part: Any, device: torch.device) -> Any:
    return part.to(device, non_blocking=True) if isinstance(part, torch.Tensor) else part


class Streaming(NamedTuple):
    """How to read a corpus, or those of a mixture, without a copy: see stream.py."""

    sources: Sequence[str]  # directory or fsspec URL of each corpus
    lanes: int
    window: int  # samples per lane that are shuffled together


class TrainingCorpus:
    """A prepared corpus: samples by (epoch, index), masks applied."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        self.sha256 = manifest_sha256(directory)
        self.pass_sizes = [self.manifest.splits[pass_name(p)].samples for p in range(self.manifest.passes)]
        if not sum(self.pass_sizes):
            raise UserError(f"{directory}: holds no training samples; prepare it from more text")
        self.held_out = {split: self.manifest.splits[split].samples for split in self.manifest.held_out}
        self.num_val = self.held_out.get(VAL, 0)
        self.has_pairs = self.manifest.objective != "none"
        self.averaged: tuple[str, ...] = ()  # held-out splits whose mean stands for all, where there is no `val`
        self.corpora: tuple[TrainingCorpus, ...] = (self,)  # those that it is made of; several, of a mixture
        self._splits: dict[str, Split] = {}
        self._streamed: Streamed | None = None
        self._live_masks: LiveMasks | None = None  # of training samples, in place of the corpus' own

    @property
    def opener(self) -> "Path | Callable[[], TrainingCorpus]":
        """What another process opens it by."""
        return self.directory

    @property
    def epoch_samples(self) -> float:
        """Samples of a mean pass."""
        return sum(self.pass_sizes) / self.manifest.passes

    def training_batch(self, seed: int, positions_N: I64) -> MicroBatch:
        """The samples at these ascending positions of the run, as one packed micro-batch."""
        return self._pack(self.training_parts(seed, positions_N, positions_N))

    def training_parts(self, seed: int, own_N: I64, positions_N: I64) -> list[tuple[Samples, Masks]]:
        """The samples at the ascending positions `own_N` of this corpus' order, an item for each epoch they touch.

        `positions_N` are those of the run, which masks may depend on.
        """
        parts = []
        if self._streamed:
            start = 0
            for samples, draw in self._streamed.gather(own_N):
                end = start + len(samples.ids_N)
                parts.append(self._with_masks(samples, draw, positions_N[start:end]))
                start = end
            return parts
        place = locate(seed, own_N, self.pass_sizes)
        visits_N, passes_N = np.divmod(place.epochs_N, self.manifest.passes)
        for epoch in np.unique(place.epochs_N).tolist():  # more than one only where the batch spans epochs
            here = place.epochs_N == epoch
            split, draw = pass_name(int(passes_N[here][0])), int(visits_N[here][0])
            samples = self._split(split).gather(place.samples_N[here], draw)
            parts.append(self._with_masks(samples, draw, positions_N[here]))
        return parts

    def progress(self, samples: int) -> dict[str, float]:
        """Metrics, beside the run's own, of where it stands when so many samples are consumed."""
        del samples
        return {}

    def told(self) -> list[str]:
        """A line for each corpus of a mixture."""
        return []

    def mask_live(self, live_masks: LiveMasks | None) -> None:
        """Draw masks of training samples so from now on; None: as the corpus has them."""
        self._live_masks = live_masks

    def stream(self, seed: int, streaming: Streaming) -> None:
        """Read training samples by `streaming` from now on, instead of from the directory."""
        (source,) = streaming.sources
        self._streamed = Streamed(source, self.manifest, seed, streaming.lanes, streaming.window)

    def val_batch(self, indices_N: I64, split: str = VAL) -> MicroBatch:
        """Samples of a held-out split with their first draw of masks: the same in every evaluation."""
        samples = self._split(split).gather(indices_N, 0)
        return self._pack([(samples, masks_of(samples, self.manifest, 0))])

    def sample_batch(self) -> MicroBatch:
        """A sample that is made up, for passes whose result does not count: no shard need be here."""
        facts = self.manifest.tokenizer
        return MicroBatch(
            input_ids_T=torch.tensor([facts.cls_id, facts.mask_id, facts.sep_id]),
            position_ids_T=torch.arange(3),
            token_type_ids_T=torch.zeros(3, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
            masked_index_M=torch.tensor([1]),
            mlm_labels_M=torch.tensor([facts.unk_id]),
            nsp_labels_N=torch.tensor([0]),
            max_seqlen=3,
            tokens_squared=9,
            num_tokens=3,
            num_masked=1,
        )

    def _pack(self, parts: list[tuple[Samples, Masks]]) -> MicroBatch:
        return pack(parts, self.manifest.tokenizer.token_types)

    def _split(self, split: str) -> Split:
        if split not in self._splits:
            self._splits[split] = Split(self.directory, self.manifest, split)
        return self._splits[split]

    def _with_masks(self, samples: Samples, draw: int, positions_N: I64) -> tuple[Samples, Masks]:
        live, own = self._live_masks, self.manifest.masking.probability
        return samples, masks_of(samples, self.manifest, draw, live.rates(positions_N, own) if live else None)


def pack(parts: list[tuple[Samples, Masks]], token_types: bool = True, places_N: I64 | None = None) -> MicroBatch:
    """Samples and their masks -> one row of tokens; without `token_types` all are of type 0.

    `places_N`: which sample of the row each of them becomes, where it is not as they come.
    """
    tokens_T = _joined([samples.tokens_T for samples, _ in parts])
    lengths_Nx2 = _joined([samples.lengths_Nx2 for samples, _ in parts])
    labels_N = _joined([samples.random_next_N for samples, _ in parts])
    counts_N = _joined([masks.counts_N for _, masks in parts])
    positions_M = _joined([masks.positions_M for _, masks in parts])
    shown_M = _joined([masks.tokens_M for _, masks in parts])
    if places_N is not None:
        order_N = np.argsort(places_N)
        tokens_T = tokens_T[_moved_runs(lengths_Nx2[:, 1], order_N)]
        moved_M = _moved_runs(counts_N, order_N)
        positions_M, shown_M = positions_M[moved_M], shown_M[moved_M]
        lengths_Nx2, labels_N, counts_N = lengths_Nx2[order_N], labels_N[order_N], counts_N[order_N]

    first_N, total_N = lengths_Nx2[:, 0], lengths_Nx2[:, 1]
    cu_seqlens = np.concatenate([[0], np.cumsum(total_N)])
    starts_N = cu_seqlens[:-1]
    position_ids_T = np.arange(len(tokens_T)) - np.repeat(starts_N, total_N)
    token_type_ids_T = ((position_ids_T >= np.repeat(first_N, total_N)) & token_types).astype(np.int64)
    masked_index_M = np.repeat(starts_N, counts_N) + positions_M
    mlm_labels_M = tokens_T[masked_index_M]
    tokens_T[masked_index_M] = shown_M
    return MicroBatch(
        input_ids_T=torch.from_numpy(tokens_T),
        position_ids_T=torch.from_numpy(position_ids_T),
        token_type_ids_T=torch.from_numpy(token_type_ids_T),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        masked_index_M=torch.from_numpy(masked_index_M),
        mlm_labels_M=torch.from_numpy(mlm_labels_M),
        nsp_labels_N=torch.from_numpy(labels_N),
        max_seqlen=int(total_N.max(initial=0)),
        tokens_squared=int((total_N**2).sum()),
        num_tokens=len(tokens_T),
        num_masked=len(mlm_labels_M),
    )


def _moved_runs(lengths_N: I64, order_N: I64) -> I64:
    """Indices that bring runs of these lengths, one after another, into another order."""
    return ranges((np.cumsum(lengths_N) - lengths_N)[order_N], lengths_N[order_N])


def _joined(arrays: Sequence[npt.NDArray[np.integer]]) -> I64:
    return np.concatenate(arrays, dtype=np.int64, casting="unsafe")


def cut(batch: MicroBatch, size: int) -> list[MicroBatch]:
    """The micro-batches of `size` samples that one packed row of a multiple of them holds, as `pack` makes them."""
    tokens_T, positions_T, types_T, cu_seqlens, index_M, labels_M, nsp_N = (part.numpy() for part in batch[:7])
    total_N = np.diff(cu_seqlens).astype(np.int64)
    longest = np.maximum.reduceat(total_N, np.arange(0, len(total_N), size)).tolist()
    squared = np.add.reduceat(total_N**2, np.arange(0, len(total_N), size)).tolist()
    edges = cu_seqlens[::size]
    token_spans, mask_spans = pairwise(edges.tolist()), pairwise(np.searchsorted(index_M, edges).tolist())
    found = []
    for i, ((start, end), (first, last)) in enumerate(zip(token_spans, mask_spans, strict=True)):
        here = slice(i * size, (i + 1) * size)
        arrays = (
            tokens_T[start:end],
            positions_T[start:end],
            types_T[start:end],
            cu_seqlens[here.start : here.stop + 1] - start,
            index_M[first:last] - start,
            labels_M[first:last],
            nsp_N[here].copy(),  # what goes to another process takes all of its memory along
        )
        numbers = (longest[i], squared[i], end - start, last - first)
        found.append(MicroBatch._make((*map(torch.from_numpy, arrays), *numbers)))
    return found


def bounded(batch: MicroBatch) -> MicroBatch:
    """Padded to few different shapes: kernels are not rebuilt at each step, and freed memory fits what comes next.

    Extra tokens belong to no sample, so attention leaves them out, and nothing reads them; extra masked positions have
    the label that cross-entropy ignores. On a CPU, shapes that never come twice make the heap grow by the hour.
    """
    masked_multiple = _MASKED_MULTIPLES[len(batch.masked_index_M) > _FEW_MASKED]
    return batch._replace(
        input_ids_T=_filled(batch.input_ids_T, TOKENS_MULTIPLE),
        position_ids_T=_filled(batch.position_ids_T, TOKENS_MULTIPLE),
        token_type_ids_T=_filled(batch.token_type_ids_T, TOKENS_MULTIPLE),
        masked_index_M=_filled(batch.masked_index_M, masked_multiple),
        mlm_labels_M=_filled(batch.mlm_labels_M, masked_multiple, IGNORED),
        max_seqlen=batch.max_seqlen + -batch.max_seqlen % _LENGTH_MULTIPLE,
    )


def _filled(tensor: torch.Tensor, multiple: int, value: int = 0) -> torch.Tensor:
    """A copy, with `value` up to the next multiple. In numpy: several times as fast as torch for so few elements."""
    values = tensor.numpy()
    size = len(values)
    filled = np.empty(size + -size % multiple, np.int64)
    filled[:size], filled[size:] = values, value
    return torch.from_numpy(filled)


class Layout(NamedTuple):
    """How global batches are dealt to ranks."""

    rank: int
    world_size: int
    micro_batch_size: int
    global_batch_size: int

    @property
    def accumulation(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)


class MicroBatches(Dataset[MicroBatch | UserError]):
    """`dataset[i]` is this rank's micro-batch i, counted from run position `first_position`; it never ends.

    A corrupt shard comes back as the `UserError` itself: an exception would lose its one line on the way out of a
    worker process.
    """

    def __init__(
        self,
        corpus: Path | Callable[[], TrainingCorpus],
        seed: int,
        layout: Layout,
        first_position: int = 0,
        streaming: Streaming | None = None,
        live_masks: LiveMasks | None = None,
    ) -> None:
        """`corpus`: its directory, or what opens it, in each process anew."""
        self.corpus, self.seed, self.layout, self.first_position = corpus, seed, layout, first_position
        self.streaming, self.live_masks = streaming, live_masks
        self._corpus: TrainingCorpus | None = None

    def __getitem__(self, index: int) -> MicroBatch | UserError:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[MicroBatch] | list[UserError]:
        """Several micro-batches in one pass over their samples: the same as one by one, and faster.

        The DataLoader calls this where it batches indices.
        """
        try:
            if self._corpus is None:
                self._corpus = TrainingCorpus(self.corpus) if isinstance(self.corpus, Path) else self.corpus()
                if self.streaming:
                    self._corpus.stream(self.seed, self.streaming)
                self._corpus.mask_live(self.live_masks)
            interleaved = self.streaming is not None
            positions = [
                micro_batch_positions(index, **self.layout._asdict(), interleaved=interleaved) for index in indices
            ]
            row = self._corpus.training_batch(self.seed, self.first_position + np.concatenate(positions))
            return [bounded(batch) for batch in cut(row, self.layout.micro_batch_size)]
        except UserError as error:
            return [error]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_corpus": None}  # each worker maps the files itself


def training_steps(
    dataset: MicroBatches, *, steps: int | Iterable[int], workers: int, prefetch: int, pin_memory: bool
) -> Generator[list[MicroBatch], None, None]:
    """The micro-batches of the dataset's first optimizer steps, a list per step, prefetched by index.

    `steps` counts them, or says of each, before it begins, how many micro-batches it has, where the batch grows.
    """
    sizes = iter(repeat(dataset.layout.accumulation, steps) if isinstance(steps, int) else steps)
    chunk = max(1, CHUNK_SAMPLES // dataset.layout.micro_batch_size)
    if workers:
        room = max(1, (_open_files() - _OTHER_FILES) // _FILES_PER_BATCH)
        chunk, prefetch = min(chunk, room), min(prefetch, room)
        _start_deaf_forkserver()
    loader: DataLoader[MicroBatch | UserError] = DataLoader(
        dataset,
        sampler=count(),
        batch_size=chunk,
        collate_fn=list,
        num_workers=workers,
        prefetch_factor=-(-prefetch // chunk) if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_end_with_parent,
        pin_memory=pin_memory,
    )
    step: list[MicroBatch] = []
    size = next(sizes, 0)
    if not size:
        return
    for item in _with_reasons(loader):  # no name for the iterator: a traceback would keep its processes alive
        if isinstance(item, UserError):
            raise item
        step.append(item)
        if len(step) == size:
            yield step
            step, size = [], next(sizes, 0)
            if not size:
                return


def _open_files() -> int:
    """How many this process may have open, raised as far as it may raise that itself; its children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft if soft >= 0 else _MANY_FILES


def _with_reasons(loader: Iterable[Iterable[T]]) -> Iterator[T]:
    """What is in its chunks. Raises `UserError` where a loader process is gone, or has no room for what it made."""
    try:
        yield from chain.from_iterable(loader)  # which starts the processes
    except (RuntimeError, OSError) as error:
        told = str(error)
        if not re.search(
            r"exited unexpectedly|killed by signal|shared memory|shm|No space left|oo many open files", told
        ):
            raise
        lost = _loader_lost(told)
    lost.one_rank_only = True
    raise lost


def _loader_lost(told: str) -> UserError:
    """Why, as far as this machine tells it."""
    if "open files" in told:
        return UserError(
            "data.workers: a loader process could not hand over its batches (too many open files); raise the limit "
            "(ulimit -n 4096), or set data.workers=0"
        )
    room = os.statvfs(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    free_mib = room.f_bavail * room.f_frsize / 2**20 if room else 0.0
    if re.search("shared memory|shm|Bus error|No space left", told) or free_mib < _LITTLE_MIB:
        return DiskError(
            f"{SHARED_MEMORY}: no room for the loader's batches ({free_mib:.0f} MiB are free); give the container more "
            "(docker run --shm-size=1g), or set data.workers=0"
        )
    return UserError(
        "data.workers: a loader process is gone, perhaps killed for want of memory (dmesg, or the container's limit, "
        "tells); the same command goes on, with fewer data.workers if it comes again"
    )


def _end_with_parent(worker: int) -> None:
    """End this loader process with the one that trains, however that ends.

    torch looks at the number of the parent, which is the fork server here; and that lives as long as its children.
    """
    del worker
    trainer = parent_process()
    assert trainer

    def wait() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _start_deaf_forkserver() -> None:
    """Start the parent of the loader's processes with the signals that end a job blocked, as its children inherit.

    Slurm, `timeout` and Ctrl-C signal every process of a job. When to stop is the training loop's to say, and until
    then it needs its loader.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # it unblocks some
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
