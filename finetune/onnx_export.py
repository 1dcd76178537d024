"""A model as ONNX, whole and in int8, both held against PyTorch: on the development set of its task, or of a pretrained
model on masked texts.

onnxruntime must give PyTorch's outputs, at several lengths and sizes of a batch, before anything counts as done. int8
is dynamic quantization of the weights: its outputs differ, so it is told what it scores, how often its answer is the
same, and how fast each of the three is here; where it loses more than is allowed it is made more carefully, or refused.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession
from onnxruntime.quantization import quantize_dynamic
from torch import nn

from cloze.errors import UserError
from cloze.files import json_object
from finetune.config import FinetuneConfig, saved
from finetune.keys import Init
from finetune.masked_texts import MaskedTexts
from finetune.side_by_side import Batch, Runner, batches, compared, output_names, outputs_of, runner
from finetune.techniques.crf import save
from pretrain.export.hugging_face import be_quiet, load_pretrained, load_tokenizer, replaced_directory

TOLERANCE = 1e-4  # largest difference of two fp32 outputs
WHOLE, SMALL = "model.onnx", "model-int8.onnx"
# From the smallest and fastest to the most careful. Where a CPU has no VNNI, sums of 8-bit products overflow: 7 do not.
_INT8: Sequence[dict[str, Any]] = (
    {},
    {"per_channel": True},
    {"per_channel": True, "reduce_range": True},
    {"per_channel": True, "reduce_range": True, "op_types_to_quantize": ["MatMul"]},  # not the embeddings
)


class _Plain(nn.Module):
    """Inputs and outputs that ONNX has: tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return tuple(outputs_of(self.model(input_ids=input_ids, attention_mask=attention_mask, **segments)))


class _Subject(NamedTuple):
    """A model with what it is tried on."""

    model: Any
    tokenizer: Any
    batches: Sequence[Batch]
    compare: Callable[[Mapping[str, Runner]], dict[str, Any]]  # by name: scores, difference, examples_per_second …
    score: str
    is_scored: bool
    max_len: int


def compress(folder: Path, out: Path, data: Mapping[str, Any], max_loss: float = 1.0) -> dict[str, Any]:
    """Write model.onnx, model-int8.onnx, tokenizer, config.json and compress.json; returns what the last holds.

    `data` names train and dev where they are not what the model was made with; of a pretrained model dev is a text to
    fill gaps in. Raises `UserError` where model or data cannot be loaded, ONNX differs from PyTorch by more than
    `TOLERANCE`, or int8 loses more than `max_loss` of the score.
    """
    be_quiet()
    with replaced_directory(out) as temporary:
        subject = _subject(folder, data)
        subject.tokenizer.save_pretrained(temporary)
        for name in ("config.json", "metrics.json"):  # the latter tells `finetune.predict` what the model does
            if (folder / name).is_file():
                shutil.copy(folder / name, temporary)
        if crf := getattr(subject.model, "crf", None):
            save(crf, temporary)
        whole, small = temporary / WHOLE, temporary / SMALL
        with _quietly():
            _to_onnx(_Plain(subject.model).eval(), subject.batches[0], whole)
        torch_runner, onnx_runner = runner(subject.model), _session(whole)
        lengths = _lengths(torch_runner, onnx_runner, subject)
        body = _int8(whole, small, {"pytorch": torch_runner, "onnx": onnx_runner}, subject, max_loss)
        worst = max(body["onnx"]["difference"], *lengths.values())
        if not worst <= TOLERANCE:
            raise UserError(f"{folder}: ONNX differs from PyTorch by {worst:.2g}; nothing was written")
        body |= {
            "score": subject.score,
            "differences_by_tokens": lengths,
            "bytes": {path.name: path.stat().st_size for path in (whole, small)},
        }
        (temporary / "compress.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return body


def _subject(folder: Path, data: Mapping[str, Any]) -> _Subject:
    """A fine-tuned model with the development set of its task, or a pretrained one with masked texts."""
    described = json_object(folder / "config.json")
    if "config" in (metrics := json_object(folder / "metrics.json")):
        return _finetuned(_config(folder, metrics["config"], data))
    kinds = ("ForMaskedLM", "ForPreTraining")
    if not any(name.endswith(kinds) for name in described.get("architectures") or ()):
        raise UserError(
            f"{folder}: has no metrics.json; name a directory that `python -m finetune` or `python -m pretrain.export` "
            "wrote"
        )
    if "train" in data:
        raise UserError("--train: of a pretrained model nothing is trained; leave it out")
    return _pretrained(folder, data.get("dev"))


def _config(folder: Path, body: Mapping[str, Any], data: Mapping[str, Any]) -> FinetuneConfig:
    """That of the model in `folder`, to be loaded again as it is."""
    config = saved(body)
    alone, own = replace(config.distill, teacher=None), replace(config.data, test=None, mismatched=None, **data)
    return replace(config, model=str(folder), init=Init.pretrained, distill=alone, data=own)


def _finetuned(config: FinetuneConfig) -> _Subject:
    prepared = config.definition.family.prepare(config)
    model, own = prepared.make_model().eval(), [*batches(prepared)]

    def compare(runners: Mapping[str, Runner]) -> dict[str, Any]:
        return compared(runners, own, prepared, dict.fromkeys(runners, model))

    return _Subject(model, prepared.tokenizer, own, compare, config.definition.score, True, config.max_len)


def _pretrained(folder: Path, text: str | None) -> _Subject:
    from transformers import AutoModelForMaskedLM

    tokenizer = load_tokenizer(folder)
    model = load_pretrained(AutoModelForMaskedLM, folder, purpose="filling gaps")
    texts = MaskedTexts(folder, tokenizer, text)
    return _Subject(model, tokenizer, texts.batches, texts.compare, "accuracy", texts.is_text, texts.max_len)


def _lengths(first: Runner, second: Runner, subject: _Subject) -> dict[str, float]:
    """Largest difference of the outputs at three lengths, of one, two and three random texts, the shorter padded."""
    rng, found = np.random.default_rng(0), {}
    special = {*subject.tokenizer.all_special_ids}
    known = np.asarray([number for number in range(len(subject.tokenizer)) if number not in special])
    for count, tokens in enumerate(sorted({8, max(8, subject.max_len // 3), subject.max_len}), 1):
        mask_BT = np.ones((count, tokens), dtype=np.int64)
        mask_BT[1:, tokens // 2 :] = 0
        ids_BT = np.where(mask_BT == 1, rng.choice(known, (count, tokens)), subject.tokenizer.pad_token_id)
        batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "token_type_ids": np.zeros_like(mask_BT)}
        batch = {name: batch[name] for name in subject.batches[0]}
        pairs = zip(first(batch), second(batch), strict=True)
        found[str(tokens)] = max(float(np.abs(a - b).max()) for a, b in pairs)
    return found


def _int8(
    whole: Path, small: Path, runners: Mapping[str, Runner], subject: _Subject, max_loss: float
) -> dict[str, Any]:
    """Write the first int8 model that loses no more than is allowed, and return what all three give."""
    graph = onnx.load(whole)
    del graph.graph.value_info[:]  # shapes that PyTorch's optimizer left behind; the quantizer finds its own
    losses = []
    for options in _INT8:
        with _quietly():
            quantize_dynamic(graph, small, **options)
        body = subject.compare({**runners, "onnx_int8": _session(small)})
        losses.append(body["onnx"][subject.score] - body["onnx_int8"][subject.score])
        if losses[-1] <= max_loss or not subject.is_scored:
            return {**body, "int8_options": options}
    told = f"int8 loses {min(losses):.4f} of {subject.score}, more than --max-loss {max_loss:g}"
    raise UserError(f"{told}; nothing was written: allow more, or use a larger model")


def _session(path: Path) -> Runner:
    return partial(InferenceSession(path, providers=["CPUExecutionProvider"]).run, None)


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
        output_names=output_names(model.model(**inputs)),
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
