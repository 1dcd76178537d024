"""The same few held-out sentences at every evaluation, each with a word left out, and what the model put there.

It is what a person remembers of a run. `predictions.jsonl` in the run's directory: a row of texts and answers whenever
those are new, then a row of guesses for each evaluation. Append-only; a run that goes back tells a step anew, and the
later row counts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cloze.files import parsed

PREDICTIONS_NAME = "predictions.jsonl"
_MOST_BYTES = 1 << 24


class Gap(NamedTuple):
    """A sentence around one word that was left out."""

    before: str
    after: str
    answer: str


class Guess(NamedTuple):
    """The likeliest token, and how likely the model takes it to be."""

    token: str
    probability: float


class Predictions(NamedTuple):
    """What a run's directory holds of them."""

    gaps: list[Gap]
    guesses: list[tuple[int, list[Guess]]]  # (step, one for each gap), steps ascending


def write_gaps(folder: Path, gaps: Sequence[Gap]) -> None:
    """Begin with these, unless they are those of before. Raises OSError."""
    if gaps and read_predictions(folder).gaps != list(gaps):
        _append(folder, {"gaps": [list(gap) for gap in gaps]})


def write_guesses(folder: Path, step: int, guesses: Sequence[Guess]) -> None:
    """Add an evaluation. Raises OSError."""
    _append(folder, {"step": step, "guesses": [[one.token, round(one.probability, 4)] for one in guesses]})


def read_predictions(folder: Path) -> Predictions:
    """Those of the newest texts; nothing where there are none."""
    gaps: list[Gap] = []
    guesses: dict[int, list[Guess]] = {}
    try:
        with (folder / PREDICTIONS_NAME).open("rb") as file:
            lines = file.read(_MOST_BYTES).split(b"\n")
    except OSError:
        return Predictions([], [])
    for line in lines:
        try:
            row = parsed(line)
            if "gaps" in row:
                gaps, guesses = [Gap(*map(str, gap)) for gap in row["gaps"]], {}
            else:
                step, found = int(row["step"]), [Guess(str(token), float(share)) for token, share in row["guesses"]]
                if len(found) == len(gaps):
                    guesses = {known: each for known, each in guesses.items() if known < step} | {step: found}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # a torn line
            continue
    return Predictions(gaps, sorted(guesses.items()))


def _append(folder: Path, row: Mapping[str, Any]) -> None:
    with (folder / PREDICTIONS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
