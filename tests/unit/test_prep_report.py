"""The page about a corpus: well-formed, self-contained, and right about what it counts."""

import re
from html.parser import HTMLParser

import pytest

from data_prep.errors import ExitCode
from data_prep.report import main, report
from tests.support import make_corpus


class Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize(("objective", "baked"), [("nsp", 1), ("none", 0), ("sop", 2)])
def test_the_page(tmp_path, objective, baked, capsys):
    source = {"kind": "text", "paths": ["<b>.txt"], "weight": 2, "read": 9, "kept": 8, "tokens": 77}
    manifest = make_corpus(tmp_path / "c", objective=objective, baked_draws=baked, samples=2000)
    from dataclasses import replace

    from data_prep.manifest import write_manifest

    documents = {"read": 9, "kept": 8, "bytes": 5, "dropped": {"too_short": 1}, "repaired": {}, "sources": [source]}
    write_manifest(tmp_path / "c", replace(manifest, documents=documents))
    assert main([str(tmp_path / "c")]) == 0
    page = (tmp_path / "c" / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    text = " ".join(checker.text)
    assert "<b>.txt" in text
    assert "too_short" in text
    assert f"{manifest.splits['pass-00'].samples:,}" in text
    assert ("of them [MASK]" in text) == bool(baked)
    assert ("random next, val" in text) == (objective == "nsp")
    if baked:
        share = float(re.search(r"of them \[MASK\]</td><td>([0-9.]+)%", page)[1])
        assert 75 < share < 85
    assert len(page) < 200_000
    assert "report.html" in capsys.readouterr().out


def test_it_says_what_is_wrong(tmp_path, capsys):
    assert main([str(tmp_path)]) == ExitCode.USAGE
    make_corpus(tmp_path / "c")
    assert main([str(tmp_path / "c"), "--out", str(tmp_path / "no" / "x.html")]) == ExitCode.USAGE
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("error: ") for line in errors)
    assert report(tmp_path / "c").startswith("<!doctype html>")
