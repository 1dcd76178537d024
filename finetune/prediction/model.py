"""Running a model over features, batched by length: PyTorch's weights, or ONNX through onnxruntime.

Shapes: B samples of a batch, T tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from cloze.errors import UserError, first_line
from finetune.keys import Precision
from finetune.pooled_classifier import load_trained
from finetune.predictor import Arrays, Encoded, Feature, Predictor, Trained
from pretrain.export.hugging_face import be_quiet

Batch = dict[str, npt.NDArray[np.int64]]
Run = Callable[[Batch], Arrays]

_GPU_TOKENS, _CPU_TOKENS = 2**16, 2**12  # of a batch: beyond a few thousand a CPU's caches overflow


def loaded(trained: Trained, predictor: Predictor, precision: Precision) -> tuple[Run, int]:
    """The model as a function of a batch, and how many tokens a batch of it should have."""
    be_quiet()
    head = predictor.auto_class.removeprefix("AutoModel")
    if trained.architectures and not any(name.endswith(head) for name in trained.architectures):
        own = ", ".join(trained.architectures)
        raise UserError(f"model={trained.folder}: is {own}, and task={trained.task} needs …{head}; name another model")
    if trained.onnx:
        return _onnx(trained.onnx, predictor.outputs), _CPU_TOKENS
    model = load_trained(getattr(transformers, predictor.auto_class), trained.folder, purpose="predicting")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    bf16 = precision is Precision.bf16

    def run(batch: Batch) -> Arrays:
        inputs = {name: torch.from_numpy(ids).to(device) for name, ids in batch.items()}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            found = model(**inputs)
        return tuple(found[name].float().cpu().numpy() for name in predictor.outputs)

    return run, _GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS


def _onnx(path: Path, outputs: Sequence[str]) -> Run:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(f"model={path}: needs onnxruntime: pip install 'cloze[finetune]'") from None
    fast = ("CUDAExecutionProvider", "CPUExecutionProvider")
    there = onnxruntime.get_available_providers()
    try:
        session = onnxruntime.InferenceSession(path, providers=[name for name in fast if name in there])
    except Exception as error:  # onnxruntime's own, which share no base
        raise UserError(f"model={path}: cannot be loaded ({first_line(error)}); write it again") from error
    inputs = {one.name for one in session.get_inputs()}
    has = [one.name for one in session.get_outputs()]
    if missing := sorted({*outputs} - {*has}):
        raise UserError(f"model={path}: gives {', '.join(has)}, and no {missing[0]}; name another model")

    def run(batch: Batch) -> Arrays:
        return tuple(session.run(list(outputs), {name: ids for name, ids in batch.items() if name in inputs}))

    return run


def answers(encoded: Encoded, run: Run, batch_tokens: int, tokenizer: Any) -> Iterable[dict[str, Any]]:
    """The new columns of each row."""
    kept: list[Any] = [None] * len(encoded.features)
    for numbers in batches([len(feature["input_ids"]) for feature in encoded.features], batch_tokens):
        outputs = run(collated([encoded.features[number] for number in numbers], tokenizer))
        for place, number in enumerate(numbers):
            kept[number] = encoded.read(number, tuple(array[place] for array in outputs))
    return encoded.answers(kept)


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Samples of like lengths together, the longest first; a batch with its padding has at most so many tokens."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def collated(features: Sequence[Feature], tokenizer: Any) -> Batch:
    """int64 [B, T] each, padded on the right."""
    width = max(1, *(len(feature["input_ids"]) for feature in features))
    shape = len(features), width
    batch = {name: np.zeros(shape, np.int64) for name in ("attention_mask", *features[0])}
    batch["input_ids"].fill(tokenizer.pad_token_id or 0)
    for row, feature in enumerate(features):
        batch["attention_mask"][row, : len(feature["input_ids"])] = 1
        for name, ids in feature.items():
            batch[name][row, : len(ids)] = ids
    return batch
