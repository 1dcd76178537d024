"""Lines of any encoding and any line end are read once, however a file is cut; what is in another encoding is told."""

import codecs
import io
import itertools
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloze.encodings import codec_named, guessed, to_utf_8, unit_of
from cloze.errors import UserError
from data_prep.sources import lines as lines_module
from data_prep.sources.base import Bad, Span
from data_prep.sources.lines import lines
from data_prep.text.cleaning import repair
from tests.unit.test_formats import items, texts
from tests.unit.test_sources import COMPRESSORS, source

ALPHABETS = {
    "utf-8": "aé\u4e0a\u0a0a\u0d0d\x85\u2028\U0001f600", "utf-16-le": "aé\u0a0a\u0d00\u000b\u0a00\u2028\U0001f600",
    "utf-16-be": "aé\u0a0a\u0d00\u0a00\u000d0\U0001f600", "utf-32-le": "a\u0a0a\u0d00\U00010a0a", "latin-1": "aé\x85ÿ",
    "utf-32-be": "a\u0a0a\u0d00\U0001000a", "gb18030": "a中\U0001f600é", "big5": "a中功", "shift_jis": "a日ソ表",
    "euc_kr": "a한", "iso2022_jp": "a日", "cp037": "aé\x85", "cp1252": "aé…", "cp949": "a힣",
}  # fmt: skip


def slow_lines(text: str) -> list[str]:
    """What Python's own reader makes of line ends."""
    found = io.StringIO(text, newline=None).read().split("\n")
    return found[:-1] if found[-1] == "" else found


@pytest.mark.parametrize("codec", ALPHABETS)
@given(data=st.data(), pieces=st.integers(1, 7), suffix=st.sampled_from(["", ".gz", ".bz2"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_line_is_read_once(tmp_path, monkeypatch, codec, data, pieces, suffix):
    monkeypatch.setattr(lines_module, "_PLAIN_BYTES", 3)
    monkeypatch.setattr(lines_module, "_COMPRESSED_BYTES", 3)
    alphabet = ALPHABETS[codec].replace("\r", "").replace("\n", "")
    parts = data.draw(st.lists(st.sampled_from([*alphabet, "\n", "\r", "\r\n", "\n\n", "bc"]), max_size=30))
    text = "".join(parts)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(COMPRESSORS[suffix](text.encode(codec)))
    size = path.stat().st_size
    borders = [size * i // pieces for i in range(pieces + 1)]
    found: dict[int, str] = {}
    for begin, end in itertools.pairwise(borders):
        for place, offset, line, _ in lines(str(path), begin, end, unit_of(codec)):
            if place >= end:
                break
            assert offset not in found
            found[offset] = line.decode(codec)
    assert [found[offset] for offset in sorted(found)] == slow_lines(text)


@pytest.mark.parametrize("codec", sorted(codec for codec in ALPHABETS if unit_of(codec).width == 1))
def test_no_character_holds_a_line_end(codec):
    """All characters of 16 bits: what makes cutting at bytes exact."""
    newline, carriage_return = unit_of(codec)
    for point in itertools.chain(range(0x0E, 0xD800), range(0xE000, 0x11000)):
        try:
            data = chr(point).encode(codec)
        except UnicodeEncodeError:
            continue
        assert newline not in data
        assert carriage_return not in data


@pytest.mark.parametrize("codec", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_byte_order_marks_are_obeyed_and_removed(tmp_path, codec):
    text = "\ufeffEins über.\r\n\r\n\ufeffZwei.\r\rDrei.\n"
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    assert texts(items(source("text", paths=[str(tmp_path / "a.txt")]), 3)) == ["Eins über.", "Zwei.", "Drei."]


@pytest.mark.parametrize("codec", ["gb18030", "big5", "shift_jis", "utf-16", "gbk"])
def test_an_encoding_can_be_named(tmp_path, codec):
    text = "上海很大。\n\n北京也很大。"
    if codec == "shift_jis":
        text = "東京は大きい。\n\n京都も。"
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    assert texts(items(source("text", paths=[str(tmp_path / "a.txt")], encoding=codec), 2)) == text.split("\n\n")
    (tmp_path / "a.jsonl").write_bytes('{"text": "上海"}\n{"text": "北京"}'.encode("utf-16"))
    assert texts(items(source("jsonl", paths=[str(tmp_path / "a.jsonl")]), 2)) == ["上海", "北京"]


def test_what_is_no_encoding_is_refused():
    for name in ("klingon", "hex", "rot13", "", "base64"):
        with pytest.raises(UserError, match=r"source\.encoding=.*no encoding of text"):
            source("text", encoding=name)
    assert codec_named("UTF8") == codec_named("utf-8-sig") == "utf-8"


def test_another_encoding_is_guessed_and_refused_or_warned_of(tmp_path, caplog):
    path = tmp_path / "a.txt"
    config = source("text", paths=[str(path)])
    french = "L'été dernier, à la plage, où était-elle allée\u00a0? Ça, personne ne l'a jamais su.\n"
    path.write_bytes(french.encode("latin-1") * 40)
    with pytest.raises(UserError, match=r"a\.txt: 40 of 40 lines looked at are no utf-8; it looks like (\S+): source"):
        config.looked_at(config.find_inputs())
    path.write_bytes(b"Plain words.\n\n" * 40 + french.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "cloze"):
        config.looked_at(config.find_inputs())
    assert "1 of 41 lines looked at are no utf-8, and lose letters" in caplog.text
    path.write_bytes(french.encode() * 40)
    caplog.clear()
    config.looked_at(config.find_inputs())
    assert "utf-8" not in caplog.text


def test_what_an_encoding_cannot_read_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("好".encode("gb18030") + b"\xff\xff.\n\n" + "好".encode("gb18030"))
    found = items(source("text", paths=[str(tmp_path / "a.txt")], encoding="gb18030"))
    assert not any(isinstance(item, Bad) for item in found)
    assert [item.repaired for item in found] == [True, False]
    assert to_utf_8(b"\xff\xff", "gb18030") == b"\xff\xff"


def test_binary_data_is_no_encoding():
    assert guessed([bytes(range(256))] * 20) is None
    assert guessed([]) is None
    assert guessed(["abc def".encode("utf-16-be")]) == "utf-16-be"
    assert codecs.lookup(guessed(["今天天气很好。我们去公园玩。".encode("gb18030")] * 20) or "").name == "gb18030"


SPOKEN = {  # in encodings of its time
    "Tous les êtres humains naissent égaux, déjà à Noël.": (
        "latin-1",
        "cp1252",
        "mac-roman",
        "cp850",
    ),
    "Wszyscy ludzie rodzą się równi pod względem swej godności.": ("iso8859-2", "cp1250"),
    "Bütün insanlar hür ve eşit doğarlar, çıkış.": ("iso8859-9", "cp1254"),
    "Все люди рождаются свободными.": (
        "cp1251",
        "koi8-r",
        "cp866",
        "iso8859-5",
        "mac-cyrillic",
    ),
    "人人生而自由，在尊严上平等。\n": (
        "gb18030",
        "utf-16-le",
        "utf-16-be",
        "utf-32-le",
        "utf-32-be",
    ),
    "すべての人間は、自由である。": (
        "shift_jis",
        "euc_jp",
        "iso2022_jp",
    ),
    "모든 인간은 태어날 때부터 자유로우며.": ("euc_kr",),
}


@pytest.mark.parametrize(("text", "codec"), [(text, codec) for text, codecs in SPOKEN.items() for codec in codecs])
def test_the_guess_reads_the_text(tmp_path, text, codec):
    """As it was written: a guess that makes other letters of it would be taken at its word."""
    text = f"{text}\n" * 300
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    config = source("text", paths=[str(tmp_path / "a.txt")])
    with pytest.raises(UserError, match=r"it looks like (\S+): source\.encoding=(\S+)$") as caught:
        config.looked_at(config.find_inputs())
    assert text.encode(codec).decode(str(caught.value).rpartition("=")[2]) == text


def test_a_long_line_is_not_cut_in_a_letter(tmp_path, caplog):
    """A line beyond what is looked at is no reason to doubt its encoding."""
    for lead in ("", "a", "ab"):
        (tmp_path / "a.txt").write_text(lead + "\u597d" * 30_000 + "\n")
        config = source("text", paths=[str(tmp_path / "a.txt")])
        config.looked_at(config.find_inputs())
        assert "utf-8" not in caplog.text


def test_surrogates_that_were_encoded_apart_are_joined(tmp_path):
    """As Java and Oracle write what is beyond 16 bits: neither another encoding nor lost."""
    data = "\ud83d\ude00".encode("utf-8", "surrogatepass") + " and \ud83d alone.\n".encode("utf-8", "surrogatepass")
    (tmp_path / "a.txt").write_bytes(data * 20)
    config = source("text", paths=[str(tmp_path / "a.txt")])
    config.looked_at(config.find_inputs())
    text, repairs = repair(items(config)[0].text)
    assert text.startswith("\U0001f600 and \ufffd alone.")
    assert repairs == ("lone_surrogates",)


def test_spans_of_a_wide_encoding_are_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes("ab\n\ncd\n".encode("utf-16-le") * 20_000)
    config = source("text", paths=[str(tmp_path / "a.txt")], encoding="utf-16-le")
    (file,) = config.find_inputs()
    cut = [0, 33_333, 100_001, 200_003, file.units]
    found = [d for a, b in itertools.pairwise(cut) for d in config.read([file], [Span(0, a, b)])]
    assert "\n".join(item.text for item in found).split() == ["ab", *["cd", "ab"] * 19_999, "cd"]


@pytest.mark.parametrize("suffix", sorted(COMPRESSORS.keys() - {""}))
def test_a_name_that_is_wrong_is_told(tmp_path, suffix):
    """Text that is called compressed, and what is compressed but not called so."""
    (tmp_path / f"a.txt{suffix}").write_text("Plain. Text.\n\nHere.\n" * 9)
    with pytest.raises(UserError, match=rf"is no {suffix} file, whatever its name says; rename or restore it"):
        items(source("text", paths=[str(tmp_path / f"a.txt{suffix}")]))
    (tmp_path / "a.txt").write_bytes(COMPRESSORS[suffix](b"Text.\n" * 99))
    found = items(source("text", paths=[str(tmp_path / "a.txt")]))
    assert [(item.reason, "unpack it" in item.location) for item in found] == [("compressed", True)]
