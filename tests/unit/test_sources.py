"""Every document of every file is read exactly once, however the files are cut into tasks."""

import bz2
import gzip
import itertools
import json
import lzma
import os
from pathlib import Path

import pytest
import yaml
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloze.cli import typed
from cloze.errors import UserError
from cloze.schema import CONF
from data_prep.sources import json_values, jsonl, lines
from data_prep.sources import text as text_module
from data_prep.sources.base import Bad, Document, InputFile, Source, Span

COMPRESSORS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]),
    ".zst": lambda data: zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :]),
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def source(kind: str = "text", **values: object) -> Source:
    """A source of this kind, with what conf/source says but for `values`."""
    silent = yaml.safe_load((CONF / "source" / f"{kind}.yaml").read_text())
    fields = {**silent, "paths": ["x"], "min_characters": 1, "max_bad_fraction": 1.0, **values}
    return typed(fields, Source.kinds[kind])


def read_in_pieces(path: Path, config: Source, pieces: int) -> list[Document | Bad]:
    (file,) = config.measured([str(path)])
    borders = [file.bytes * i // pieces for i in range(pieces + 1)]
    spans = [Span(0, begin, end) for begin, end in itertools.pairwise(borders)]
    return [item for span in spans for item in config.read([file], [span])]


@pytest.fixture(autouse=True)
def _small_bites(monkeypatch):
    """Borders of spans lie between the bites in which compressed bytes are read: make them matter in small files."""
    monkeypatch.setattr(lines, "_PLAIN_BYTES", 3)
    monkeypatch.setattr(lines, "_COMPRESSED_BYTES", 3)


LINES = st.lists(st.sampled_from(["", " ", "\r", "a", "b c", "\u00e9.", "x" * 50]), max_size=40)
PIECES = st.integers(1, 9)
SUFFIX = st.sampled_from(sorted(COMPRESSORS))
REPEATED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(lines=LINES, ends=st.booleans(), pieces=PIECES, suffix=SUFFIX)
@REPEATED
def test_blank_line_documents_are_read_once(tmp_path, lines, ends, pieces, suffix):
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(COMPRESSORS[suffix](("\n".join(lines) + "\n" * ends).encode()))
    found = [document.text.split() for document in read_in_pieces(path, source(), pieces)]
    groups = itertools.groupby(lines, key=lambda line: bool(line.strip()))
    assert found == [" ".join(group).split() for full, group in groups if full]


@given(lines=LINES, pieces=PIECES, suffix=SUFFIX)
@REPEATED
def test_json_lines_are_read_once(tmp_path, lines, pieces, suffix):
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix]("".join(json.dumps({"text": line}) + "\n" for line in lines).encode()))
    assert [document.text for document in read_in_pieces(path, source("jsonl"), pieces)] == lines


@pytest.mark.parametrize("suffix", sorted(COMPRESSORS))
def test_a_file_is_one_document_where_asked(tmp_path, suffix):
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(COMPRESSORS[suffix](b"a\n\n\nb\nc"))
    assert [document.text for document in read_in_pieces(path, source(document="file"), 1)] == ["a\n\n\nb\nc"]


def test_a_long_text_comes_in_parts_of_one_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "PART_BYTES", 100)
    path = tmp_path / "x.txt"
    path.write_text("\n".join(["line of text"] * 50) + "\n\nanother")
    *parts, other = read_in_pieces(path, source(), 1)
    assert "\n".join(part.text for part in parts).split() == ["line", "of", "text"] * 50
    assert len(parts) == 6
    assert len({part.origin for part in parts}) == 1 != other.origin


def test_bad_json_is_told_apart(tmp_path, monkeypatch):
    for module in (lines, jsonl, json_values):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    deep = b'{"text": ' + b"[" * 400 + b"]" * 400 + b"}"
    cases = [
        (b'{"text": "good"}', "good"),
        (b'{"text": "cut', "bad_json"),
        (b"[1, 2]", "no_text_field"),
        (b'{"other": "x"}', "no_text_field"),
        (b'{"text": 7}', "no_text_field"),
        (b'{"text": "first", "text": "last"}', "last"),
        (b'{"text": "' + b"y" * 5000 + b'"}', "line_too_long"),
        (b"\xff\xfe", "bad_json"),
        (b'{"text": "\xff"}', "\ufffd"),
        (b'{"text": ' + b"9" * 980 + b"}", "no_text_field"),
        (deep, "empty"),
        (b"   ", None),
        (b'{"text": "end"}', "end"),
    ]
    path.write_bytes(b"\n".join(line for line, _ in cases))
    found = read_in_pieces(path, source("jsonl"), 1)
    assert [item.reason if isinstance(item, Bad) else item.text for item in found] == [x for _, x in cases if x]
    assert [item.repaired for item in found if isinstance(item, Document)] == [False, False, True, False]


def test_deep_json_is_bad(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"[" * 200_000)
    assert [item.reason for item in read_in_pieces(path, source("jsonl"), 1)] == ["bad_json"]


def test_docstrings_are_read_without_importing(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""Module."""\nraise SystemExit\nclass A:\n    """Class.\n\n    >>> doctest\n    -----\n    More."""\n'
        '    if x:\n        async def f(self):\n            """Inner."""\n    else:\n        g = lambda: """no"""\n'
    )
    (tmp_path / "b.py").write_text('def f(:\n    """broken"""\n')
    (tmp_path / "c.py").write_text("x = 1\n")
    (tmp_path / "d.txt").write_text('"""not Python"""')
    config = source("docstrings", paths=[str(tmp_path)])
    files = config.find_inputs()
    items = [item for task in config.split(files) for item in config.read(files, task)]
    texts = sorted(item.text for item in items if isinstance(item, Document))
    assert texts == ["Class.\n\nMore.", "Inner.", "Module."]
    assert [(item.reason, Path(item.location).name) for item in items if isinstance(item, Bad)] == [
        ("unparsable", "b.py")
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_truncated_and_damaged_files_are_refused(tmp_path, suffix):
    whole = COMPRESSORS[suffix](b"some text\n" * 1000)
    for name, data in (("cut", whole[:-9]), ("damaged", whole[:20] + b"\x55" * 20 + whole[40:]), ("alien", b"text\n")):
        path = tmp_path / f"{name}.txt{suffix}"
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{name}.txt"):
            read_in_pieces(path, source(), 1)


def test_paths_that_are_not_there_are_named(tmp_path):
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "link.txt")
    for pattern in ("none.txt", "*.nothing", "d.txt", "*.txt", "link.txt"):
        with pytest.raises(UserError, match=r"source\.paths"):
            source(paths=[str(tmp_path / pattern)]).find_inputs()


def test_a_file_named_twice_is_read_once(tmp_path):
    for name in ("a.txt", "b.txt", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "c.txt").symlink_to("a.txt")
    files = source(paths=[str(tmp_path / "b.txt"), str(tmp_path / "*.txt")]).find_inputs()
    assert [Path(file.path).name for file in files] == ["b.txt", "a.txt"]


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    files = source(paths=[str(path)]).find_inputs()
    path.write_text("changed")
    with pytest.raises(UserError, match="changed since"):
        list(source().read(files, [Span(0, 0, 1)]))


@pytest.mark.parametrize("change", ["cut", "rewritten", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    """By the end of the span at the latest: nothing is committed before."""
    path = tmp_path / "a.txt"
    path.write_text("some text\n\n" * 20_000)
    (file,) = source(paths=[str(path)]).find_inputs()
    documents = source().read([file], [Span(0, 0, file.units)])
    assert next(documents).text == "some text"
    if change == "cut":
        os.truncate(path, 100_000)
    elif change == "rewritten":
        with path.open("r+b") as other:
            other.write(b"other text\n" * 20_000)
    else:
        (tmp_path / "new").write_text("newer text\n")
        (tmp_path / "new").replace(path)
    with pytest.raises(UserError, match=r"a\.txt: changed since the preparation began"):
        list(documents)


def test_tasks_cover_every_byte_once(tmp_path):
    files = [
        InputFile(f"f{i}{suffix}", n, 0, n * 3, n)
        for i, (n, suffix) in enumerate(
            [(0, ".txt"), (5, ".txt"), (10**9, ".txt"), (10**8, ".jsonl.zst"), (10**6, ".gz"), (10**7, ".bz2")]
        )
    ]
    spans = [span for task in source().split(files) for span in task]
    for index, file in enumerate(files):
        mine = [span for span in spans if span.file == index]
        assert (mine[0].begin, mine[-1].end) == (0, file.bytes)
        assert all(left.end == right.begin for left, right in itertools.pairwise(mine))
    assert sum(span.file == 3 for span in spans) <= 16
    assert len(source().split(files)) < 200
