"""`python -m finetune.compress out/sst2 out/sst2-onnx texts.txt`: a fine-tuned model as ONNX, whole and in int8.

onnxruntime must give PyTorch's outputs before anything counts as done. int8 is dynamic quantization of the weights: its
outputs differ, so it is told how often its prediction is the same, and how fast each of the three is on this machine.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import nn
from transformers.utils import logging as transformers_logging

from data_prep.errors import ExitCode, UserError
from finetune.train import load_tokenizer

TOLERANCE = 1e-4  # largest difference of two fp32 outputs
_BATCH, _ROUNDS, _MOST_TEXTS = 8, 5, 256
_OUTPUTS = ("logits", "start_logits", "end_logits")

Batch = dict[str, npt.NDArray[np.int64]]
Arrays = list[npt.NDArray[np.float32]]


def read_texts(path: Path) -> list[str]:
    """One text per line. Raises `UserError` where there are none."""
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); a UTF-8 file with a text per line is needed") from error
    if not texts:
        raise UserError(f"{path}: holds no texts")
    return texts


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


def compress(folder: Path, out: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Write model.onnx, model-int8.onnx, tokenizer, config.json and compress.json; returns what the last holds.

    Raises `UserError` where the model cannot be loaded, or ONNX differs from PyTorch by more than `TOLERANCE`.
    """
    try:
        import onnx
        from onnxruntime import InferenceSession
        from onnxruntime.quantization import quantize_dynamic
    except ModuleNotFoundError as error:
        raise UserError(f"needs {error.name}: pip install 'cloze[finetune]'") from None
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; name another directory")
    tokenizer = load_tokenizer(folder)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = _Plain(getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()).eval()
    limit = model.model.config.max_position_embeddings
    batches = [
        dict(
            tokenizer(list(texts[i : i + _BATCH]), truncation=True, max_length=limit, padding=True, return_tensors="np")
        )
        for i in range(0, len(texts), _BATCH)
    ]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        tokenizer.save_pretrained(temporary)
        shutil.copy(folder / "config.json", temporary)
        whole, small = temporary / "model.onnx", temporary / "model-int8.onnx"
        with _quietly():
            _to_onnx(model, batches[0], whole)
            graph = onnx.load(whole)
            del graph.graph.value_info[:]  # shapes that PyTorch's optimizer left behind; the quantizer finds its own
            quantize_dynamic(graph, small)
        sessions = [InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (whole, small)]
        runners: dict[str, Callable[[Batch], Arrays]] = {"pytorch": lambda batch: _torch(model, batch)}
        for name, session in zip(("onnx", "onnx_int8"), sessions, strict=True):
            runners[name] = partial(session.run, None)
        body = _compare(runners, batches) | {"bytes": {path.name: path.stat().st_size for path in (whole, small)}}
        if not body["onnx"]["difference"] <= TOLERANCE:
            raise UserError(
                f"{folder}: ONNX differs from PyTorch by {body['onnx']['difference']:.2g}; nothing was written"
            )
        (temporary / "compress.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return body


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


def _compare(runners: dict[str, Callable[[Batch], Arrays]], batches: Sequence[Batch]) -> dict[str, Any]:
    """Of each: texts per second (median of rounds that take turns), and how it differs from the first."""
    outputs = {name: [run(batch) for batch in batches] for name, run in runners.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(_ROUNDS):
        for name, run in runners.items():
            start = time.perf_counter()
            for batch in batches:
                run(batch)
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(runners))
    count = sum(len(batch["input_ids"]) for batch in batches)
    found: dict[str, Any] = {}
    for name in runners:
        pairs = [
            (a, b)
            for one, two in zip(outputs[first], outputs[name], strict=True)
            for a, b in zip(one, two, strict=True)
        ]
        same = np.concatenate([(a.argmax(-1) == b.argmax(-1)).ravel() for a, b in pairs])
        found[name] = {
            "texts_per_second": count / statistics.median(seconds[name]),
            "difference": max(float(np.abs(a - b).max()) for a, b in pairs),
            "same_prediction": float(same.mean()),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.compress", description="Fine-tuned model -> ONNX and int8."
    )
    parser.add_argument("model", type=Path, help="directory that `python -m finetune` wrote")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument(
        "texts", type=Path, help=f"texts to compare with, one per line; the first {_MOST_TEXTS} are used"
    )
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        body = compress(arguments.model, arguments.out, read_texts(arguments.texts)[:_MOST_TEXTS])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name in ("pytorch", "onnx", "onnx_int8"):
        row = body[name]
        print(
            f"{name:10} {row['texts_per_second']:9.1f} texts/s   same prediction {row['same_prediction']:6.1%}   "
            f"largest difference {row['difference']:.1e}"
        )
    print(f"{arguments.out}: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in body["bytes"].items()))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
