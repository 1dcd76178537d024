"""Values of JSON, however they stand in a file: an object a line, over several lines, side by side, or in an array.

Memory is bounded by the longest value that is taken, not by the file.
"""

import json
import re
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, NamedTuple

from data_prep.sources.lines import MAX_LINE_BYTES, Line

HEAD_BYTES = 2**16  # by which `stands_apart_from_lines` judges a file

_DECODER = json.JSONDecoder(strict=False)  # takes raw tabs in strings, which people write
_BETWEEN = re.compile(rb"[\s,}]*")  # values; a brace is left over from one that was broken
_OUTSIDE = re.compile(rb'["{}\[\]]')  # strings
_INSIDE = re.compile(rb'["\\]')
_SCALAR = re.compile(rb"[^\s,{}\[\]\"]+")


class Value(NamedTuple):
    """The bytes of one value; None: it was too long to keep."""

    line: int  # in which it begins, counted from 1
    offset: int  # in the text
    data: bytes | None


class _Missing(Enum):
    missing = "missing"


MISSING = _Missing.missing  # a value that is not there, where None is a null


def parsed(data: bytes) -> Any:
    """What JSON in UTF-8 says. Raises `ValueError` or `RecursionError`; bytes that are no UTF-8 become U+FFFD."""
    return _DECODER.decode(data.decode(errors="replace"))


def stands_apart_from_lines(head: bytes) -> bool:
    """Whether a file that begins so holds values that follow no lines: an array, or objects longer or shorter than one.

    Such a file has no place in the middle where reading could begin.
    """
    text = head.decode(errors="replace").lstrip("\ufeff \t\r\n")
    first, _, rest = text.partition("\n")
    if text.startswith("["):
        element = text[1:].lstrip()[:1]
        return element == "{" or (element == '"' and not rest.lstrip().startswith("["))
    if not text.startswith("{"):
        return False
    try:
        _, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return first.rstrip().endswith(("{", "[", ",")) and not rest.lstrip().startswith("{")
    return end > len(first) or first[end:].strip() != ""


def values(lines: Iterable[Line]) -> Iterator[Value]:
    """The values that follow one another in lines, and those in an array around them, each with its place.

    Where one is broken off in the middle of a string, the next line that begins with a brace begins the next one.
    """
    scanner = _Scanner()
    number = 0
    for _, offset, line, goes_on in lines:
        number += not goes_on
        yield from scanner.line(number, offset, line, goes_on)
    yield from scanner.end()


class _Scanner:
    """Where values begin and end: brackets and strings are all that it looks at."""

    def __init__(self) -> None:
        self.depth = 0  # of brackets that are open, in the value that is under way
        self.in_string = self.in_array = self.lost = False
        self.start: tuple[int, int] | None = None  # line and offset of the value under way
        self.parts: list[bytes] = []
        self.size = 0

    def line(self, number: int, offset: int, data: bytes, goes_on: bool) -> Iterator[Value]:
        if self.start and not goes_on:
            if self.in_string:  # no string of JSON goes over the end of a line
                yield self.finished()
                self.lost = True
            else:
                self.keep(b"\n")
        if self.lost and not data.lstrip().startswith(b"{"):
            return
        self.lost = False
        place = 0
        while place < len(data):
            if self.start is None:
                place = self.between(data, place)
                if place == len(data):
                    return
                self.start = number, offset + place
                if scalar := _SCALAR.match(data, place):
                    self.keep(scalar[0])
                    place = scalar.end()
                    yield self.finished()
                    continue
            begin = place
            place, ended = self.inside(data, place)
            self.keep(data[begin:place])
            if ended:
                yield self.finished()

    def between(self, data: bytes, place: int) -> int:
        """Where the next value begins, past what separates values and past the brackets of the array around them."""
        while place < len(data):
            match = _BETWEEN.match(data, place)
            place = match.end() if match else place
            bracket = data[place : place + 1]
            if bracket == b"]" or (bracket == b"[" and not self.in_array):
                self.in_array = bracket == b"["
                place += 1
            else:
                break
        return place

    def inside(self, data: bytes, place: int) -> tuple[int, bool]:
        """How far the value under way goes in `data`, and whether it ends there."""
        while match := (_INSIDE if self.in_string else _OUTSIDE).search(data, place):
            place = match.end()
            mark = match[0]
            if mark == b"\\":
                place += 1
            elif mark == b'"':
                self.in_string = not self.in_string
            else:
                self.depth += 1 if mark in b"{[" else -1
            if self.depth <= 0 and not self.in_string:
                return place, True
        return len(data), False

    def keep(self, data: bytes) -> None:
        self.size += len(data)
        if self.size <= MAX_LINE_BYTES:
            self.parts.append(data)
        else:
            self.parts = []

    def finished(self) -> Value:
        assert self.start is not None
        found = Value(*self.start, b"".join(self.parts) if self.size <= MAX_LINE_BYTES else None)
        self.start, self.parts, self.size, self.depth, self.in_string = None, [], 0, 0, False
        return found

    def end(self) -> Iterator[Value]:
        if self.start:
            yield self.finished()


def at_path(value: Any, path: str) -> Any:
    """What stands at a dotted path: members of objects, of all objects in a list, or one element by its number.

    `MISSING` where nothing does. A key that itself holds dots comes first. A bare string is its own text.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and path in value:
        return value[path]
    for name in path.split("."):
        value = _step(value, name)
    return value


def _step(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return value.get(name, MISSING)
    if isinstance(value, list):
        if name.isdecimal():
            return value[int(name)] if int(name) < len(value) else MISSING
        found = [inner for inner in (_step(each, name) for each in value) if inner is not MISSING]
        return found if found or not value else MISSING
    return None if value is None else MISSING


def text_paths(value: Any, prefix: str = "") -> Iterator[str]:
    """The dotted paths in a value at which text stands."""
    if isinstance(value, list) and not prefix:
        for number, element in enumerate(value[:20]):
            yield from text_paths(element, str(number))
    elif isinstance(value, str | list) and prefix:
        inner = next((each for each in value if each is not None), "") if isinstance(value, list) else ""
        if isinstance(inner, dict):
            yield from text_paths(inner, prefix)
        elif isinstance(inner, str | list):
            yield prefix
    elif isinstance(value, dict):
        for name, member in list(value.items())[:20]:
            yield from text_paths(member, f"{prefix}.{name}" if prefix else name)
