"""Parquet, wiki dumps, data sets of the hub, URLs, and mixtures of sources: all of it made by code."""

import bz2
import itertools
import json
import time
from html import escape

import fsspec
import numpy as np
import pytest

from cloze.cli import compose
from cloze.corpus import verify
from cloze.corpus.manifest import read_manifest
from cloze.errors import UserError
from data_prep.config import PrepConfig
from data_prep.plan import make_plan
from data_prep.prepare import main
from data_prep.sources import lines, wiki
from data_prep.sources.base import Bad, Document, Span
from data_prep.sources.wiki import plain_text
from tests.unit.corpora import documents, prep, vocabulary, write_jsonl
from tests.unit.test_sources import source


def items(config, pieces=1):
    """Everything that the tasks of a source give, its files cut into so many spans each."""
    files = config.find_inputs()
    found = []
    for index, file in enumerate(files):
        borders = [file.units * i // pieces for i in range(pieces + 1)]
        for begin, end in itertools.pairwise(borders):
            found += config.read(files, [Span(index, begin, end)])
    return found


def texts(found):
    return [item.text for item in found if isinstance(item, Document)]


def reasons(found):
    return [item.reason for item in found if isinstance(item, Bad)]


# -- parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 3])
def test_parquet(tmp_path, pieces):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [*documents(50), None]
    parquet.write_table(pyarrow.table({"id": range(51), "body": rows}), tmp_path / "a.parquet", row_group_size=20)
    config = source("parquet", paths=[str(tmp_path / "*.parquet")], field="body")
    found = items(config, pieces)
    assert texts(found) == rows[:-1]
    assert reasons(found) == ["empty"]
    assert len({item.origin for item in found if isinstance(item, Document)}) == 50
    with pytest.raises(UserError, match=r"no column of text named text; set source\.field to one of body"):
        items(source("parquet", paths=[str(tmp_path / "a.parquet")]))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"b\.parquet: no Parquet file"):
        items(source("parquet", paths=[str(tmp_path / "b.parquet")]))


def test_nested_and_damaged_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [f"number {i} of many texts" for i in range(5000)]
    nested = {"tags": [["a"]] * 5000, "of": [{"text": "other"}] * 5000, "text": rows}
    parquet.write_table(pyarrow.table(nested), tmp_path / "a.parquet", compression="snappy")
    config = source("parquet", paths=[str(tmp_path / "a.parquet")])
    (file,) = config.find_inputs()
    assert file.text_bytes > 20_000  # of the column itself, not of the one of that name in `of`
    assert texts(items(config)) == rows
    with pytest.raises(UserError, match=r"named of; set source\.field to one of tags, of\.text, text"):
        items(source("parquet", paths=[str(tmp_path / "a.parquet")], field="of"))
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    place = data.index(b"number ") + 5000
    data[place - 500 : place + 500] = b"\xaa" * 1000
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"^[^\n]*a\.parquet: cannot be read [^\n]*restore or leave out the file$"):
        items(config)


# -- wiki -------------------------------------------------------------------------------------------------------------

ARTICLE = """{{Infobox|name=x}}
'''Berlin''' is a [[city|big city]] in [[Germany]].<ref>A book.</ref> It is old.
== History ==
{| class="wikitable"
! head
|-
| cell
|}
* A list item of [[File:x.jpg|thumb|caption]] words.
[[Category:Cities]] <!-- hidden -->"""


def page(title, text, ns=0, redirect=False):
    return (
        f"  <page>\n    <title>{title}</title>\n    <ns>{ns}</ns>\n    <id>1</id>\n"
        + ('    <redirect title="X" />\n' if redirect else "")
        + f'    <revision>\n      <text xml:space="preserve">{escape(text)}</text>\n    </revision>\n  </page>\n'
    ).encode()


def dump(path, how, count=60):
    """A dump of `count` articles, and a redirect, a talk page and a broken page."""
    head, tail = b"<mediawiki>\n  <siteinfo><sitename>T</sitename></siteinfo>\n", b"</mediawiki>\n"
    body = [page(f"P{i}", f"Article number {i}.\n\nIt goes on & on.") for i in range(count)]
    body += [page("R", "#REDIRECT [[P1]]", redirect=True), page("T", "talk", ns=1), b"  <page>\n<x>\n  </page>\n"]
    if how == "multistream":
        groups = [b"".join(body[i : i + 7]) for i in range(0, len(body), 7)]
        data = b"".join(bz2.compress(part) for part in (head, *groups, tail))
    else:
        data = head + b"".join(body) + tail
        data = bz2.compress(data) if how == "single" else data
    path.write_bytes(data)
    return path


def test_pages_stand_anywhere_in_a_line(tmp_path, monkeypatch):
    pytest.importorskip("mwparserfromhell")
    monkeypatch.setattr(lines, "_PLAIN_BYTES", 50)
    first, second, third = (b" ".join(page(f"P{i}", f"Article {i}.").split()) for i in range(3))
    (tmp_path / "d.xml").write_bytes(b"<mediawiki>" + first + second + b"\n" + third + b"</mediawiki>")
    for pieces in (1, 2, 5):
        found = items(source("wikidump", paths=[str(tmp_path / "d.xml")]), pieces)
        assert texts(found) == ["Article 0.", "Article 1.", "Article 2."]
        assert len({item.origin for item in found}) == 3


@pytest.mark.parametrize(
    "word", ["REDIRECT", "redirect ", "WEITERLEITUNG", "перенаправление", "重定向", "تحويل", "REDIRECTION:"]
)
def test_redirects_of_any_language_are_no_prose(tmp_path, word):
    pytest.importorskip("mwparserfromhell")
    body = page("A", f"#{word}[[Other page]] {{{{R from move}}}}") + page("B", "# one [[two]] three.\n# four")
    (tmp_path / "d.xml").write_bytes(body)
    found = items(source("wikidump", paths=[str(tmp_path / "d.xml")]))
    assert reasons(found) == ["redirect"]
    assert texts(found) == ["one two three.\n\nfour"]


def test_a_dump_says_which_links_are_files_and_categories(tmp_path):
    pytest.importorskip("mwparserfromhell")
    names = b'<mediawiki>\n<namespace key="6" case="first-letter">Failas</namespace>\n'
    names += b'<namespace key="14" case="first-letter">Thing of</namespace>\n'
    (tmp_path / "d.xml").write_bytes(names + page("A", "a [[Failas:x.jpg|thumb|b]] c [[Thing of:d|e]] [[Thing:d|f]]"))
    assert texts(items(source("wikidump", paths=[str(tmp_path / "d.xml")]))) == ["a c f"]


@pytest.mark.parametrize(("how", "name"), [("plain", "d.xml"), ("single", "d.xml.bz2"), ("multistream", "d.xml.bz2")])
@pytest.mark.parametrize("pieces", [1, 4])
def test_wiki_dumps(tmp_path, how, name, pieces, monkeypatch):
    pytest.importorskip("mwparserfromhell")
    monkeypatch.setattr(lines, "_COMPRESSED_BYTES", 100)
    monkeypatch.setattr(lines, "_PLAIN_BYTES", 100)
    monkeypatch.setattr(wiki, "_READ", 100)
    path = dump(tmp_path / name, how)
    found = items(source("wikidump", paths=[str(path)]), pieces)
    assert texts(found) == [f"Article number {i}.\n\nIt goes on & on." for i in range(60)]
    assert sorted(reasons(found)) == ["bad_xml", "other_namespace", "redirect"]
    assert len({item.origin for item in found if isinstance(item, Document)}) == 60


def test_a_truncated_dump_is_refused(tmp_path):
    path = dump(tmp_path / "d.xml.bz2", "multistream")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="middle of its compressed data"):
        items(source("wikidump", paths=[str(path)]))


def test_markup_headings_and_tables_go():
    pytest.importorskip("mwparserfromhell")
    text = plain_text(ARTICLE)
    assert text.startswith("Berlin is a big city in Germany. It is old.")
    assert "A list item of" in text
    for gone in ("History", "cell", "head", "Infobox", "A book", "caption", "Category", "hidden", "[[", "''", "=="):
        assert gone not in text
    for broken in ("{{{{", "[[[[x", "{| a\n{| b", "<ref><ref>", "'''''x", "= =", "<table>" * 50, "{{" * 500):
        assert isinstance(plain_text(broken), str)


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("At {{convert|1300|mi|km}}, it has {{formatnum:6000}} rivers.", "At 1300 mi, it has 6000 rivers."),
        ("Kyoto ({{lang|ja|京都}}) is a city.", "Kyoto (京都) is a city."),
        ("Kyoto ({{IPA|x}}; {{audio|a.ogg}}) is{{cn|date=May 2020}}.", "Kyoto is."),
        ("A ({{IPAc-en|x}}; {{lang-fr|un}}), b ({{lang-de|zwei}}; {{sfn|X|1990}}).", "A (un), b (zwei)."),
        (
            "A {{convert|3|to|5|km|mi}} b {{unité|5|km}} c {{nowrap|6 m}} d {{val|7|u=s}}.",
            "A 3 to 5 km b 5 km c 6 m d 7 s.",
        ),
        (
            "In {{as of|2011|alt=In [[c|2011]]}} {{c.|1500}} {{HMS|Victory}} {{frac|1|2}}",
            "In In 2011 c. 1500 HMS Victory 1/2",
        ),
        ("x {{nihongo|Tokyo|東京|Tōkyō}} {{transl|ja|Kyōto}} {{US$|5}}", "x Tokyo (東京, Tōkyō) Kyōto US$5"),
        ("{{quote|To be or not.}}\n{{Infobox|a=b\n|c}}\n{{unknown|words}}\nend", "To be or not.\n\nend"),
        ("a {{outer|{{inner|text}}}} b {{x|[[c|d]] e}} {{y|f|g|h}}", "a text b d e"),
        ("[[wikt:word|word]] [[:fr:Paris|P]] [[fr:Paris]]", "word P"),
        ("[[:Category:X]] [[Category:Y|z]] [[Kategorie:Y|z]] [[:Datei:a.jpg|b]]", "Category:X b"),
        ("__NOTOC__a __KEIN_INHALTSVERZEICHNIS__ __无目录__ __init__", "a __init__"),
        ("这是-{zh-hans:甲;zh-hant:乙}-的-{丙}-。-{H|zh:a;zh-tw:b}-", "这是甲的丙。"),
        ("bis-{2-chloro}-x and 4-{4-[(2S)-x]}-y", "bis-{2-chloro}-x and 4-{4-[(2S)-x]}-y"),
        ("<nowiki>{{x}} ''y'' [[z]]</nowiki> [[w]]", "{{x}} ''y'' [[z]] w"),
        ("f() and g( ; ) stay", "f() and g( ; ) stay"),
        ("<blockquote>To be.<ref>Smith 1990</ref></blockquote>", "To be."),
        ("<div>\n{|\n! head\n|-\n| cell\n|}\nwords</div>", "words"),
        ("<div>\n== Head ==\nwords</div>", "words"),
        ("<div>[[Category:Foo]]a<small>b</small></div>", "ab"),
        ("one<br />two<p>three</p>", "one\n\ntwo\n\nthree"),
        ("{| \n| a\n{|\n| b\n|}\n|}c", "c"),
        ("{{a|{{b|c=|}}|{{{d|}}}}}e", "e"),
        ("[[File:a.jpg|thumb|see [[b]] and {{c}}]]d [[e|f]] [[g]]s", "d f gs"),
        ("<ref>{{cite|url=[http://x.y b]}}</ref>c<ref name=q />d<!-- [[ -->", "cd"),
        ("a [http://x.y z] [http://x] http://q.r", "a z http://q.r"),
        ("x < y, a<b [sic] &amp; <nowiki>[[c]]</nowiki> H<sub>2</sub>O", "x < y, a<b [sic] & [[c]] H2O"),
        ("a <ref>b {{c <b>d [[e [http://f g", "a b c d e http://f g"),  # nothing ends: the brackets go, the words stay
    ],
)
def test_nested_and_broken_markup(markup, prose):
    pytest.importorskip("mwparserfromhell")
    assert plain_text(markup) == prose


HOSTILE = [
    "<ref>", "<b>", "[http://", "\n== h ==\n", "[[", "{{", "{|\n", "<div>", "a<ref>b</ref> ", "{{a|", "[[a|",
    "<ref name='", "<nowiki>", "<!--", "]]}}|}</b>", "[[{{<b>{|", "{{{a|", "<", "<b></b>", "[http://a\n", "<br>",
]  # fmt: skip


@pytest.mark.parametrize("unit", [*HOSTILE, ("{{a|", "}}"), ("<div>", "</div>"), ("[[a|", "]]"), ("<b [[", "]]>")])
def test_no_page_costs_its_square(unit):
    """20,000 times anything: the parser by itself took from 15 seconds to hours."""
    pytest.importorskip("mwparserfromhell")
    first, last = unit if isinstance(unit, tuple) else (unit, "")
    started = time.process_time()
    plain_text(first * 20_000 + last * 20_000)
    assert time.process_time() - started < 10


# -- hub and URLs -----------------------------------------------------------------------------------------------------


def test_a_local_data_set(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for name, part in (("a", documents(20)), ("b", documents(15, 1))):
        write_jsonl(tmp_path / "set" / f"train-{name}.jsonl", part)
    run = prep(
        "source=hub", f"source.paths=[{tmp_path / 'set'}]", f"out={tmp_path / 'out'}", "tokenizer.vocab_size=200",
        "executor.workers=1", env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert read_manifest(tmp_path / "out").documents["read"] == 35
    assert list(verify.faults(tmp_path / "out")) == []


def test_a_broken_line_of_a_data_set_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "broken\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"^[^\n]*: cannot be read [^\n]*restore or leave out the file$"):
        items(source("hub", paths=[str(tmp_path)]))


def test_a_data_set_that_changes_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_jsonl(tmp_path / "train.jsonl", documents(3))
    config = source("hub", paths=[str(tmp_path)])
    (file,) = config.find_inputs()
    assert texts(config.read([file], [Span(0, 0, 1)])) == documents(3)
    write_jsonl(tmp_path / "train.jsonl", documents(4))
    with pytest.raises(UserError, match="changed since"):
        list(config.read([file], [Span(0, 0, 1)]))
    assert texts(config.read(config.find_inputs(), [Span(0, 0, 1)])) == documents(4)


@pytest.fixture
def memory():
    file_system = fsspec.filesystem("memory")
    for number, part in enumerate((documents(5), documents(7, 1))):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        file_system.pipe(f"/corpus/{number}.jsonl", lines)
        file_system.pipe(f"/corpus/{number}.jsonl.bz2", bz2.compress(lines))
    yield file_system
    file_system.rm("/corpus", recursive=True)


@pytest.mark.parametrize("pattern", ["memory://corpus/*.jsonl", "memory://corpus/*.bz2"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_urls_and_globs(memory, pattern, pieces):
    found = items(source("jsonl", paths=[pattern]), pieces)
    assert texts(found) == [*documents(5), *documents(7, 1)]


def test_urls_that_are_not_there(memory):
    for pattern in ("memory://corpus/none.jsonl", "memory://corpus/*.txt", "nonsense://x/y"):
        with pytest.raises(UserError, match=r"correct the URL|that fsspec understands"):
            items(source("jsonl", paths=[pattern]))
    files = source("jsonl", paths=["memory://corpus/0.jsonl"]).find_inputs()
    memory.pipe("/corpus/0.jsonl", b"{}\n" * 9)
    with pytest.raises(UserError, match="changed since"):
        list(source("jsonl").read(files, [Span(0, 0, 9)]))


# -- mixtures ---------------------------------------------------------------------------------------------------------


def mixture(tmp_path, out, weights, *extra):
    entries = ",".join(
        f"{{kind: jsonl, paths: [{tmp_path}/{name}.jsonl], weight: {weight}}}"
        for name, weight in zip("ab", weights, strict=True)
    )
    return [
        f"sources=[{entries}]", f"out={tmp_path / out}", f"tokenizer.path={tmp_path}/vocab.txt", "max_len=64",
        "executor.workers=1", "val_fraction=0.1", "objective=none", *extra,
    ]  # fmt: skip


@pytest.fixture
def two(tmp_path):
    vocabulary(tmp_path / "vocab.txt")
    first, second = documents(300), documents(300, 1)
    write_jsonl(tmp_path / "a.jsonl", first)
    write_jsonl(tmp_path / "b.jsonl", [*second, *first[:50]])
    return tmp_path


def test_mixtures_are_weighted_and_counted_apart(two):
    tokens = {}
    for weights in ((1, 1), (0.5, 2.5)):
        out = f"{weights[0]}"
        passes = 2 if weights == (0.5, 2.5) else 1
        assert main(compose("prep", PrepConfig, mixture(two, out, weights, f"passes={passes}"))) == 0
        manifest = read_manifest(two / out)
        assert list(verify.faults(two / out)) == []
        a, b = manifest.documents["sources"]
        assert (a["read"], a["kept"], b["read"], b["kept"]) == (300, 300, 350, 300)  # the first named source keeps it
        assert b["dropped"] == {"duplicate": 50} == manifest.documents["dropped"]
        assert (a["weight"], b["weight"]) == weights
        tokens[weights] = {name: split.tokens for name, split in manifest.splits.items()}, a, b
    (plain, *_), (weighted, a, b) = tokens[1, 1], tokens[0.5, 2.5]
    assert plain["val"] == weighted["val"]  # held-out documents count once
    assert weighted["pass-00"] != weighted["pass-01"]  # another half in every pass
    share = 1 - plain["val"] / sum(plain.values())
    expected = (0.5 * a["tokens"] + 2.5 * b["tokens"]) * share
    assert abs(weighted["pass-00"] / expected - 1) < 0.1


def test_bad_mixtures_are_one_line(two):
    cases = [
        ("{paths: [a]}", "has no kind"), ("{kind: text, path: [a]}", "path"), ("3", "has no kind"),
        ("{kind: text, paths: x}", "paths"), ("{kind: jsonl, paths: [a], weight: -1}", "weight"),
        ("{kind: text, paths: [3]}", "no such file"), ("{kind: [text], paths: [a]}", "has no kind"),
        ("{kind: text, paths: [a], document: foo}", "document=foo: no such value"),
        ("{kind: text, paths: [a], weight: x}", "weight=x: is not a number"), ("{kind: text, paths: [[a]]}", "paths"),
    ]  # fmt: skip
    for entry, words in cases:
        config = compose("prep", PrepConfig, [f"sources=[{entry}]", f"out={two / 'no'}"])
        with pytest.raises(UserError, match=words) as caught:
            make_plan(config)
        assert "\n" not in str(caught.value)


def test_passes_that_would_all_be_the_same_are_refused(two):
    """Full sentences draw nothing: only a weight with a fraction makes one pass differ from another."""
    for weights, extra in (((1, 2), ()), ((3, 1), ("masking.baked_draws=0",))):
        with pytest.raises(UserError, match="every pass would hold the same; set passes=1"):
            make_plan(compose("prep", PrepConfig, mixture(two, "same", weights, "passes=2", *extra)))
    assert make_plan(compose("prep", PrepConfig, mixture(two, "other", (1, 1.5), "passes=2")))


def test_a_pass_may_hold_nothing_of_a_bucket(two):
    write_jsonl(two / "a.jsonl", documents(3))
    write_jsonl(two / "b.jsonl", documents(40, 1))
    assert main(compose("prep", PrepConfig, mixture(two, "thin", (0.01, 0.5)))) == 0
    assert list(verify.faults(two / "thin")) == []
    assert np.isclose(read_manifest(two / "thin").documents["sources"][0]["weight"], 0.01)
