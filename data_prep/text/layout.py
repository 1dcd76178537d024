"""How a plain text is laid out: what its documents are, and whether its lines are sentences. Pure.

Four kinds are told apart by a sample: prose wrapped at a width (a line ends where the next word would not have fitted),
sentences a line (BERT's own format), documents a line, and paragraphs a line. Where a text is not plainly one of the
others, documents end at blank lines and sentences where the rules say.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby, pairwise
from shlex import quote
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
_SEPARATORS = 3  # lines of one kind that may stand between documents
_SEPARATOR = re.compile(  # ---, * * *, <|endoftext|>, [SEP], fortune's %; not the "..." of somebody who says nothing
    "([-=_*#+\u2013\u2014\u2022\u2500\u2550])(?:\\s*\\1)+|%|<[^<>\\s]+>|\\[(?:SEP|EOS|EOD|DOC|END)\\]"
)
_INLINE = re.compile(r"[\v\f\x85\u2028\u2029]|<\|\w+\|>|</s>")  # what ends lines or documents elsewhere
_BLANK = re.compile(r"[\s\u200b\u2060\ufeff]*")
_MOSTLY = 0.5  # of the lines
_OBJECT = re.compile(r"\{.*\}|[\[\]{}, ]+|(?:[\[{]\s*)*\"[^\"]*\"\s*:.*")  # of JSON, on a line or over several
_TAG = re.compile(r"</[A-Za-z][\w:-]*>")


class Layout(NamedTuple):
    document: str  # blank_line or line
    sentences: str  # rules or lines
    why: str
    advice: str  # what to do if the text is not what it was taken for; or ""
    separator: str | None = None  # the line that stands between documents, of a text without blank lines


def judged(samples: Sequence[Sequence[str]]) -> Layout:
    """The layout of files of which some lines are given, in order, blank ones too."""
    inline = Counter(mark for lines in samples for line in lines for mark in _INLINE.findall(line.strip()))
    files = [["" if is_blank(line) else line.expandtabs(4).rstrip() for line in lines] for lines in samples]
    groups = [list(group) for lines in files for full, group in groupby(lines, key=bool) if full]
    full = [line for group in groups for line in group]
    separator, count = _separator(full)
    blank_lines = len(groups) > sum(any(lines) for lines in files)
    if separator and not blank_lines:
        parted = judged([["" if line.strip() == separator else line for line in lines] for lines in files])
        return parted._replace(why=f"lines of {separator!r} between documents, {parted.why}", separator=separator)
    breaks = [found for lines in files if any(lines) for found in _breaks(lines)]
    inside = "" if blank_lines else _told_of(inline)
    if len(full) < _FEW_LINES:
        return Layout("blank_line", "rules", f"{len(full)} lines with text", inside)
    width = _width(full)
    wrapped = width <= _WIDEST and _is_wrapped(breaks)
    a_line = sum(len(split_sentences(line.lower())) for line in full) / len(full)
    if not blank_lines:
        found = _without_blank_lines(wrapped, width, a_line, _is_continued(breaks))
        return found._replace(advice=inside or found.advice)
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
    advice = []
    if separator:
        told = f"source.separator={separator}"
        advice.append(
            f"{count:,} lines of {separator!r}: where they end documents, and blank lines do not, set {quote(told)}"
        )
    if a_group < _SHORT and len(groups) >= _MANY:
        advice.append(
            f"documents of {a_group:.1f} sentences between blank lines: many have no next sentence for a pair; where a "
            "file is one text (a book), set source.document=file, where they are so short (reviews), objective=none"
        )
    return Layout("blank_line", "lines" if by_lines else "rules", why, "; ".join(advice))


def is_blank(line: str) -> bool:
    """Whether nothing is to be seen of it."""
    return _BLANK.fullmatch(line) is not None


def _told_of(inline: Counter[str]) -> str:
    """What to do about characters within lines that end lines or documents elsewhere."""
    for mark, count in inline.most_common(1):
        written = mark if mark.isprintable() else "".join(f"\\x{byte:02x}" for byte in mark.encode())
        if count >= _SEPARATORS:
            command = quote(rf"s#{written}#\n\n#g")
            told = f"{count:,} times {mark!r} within lines: where it ends documents, make an empty line of it"
            return f"{told}: sed {command} OLD > NEW"
    return ""


def marked_up(samples: Sequence[Sequence[str]]) -> str:
    """What to do where lines are no plain text but of a format that has a reader, or a tool, of its own; else ""."""
    full = [text for lines in samples for line in lines if (text := line.strip())]
    if sum(_OBJECT.fullmatch(line) is not None for line in full) > _MOSTLY * len(full):
        return "most lines look like JSON, and its keys and brackets would be text: set source=jsonl"
    if sum(_TAG.search(line) is not None for line in full) > _MOSTLY * len(full):
        return "most lines hold tags, which would be text: take the text out first, with trafilatura or pandoc"
    tables = [_columns(lines) for lines in samples if any(lines)]
    if tables and all(tables):
        return (
            "lines of as many columns each, all of which would be text: make JSON lines of it (pandas: read_csv, "
            "to_json(orient='records', lines=True)), and set source=jsonl, source.field=COLUMN"
        )
    return ""


def _columns(lines: Sequence[str]) -> bool:
    """Whether lines of a file are rows of a table: of two columns or more, as many in each."""
    full = [text for line in lines[:-1] if (text := line.strip("\r\n "))]  # the last may be cut off
    if len(full) < _FEW_LINES:
        return False
    for delimiter in "\t,;":
        with suppress(csv.Error):
            counts = {len(row) for row in csv.reader(full, delimiter=delimiter)}
            if len(counts) == 1 and counts.pop() > 1:
                return True
    return False


def _separator(full: Sequence[str]) -> tuple[str | None, int]:
    """The commonest line that looks as if it stood between documents, and how often it comes."""
    found = Counter(text for line in full if _SEPARATOR.fullmatch(text := line.strip())).most_common(1)
    return found[0] if found and found[0][1] >= _SEPARATORS else (None, 0)


def _without_blank_lines(wrapped: bool, width: int, a_line: float, continued: bool) -> Layout:
    if wrapped or continued:
        how = f"wrapped at {width} characters" if wrapped else "that go on with the sentence of the one before"
        return Layout("blank_line", "rules", f"no blank lines, lines {how}: every file is a document", "")
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


class _Break(NamedTuple):
    """The end of a line within a paragraph."""

    line: str
    following: str
    room: int  # characters that the line leaves up to the width of its file


def _breaks(lines: Sequence[str]) -> Iterator[_Break]:
    """Those of a file, but where the next line stands further to the right: there a paragraph begins."""
    width = _width([line for line in lines if line])
    for line, following in pairwise(lines):
        if line and following and _indent(following) <= _indent(line):
            yield _Break(line.strip(), following.strip(), width - len(line))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _width(full: Sequence[str]) -> int:
    """Characters that few lines exceed."""
    return sorted(map(len, full))[int(0.95 * (len(full) - 1))]


def _is_wrapped(breaks: Sequence[_Break]) -> bool:
    if len(breaks) < _FEW_LINES:
        return False
    forced = sum(1 + _first_word(following) > room for _, following, room in breaks)
    ended = sum(split_sentences(f"{line} A")[-1] == "A" for line, _, _ in breaks)
    return forced > _WRAPPED * len(breaks) and ended < _ENDED * len(breaks)


def _first_word(line: str) -> int:
    """How many characters cannot be parted from the first one; of scripts without spaces, about how many."""
    if "\u2e80" <= line[0] < "\ua4d0" or line[0] >= "\uf900":  # not Hangul
        return 1
    word = len(line.split(maxsplit=1)[0])
    return min(word, 8) if "\u0e00" <= line[0] < "\u10a0" or "\u1780" <= line[0] < "\u1800" else word


def _is_continued(breaks: Sequence[_Break]) -> bool:
    """Whether many lines go on with the sentence of the one before, as capitals show."""
    if not any(line != line.lower() for line, _, _ in breaks):
        return False
    going_on = sum(following[0].islower() and split_sentences(f"{line} A")[-1] != "A" for line, following, _ in breaks)
    return going_on > _CONTINUED * len(breaks)
