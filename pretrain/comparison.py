"""Faults that no device reports: a bit that flips in one rank's memory, a processor that computes wrongly.

Ranks hold part of the state alike, and compute the same from the same input, to the bit. So now and then they compare
checksums: of what they hold, and of what comes out of one and the same micro-batch; whoever differs from the most is
named, and training ends before a checkpoint is made of it. Only ranks of one kind of device are compared, since another
kind may round otherwise. Neither the training state nor any random number is touched.
"""

import socket
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from cloze.errors import TrainingError
from pretrain.config import Access, TrainConfig
from pretrain.data.loader import IGNORED, MicroBatch, TrainingCorpus, bounded
from pretrain.dist import Process
from pretrain.engine.engine import Engine
from pretrain.precision import cpu_name

_DIGEST_BYTES = 6  # a float of 64 bits, in which ranks send it, holds 53
_CHUNK_ELEMENTS = 1 << 22  # summed at a time: on a CPU a chunk is copied


class Comparison:
    """Compares this rank with the others of its kind. Every rank calls each function equally often."""

    def __init__(
        self, engine: Engine, corpus: TrainingCorpus, config: TrainConfig, process: Process, step: int
    ) -> None:
        """`step` is where the run stands. Collective."""
        self._engine, self._process, self._sound_step = engine, process, step
        self._groups: list[list[int]] = []  # ranks that compute alike, where there are several
        self._reproducible = True
        if process.world_size == 1:
            return
        ranks: dict[str, list[int]] = defaultdict(list)
        known = process.everywhere((_kind_of(process.device), socket.gethostname()))
        for rank, (kind, _) in enumerate(known):
            ranks[kind].append(rank)
        self._groups, self._hosts = [group for group in ranks.values() if len(group) > 1], [host for _, host in known]
        if config.checks.arithmetic_every:  # rank 0's: what another one would read may be damaged
            self._batch = process.on_main(lambda: _batch_of(corpus, config))

    def weights(self, step: int) -> None:
        """Raises `TrainingError` on every rank where one holds other bits than the rest of what all hold alike."""
        if not self._groups:
            return
        sums = checksums(self._engine.replicated())
        digests = self._process.gather([_digest([*sums.values()])])
        odd = self._odd(digests)
        if not odd:
            return
        tables = self._process.everywhere(sums)
        first = next((name for name in sums if self._odd([table[name] for table in tables])), "?")
        raise TrainingError(
            f"step {step}: {self._told(odd)} not the weights that the others of its kind hold (first: {first}), so a "
            "bit flipped in its memory, or it computes wrongly; what is saved is from before, the same command goes on "
            "from there: leave that host out if it comes again"
        )

    def arithmetic(self, step: int) -> None:
        """Raises `TrainingError` on every rank where one computes something else from the same micro-batch."""
        if not self._groups or not self._reproducible or self._batch is None:
            return
        results = self._process.gather([self._computed(self._batch)])
        odd = self._odd(results)
        if not odd:
            self._sound_step = step
            return
        again = self._process.gather([self._computed(self._batch)])
        unsteady = [rank for rank, both in enumerate(zip(results, again, strict=True)) if both[0] != both[1]]
        if 2 * len(unsteady) > self._process.world_size:
            self._reproducible = False
            self._process.log.warning(
                "checks.arithmetic_every: this device computes the same twice with different results, so ranks cannot "
                "be compared, and are not any more; checks.arithmetic_every=0 leaves it out"
            )
            return
        raise TrainingError(
            f"step {step}: {self._told(unsteady or odd)} not what the others of its kind compute from the same "
            f"micro-batch, so a processor is at fault; checkpoints after step {self._sound_step} may hold its errors: "
            "remove them, leave that host out, and the same command goes on"
        )

    def _odd(self, values: Sequence[list[float] | int]) -> list[int]:
        """The ranks whose value is not that of most of their kind."""
        return [ranks[i] for ranks in self._groups for i in minority([str(values[rank]) for rank in ranks])]

    def _told(self, ranks: Sequence[int]) -> str:
        """Of the ranks at fault, or among which one is, what precedes `not what the others …`."""
        names = " and ".join(f"rank {rank} ({self._hosts[rank]})" for rank in ranks)
        if any({*ranks} >= {*group} for group in self._groups):
            return f"{names} differ, and no majority tells which is right: one of them has"
        return f"{names} {'has' if len(ranks) == 1 else 'have'}"

    def _computed(self, batch: MicroBatch) -> int:
        """Digest of logits and loss of a forward pass without dropout. Collective under ZeRO 3."""
        mlm_MxV, nsp_Nx2 = self._engine.evaluate(batch.to(self._process.device))
        labels_M = batch.mlm_labels_M.to(mlm_MxV.device)
        loss = torch.nn.functional.cross_entropy(mlm_MxV.float(), labels_M, ignore_index=IGNORED)
        return _digest([*checksums({"mlm": mlm_MxV, "nsp": nsp_Nx2, "loss": loss}).values()])


def minority(values: Sequence[str]) -> list[int]:
    """Which of them are not what most are: none where all are equal, all where no value has more than half."""
    value, count = Counter(values).most_common(1)[0]
    if 2 * count <= len(values):
        return list(range(len(values)))
    return [i for i, each in enumerate(values) if each != value]


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Of each tensor the sum of its bits, taken as whole numbers: any one bit that flips changes it.

    Waits for the device once.
    """
    sums = [_sum_of_bits(tensor.detach()) for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist() if sums else [], strict=True))


def _sum_of_bits(tensor: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    parts = torch.split(tensor.contiguous().view(whole).reshape(-1), _CHUNK_ELEMENTS)
    return torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()


def _digest(sums: Sequence[int]) -> int:
    return int.from_bytes(blake2b(np.asarray(sums, np.int64).tobytes(), digest_size=_DIGEST_BYTES).digest(), "little")


def _batch_of(corpus: TrainingCorpus, config: TrainConfig) -> MicroBatch | None:
    """The first micro-batch of the run; of a corpus that is streamed, of its held-out samples, if there are any."""
    if config.data.access is Access.mapped:
        return bounded(corpus.training_batch(config.seed, np.arange(config.micro_batch_size, dtype=np.int64)))
    for split, samples in corpus.held_out.items():
        if samples:
            return bounded(corpus.val_batch(np.arange(min(samples, config.micro_batch_size), dtype=np.int64), split))
    return None


def _kind_of(device: torch.device) -> str:
    """What ranks must have in common to compute the same bits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
