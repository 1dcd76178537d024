"""What a score stands beside: the score of guessing, the share of [UNK]; and what is plainly wrong with a model.

A model that answers the same to everything is not told from a good one by its score where one label is common.
"""

from collections.abc import Mapping, Sequence
from typing import Any

UNK_WARNED = 0.05  # share of [UNK] among the tokens

_SHOWN = 40  # characters of an answer


def unk_share(features: Sequence[Mapping[str, Any]], tokenizer: Any) -> float:
    """Share of [UNK] among the tokens that stand for text."""
    unk, special = tokenizer.unk_token_id, {*tokenizer.all_special_ids}
    ids = [number for row in features for number in row["input_ids"]]
    num_unk: int = sum(number == unk for number in ids)
    return num_unk / max(1, num_unk + sum(number not in special for number in ids))


def verdict(
    answers: Sequence[Any], scores: Mapping[str, float], guessing: Mapping[str, float], score: str
) -> str | None:
    """What is wrong with a model whose `answers` have these `scores`; None where it is better than `guessing`."""
    labels = {label for answer in answers for label in (answer if isinstance(answer, list) else [answer])}
    beside = f"{score} {scores[score]:.4f}, guessing the commonest gives {guessing[score]:.4f}"
    if len(labels) == 1 and len(answers) > 1:
        only = next(iter(labels))
        shown = f"{only:.4g}" if isinstance(only, float) else repr(only)[:_SHOWN]
        return f"answers {shown} to everything: {beside}"
    return f"is no better than guessing: {beside}" if scores[score] <= guessing[score] else None
