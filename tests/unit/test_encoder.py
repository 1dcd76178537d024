"""The cached encoder gives the ids of `tokenizers`, to the last one."""

import json

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from cloze.corpus.tokenizer import Spelling, load_tokenizer
from data_prep.text import encoder as encoder_module
from data_prep.text.cutters.base import PROBES
from data_prep.text.cutters.bert import BertCutter
from data_prep.text.encoder import Encoder
from data_prep.text.sentences import split_sentences
from data_prep.text.wordpiece import count_words, train_tokenizer
from tests.unit.corpora import FUZZ, real, vocabulary

ODD = "[SEP] [MASK] [CLS] [PAD] ##s don't café İ 中文 豈 - — é ́ \x07 \u200b ... $5 😀 the cat"
PIECES = st.sampled_from([*ODD.split(), "\xa0", "\u3000", "\t", "\n", " ", "  "])
STRANGE = st.characters(categories=["Cc", "Cf", "Co", "Mn", "Mc", "Me", "Zs", "Zl"])  # controls, marks and spaces
HAN = st.sampled_from("\u4e2d\u6587\u8c48\u3400\U00020000\u3002\uff01\u3042\uac00\uff76")
TEXT = st.lists(st.one_of(PIECES, st.text(max_size=8), STRANGE, HAN), max_size=12).map("".join)


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def encoder(request, tmp_path_factory):
    path = vocabulary(tmp_path_factory.mktemp("v") / "vocab.txt", "caf", "cafe", "\u4e2d", "Don", "##\u00e9", "\u2014")
    return Encoder(load_tokenizer(path, Spelling(lowercase=request.param)).backend)


def reference(tokenizer: Tokenizer, sentences: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(sentences, add_special_tokens=False)]


def encoded(encoder: Encoder, sentences: list[str]) -> list[list[int]]:
    ids_T, lengths_S = encoder.encode(sentences)
    assert len(lengths_S) == len(sentences)
    assert lengths_S.sum() == len(ids_T)
    return [part.tolist() for part in np.split(ids_T, np.cumsum(lengths_S)[:-1])] if sentences else []


@pytest.mark.slow
@given(sentences=st.lists(TEXT, max_size=6))
@settings(max_examples=400 * FUZZ, deadline=None)
def test_ids_are_those_of_tokenizers(encoder, sentences):
    assert encoder.cached
    assert encoded(encoder, sentences) == reference(encoder._tokenizer, sentences)


def test_portions_change_nothing(encoder, monkeypatch):
    monkeypatch.setattr(encoder_module, "_PORTION_CHARACTERS", 10)
    sentences = ["", "the cat", "", "caf\u00e9 " * 5, "x", "", "the red hats of the cat", ""]
    assert encoded(encoder, sentences) == reference(encoder._tokenizer, sentences)


def test_text_that_spells_a_special_token_is_text(encoder):
    specials = {encoder._tokenizer.token_to_id(t) for t in ("[SEP]", "[MASK]", "[CLS]", "[PAD]")}
    ids_T, _ = encoder.encode(["[SEP] [MASK]", "a[CLS]b", "[PAD]"])
    assert not specials & set(ids_T.tolist())


@pytest.mark.parametrize(("most_words", "slot_bits"), [(50, 18), (10**6, 5)], ids=["starts-afresh", "crowded"])
def test_what_is_remembered_stays_bounded(encoder, monkeypatch, most_words, slot_bits):
    monkeypatch.setattr(encoder_module, "_MAX_WORDS", most_words)
    monkeypatch.setattr(encoder_module, "_SLOT_BITS", slot_bits)
    encoder = Encoder(encoder._tokenizer)
    assert encoder.cached
    sentences = [f"word{i} {'x' * (i % 60)} \u00e9{i} the cat" for i in range(400)]
    for start in range(0, 400, 20):
        batch = sentences[start : start + 20]
        for _ in range(2):
            assert encoded(encoder, batch) == reference(encoder._tokenizer, batch)
        assert encoder._table.num_words <= min(most_words + 60, 2**slot_bits + 8)


def test_a_word_without_ids_may_come_last_where_the_ids_fill_their_room(encoder):
    encoder = Encoder(encoder._tokenizer)
    room = len(encoder._table.ids) - encoder._table._num_ids
    encoder._table._num_ids += room - 2  # what "qz" takes
    sentences = ["qz", "\x07\x06\x05"]
    assert encoded(encoder, sentences) == reference(encoder._tokenizer, sentences)
    assert len(encoder._table.ids) > 2**16


def test_whole_words_of_the_vocabulary_are_known_but_for_what_the_model_would_not_take_whole(tmp_path):
    long = "supercalifragilistic"
    path = vocabulary(tmp_path / "vocab.txt", long, "Don", "madeup")
    tokenizer = load_tokenizer(path).backend
    tokenizer.add_special_tokens([AddedToken("madeup", special=True)])
    tokenizer.model.max_input_chars_per_word = 10
    tokenizer.model = tokenizer.model
    encoder = Encoder(tokenizer)
    assert encoder.cached
    assert "cat" in encoder._whole
    assert not {long, "Don", "madeup"} & set(encoder._whole)
    sentences = [f"the cat {long} Don madeup"]
    assert encoded(encoder, sentences) == reference(tokenizer, sentences)


@pytest.mark.parametrize("length", [7, 8, 9, 15, 16, 17, 23, 24, 25, 32])
def test_words_that_begin_alike_are_told_apart(tmp_path, length):
    word = "x" * length
    others = [word + "b", word + "bb", word[:-1], word[:-1] + "b", f"{word}\u00e9", f"{word[:-1]}\u4e2d"]
    path = vocabulary(tmp_path / "vocab.txt", "\u4e2d", "x", "##x", "##xx", "##b", "##\u00e9", "##bb", "##e")
    encoder = Encoder(load_tokenizer(path).backend)
    for sentences in ([word], others, [*others, word], others[::-1]):
        assert encoded(encoder, sentences) == reference(encoder._tokenizer, sentences)


@pytest.mark.parametrize("change", ["normalizer", "pre_tokenizer", "added_token"])
def test_other_tokenizers_are_encoded_without_short_cuts(tmp_path, change):
    tokenizer = load_tokenizer(vocabulary(tmp_path / "vocab.txt")).backend
    if change == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "")])
    elif change == "pre_tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer.add_tokens([AddedToken("red hats")])
    encoder = Encoder(tokenizer)
    assert not encoder.cached
    sentences = ["the red hats, don't", "", "[SEP]"]
    assert encoded(encoder, sentences) == reference(tokenizer, sentences)


def test_a_failing_self_check_turns_the_short_cuts_off(tmp_path, monkeypatch):
    monkeypatch.setattr(BertCutter, "_alphanumeric", lambda self, word: [7])
    encoder = Encoder(load_tokenizer(vocabulary(tmp_path / "vocab.txt")).backend)
    assert not encoder.cached
    assert encoded(encoder, list(PROBES)) == reference(encoder._tokenizer, list(PROBES))


@pytest.mark.parametrize(("name", "lowercase"), [("books-small.jsonl.zst", True), ("zh/reviews.jsonl.zst", False)])
@pytest.mark.slow
def test_ids_on_a_whole_real_corpus(name, lowercase):
    with zstandard.open(real(name), "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:5000]
    blocks = ["".join(texts[i : i + 4])[:100_000] for i in range(0, len(texts), 40)]
    spelling = Spelling(lowercase=lowercase)
    encoder = Encoder(train_tokenizer(count_words(blocks, spelling), 8192, spelling).backend)
    assert encoder.cached
    sentences = [sentence for text in texts for sentence in split_sentences(text)]
    sentences[::500] = [f"[SEP] {sentence} [MASK]" for sentence in sentences[::500]]
    for start in range(0, len(sentences), 2000):
        batch = sentences[start : start + 2000]
        assert encoded(encoder, batch) == reference(encoder._tokenizer, batch)
