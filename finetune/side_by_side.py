"""Models beside each other on data.dev: size, score, speed here, and how often the answer is the first one's."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune.tasks import Prepared

_BATCH, _ROUNDS, _TIMED = 8, 5, 32  # samples of a batch; how often, and how many batches, speed is measured on
_OUTPUTS = ("logits", "start_logits", "end_logits")

Batch = dict[str, npt.NDArray[np.int64]]
Arrays = list[npt.NDArray[np.float32]]
Runner = Callable[[Batch], Arrays]


def outputs_of(found: Any) -> list[torch.Tensor]:
    """What a model answers with."""
    return [found[name] for name in _OUTPUTS if name in found]


def output_names(found: Any) -> list[str]:
    return [name for name in _OUTPUTS if name in found]


def runner(model: Any) -> Runner:
    """PyTorch's, on the device where the model is."""

    def run(batch: Batch) -> Arrays:
        inputs = {name: torch.as_tensor(ids, device=model.device) for name, ids in batch.items()}
        with torch.inference_mode():
            return [value.float().cpu().numpy() for value in outputs_of(model(**inputs))]

    return run


def batches(prepared: Prepared) -> Iterator[Batch]:
    """Those of data.dev, as arrays without labels."""
    features = prepared.dev.features
    for start in range(0, len(features), _BATCH):
        batch = prepared.collate([*features[start : start + _BATCH]])
        yield {name: ids.numpy() for name, ids in batch.items() if name not in prepared.label_columns}


def compared(
    runners: Mapping[str, Runner], sets: Sequence[Batch], prepared: Prepared, models: Mapping[str, Any]
) -> dict[str, Any]:
    """Of each: scores, how it differs from the first, examples per second (median of rounds that take turns).

    `models` are what `decide` asks, by the runners' names.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(_ROUNDS):
        for name, run in runners.items():
            start = time.perf_counter()
            for batch in sets[:_TIMED]:
                run(batch)
            seconds[name].append(time.perf_counter() - start)
    count = sum(len(batch["input_ids"]) for batch in sets[:_TIMED])
    found: dict[str, Any] = {}
    first: tuple[list[Arrays], Sequence[Any]] | None = None
    for name, run in runners.items():
        outputs = [run(batch) for batch in sets]
        joined = [_joined(parts) for parts in zip(*outputs, strict=True)]
        answers = prepared.dev.decide(joined[0] if len(joined) == 1 else tuple(joined), models[name])
        first = first or (outputs, answers)
        pairs = [(a, b) for one, two in zip(first[0], outputs, strict=True) for a, b in zip(one, two, strict=True)]
        found[name] = {
            **prepared.dev.score(answers),
            "difference": max(float(np.abs(a - b).max()) for a, b in pairs),
            "examples_per_second": count / statistics.median(seconds[name]),
        }
        if not isinstance(answers[0], float):  # two numbers are hardly ever the same
            found[name]["same_answer"] = statistics.fmean(a == b for a, b in zip(first[1], answers, strict=True))
    return found


def teacher_and_student(prepared: Prepared, student: Any) -> dict[str, Any]:
    """What distillation gave: parameters, bytes of the weights, and all that `compared` tells, of both."""
    models = {"teacher": prepared.teacher.eval(), "student": student.eval()}
    found = compared({name: runner(model) for name, model in models.items()}, [*batches(prepared)], prepared, models)
    for name, model in models.items():
        found[name]["parameters"] = sum(weights.numel() for weights in model.parameters())
        found[name]["bytes"] = sum(weights.numel() * weights.element_size() for weights in model.parameters())
    return found


def lines(found: Mapping[str, Mapping[str, Any]], score: str) -> list[str]:
    """`compared`, a line for each."""
    told = []
    for name, row in found.items():
        same = f"   same answer {row['same_answer']:6.1%}" if "same_answer" in row else ""
        size = f"{row['parameters']:13,d} parameters {row['bytes'] / 1e6:8.1f} MB   " if "parameters" in row else ""
        told.append(
            f"{name:10} {size}{score} {row[score]:.4f}{same}   largest difference {row['difference']:.1e}   "
            f"{row['examples_per_second']:9.1f} examples/s"
        )
    return told


def _joined(parts: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Batches of different width one after another."""
    width = max(part.shape[1] for part in parts)
    padded = [np.pad(part, [(0, 0), (0, width - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]) for part in parts]
    return np.concatenate(padded)
