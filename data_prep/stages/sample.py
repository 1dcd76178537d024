"""Stage sample: count pieces of text for the tokenizer to learn from, of what some map tasks begin with."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.config import TokenizerConfig, TokenizerKind
from data_prep.plan import Plan
from data_prep.stages.base import Stage
from data_prep.stages.documents import Tally, held_out, pieces
from data_prep.text.wordpiece import count_pieces

_SAMPLED_TASKS = 64  # map tasks from whose beginnings the tokenizer learns


def cuts_ideographs(config: TokenizerConfig) -> bool:
    """Whether every ideograph is a piece by itself."""
    return config.chinese_characters and config.kind is TokenizerKind.wordpiece


def sampled_task(plan: Plan, number: int) -> int:
    """The map task whose beginning a sample task reads."""
    return number * plan.num_training_tasks // _num_tasks(plan)


def sampled_pieces(plan: Plan, number: int) -> dict[str, int]:
    """What a sample task counted."""
    pieces = json.loads(SAMPLE.result(plan, number).read_text())
    assert isinstance(pieces, dict)
    return pieces


def _num_tasks(plan: Plan) -> int:
    return min(plan.num_training_tasks, _SAMPLED_TASKS)


def _run(plan: Plan, number: int, path: Path) -> None:
    """Count what stands between spaces in what is trained on: how it is spelled follows from the scripts of it all."""
    room = plan.config.tokenizer.sample_mib * 2**20 // _num_tasks(plan)

    def sentences() -> Iterator[str]:
        nonlocal room
        for piece in pieces(plan, sampled_task(plan, number), Tally()):
            if room > 0 and not held_out(plan, np.uint64(piece.side)):
                room -= piece.num_bytes
                yield from piece.sentences
            elif room <= 0:
                return

    path.write_text(json.dumps(count_pieces(sentences(), cuts_ideographs(plan.config.tokenizer))))


SAMPLE = Stage("sample", _num_tasks, _run)
