"""The nastiest files that we could think of, made by code, each with its outcome: documents kept, or one refusal.

Every one goes through all stages in this process, with a limit on time; what comes out must verify.
"""

import bz2
import gzip
import io
import json
import lzma
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from cloze.cli import compose
from cloze.corpus import verify
from cloze.corpus.manifest import read_manifest
from cloze.errors import ExitCode, UserError
from data_prep.config import PrepConfig
from data_prep.plan import claimed, make_plan
from data_prep.stages import tokenizer
from data_prep.stages.finish import document_statistics, finish
from data_prep.stages.map import MAP
from data_prep.stages.reduce import REDUCE
from tests.unit.corpora import documents, prep, vocabulary

SECONDS = 100  # of CPU, for the worst of them on a loaded machine; the square of 100 MB would take years

PLAIN = "\n\n".join(documents(12)).encode()
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents(12))


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", PLAIN)
    return file.getvalue()


def bomb() -> bytes:
    return zstandard.compress(b"a" * 100_000_000)


# name, bytes, and what is to come: the least number of documents kept, or words of the refusal
NASTY: dict[str, tuple[str, bytes | Callable[[], bytes], int | str]] = {
    "truncated gzip": ("a.txt.gz", gzip.compress(PLAIN)[:-9], "restore"),
    "truncated zstd": ("a.txt.zst", zstandard.compress(PLAIN)[:-9], "restore"),
    "truncated xz": ("a.txt.xz", lzma.compress(PLAIN)[:-9], "restore"),
    "truncated bz2": ("a.txt.bz2", bz2.compress(PLAIN)[:-9], "restore"),
    "text named gzip": ("a.txt.gz", PLAIN, "restore"),
    "gzip named text": ("a.txt", gzip.compress(PLAIN), "compressed at"),
    "garbage after gzip": ("a.txt.gz", gzip.compress(PLAIN) + b"garbage", "restore"),
    "padding after gzip": ("a.txt.gz", gzip.compress(PLAIN) + bytes(700), 12),
    "gzip in capitals": ("A.TXT.GZ", gzip.compress(PLAIN), 12),
    "empty gzip": ("a.txt.gz", gzip.compress(b""), "no document"),
    "zstd bomb of one letter": ("a.txt.zst", bomb, "unknown_tokens: 100.00%"),
    "gzip in gzip": ("a.txt.gz", gzip.compress(gzip.compress(PLAIN)), "compressed at"),
    "UTF-16 with mark": ("a.txt", PLAIN.decode().encode("utf-16"), 12),
    "UTF-16 without mark": ("a.txt", PLAIN.decode().encode("utf-16-le"), "source.encoding=utf-16-le"),
    "UTF-32": ("a.txt", PLAIN.decode().encode("utf-32"), 12),
    "UTF-16 in Chinese": (
        "a.txt",
        ("我们在北京大学学习，你好吗？他不知道。\n\n" * 99).encode("utf-16-be"),
        "source.encoding=utf-16-be",
    ),
    "UTF-16 JSON": ("a.jsonl", LINES.decode().encode("utf-16"), 12),
    "one archive among texts": ("a.txt", zipped() + b"\n\n" + PLAIN, "compressed at"),
    "random bytes": ("a.txt", random.Random(0).randbytes(200_000), "not_text at"),
    "PDF": ("a.txt", b"%PDF-1.4\n1 0 obj << /Type /Page >> endobj\n\n" * 50, "pdf at"),
    "Latin-1 throughout": (
        "a.txt",
        ("Café naïve. Straße über Häuser. " * 9 + "\n\n").encode("latin-1") * 20,
        "source.encoding=cp125",
    ),
    "GB18030": (
        "a.txt",
        ("今天天气很好。我们去公园玩。他说你好。\n" * 50).encode("gb18030"),
        "source.encoding=gb18030",
    ),
    "carriage returns and marks": ("a.txt", b"\xef\xbb\xbf" + PLAIN.replace(b"\n\n", b"\r\r\xef\xbb\xbf"), 12),
    "Latin-1": ("a.txt", ("Café naïve. Straße hier. " * 9).encode("latin-1") + b"\n\n" + PLAIN, 13),
    "byte order mark": ("a.txt", b"\xef\xbb\xbf" + PLAIN, 12),
    "all byte values": ("a.txt", bytes(range(256)) * 400, "not_text at"),
    "NUL bytes only": ("a.txt", bytes(100_000), "not_text at"),
    "a megabyte of dashes": ("a.txt", b"-" * 2**20, 1),
    "a megabyte of full stops": ("a.txt", b"." * 2**20, 1),
    "a megabyte of quotes": ("a.txt", b'."' * 2**19, 1),
    "a word of ten megabytes": ("a.txt", b"x" * 10_000_000 + b"\n\n" + PLAIN, 12),
    "ten megabytes of spaces": ("a.txt", b" " * 10_000_000, "no document"),
    "a million line ends": ("a.txt", b"\n" * 1_000_000, "no document"),
    "only carriage returns": ("a.txt", PLAIN.replace(b"\n\n", b"\r\r"), 1),
    "only emoji": ("a.txt", ("😀👨‍👩‍👧🇩🇪 " * 5000).encode(), "unknown_tokens: 100.00%"),
    "right to left": ("a.txt", ("שלום עולם. مرحبا بالعالم. \u202eabc\u202c " * 500).encode(), 1),
    "combining marks": ("a.txt", ("a" + "\u0301" * 5000 + " b. ").encode() * 5, 1),
    "zero-width": ("a.txt", "\u200b\u200d\ufeff".encode() * 5000, 0),
    "private use and unassigned": ("a.txt", "\ue000\U0010ffff\u0378 ".encode() * 5000, 0),
    "HTML": ("a.txt", b"<html><body>" + b"<div class='x'>Text &amp; more.</div>" * 2000, 1),
    "one letter": ("a.txt", b"a", "no training sample"),
    "special tokens": ("a.txt", b"[CLS] [SEP] [MASK] [PAD] [UNK]. " * 3000, 1),
    "deep JSON": ("a.jsonl", b"[" * 1_000_000 + b"\n" + LINES, 12),
    "deep JSON in the field": ("a.jsonl", b'{"text": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}\n" + LINES, 12),
    "a number of a million digits": ("a.jsonl", b'{"text": ' + b"9" * 1_000_000 + b"}\n" + LINES, 12),
    "duplicated keys": ("a.jsonl", b'{"text": "First. One.", "text": "Last. One."}\n' + LINES, 13),
    "lone surrogates": ("a.jsonl", b'{"text": "\\ud800 a. \\udfff b. \\ud83d\\ude00 c."}\n' + LINES, 13),
    "a BOM before JSON": ("a.jsonl", b"\xef\xbb\xbf" + LINES, 12),
    "no end of line": ("a.jsonl", LINES[:-1], 12),
    "cut in the middle": ("a.jsonl", LINES[:-40], 11),
    "binary": ("a.jsonl", bytes(range(256)) * 4000, "malformed"),
    "one JSON array": ("a.jsonl", json.dumps(documents(5)).encode(), 5),
    "NaN and null": ("a.jsonl", b'{"text": NaN}\n{"text": null}\nnull\n' + LINES, 12),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("v") / "vocab.txt")


def run_here(folder: Path, paths: str, words: Path) -> int:
    """All stages in this process; documents kept."""
    plan = make_plan(
        compose(
            "prep", PrepConfig,
            [f"source={'jsonl' if 'json' in paths else 'text'}", f"source.paths=[{paths}]", f"out={folder / 'out'}",
             f"tokenizer.path={words}", "val_fraction=0", "max_len=64", "source.max_bad_fraction=0.3"],
        )
    )  # fmt: skip
    with claimed(plan):
        facts = tokenizer.make_tokenizer(plan)
        for stage in (MAP, REDUCE):
            for number in range(stage.num_tasks(plan)):
                stage.run_task(plan, number)
            document_statistics(plan)
        finish(plan, facts)
    assert list(verify.faults(folder / "out")) == []
    return int(read_manifest(folder / "out").documents["kept"])


def outcome_of(folder: Path, paths: str, words: Path) -> int | str:
    try:
        return run_here(folder, paths, words)
    except UserError as error:
        return str(error)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "zstd bomb of one letter" else ()) for case in NASTY]
)
def test_nasty_files(tmp_path, words, case):
    name, data, outcome = NASTY[case]
    (tmp_path / name).write_bytes(data() if callable(data) else data)
    started = time.process_time()
    found = outcome_of(tmp_path, str(tmp_path / name), words)
    if isinstance(found, str):
        assert "\n" not in found
        assert outcome == 0 or (isinstance(outcome, str) and outcome in found), found
    else:
        assert isinstance(outcome, int), f"kept {found}"
        assert found >= outcome
    assert time.process_time() - started < SECONDS


@pytest.mark.slow
def test_all_of_them_in_one_command_leave_no_traceback(tmp_path, words):
    """As a user runs it, in worker processes, the largest left out; what cannot be decompressed is refused."""
    expected = 0
    for number, (name, data, outcome) in enumerate(NASTY.values()):
        if callable(data) or len(data) > 2e6:
            continue
        refused = outcome == "restore" or "source.encoding" in str(outcome)
        name = f"refused-{number}-{name}" if refused else f"{number}-{name}"
        (tmp_path / name).write_bytes(data)
        expected += outcome if isinstance(outcome, int) else 0
    mixture = "{{kind: {kind}, paths: ['{folder}/{files}'], max_bad_fraction: 1}}"
    both = ("text", "[0-9]*.[tT]*"), ("jsonl", "[0-9]*.jsonl")
    sources = ",".join(mixture.format(kind=kind, folder=tmp_path, files=files) for kind, files in both)
    extra = [f"tokenizer.path={words}", "max_len=64", "executor.workers=2"]
    run = prep(f"sources=[{sources}]", f"out={tmp_path / 'out'}", *extra)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    documents = read_manifest(tmp_path / "out").documents
    assert documents["kept"] + documents["dropped"]["duplicate"] >= expected
    for reason in ("bad_json", "compressed", "no_text_field", "not_text", "pdf"):
        assert documents["dropped"][reason]
    assert list(verify.faults(tmp_path / "out")) == []
    run = prep("source=text", f"source.paths=[{tmp_path}/refused-*]", f"out={tmp_path / 'no'}", *extra)
    assert run.returncode == ExitCode.USAGE
    assert "Traceback" not in run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith("error: ")] == [run.stderr.splitlines()[-1]]


def test_things_that_are_no_files(tmp_path, words):
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to(tmp_path / "a")
    (tmp_path / "none.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "empty.txt").write_bytes(b"")
    for paths in ("d.txt", "loop.txt", "none.txt", "empty.txt", "*.txt"):
        with pytest.raises(UserError, match=r"source\.paths"):
            run_here(tmp_path, str(tmp_path / paths), words)
    (tmp_path / "a" / "x.txt").write_bytes(PLAIN)
    assert run_here(tmp_path, str(tmp_path / "a" / "**" / "*.txt"), words) == 12  # through no loop, once


def test_a_file_that_changes_while_it_is_read(tmp_path, words, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(PLAIN)
    train = tokenizer.make_tokenizer

    def grows(plan):
        path.write_bytes(PLAIN + b"more")
        return train(plan)

    monkeypatch.setattr(tokenizer, "make_tokenizer", grows)
    with pytest.raises(UserError, match="changed since the preparation began"):
        run_here(tmp_path, str(path), words)
