"""The rows of a file of any size, one after another, in bounded memory. A row that cannot be read ends the reading.

Knows no tasks. `finetune.readers` reads the files of training, which are small, and leaves bad rows out: here each row
that goes in must come out.
"""

import codecs
import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence

from cloze.encodings import codec_of
from cloze.errors import UserError
from finetune import packed
from finetune.readers import Row, csv_cells, delimiter, refuse_twins, suffix, table_header

MAX_CHARACTERS = 64 * 2**20  # of a line, or of a JSON object: bounds memory

_DECODER = json.JSONDecoder()
_LONGEST_WORD = 16  # in characters, of what JSON has besides strings and numbers: -Infinity, \\u1234
_JSON_GAP = re.compile(r"[\s,\ufeff]*")
_SUFFIXES = {
    ".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "text",
    ".conll": "conll", ".bio": "conll", ".iob": "conll", ".iob2": "conll",
}  # fmt: skip
FORMATS = tuple(dict.fromkeys(_SUFFIXES.values()))


def format_of(path: str, asked: str | None) -> str:
    """`csv` of `A.CSV.gz`, unless another one is asked for. Raises `UserError` where neither tells."""
    if asked is None and suffix(path) not in _SUFFIXES:
        raise UserError(f"in={path}: its name tells no format; add in_format={'|'.join(FORMATS)}")
    return asked or _SUFFIXES[suffix(path)]


def rows(
    texts: Iterator[str], kind: str, layouts: Sequence[Sequence[str]], header: Sequence[str] | None
) -> Iterator[Row]:
    """The rows of a text of this format (one of `FORMATS`, but conll, which is `tagging`'s).

    `layouts` and `header` as `finetune.readers` has them. Raises `UserError` with the line of the first that is none.
    """
    if kind == "jsonl":
        return json_rows(texts)
    if kind == "text":
        return (Row(f"line {number}", {"text": line}) for number, line in enumerate(lines(texts), 1))
    return table_rows(lines(texts), header, layouts, quoted=kind == "csv")


def blocks(path: str, encoding: str | None = None) -> Iterator[str]:
    """The text of a file, decompressed, in pieces; line ends of old Macs become ours.

    Without an encoding it is what a byte order mark says, or UTF-8. Raises `UserError` with the line that is not.
    """
    found = packed.blocks(path)
    head = next(found, b"")
    codec = encoding or codec_of(head, "auto")
    decoder, num_lines, is_first, is_mac = codecs.getincrementaldecoder(codec)(), 1, True, False
    for data in itertools.chain([head], found, [b""]):
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = num_lines + error.object[: error.start].decode(codec, "ignore").count("\n")
            what = f"line {line}: not {codec.upper()} (byte 0x{error.object[error.start]:02x})"
            raise UserError(f"{what}; set encoding: gb18030, latin-1, …") from None
        if is_first and text:
            text, is_mac, is_first = text.removeprefix("\ufeff"), "\r" in text[:-1] and "\n" not in text, False
        num_lines += text.count("\n")
        yield text.replace("\r", "\n") if is_mac else text


def lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends."""
    rest, number = "", 0
    for text in texts:
        found = (rest + text).split("\n")
        rest = found.pop()
        number += len(found)
        yield from (line.removesuffix("\r") for line in found)
        if len(rest) > MAX_CHARACTERS:
            raise UserError(f"line {number + 1}: longer than {MAX_CHARACTERS:,} characters; is it text, line by line?")
    if rest:
        yield rest


def table_rows(
    found: Iterator[str], default_header: Sequence[str] | None, layouts: Sequence[Sequence[str]], *, quoted: bool
) -> Iterator[Row]:
    """As `finetune.readers.table_rows`, but that an empty line is an empty text where there is one column."""
    first = next(found, None)
    if first is None:
        return
    cells = (_csv_cells if quoted else _tsv_cells)(itertools.chain([first], found), first)
    _, names = next(cells)
    header, is_there = table_header(names, default_header, layouts)
    refuse_twins(header)
    for number, row in cells if is_there else itertools.chain([(1, names)], cells):
        if row in ([], [""]):  # an empty line
            if len(header) > 1:
                continue
            row = [""]
        if len(row) != len(header):
            raise UserError(f"line {number}: {len(row)} columns where the header has {len(header)}; mend it")
        yield Row(f"line {number}", dict(zip(header, row, strict=True)))


def _tsv_cells(found: Iterator[str], first: str) -> Iterator[tuple[int, list[str]]]:
    del first
    return ((number, line.split("\t")) for number, line in enumerate(found, 1))


def _csv_cells(found: Iterator[str], first: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(MAX_CHARACTERS, csv.field_size_limit()))  # the module's own is 131,072 characters
    return csv_cells(found, delimiter(first))


def json_rows(texts: Iterable[str]) -> Iterator[Row]:
    """Objects one after another: on lines, side by side or in one array."""
    more = filter(None, texts)
    text, place, line, number, is_array = next(more, ""), 0, 1, 0, False
    while True:
        gap = _JSON_GAP.match(text, place)
        assert gap  # it may be empty
        line, place = line + text.count("\n", place, gap.end()), gap.end()
        if number == 0 and not is_array and text[place : place + 1] == "[":
            is_array, place = True, place + 1
            continue
        if is_array and text[place : place + 1] == "]":
            return
        where = f"item {number + 1}" if is_array else f"line {line}"
        try:
            value, end = _DECODER.raw_decode(text, place)
        except ValueError as error:
            longer = "".join(itertools.islice(more, 1 + (len(text) - place) // packed.BLOCK_BYTES))
            if not longer and place == len(text) and not is_array:
                return
            fault = getattr(error, "msg", str(error))
            is_torn = fault.startswith("Unterminated") or getattr(error, "pos", 0) > len(text) - _LONGEST_WORD
            if not longer or not is_torn or len(text) - place > MAX_CHARACTERS:
                at = line + text.count("\n", place, getattr(error, "pos", place))
                raise UserError(f"{where}: not JSON ({fault}, line {at}); mend it") from None
            text, place = text[place:] + longer, 0
            continue
        except RecursionError:
            raise UserError(f"{where}: not JSON that can be read (nested too deeply); mend it") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: {str(value)[:40]!r} is not a JSON object, with a name for each value; mend it")
        number += 1
        yield Row(where, value)
        line, place = line + text.count("\n", place, end), end
