"""Training, loading, fingerprints, and what Hugging Face makes of a saved tokenizer."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from cloze.corpus.kinds.wordpiece import SPECIALS
from cloze.corpus.tokenizer import Spelling, load_tokenizer, save_tokenizer
from cloze.errors import UserError
from data_prep.text.wordpiece import count_words, train_tokenizer
from tests.unit.corpora import ROOT, documents, vocabulary

PLAIN = Spelling()
TEXTS = [*documents(60), "\u00c5ngstr\u00f6m caf\u00e9 \u4e2d\u6587 Zebra 3.14"]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(count_words(TEXTS), 200)


def test_training_is_deterministic_across_processes(trained):
    program = (
        "from tests.unit.test_tokenizer import TEXTS\n"
        "from data_prep.text.wordpiece import count_words, train_tokenizer\n"
        "print(train_tokenizer(count_words(TEXTS), 200).facts.fingerprint)"
    )
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == trained.facts.fingerprint


SPELLINGS = [PLAIN, Spelling(lowercase=False), Spelling(strip_accents=False), Spelling(ideographs=False)]


@given(
    st.lists(
        st.text(alphabet="aB1 é\u0301ß\u4e2d\u6587\uf900\u3002.-\xa0\u200b\u2014\u0130\0\x07|[SEP]") | st.text(),
        max_size=5,
    ),
    st.sampled_from(SPELLINGS),
)
@settings(max_examples=300, deadline=None)
def test_words_are_those_of_the_pre_tokenizer(texts, spelling):
    lowercase, accents, ideographs, _ = spelling
    normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=accents, handle_chinese_chars=ideographs)
    expected = Counter()
    for text in texts:
        splits = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normalizer.normalize_str(text))
        expected.update(word for word, _ in splits)
    assert count_words(texts, spelling) == expected


def test_training_is_that_of_tokenizers_on_the_text_itself(trained):
    """With the alphabet given, since by itself its order is random."""
    letters = sorted(token for token in trained.backend.get_vocab() if len(token.removeprefix("##")) == 1)
    theirs = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    theirs.normalizer, theirs.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    specials = [*SPECIALS, *letters]
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, min_frequency=2, special_tokens=specials, limit_alphabet=0, show_progress=False
    )
    theirs.train_from_iterator(TEXTS, trainer)
    assert theirs.get_vocab() == trained.backend.get_vocab()


def test_trained_vocabulary(trained):
    vocabulary = trained.backend.get_vocab()
    assert [trained.backend.token_to_id(token) for token in SPECIALS] == [0, 1, 2, 3, 4]
    assert trained.facts.vocab_size == len(vocabulary) <= 200
    assert {"the", "skies", "a", "##s", "\u4e2d"} <= set(vocabulary)
    assert "##\u4e2d" not in vocabulary
    assert "##." not in vocabulary
    assert not any(token.lower() != token for token in set(vocabulary) - set(SPECIALS))
    assert trained.backend.encode("\u00c5ngstr\u00f6m caf\u00e9").ids.count(1) == 0


def test_a_small_vocabulary_holds_the_most_frequent_letters():
    tiny = train_tokenizer(count_words(TEXTS), 64)
    assert tiny.facts.vocab_size <= 64
    assert tiny.backend.encode("the tea").ids.count(1) == 0


def test_saved_and_loaded_is_the_same(trained, tmp_path):
    save_tokenizer(trained, tmp_path, 128)
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "vocab.txt"):
        assert load_tokenizer(path).facts == trained.facts
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).facts == trained.facts


def test_hugging_face_loads_it_as_bert(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(trained, tmp_path, 128)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.BertTokenizer | transformers.BertTokenizerFast)
    assert len(theirs) == trained.facts.vocab_size
    assert theirs.model_max_length == 128
    assert (
        theirs.pad_token_id,
        theirs.unk_token_id,
        theirs.cls_token_id,
        theirs.sep_token_id,
        theirs.mask_token_id,
    ) == (trained.facts.special_ids)
    trained.backend.encode_special_tokens = False
    for text in ("The [MASK] sat, Caf\u00e9 \u4e2d\u6587!", "dogs"):
        assert theirs(text).input_ids == trained.backend.encode(text).ids
    pair = theirs("the cat", "a dog")
    assert pair.token_type_ids == trained.backend.encode("the cat", "a dog").type_ids
    assert theirs.decode(theirs("skies fell").input_ids) == "[CLS] skies fell [SEP]"


def test_fingerprints_tell_what_changes_ids(trained, tmp_path):
    save_tokenizer(trained, tmp_path, 128)
    first = trained.facts.fingerprint
    body = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(body, indent=7))
    assert load_tokenizer(tmp_path).facts.fingerprint == first
    (tmp_path / "cased").mkdir()
    (tmp_path / "cased" / "vocab.txt").write_text((tmp_path / "vocab.txt").read_text())
    assert load_tokenizer(tmp_path / "cased", Spelling(lowercase=False)).facts.fingerprint != first
    lines = (tmp_path / "vocab.txt").read_text().splitlines()
    lines[-1], lines[-2] = lines[-2], lines[-1]
    (tmp_path / "cased" / "vocab.txt").write_text("\n".join(lines) + "\n")
    assert load_tokenizer(tmp_path / "cased").facts.fingerprint != first


def test_specials_may_stand_anywhere(tmp_path):
    path = vocabulary(tmp_path / "vocab.txt")
    tokens = path.read_text().split()
    path.write_text("\n".join([*tokens[5:], *reversed(tokens[:5])]))
    facts = load_tokenizer(path).facts
    assert facts.special_ids == tuple(range(facts.vocab_size - 1, facts.vocab_size - 6, -1))


def test_what_bert_cannot_use_is_refused_with_one_line(tmp_path):
    def refused(path, pattern):
        with pytest.raises(UserError, match=pattern) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)

    good = vocabulary(tmp_path / "vocab.txt").read_text()
    (tmp_path / "vocab.txt").write_text(good.replace("[MASK]\n", ""))
    refused(tmp_path / "vocab.txt", r"has no \[MASK\];")
    refused(tmp_path, r"has no \[MASK\];")
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    refused(tmp_path / "vocab.txt", "cannot be read")
    refused(tmp_path / "nothing", "no such file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither")
    for content in ("{", "[]", "{}", '{"model": 3}', '{"model": {"type": "WordPiece"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        refused(tmp_path, "tokenizer.json")
    Tokenizer(models.WordLevel(unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    refused(tmp_path, r"its model is WordLevel, .*it knows .*WordPiece \(wordpiece\)")


def test_options_of_training():
    texts = ["Caf\u00e9 caf\u00e9 \u4e2d\u6587\u4e2d\u6587 zq zq rare"] * 3 + ["once"]

    def words(spelling=PLAIN, **options):
        tokenizer = train_tokenizer(count_words(texts, spelling), 120, spelling, **options)
        return tokenizer.backend.get_vocab(), tokenizer.backend

    plain, _ = words()
    assert {"cafe", "\u4e2d"} <= plain.keys()
    assert "\u4e2d\u6587" not in plain
    accents, backend = words(Spelling(strip_accents=False))
    assert "caf\u00e9" in accents
    assert backend.encode("CAF\u00c9", add_special_tokens=False).tokens == ["caf\u00e9"]
    whole, _ = words(Spelling(ideographs=False))
    assert "\u4e2d\u6587\u4e2d\u6587" in whole
    cased, _ = words(Spelling(lowercase=False))
    assert "Caf\u00e9" in cased
    assert "zq" in words(min_frequency=6)[0]
    assert "zq" not in words(min_frequency=7)[0]
    few, backend = words(limit_alphabet=4)
    assert sum(len(token.removeprefix("##")) == 1 for token in few) <= 8
    assert 1 in backend.encode("zq").ids


def test_a_vocabulary_is_read_as_bert_reads_it(tmp_path, caplog):
    """Marks, line ends of any system, empty lines, duplicates: no other id moves (`load_vocab` of google-research)."""
    tokens = vocabulary(tmp_path / "vocab.txt").read_text().split()
    odd = [*tokens[:50], "", "the", *tokens[50:], "", "cat"]
    expected = {token: index for index, token in enumerate(odd) if token}
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf" + end.join(odd).encode())
        caplog.clear()
        with caplog.at_level("WARNING", "cloze"):
            found = load_tokenizer(tmp_path / "vocab.txt")
        assert found.backend.get_vocab() == expected
        assert found.backend.encode("the cat", add_special_tokens=False).ids == [odd.index("the", 52), len(odd) - 1]
        told = [record.getMessage() for record in caplog.records]
        assert "2 tokens stand there more than once (first: 'the')" in told[0]
        assert "2 empty lines (first: line 51)" in told[1]


def test_a_bare_cased_vocabulary_is_not_lower_cased(tmp_path, caplog):
    vocabulary(tmp_path / "vocab.txt", "Paris", "The", "House", "Green")
    with caplog.at_level("WARNING", "cloze"):
        found = load_tokenizer(tmp_path / "vocab.txt")
    assert found.backend.encode("The Paris", add_special_tokens=False).tokens == ["The", "Paris"]
    assert "tokens have capitals: read as a cased vocabulary" in caplog.text
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    caplog.clear()
    found = load_tokenizer(tmp_path / "vocab.txt")
    assert found.backend.encode("The cat", add_special_tokens=False).tokens == ["the", "cat"]
    assert not caplog.records
