"""The diagnosis: each finding has the right value on a corpus made for it, and does what its thresholds say."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers.normalizers import BertNormalizer

from cloze.cli import compose
from cloze.corpus.diagnosis import (
    NAMES,
    Finding,
    Level,
    from_fingerprints,
    length_guess,
    stored,
    unknown_tokens,
    warnings,
)
from cloze.corpus.manifest import Manifest, read_manifest, sealed_json, write_manifest
from cloze.corpus.report import of_corpus
from cloze.corpus.scripts import IDEOGRAPH_RANGES, character
from cloze.corpus.tokenizer import Spelling, load_tokenizer
from cloze.errors import UserError
from data_prep import prepare
from data_prep.config import PrepConfig
from data_prep.prepare import main
from data_prep.stages.buckets import Documents
from data_prep.stages.survey import fingerprints, unpacked
from data_prep.text.encoder import Encoder
from data_prep.text.mojibake import garbled
from data_prep.text.wordpiece import count_letters, count_pieces, fitted, scripts_of
from tests.support import make_corpus
from tests.unit.corpora import documents, sentence, vocabulary, write_jsonl
from tests.unit.test_encoder import encoded, reference

THAI = "\u0e01\u0e33\u0e25\u0e31\u0e07\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48\u0e40\u0e1b\u0e47\u0e19\u0e44\u0e17\u0e22"
HINDI = "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u0932\u093f\u0916\u0940 \u0939\u0941\u0908."


def made(folder: Path, texts: list[str], *overrides: str) -> Manifest:
    """The manifest of a corpus of these texts."""
    path = folder / "a.jsonl"
    if not path.exists():  # else a preparation goes on, whose files must not change
        write_jsonl(path, texts)
    base = ["source=jsonl", f"source.paths=[{path}]", f"out={folder}/out", "executor.workers=1", "val_fraction=0.1"]
    main(compose("prep", PrepConfig, [*base, "tokenizer.vocab_size=300", "max_len=64", *overrides]))
    return read_manifest(folder / "out")


def found(manifest: Manifest, name: str) -> Finding:
    return next(finding for finding in stored(manifest) if finding.name == name)


@pytest.mark.slow
def test_a_sound_corpus_is_called_sound(tmp_path):
    """Each text of its own words, so that nothing repeats."""
    rng = random.Random(0)
    texts = [
        " ".join(
            " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(rng.randint(5, 12))) + "."
            for _ in range(rng.randint(4, 20))
        ).replace(". ", ". X")
        for _ in range(600)
    ]
    manifest = made(tmp_path, texts)
    assert [finding.line for finding in warnings(stored(manifest))] == []
    assert {finding.name for finding in stored(manifest)} <= set(NAMES)
    assert abs(found(manifest, "random_next").value - 0.5) < 0.05
    assert found(manifest, "unknown_tokens").value < 0.01
    assert found(manifest, "documents_per_file").value == 600
    sentences = sum(text.count(".") for text in texts)
    assert found(manifest, "sentences_per_document").value == pytest.approx(sentences / 600, rel=0.02)
    assert found(manifest, "scripts").meaning == "latin 100.0%"


def test_documents_of_one_sentence(tmp_path):
    """Tweets: every pair is random, and it is said how many documents are to blame."""
    rng = random.Random(0)
    manifest = made(tmp_path, [f"{i} {sentence(rng)}" for i in range(300)], "val_fraction=0")
    assert found(manifest, "random_next").value == 1.0
    assert found(manifest, "random_next").level is Level.warning
    assert found(manifest, "one_sentence").value == 1.0
    assert "objective=none" in found(manifest, "random_next").line
    assert found(manifest, "held_out").level is Level.warning


@pytest.mark.parametrize(("objective", "kept"), [("sop", 1), ("nsp", 101), ("none", 101)])
def test_documents_that_make_no_pair_are_counted(tmp_path, objective, kept):
    texts = [f"One sentence of number {i} alone" for i in range(100)] + ["The first one. The second one."]
    manifest = made(tmp_path, texts, f"objective={objective}", "val_fraction=0")
    documents = manifest.documents
    assert documents["kept"] == kept
    assert documents["read"] == 101 == documents["kept"] + sum(documents["dropped"].values())
    assert documents["dropped"] == ({"one_sentence": 100} if objective == "sop" else {})
    (source,) = documents["sources"]
    assert (source["kept"], source["dropped"]) == (documents["kept"], documents["dropped"])


def test_unknown_words_are_told_and_a_text_that_is_mostly_unknown_is_refused(tmp_path):
    vocabulary(tmp_path / "v.txt")
    path = f"tokenizer.path={tmp_path}/v.txt"
    greek = ["\u03b1\u03b2\u03b3 \u03b4\u03b5\u03b6. \u0391\u03b2 \u03b3\u03b4 the cat."] * 3
    texts = [*documents(200), *[f"{text} {n}" for n, text in enumerate(greek)]]
    manifest = made(tmp_path, texts, path)
    finding = found(manifest, "unknown_tokens")
    assert finding.level is Level.note
    assert set(finding.examples) == {
        f"{w!r} 3" for w in ("\u03b1\u03b2\u03b3", "\u03b4\u03b5\u03b6", "\u0391\u03b2", "\u03b3\u03b4")
    }
    assert finding.where is not None
    assert "a.jsonl" in finding.where
    (tmp_path / "b").mkdir()
    only = ["\u03b1\u03b2\u03b3 \u03b4\u03b5\u03b6. \u0391\u03b2 \u03b3\u03b4. " + "\u03b1" * n for n in range(1, 40)]
    with pytest.raises(
        UserError, match=r"unknown_tokens: .*are .UNK.*tokenizer.path.*diagnosis.ignore=.unknown_tokens"
    ):
        made(tmp_path / "b", only, path)
    assert not (tmp_path / "b" / "out" / "pass-00").exists()
    assert found(made(tmp_path / "b", only, path, "diagnosis.ignore=[unknown_tokens]"), "unknown_tokens").value > 0.7


def test_a_long_preparation_looks_before_it_encodes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_LONG_BYTES", 0)
    vocabulary(tmp_path / "v.txt")
    with pytest.raises(UserError, match=r"unknown_tokens: 100\.00%"):
        made(tmp_path, ["\u03b1\u03b2 " + "\u03b1" * n for n in range(1, 40)], f"tokenizer.path={tmp_path}/v.txt")
    assert not (tmp_path / "out" / ".work" / "map").exists()


def test_a_vocabulary_without_punctuation_is_told(tmp_path):
    tokens = vocabulary(tmp_path / "v.txt").read_text().split()
    (tmp_path / "v.txt").write_text("\n".join(token for token in tokens if token not in ".!?"))
    finding = found(made(tmp_path, documents(100), f"tokenizer.path={tmp_path}/v.txt"), "unknown_tokens")
    assert finding.level is Level.warning
    assert {example.split()[0] for example in finding.examples} == {"'.'", "'!'", "'?'"}


def test_what_is_refused_and_ignored_is_a_choice(tmp_path, capsys):
    texts = [f"One sentence of number {i} alone" for i in range(100)]
    with pytest.raises(UserError, match=r"random_next: 100\.0%"):
        made(tmp_path, texts, "diagnosis.refuse=[random_next]")
    assert not (tmp_path / "out" / "manifest.json").exists()
    capsys.readouterr()
    made(tmp_path, texts, "diagnosis.ignore=[random_next]")  # goes on with what is done
    told = capsys.readouterr().err
    assert "warning: sentences_per_document" in told
    assert "warning: random_next" not in told
    with pytest.raises(UserError, match=r"diagnosis\.refuse: no nonsense; there are unknown_tokens"):
        made(tmp_path, texts, "diagnosis.refuse=[nonsense]")


def test_marks_that_lower_casing_strips(tmp_path):
    tokens = [chr(code) for code in range(0x900, 0x980)]
    vocabulary(tmp_path / "v.txt", *tokens, *(f"##{token}" for token in tokens))
    texts = [f"{HINDI} {n}" for n in range(50)]
    finding = found(made(tmp_path, texts, f"tokenizer.path={tmp_path}/v.txt"), "marks_stripped")
    marks = sum(character(letter).loses for letter in HINDI)
    letters = sum(character(letter).is_letter for letter in HINDI)
    assert finding.value == pytest.approx(marks / letters)
    assert finding.examples == (f"devanagari {50 * marks:,}",)
    assert "tokenizer.strip_accents=false" in finding.line


def test_accents_of_french_are_bert_s_custom(tmp_path):
    texts = [f"Un \u00e9t\u00e9 de plus, et la vie reprend son cours habituel {n}. Voil\u00e0 tout." for n in range(50)]
    assert found(made(tmp_path, texts), "marks_stripped").level is Level.note


def test_turkish_is_advised_to_keep_its_case(tmp_path):
    finding = found(made(tmp_path, [f"\u0130\u0131 k\u0131z {n}. Ilk \u0131\u0131." for n in range(30)]), "dotless_i")
    assert finding.level is Level.warning
    assert "tokenizer.lowercase=false" in finding.line


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_mojibake_is_seen_and_sound_text_is_not(tmp_path, encoding):
    good = [
        f"Un \u00e9t\u00e9 \u00e0 la mer n\u00b0 {n}. \u00abVoil\u00e0\u00bb \u00c3O, \u2019tis \u20ac5."
        for n in range(40)
    ]
    bad = [
        text.replace("\u00c3", "").replace("\u00e0", "\u00e9").encode().decode(encoding, "ignore") for text in good[:10]
    ]
    finding = found(made(tmp_path, [*good, *bad]), "mojibake")
    assert finding.value == pytest.approx(10 / 50)
    assert "\u00c3\u00a9" in finding.examples[0]


@pytest.mark.parametrize("codec", ["cp1252", "cp1251", "cp1250", "mac-roman", "cp437", "gb18030"])
@pytest.mark.parametrize(
    "text",
    [
        "d\u00e9j\u00e0 vu",
        "\u043b\u044e\u0434\u0438",
        "\u4eba\u4eba\u751f\u800c",
        "\u0e21\u0e19\u0e38\u0e29",
        "\ubaa8\ub4e0 \uc778\uac04",
        "t\u1ea5t c\u1ea3",
    ],
)
def test_mojibake_of_any_script_through_any_encoding(codec, text):
    read = text.encode().decode(codec, "replace")
    control = {byte: chr(byte) for byte in range(0x80, 0xA0)}  # as readers take what an encoding lacks
    read = "".join(control.get(b, c) for b, c in zip(text.encode(), read, strict=False)) if "\ufffd" in read else read
    if codec != "gb18030" or text[0] >= "\u2e80":  # of fewer bytes GBK proves nothing
        assert garbled(f"x {read} y")
    assert garbled(text) is None
    assert garbled("\u951f\u65a4\u62f7\u951f\u65a4\u62f7")


def test_sound_text_is_no_mojibake():
    for text in (
        "„KÖ“ «CAFÉ» à\u00a0«, 5€ – «Я», «СССР»",
        "├── a\n└── b",
        "人人生而自由，在尊严和权利上一律平等。",
        "مرحبا שלום καλημέρα",
    ):
        assert garbled(text) is None


def test_words_too_long_for_word_piece_get_another_remedy():
    assert "tokenizer.kind=bpe" in unknown_tokens(9, 9, [("ACGT" * 40, 9), ("b", 2)]).line
    assert "tokenizer.vocab_size" in unknown_tokens(9, 9, [("ACGT" * 40, 1), ("b", 2)]).line


def test_what_shows_nothing_and_what_was_lost_before_is_told(tmp_path):
    """Marks of direction and zero-width floods; letters that an earlier tool replaced by U+FFFD."""
    texts = [text.replace(" a ", " \u202ea\u202c ") for text in documents(40)]
    manifest = made(tmp_path, [*(text.replace("e", "e\u200b") for text in texts), "caf\ufffd is not what it was. No."])
    assert found(manifest, "invisible").level is Level.warning
    assert "replaced_before 1" in found(manifest, "repaired").examples
    (tmp_path / "b").mkdir()
    assert found(made(tmp_path / "b", documents(40)), "invisible").value == 0


def test_a_corpus_of_one_document_is_not_told_to_have_longer_ones(tmp_path):
    finding = found(made(tmp_path, documents(1, seed=3), "val_fraction=0"), "random_next")
    assert finding.value == 0
    assert "more documents" in finding.line


def test_repeats_and_leaks(tmp_path):
    """Of 300 documents 100 stand there twice but for their last word."""
    rng = random.Random(0)
    texts = [
        " ".join(
            " ".join("".join(rng.choices("abcdefghij", k=4)) for _ in range(12)).capitalize() + "." for _ in range(8)
        )
        for _ in range(200)
    ]
    manifest = made(tmp_path, [*texts, *(text + " End." for text in texts[:100])], "val_fraction=0.2")
    assert 0.15 < found(manifest, "repeated_lines").value < 0.4
    assert 0.1 < found(manifest, "near_duplicates").value < 0.35
    assert 0.3 < found(manifest, "leakage").value < 0.75
    for name in ("repeated_lines", "near_duplicates", "leakage"):
        assert "clean." in found(manifest, name).remedy


def test_one_document_above_a_tenth(tmp_path):
    texts = [*documents(30), " ".join(documents(20, seed=1))]
    finding = found(made(tmp_path, texts), "largest_document")
    assert finding.value == pytest.approx(len(texts[-1]) / sum(map(len, texts)))
    assert finding.level is Level.warning


def test_fingerprints_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    sentences_D = rng.integers(1, 9, 60).astype(np.uint32)
    lengths_S = rng.integers(1, 40, int(sentences_D.sum())).astype(np.uint16)
    tokens_T = rng.integers(0, 3, int(lengths_S.sum())).astype(np.uint16)
    documents = Documents(
        np.zeros((60, 2), np.uint64), np.arange(60, dtype=np.uint64), np.zeros(60, np.uint16), sentences_D, lengths_S,
        tokens_T, np.zeros(0, bool),
    )  # fmt: skip
    lines, runs = [], set()
    ends = np.cumsum(lengths_S.astype(int))
    document_S = np.repeat(np.arange(60), sentences_D)
    for number, (end, length) in enumerate(zip(ends.tolist(), lengths_S.tolist(), strict=True)):
        begin = end - length
        if length >= 8:
            lines.append(tuple(tokens_T[begin:end].tolist()))
        last = ends[np.flatnonzero(document_S == document_S[number])[-1]]
        if begin + 50 <= last:
            runs.add(tuple(tokens_T[begin : begin + 50].tolist()))
    totals = np.bincount(document_S, lengths_S)
    result, half = ([fingerprints(documents, modulus)] for modulus in (1, 2))
    found = unpacked(result, "lines").tolist()
    assert (len(found), len(set(found))) == (len(lines), len(set(lines)))
    found = set(unpacked(result, "runs").tolist())
    assert len(found) == len(runs)
    assert len(unpacked(result, "sketches").reshape(-1, 3)) == int((totals >= 20).sum())
    assert set(unpacked(half, "runs").tolist()) == {run for run in found if run % 2 == 0}


def test_leakage_is_the_share_of_held_out_runs():
    findings = from_fingerprints({1: 1, 2: 3}, [(1, 2, 3), (1, 2, 3), (4, 5, 6)], {1, 2, 3}, {3, 4, 5, 6})
    assert {finding.name: finding.value for finding in findings} == {
        "repeated_lines": 0.5,
        "near_duplicates": pytest.approx(1 / 3),
        "leakage": 0.25,
    }


def test_lengths_that_tell_and_lengths_that_do_not():
    rng = np.random.default_rng(0)
    lengths, labels = rng.integers(1, 100, (4000, 2)), rng.integers(0, 2, 4000).astype(np.uint8)
    assert length_guess(lengths, labels) < 0.54
    assert length_guess(lengths, (lengths[:, 0] > 50).astype(np.uint8)) > 0.97


def test_a_corpus_of_before_is_read_and_judged_by_what_it_shows(tmp_path):
    manifest = make_corpus(tmp_path / "c", samples=600)
    body = json.loads((tmp_path / "c" / "manifest.json").read_text())
    del body["diagnosis"]
    (tmp_path / "c" / "manifest.json").write_text(sealed_json(body))
    again = read_manifest(tmp_path / "c")
    assert again == manifest
    names = [finding.name for finding in of_corpus(tmp_path / "c", again)]
    assert {"dropped", "repaired", "random_next", "held_out", "short_samples", "unknown_tokens"} <= set(names)


def test_findings_survive_the_manifest(tmp_path):
    manifest = made(tmp_path, documents(50))
    write_manifest(tmp_path, manifest)
    assert stored(read_manifest(tmp_path)) == stored(manifest)
    assert len(stored(manifest)) > 12


def test_a_preview_writes_nothing(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", documents(100))
    overrides = ["source=jsonl", f"source.paths=[{path}]", f"out={tmp_path}/out", "tokenizer.vocab_size=300"]
    assert main(compose("prep", PrepConfig, [*overrides, "preview=40"])) == 0
    captured = capsys.readouterr()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl"]
    assert "40 documents" in captured.out
    assert "to expect: shards of about" in captured.out
    assert captured.out.count("[CLS]") == 10
    assert "random_next: " in captured.err
    assert "unknown_tokens: " in captured.err


# -- scripts ----------------------------------------------------------------------------------------------------------


def test_thai_is_cut_in_tokenizer_json_and_alike_everywhere(tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices(THAI, k=600)) + f" {n} ok" for n in range(40)]
    manifest = made(tmp_path, texts, "val_fraction=0", "masking=whole_word", "masking.chinese_words=false")
    assert found(manifest, "unknown_tokens").value < 0.01
    assert abs(found(manifest, "random_next").value - 0.5) < 0.1
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert tokenizer.spelling == Spelling(lowercase=True, strip_accents=False, clusters=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer", model_max_length=10_000)
    encoder = Encoder(tokenizer.backend)
    assert encoder.cached
    assert theirs(texts, add_special_tokens=False).input_ids == encoded(encoder, texts)
    assert theirs("a", "b").token_type_ids == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "\u1019\u103c\u1014\u103a\u1019\u102c\u1018\u102c\u101e\u102c",  # Burmese
        "\u1797\u17b6\u179f\u17b6\u1781\u17d2\u1798\u17c2\u179a",  # Khmer
        "\u0e9e\u0eb2\u0eaa\u0eb2\u0ea5\u0eb2\u0ea7",  # Lao
        "\u3089\u30fc\u3081\u3093\u3092\u305f\u3079\u307e\u3057\u305f\u30b3\u30fc\u30d2\u30fc",  # Japanese
        "\ua188\ua320\ua071\ua1d6",  # Yi
    ],
)
def test_long_runs_of_scripts_without_spaces_are_known(tmp_path, text):
    rng = random.Random(0)
    texts = ["".join(rng.choices(text, k=400)) + f" {n}" for n in range(30)]
    manifest = made(tmp_path, texts, "val_fraction=0")
    assert found(manifest, "unknown_tokens").value < 0.01
    backend = load_tokenizer(tmp_path / "out" / "tokenizer").backend
    backend.encode_special_tokens = True
    assert encoded(Encoder(backend), texts) == reference(backend, texts)


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("plain English, na\u00efve caf\u00e9s", Spelling()),
        ("\u0440\u0443\u0441\u0441\u043a\u0438\u0439", Spelling()),
        ("\u6211\u7231\u5317\u4eac\u3002\u30b3\u30fc\u30d2\u30fc", Spelling()),
        (HINDI, Spelling(strip_accents=False)),
        ("\ud55c\uad6d\uc5b4", Spelling(strip_accents=False)),
        ("\u304c\u304e", Spelling(strip_accents=False, clusters=True)),
        (THAI, Spelling(strip_accents=False, clusters=True)),
    ],
)
def test_the_script_decides_what_is_left_open(text, spelling):
    scripts = scripts_of(count_letters(count_pieces([text])))
    found, line = fitted(Spelling(), scripts)
    assert found == spelling
    assert (line is None) == (spelling == Spelling())
    assert fitted(Spelling(strip_accents=True), scripts)[0].strip_accents is True


def test_ideographs_are_those_of_the_library():
    """Character by character, over all planes that hold any."""
    normalizer = BertNormalizer(clean_text=False, lowercase=False, strip_accents=False)
    for first, last in ((0x2E80, 0xABFF), (0xF900, 0xFAFF), (0x1F000, 0x323AF)):
        for code in range(first, last + 1):
            spaced = normalizer.normalize_str(chr(code)) != chr(code)
            assert spaced == any(a <= code <= b for a, b in IDEOGRAPH_RANGES), hex(code)
