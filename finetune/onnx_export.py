"""A fine-tuned model as ONNX, whole and in int8, both held against PyTorch on the development set of its task.

onnxruntime must give PyTorch's outputs before anything counts as done. int8 is dynamic quantization of the weights: its
outputs differ, so it is told what it scores, how often its answer is the same, and how fast each of the three is here.
"""

import json
import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnxruntime import InferenceSession
from onnxruntime.quantization import quantize_dynamic
from torch import nn

from cloze.errors import UserError
from finetune.config import FinetuneConfig, Init, saved
from finetune.techniques.crf import save
from finetune.train import Prepared
from pretrain.export.hugging_face import be_quiet, replaced_directory

TOLERANCE = 1e-4  # largest difference of two fp32 outputs
_BATCH, _ROUNDS, _TIMED = 8, 5, 32  # samples of a batch; how often, and how many batches, speed is measured on
_OUTPUTS = ("logits", "start_logits", "end_logits")

Batch = dict[str, npt.NDArray[np.int64]]
Arrays = list[npt.NDArray[np.float32]]


class _Plain(nn.Module):
    """Inputs and outputs that ONNX has: tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **segments)
        return tuple(found[name] for name in _OUTPUTS if name in found)


def compress(folder: Path, out: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Write model.onnx, model-int8.onnx, tokenizer, config.json and compress.json; returns what the last holds.

    `data` names train and dev where they are not what the model was made with. Raises `UserError` where model or data
    cannot be loaded, or ONNX differs from PyTorch by more than `TOLERANCE`.
    """
    be_quiet()
    config = _config(folder, data)
    with replaced_directory(out) as temporary:
        prepared = config.definition.family.prepare(config)
        model = _Plain(prepared.make_model().eval()).eval()
        batches = list(_batches(prepared))
        prepared.tokenizer.save_pretrained(temporary)
        for name in ("config.json", "metrics.json"):  # the latter tells `finetune.predict` what the model does
            shutil.copy(folder / name, temporary)
        if crf := getattr(model.model, "crf", None):
            save(crf, temporary)
        whole, small = temporary / "model.onnx", temporary / "model-int8.onnx"
        with _quietly():
            _to_onnx(model, batches[0], whole)
            graph = onnx.load(whole)
            del graph.graph.value_info[:]  # shapes that PyTorch's optimizer left behind; the quantizer finds its own
            quantize_dynamic(graph, small)
        runners: dict[str, Callable[[Batch], Arrays]] = {"pytorch": lambda batch: _torch(model, batch)}
        for name, path in (("onnx", whole), ("onnx_int8", small)):
            runners[name] = partial(InferenceSession(path, providers=["CPUExecutionProvider"]).run, None)
        body = _compare(runners, batches, prepared, model.model)
        if not body["onnx"]["difference"] <= TOLERANCE:
            raise UserError(
                f"{folder}: ONNX differs from PyTorch by {body['onnx']['difference']:.2g}; nothing was written"
            )
        body |= {
            "score": config.definition.score,
            "bytes": {path.name: path.stat().st_size for path in (whole, small)},
        }
        (temporary / "compress.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return body


def _config(folder: Path, data: Mapping[str, Any]) -> FinetuneConfig:
    """That of the model in `folder`, to be loaded again as it is."""
    try:
        body = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: has no metrics.json; name a directory that `python -m finetune` wrote") from None
    config = saved(body)
    alone, own = replace(config.distill, teacher=None), replace(config.data, **data)
    return replace(config, model=str(folder), init=Init.pretrained, distill=alone, data=own)


def _batches(prepared: Prepared) -> Iterator[Batch]:
    for start in range(0, len(prepared.dev), _BATCH):
        batch = prepared.collate([*prepared.dev[start : start + _BATCH]])
        yield {name: ids.numpy() for name, ids in batch.items() if name not in prepared.label_columns}


def _to_onnx(model: _Plain, example: Batch, path: Path) -> None:
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    inputs = {
        name: torch.as_tensor(np.concatenate([ids, ids])) for name, ids in example.items()
    }  # one row is a constant
    torch.onnx.export(
        model,
        kwargs=inputs,
        f=path,
        input_names=list(inputs),
        output_names=[name for name in _OUTPUTS if name in model.model(**inputs)],
        dynamic_shapes={name: {0: batch, 1: tokens} for name in inputs},
        external_data=False,
        verbose=False,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporters say of themselves."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _torch(model: _Plain, batch: Batch) -> Arrays:
    with torch.inference_mode():
        return [value.numpy() for value in model(**{name: torch.as_tensor(ids) for name, ids in batch.items()})]


def _compare(
    runners: dict[str, Callable[[Batch], Arrays]], batches: Sequence[Batch], prepared: Prepared, model: Any
) -> dict[str, Any]:
    """Of each: scores, how it differs from the first, examples per second (median of rounds that take turns)."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(_ROUNDS):
        for name, run in runners.items():
            start = time.perf_counter()
            for batch in batches[:_TIMED]:
                run(batch)
            seconds[name].append(time.perf_counter() - start)
    count = sum(len(batch["input_ids"]) for batch in batches[:_TIMED])
    found: dict[str, Any] = {}
    first: tuple[list[Arrays], Sequence[Any]] | None = None
    for name, run in runners.items():
        outputs = [run(batch) for batch in batches]
        joined = [_joined(parts) for parts in zip(*outputs, strict=True)]
        answers = prepared.decide(joined[0] if len(joined) == 1 else tuple(joined), model)
        first = first or (outputs, answers)
        pairs = [(a, b) for one, two in zip(first[0], outputs, strict=True) for a, b in zip(one, two, strict=True)]
        found[name] = {
            **prepared.score(answers),
            "difference": max(float(np.abs(a - b).max()) for a, b in pairs),
            "examples_per_second": count / statistics.median(seconds[name]),
        }
        if not isinstance(answers[0], float):  # two numbers are hardly ever the same
            found[name]["same_answer"] = statistics.fmean(a == b for a, b in zip(first[1], answers, strict=True))
    return found


def _joined(parts: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Batches of different width one after another."""
    width = max(part.shape[1] for part in parts)
    padded = [np.pad(part, [(0, 0), (0, width - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]) for part in parts]
    return np.concatenate(padded)
