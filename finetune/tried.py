"""What several settings of one task gave: what varies among the models, and their scores, the best median first."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cloze.errors import UserError
from finetune.config import flat
from finetune.tables import legend, of_seeds, shown
from pretrain.export.card import table

_TELLS_NOTHING = ("out", "log.", "wandb.")  # keys, of a score


class Grid(NamedTuple):
    """What was tried: a row for each model, the best median first."""

    score: str  # by which they are ranked
    keys: Sequence[str]  # that vary
    paths: Sequence[Path]
    values: Sequence[Sequence[str]]  # of the keys
    scores: Sequence[float]  # medians
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def grid_of(bodies: Mapping[Path, Mapping[str, Any]]) -> Grid:
    """What varies among models, and what it gave. Raises `UserError` where they have learned different tasks."""
    every = [*bodies.values()]
    if len(tasks := sorted({body["config"]["task"] for body in every})) > 1:
        raise UserError(f"there are models of several tasks ({', '.join(tasks)}), whose scores do not compare")
    settings = [dict(flat(body["config"])) for body in every]
    keys = [key for key in settings[0] if not key.startswith(_TELLS_NOTHING)]
    keys = [key for key in keys if len({str(own.get(key)) for own in settings}) > 1]
    score = every[0]["score"]
    names = [name for name in (score, f"mismatched_{score}", f"test_{score}") if all(name in body for body in every)]
    ranked = sorted(
        zip(bodies, every, settings, strict=True), key=lambda one: -statistics.median(of_seeds(one[1], score))
    )
    values = [[str(own.get(key)) for key in keys] for _, _, own in ranked]
    rows = [
        [path.name, *own, *(shown(name, of_seeds(body, name)) for name in names)]
        for (path, body, _), own in zip(ranked, values, strict=True)
    ]
    return Grid(
        score=score,
        keys=keys,
        paths=[path for path, _, _ in ranked],
        values=values,
        scores=[statistics.median(of_seeds(body, score)) for _, body, _ in ranked],
        head=["model", *keys, *(f"{name}, %" for name in names)],
        rows=rows,
    )


def markdown(bodies: Mapping[Path, Mapping[str, Any]]) -> str:
    """A row for each model, the best median first. Raises `UserError` where they have learned different tasks."""
    grid, every = grid_of(bodies), [*bodies.values()]
    guessing = shown(grid.score, [every[0]["guessing"][grid.score]])
    seeds = legend(max(len(body["by_seed"]) for body in every))
    return f"{table(grid.head, grid.rows)}\nScores: {seeds}; guessing the commonest answer gives {guessing}.\n"
