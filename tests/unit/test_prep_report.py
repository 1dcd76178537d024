"""The page about a corpus: well-formed, self-contained, and right about what it counts."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from cloze.corpus.manifest import write_manifest
from cloze.corpus.report import _scale, report
from cloze.corpus.shards import Split
from cloze.errors import ExitCode
from data_prep import peek, verify
from data_prep.report import main
from tests.support import CLS, SEP, make_corpus


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


def test_the_figures_are_those_of_the_samples(tmp_path):
    """Counted here again, sample by sample, in plain Python."""
    manifest = make_corpus(tmp_path / "c", samples=500, baked_draws=1)
    manifest = replace(manifest, tokenizer=replace(manifest.tokenizer, unk_id=17))  # so that there are unknown ones
    write_manifest(tmp_path / "c", manifest)
    samples = Split(tmp_path / "c", manifest, "pass-00").gather(np.arange(500), 0)
    tokens, lengths = samples.tokens_T.tolist(), samples.lengths_Nx2[:, 1].tolist()
    page = report(tmp_path / "c")

    def shown(name):
        return re.search(rf"<td>{re.escape(name)}</td><td>([^<]*)</td>(?:<td>([^<]*)</td>)?", page).groups()

    unknown = tokens.count(17) / (len(tokens) - tokens.count(CLS) - tokens.count(SEP))
    assert unknown > 0
    assert shown("unknown")[0] == f"{unknown:.4%}"
    assert shown("vocabulary in use")[0].startswith(f"{len(set(tokens))} of 61 ")
    target = sum(min(20, max(1, round(0.15 * length))) for length in lengths) / len(tokens)
    assert shown("masked tokens") == (f"{len(samples.masks.positions_M) / len(tokens):.2%}", f"{target:.2%}")
    bins = dict(re.findall(r"<td>(\d+ to \d+)</td><td class=\"n\">([\d,]+)</td>", page))
    assert bins == {f"{n} to {n}": str(lengths.count(n)) for n in range(25)}
    random_next = sum(samples.random_next_N.tolist()) / 500
    assert shown("random next, pass-00")[0] == f"{random_next:.2%}"


def test_a_person_reads_what_is_the_matter_first_then_samples(tmp_path):
    manifest = make_corpus(tmp_path / "c", samples=60, baked_draws=1)
    page = report(tmp_path / "c")
    places = [page.index(f"<h2>{name}</h2>") for name in ("Diagnosis", "Samples", "Lengths", "Sources", "Splits")]
    assert places == sorted(places)
    samples = re.findall(r'<article class="card sample">(.*?)</article>', page, re.DOTALL)
    assert len(samples) == 20
    for sample in samples:
        marked = sum(sample.count(f'<mark class="{kind}">') for kind in ("hidden", "other", "kept"))
        assert marked == int(re.search(r"(\d+) to predict", sample)[1]) > 0
    assert manifest.masking.probability == 0.15
    assert "token 15%" in page


def test_bins_hold_all_samples(tmp_path):
    manifest = make_corpus(tmp_path / "c", samples=300, max_len=200, val=0)
    bins = re.findall(r"<td>(\d+) to (\d+)</td><td class=\"n\">([\d,]+)</td>", report(tmp_path / "c"))
    histogram = manifest.splits["pass-00"].length_histogram
    assert [int(count) for _, _, count in bins] == [sum(histogram[int(a) : int(b) + 1]) for a, b, _ in bins]
    assert sum(int(count) for _, _, count in bins) == 300
    assert int(bins[0][1]) > int(bins[0][0])


def test_it_says_what_is_wrong(tmp_path, capsys):
    assert main([str(tmp_path)]) == ExitCode.USAGE
    make_corpus(tmp_path / "c")
    assert main([str(tmp_path / "c"), "--out", str(tmp_path / "no" / "x.html")]) == ExitCode.USAGE
    errors = capsys.readouterr().err.splitlines()
    for command in (peek.main, verify.main, main):
        assert command(["s3://bucket/corpus"]) == ExitCode.USAGE
        assert capsys.readouterr().err.startswith("error: s3://bucket/corpus: not on this machine; copy the corpus")
    assert len(errors) == 2
    assert all(line.startswith("error: ") for line in errors)
    assert report(tmp_path / "c").startswith("<!doctype html>")


def test_one_crowded_length_leaves_the_other_bars_to_be_seen() -> None:
    """As where nearly all samples are full."""
    assert _scale([5, 8, 4, 900]) == 24
    assert _scale([5, 8, 4]) == 8
    assert _scale([0, 0, 7]) == 7
    assert _scale([]) == 1
