"""Document text -> repaired text -> kept, or dropped for a reason that is counted. Pure; knows no files.

A filter takes the repaired text and returns `True`, or `(False, reason)`. New ones go into `filters_for`.
"""

from collections.abc import Callable, Sequence
from typing import Literal

Verdict = Literal[True] | tuple[Literal[False], str]
Filter = Callable[[str], Verdict]


def repair(text: str) -> tuple[str, tuple[str, ...]]:
    """`text` without what no tokenizer should see, and the names of the repairs that were needed.

    Lone surrogates (from JSON escapes) become U+FFFD, NUL characters go, line ends become \\n.
    """
    repairs: list[str] = []
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            repairs.append("lone_surrogates")
        text = text.removeprefix("\ufeff")
    if "\0" in text:
        text = text.replace("\0", "")
        repairs.append("nul_characters")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, tuple(repairs)


def not_empty(text: str) -> Verdict:
    return True if text and not text.isspace() else (False, "empty")


def at_least(characters: int) -> Filter:
    def long_enough(text: str) -> Verdict:
        return True if len(text) >= characters else (False, "too_short")

    return long_enough


def filters_for(min_characters: int) -> tuple[Filter, ...]:
    """The filters of a run, cheapest first."""
    return (not_empty, at_least(min_characters))


def judge(text: str, filters: Sequence[Filter]) -> Verdict:
    """The first refusal, or `True`."""
    for accepts in filters:
        verdict = accepts(text)
        if verdict is not True:
            return verdict
    return True
