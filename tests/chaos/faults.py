"""What the ranks of test_kills.py do besides training: they import this first, told by the fork server or site/.

Each writes down what it trained on, a line a step, into the folder CHAOS_LOG: the step, its first position in the run
and a digest of every sample that went through the model, masks taken off, labels included. With CHAOS_KILL=RANK:N that
rank kills itself at its N-th operation inside saves, having written half of a file where that is the operation.
"""

import itertools
import json
import os
import signal
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pretrain.checkpoint import format as checkpoint_format
from pretrain.checkpoint import writer
from pretrain.data.loader import IGNORED, MicroBatch
from pretrain.engine.engine import Engine
from pretrain.metrics import MetricsAccumulator

LOG = Path(os.environ["CHAOS_LOG"])
RANK = int(os.environ["RANK"])
VICTIM, AT = map(int, os.environ.get("CHAOS_KILL", "-1:0").split(":"))


def append(name: str, body: Any) -> None:
    """One line, whole or not at all: SIGKILL does not interrupt so small a write."""
    descriptor = os.open(LOG / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(body) + "\n").encode())
    os.close(descriptor)


def digests(batch: MicroBatch) -> list[str]:
    tokens, real = batch.input_ids_T.clone(), batch.mlm_labels_M != IGNORED
    tokens[batch.masked_index_M[real]] = batch.mlm_labels_M[real]
    return [
        blake2b(tokens[start:end].numpy().tobytes() + bytes([label]), digest_size=6).hexdigest()
        for (start, end), label in zip(itertools.pairwise(batch.cu_seqlens.tolist()), batch.nsp_labels_N, strict=True)
    ]


def note_what_is_trained_on() -> None:
    seen: list[str] = []
    agree, backward, count_step = MetricsAccumulator.agree, Engine.backward, MetricsAccumulator.count_step

    def noting_agree(self: MetricsAccumulator, *given: Any) -> Any:
        seen.clear()
        return agree(self, *given)

    def noting_backward(self: Engine, batch: MicroBatch, *given: Any, **options: Any) -> None:
        seen.extend(digests(batch))
        backward(self, batch, *given, **options)

    def noting_count_step(self: MetricsAccumulator, *given: Any) -> None:
        progress = self._session.progress
        append(f"rank-{RANK}.jsonl", {"step": progress.step, "first": progress.samples, "samples": seen})
        count_step(self, *given)

    MetricsAccumulator.agree, MetricsAccumulator.count_step = noting_agree, noting_count_step
    Engine.backward = noting_backward


def die_in_a_save() -> None:
    count = itertools.count(1)

    def deadly(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*given: Any, **options: Any) -> Any:
            if next(count) == AT:
                if name == "save_file":
                    real(*given, **options)
                    os.truncate(given[1], given[1].stat().st_size // 2)
                append("saves.jsonl", {"rank": RANK, "operation": name})
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **options)

        return operation

    names = {
        writer: ("save_file", "_write_share", "assemble", "write", "retain"),
        checkpoint_format: ("save_file", "fsync", "_remove"),
    }
    for module, operations in names.items():
        for name in operations:
            setattr(module, name, deadly(name, getattr(module, name)))


note_what_is_trained_on()
if RANK == VICTIM:
    die_in_a_save()
