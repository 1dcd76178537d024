"""Filters, repairs and near-duplicates, each against what it says, and counted in a real run."""

import itertools
import random
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloze.cli import compose
from cloze.corpus import verify
from cloze.corpus.manifest import read_manifest
from cloze.errors import UserError
from data_prep.config import PrepConfig
from data_prep.prepare import main
from data_prep.stages import near
from data_prep.text.cleaning import SCRIPTS, few_repeated_lines, few_symbols, filters_for, judge, repair, written_in
from tests.unit.corpora import WORDS, documents, vocabulary, write_jsonl


def test_scripts_by_share_of_letters():
    latin, russian = "Some English text, 100%.", "Немного русского текста."
    assert written_in(["latin"], 0.5)(latin) is True
    assert written_in(["latin"], 0.5)(russian) == (False, "other_script")
    assert written_in(["latin", "cyrillic"], 1.0)(latin + russian) is True
    assert written_in(["latin"], 0.5)("12345 !!!") == (False, "other_script")
    assert written_in(["han", "kana"], 0.9)("東京タワーへ行く。") is True
    assert written_in(["latin"], 0.6)("Straße Ångström naïve") is True


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_what_unicode_calls_them(script):
    names = {"han": "CJK", "kana": ("HIRAGANA", "KATAKANA")}.get(script, script.upper())
    accepts = written_in([script], 1.0)
    for code in itertools.chain(range(0x250), range(0x370, 0x530, 3), range(0x5D0, 0x1200, 7), range(0x3040, 0x3100)):
        name = unicodedata.name(chr(code), "")
        if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo") and name.startswith(names):
            assert accepts(chr(code)) is True, name


def test_symbols_and_repeated_lines():
    assert few_symbols(0.2)("A sentence, as they are.") is True
    assert few_symbols(0.2)("| a | b | c |") == (False, "symbols")
    assert few_repeated_lines(0.3)("a\nb\nc\na") is True
    assert few_repeated_lines(0.3)("Menu\n\nMenu\nHome\n Menu ") == (False, "repeated_lines")
    assert few_repeated_lines(0.0)("") is True
    filters = filters_for(3, ["latin"], 0.5, 0.2, 0.3)
    assert judge("x", filters) == (False, "too_short")
    assert judge("Fine text.", filters) is True


@given(st.text(max_size=60))
def test_repairs_are_what_unicode_says(text):
    fixed, repairs = repair(text, nfc=True)
    assert fixed == unicodedata.normalize("NFC", fixed)
    assert not any(unicodedata.category(c) == "Cc" and not c.isspace() for c in fixed)
    assert repair(fixed, nfc=True) == (fixed, ()) or "\ufeff" in fixed
    if not repairs:
        assert fixed == text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")


def test_repairs_of_nfc_and_control_characters_are_named():
    assert repair("cafe\u0301", nfc=True) == ("caf\u00e9", ("not_nfc",))
    assert repair("cafe\u0301") == ("cafe\u0301", ())
    assert repair("a\x07b\tc\n") == ("ab\tc\n", ("control_characters",))
    for code in (*range(1, 0x300), 0x2028, 0x10FFFF):
        control = unicodedata.category(chr(code)) == "Cc" and not chr(code).isspace()
        assert ("control_characters" in repair(f"\u00c2{chr(code)}\u00e9")[1]) == control, hex(code)


# -- near-duplicates --------------------------------------------------------------------------------------------------


def jaccard(one, other):
    first, second = ({tuple(t.split()[i : i + 5]) for i in range(len(t.split()) - 4)} for t in (one, other))
    return len(first & second) / len(first | second)


def edited(text, changes, rng):
    words = text.split()
    for place in rng.sample(range(len(words)), changes):
        words[place] = f"new{rng.randrange(10**6)}"
    return " ".join(words)


def test_signatures_estimate_likeness():
    pytest.importorskip("rensa")
    rng = random.Random(0)
    base = " ".join(f"{rng.choice(WORDS)}{rng.randrange(99)}" for _ in range(400))
    for changes in (2, 10, 40):
        other = edited(base, changes, rng)
        estimate = np.mean(np.asarray(near.signature(base)) == np.asarray(near.signature(other)))
        assert abs(estimate - jaccard(base, other)) < 5 * 0.5 / near.NUM_VALUES**0.5  # five standard deviations
    assert near.signature("") != near.signature("a")
    assert near.signature("我们在北京大学学习" * 5) != near.signature("他们在上海工作生活" * 5)


def dropped_of(signatures, threshold, monkeypatch):
    """Which of the documents with these signatures are dropped; their digests ascend."""
    monkeypatch.setattr(near, "signature", lambda text: signatures[int(text)])
    numbers = np.arange(len(signatures), dtype=np.uint64)
    digests_Dx2 = np.stack([numbers, numbers], axis=1)
    records = near.band_records([str(i) for i in range(len(signatures))], digests_Dx2, numbers.astype(np.int64))
    assert len(records.digests_Rx2) == 16 * len(signatures)
    found = near.near_duplicates(records, threshold)
    assert records.buckets_R[found].tolist() == records.digests_Rx2[found, 0].tolist()  # the bucket goes along
    return sorted(records.digests_Rx2[found, 0].tolist())


def random_signature(rng):
    return [rng.randrange(2**32) for _ in range(64)]


def test_near_duplicates_are_those_of_all_pairs(monkeypatch):
    """Against a comparison of each with each: a band of four values in common, and enough of all 64."""
    rng = random.Random(3)
    signatures = [random_signature(rng) for _ in range(60)]
    for original in signatures[:40]:
        share = rng.choice([0.5, 0.65, 0.7, 0.75, 0.95])
        signatures.append([value if rng.random() < share else rng.randrange(2**32) for value in original])
    order = rng.sample(range(100), 100)
    signatures = [signatures[i] for i in order]
    expected = set()
    for j, later in enumerate(signatures):
        for earlier in signatures[:j]:
            equal = [a == b for a, b in zip(earlier, later, strict=True)]
            if any(all(equal[i : i + 4]) for i in range(0, 64, 4)) and sum(equal) / 64 >= 0.7:
                expected.add(j)
    assert 12 < len(expected) < 36
    assert dropped_of(signatures, 0.7, monkeypatch) == sorted(expected)


def test_likeness_and_bands_have_sharp_edges(monkeypatch):
    rng = random.Random(4)
    base = random_signature(rng)
    most = [*base[:45], *random_signature(rng)[45:]]  # 0.703
    fewer = [*base[:44], *random_signature(rng)[44:]]  # 0.688
    no_band = [value if i % 4 else rng.randrange(2**32) for i, value in enumerate(base)]  # 0.75, never four in a row
    for other, dropped in ((most, [1]), (fewer, []), (no_band, [])):
        assert dropped_of([base, other], 0.7, monkeypatch) == dropped
    assert dropped_of([base, base, most], 0.7, monkeypatch) == [1, 2]


def test_many_documents_of_one_template_cost_no_square(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, (20_000, 64))
    values[:, :4] = 7
    started = time.process_time()
    assert dropped_of(values.tolist(), 0.7, monkeypatch) == []
    assert time.process_time() - started < 10


def test_near_duplicates_are_dropped_and_counted(tmp_path, monkeypatch):
    pytest.importorskip("rensa")
    monkeypatch.setattr(near, "_TASKS_OF_A_BUCKET", 64)  # each has some of the band keys: all must do their part
    rng = random.Random(1)
    originals = [" ".join(f"{rng.choice(WORDS)}{rng.randrange(999)}" for _ in range(200)) + "." for _ in range(150)]
    alike = [edited(text, 2, rng) for text in originals[:60]]
    unlike = [edited(text, 60, rng) for text in originals[60:90]]
    path = write_jsonl(tmp_path / "a.jsonl", [*originals, *alike, *unlike, originals[0]])
    vocabulary(tmp_path / "vocab.txt")
    overrides = [
        "source=jsonl", f"source.paths=[{path}]", f"tokenizer.path={tmp_path}/vocab.txt", "executor.workers=1",
        "val_fraction=0.2", "clean.near_duplicates=0.7", "objective=none",
    ]  # fmt: skip
    for out in ("one", "two"):
        assert main(compose("prep", PrepConfig, [*overrides, f"out={tmp_path / out}"])) == 0
    found = read_manifest(tmp_path / "one").documents
    assert found["dropped"]["duplicate"] == 1
    assert 56 <= found["dropped"]["near_duplicate"] <= 60
    assert found["kept"] == 150 + 60 + 30 - found["dropped"]["near_duplicate"]
    assert list(verify.faults(tmp_path / "one")) == []
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()


def test_filters_are_counted_in_a_run(tmp_path):
    texts = [*documents(40), "Только русский текст. Здесь и там. Ещё раз.", "| a | - | b | ! |" * 9, "menu\n" * 9]
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, "cafe\u0301 and a cat. And a dog \x07."])
    vocabulary(tmp_path / "vocab.txt")
    config = compose(
        "prep", PrepConfig,
        ["source=jsonl", f"source.paths=[{path}]", f"out={tmp_path / 'out'}", f"tokenizer.path={tmp_path}/vocab.txt",
         "executor.workers=1", "clean.scripts=[latin]", "clean.max_symbols=0.3", "clean.max_repeated_lines=0.3"],
    )  # fmt: skip
    assert main(config) == 0
    found = read_manifest(tmp_path / "out").documents
    assert found["dropped"] == {"other_script": 1, "symbols": 1, "repeated_lines": 1}
    assert found["repaired"] == {"not_nfc": 1, "control_characters": 1}


def test_unknown_scripts_are_refused():
    with pytest.raises(UserError, match=r"clean\.scripts: no klingon"):
        compose("prep", PrepConfig, ["out=x", "clean.scripts=[klingon]"])
