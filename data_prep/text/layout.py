"""How a plain text is laid out: what its documents are, and whether its lines are sentences. Pure.

Four kinds are told apart by a sample: prose wrapped at a width (a line ends where the next word would not have fitted),
sentences a line (BERT's own format), documents a line, and paragraphs a line. Where a text is not plainly one of the
others, documents end at blank lines and sentences where the rules say.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from data_prep.text.sentences import split_sentences

_FEW_LINES = 8  # tell nothing
_WRAPPED = 0.7  # share of line ends where the next word would not have fitted: of wrapped text nearly all do
_ENDED = 0.6  # share of line ends that are sentence ends: of wrapped text a fifth
_WIDEST = 200  # characters at which anybody wraps
_CONTINUED = 0.3  # share of line ends in mid-sentence, of a text that has capitals
_ONE_SENTENCE = 1.3  # sentences a line up to which lines are sentences; their own full stops mislead the rules at times
_SHORT = 4  # sentences a document below which pairs suffer: a document of one has no next sentence
_MANY = 20


class Layout(NamedTuple):
    document: str  # blank_line or line
    sentences: str  # rules or lines
    why: str
    advice: str  # what to do if the text is not what it was taken for; or ""


def judged(samples: Sequence[Sequence[str]]) -> Layout:
    """The layout of files of which some lines are given, in order, blank ones too."""
    files = [[line.strip() for line in lines] for lines in samples]
    groups = [list(group) for lines in files for full, group in groupby(lines, key=bool) if full]
    full = [line for group in groups for line in group]
    breaks = [pair for group in groups for pair in pairwise(group)]
    if len(full) < _FEW_LINES:
        return Layout("blank_line", "rules", f"{len(full)} lines with text", "")
    width = sorted(map(len, full))[int(0.95 * (len(full) - 1))]
    wrapped = _is_wrapped(breaks, width)
    a_line = sum(len(split_sentences(line.lower())) for line in full) / len(full)
    if len(groups) <= sum(any(lines) for lines in files):
        return _without_blank_lines(wrapped, width, a_line)
    by_lines = not wrapped and len(breaks) >= _FEW_LINES and a_line < _ONE_SENTENCE and not _is_continued(breaks)
    by_lines = by_lines and len(breaks) > 0.2 * len(full)
    a_group = len(full) / len(groups) * (1 if by_lines else a_line)
    if by_lines:
        why = f"lines of {a_line:.1f} sentences, {a_group:.1f} between blank lines, not wrapped"
    elif wrapped:
        a_group = sum(len(split_sentences("\n".join(group))) for group in groups) / len(groups)
        why = f"lines wrapped at {width} characters, {a_group:.1f} sentences between blank lines"
    else:
        why = f"{a_group:.1f} sentences between blank lines"
    advice = ""
    if a_group < _SHORT and len(groups) >= _MANY:
        advice = (
            f"documents of {a_group:.1f} sentences between blank lines: many have no next sentence for a pair; where a "
            "file is one text (a book), set source.document=file, where they are so short (reviews), objective=none"
        )
    return Layout("blank_line", "lines" if by_lines else "rules", why, advice)


def _without_blank_lines(wrapped: bool, width: int, a_line: float) -> Layout:
    if wrapped:
        return Layout(
            "blank_line", "rules", f"no blank lines, lines wrapped at {width} characters: every file is a document", ""
        )
    if a_line < _ONE_SENTENCE:
        return Layout(
            "blank_line",
            "lines",
            f"no blank lines, {a_line:.1f} sentences a line: every file is a document",
            "no blank lines between documents: where every line is a text of its own (reviews, tweets), set "
            "source.document=line (and objective=none, since one sentence has no next one)",
        )
    return Layout(
        "line",
        "rules",
        f"no blank lines, {a_line:.1f} sentences a line: every line is a document (else: source.document=file)",
        f"documents of {a_line:.1f} sentences: many have no next sentence for a pair; if a file is one text, set "
        "source.document=file, else objective=none"
        if a_line < 2
        else "",
    )


def _is_wrapped(breaks: Sequence[tuple[str, str]], width: int) -> bool:
    if len(breaks) < _FEW_LINES or width > _WIDEST:
        return False
    forced = sum(len(line) + 1 + _first_word(following) > width for line, following in breaks)
    ended = sum(split_sentences(f"{line} A")[-1] == "A" for line, _ in breaks)
    return forced > _WRAPPED * len(breaks) and ended < _ENDED * len(breaks)


def _first_word(line: str) -> int:
    """How many characters cannot be parted from the first one; of scripts without spaces, about how many."""
    if line[0] >= "\u2e80":
        return 1
    word = len(line.split(maxsplit=1)[0])
    return min(word, 8) if "\u0e00" <= line[0] < "\u10a0" or "\u1780" <= line[0] < "\u1800" else word


def _is_continued(breaks: Sequence[tuple[str, str]]) -> bool:
    """Whether many lines go on with the sentence of the one before, as capitals show."""
    if not any(line != line.lower() for line, _ in breaks):
        return False
    going_on = sum(following[0].islower() and len(split_sentences(f"{line} A")) == 1 for line, following in breaks)
    return going_on > _CONTINUED * len(breaks)
