"""Texts with gaps, to hold ways of running a pretrained model against each other. Shapes: B texts, T tokens, V words.

An accuracy in the gaps of real text is a score; of random tokens only the agreement of two runs says something.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloze.errors import UserError, first_line
from finetune.side_by_side import Batch, Runner
from pretrain.export.positions import num_positions

_EVERY = 7  # tokens, of which one is masked: about BERT's 15%
_BATCH, _ROUNDS, _TEXTS = 8, 3, 256
_LONGEST = 128  # tokens
_RANDOM = (8, 33, 100)  # tokens of the texts where none are given


class MaskedTexts:
    """The first texts of a file, or random tokens, of which a model can be asked whether it answers the same."""

    def __init__(self, folder: Path, tokenizer: Any, path: str | None) -> None:
        """`path`: a text a line. Raises `UserError` where it cannot be read."""
        self.max_len = min(num_positions(folder) or _LONGEST, _LONGEST)
        self.is_text = path is not None
        self._tokenizer = tokenizer
        rows = [*self._read(path)] if path else [*self._random()]
        self.batches: list[Batch] = []
        self._gaps: list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]] = []  # where, and what stood there
        for start in range(0, len(rows), _BATCH):
            self._add(rows[start : start + _BATCH])

    def compare(self, runners: Mapping[str, Runner]) -> dict[str, Any]:
        """Of each: accuracy in the gaps, how often the answer is the first one's, the difference, texts per second."""
        found: dict[str, Any] = {}
        first: list[npt.NDArray[np.float32]] = []
        gold = np.concatenate([gold for _, gold in self._gaps])
        num_texts = sum(len(batch["input_ids"]) for batch in self.batches)
        for name, run in runners.items():
            seconds = []
            for _ in range(_ROUNDS):
                start = time.perf_counter()
                logits = [run(batch)[0] for batch in self.batches]
                seconds.append(time.perf_counter() - start)
            real = [batch["attention_mask"] == 1 for batch in self.batches]
            logits = [logits_BTV[mask_BT] for logits_BTV, mask_BT in zip(logits, real, strict=True)]
            first = first or logits
            holes = [where[mask] for (where, _), mask in zip(self._gaps, real, strict=True)]
            best, reference = (
                np.concatenate([each[hole].argmax(-1) for each, hole in zip(every, holes, strict=True)])
                for every in (logits, first)
            )
            found[name] = {
                "accuracy": float((best == gold).mean()),
                "same_answer": float((best == reference).mean()),
                "difference": max(float(np.abs(a - b).max()) for a, b in zip(logits, first, strict=True)),
                "examples_per_second": num_texts / statistics.median(seconds),
            }
        return found

    def _read(self, path: str) -> Iterator[list[int]]:
        try:
            with Path(path).open(encoding="utf-8") as file:
                texts = [line.strip() for _, line in zip(range(100 * _TEXTS), file, strict=False) if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"--dev {path}: cannot be read ({first_line(error)}); a UTF-8 text is needed") from None
        encoded = self._tokenizer(texts[:_TEXTS], truncation=True, max_length=self.max_len).input_ids if texts else []
        rows = [ids for ids in encoded if len(ids) > _EVERY]
        if not rows:
            raise UserError(f"--dev {path}: has no line of {_EVERY} tokens or more; name a text with a sentence a line")
        yield from rows

    def _random(self) -> Iterator[list[int]]:
        rng, special = np.random.default_rng(0), {*self._tokenizer.all_special_ids}
        known = [number for number in range(len(self._tokenizer)) if number not in special]
        for length in _RANDOM * _BATCH:
            ids = rng.choice(known, min(length, self.max_len) - 2).tolist()
            yield [self._tokenizer.cls_token_id, *ids, self._tokenizer.sep_token_id]

    def _add(self, rows: list[list[int]]) -> None:
        names = self._tokenizer.model_input_names
        padded = self._tokenizer.pad([{"input_ids": ids} for ids in rows], return_tensors="np")
        ids_BT, mask_BT = padded["input_ids"].astype(np.int64), padded["attention_mask"].astype(np.int64)
        where_BT = (np.arange(ids_BT.shape[1]) % _EVERY == _EVERY // 2)[None] & (mask_BT == 1)
        where_BT &= ~np.isin(ids_BT, self._tokenizer.all_special_ids)
        self._gaps.append((where_BT, ids_BT[where_BT]))
        batch = {
            "input_ids": np.where(where_BT, self._tokenizer.mask_token_id, ids_BT),
            "attention_mask": mask_BT,
            "token_type_ids": np.zeros_like(ids_BT),
        }
        self.batches.append({name: batch[name] for name in batch if name in names})
