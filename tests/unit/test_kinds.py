"""Tokenizers of every kind: loaded, saved, encoded to the last id, words whole, samples laid out as they say."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from cloze.corpus.kinds.bpe import byte_of
from cloze.corpus.manifest import parse_manifest, read_manifest, sealed_json
from cloze.corpus.scripts import IDEOGRAPH_RANGES, is_unspaced
from cloze.corpus.tokenizer import Spelling, load_tokenizer, save_tokenizer
from cloze.corpus.vocabulary import cutting, extended, unknown_words
from cloze.errors import ExitCode, UserError
from data_prep.__main__ import main as prep_main
from data_prep.report import main as report_main
from data_prep.text import bpe, unigram
from data_prep.text.cutters.base import PROBES
from data_prep.text.cutters.byte_level import ByteLevelCutter
from data_prep.text.encoder import Encoder
from data_prep.text.wordpiece import count_pieces
from data_prep.text.words import CharacterRule, word_encoder
from tests.unit.corpora import FUZZ, documents, vocabulary, write_jsonl
from tests.unit.published import KINDS, TEXTS, make
from tests.unit.test_encoder import HAN, PIECES, STRANGE, encoded, reference

ENDINGS = st.sampled_from(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", "''", "'S", "it's", "3's", "\t's", "!'ll"])
WHITE = st.text(alphabet=" \t\n\r\xa0\u3000\u2028\x1f", min_size=1, max_size=4)
NAMES = st.sampled_from(
    ["<s>", "</s>", "<mask>", "[MASK]", "<0x41>", "|||EMAIL_ADDRESS|||", "[unused0]", "\u2581", "\u0120"]
)
TEXT = st.lists(st.one_of(PIECES, ENDINGS, WHITE, NAMES, st.text(max_size=8), STRANGE, HAN), max_size=12).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def given_kind(request, tmp_path_factory):
    """(name, directory as published)."""
    return request.param, make(request.param, tmp_path_factory.mktemp("kinds") / request.param)


@pytest.fixture(scope="module")
def encoder(given_kind):
    return Encoder(load_tokenizer(given_kind[1]).backend)


@given(sentences=st.lists(TEXT, max_size=6))
@settings(max_examples=30 * FUZZ, deadline=None)
def test_ids_are_those_of_tokenizers(encoder, sentences):
    assert encoder.cached
    assert encoded(encoder, sentences) == as_text(encoder._tokenizer, sentences)


def as_text(tokenizer, sentences):
    """What `tokenizers` gives; only that to its Unigram a text that spells a special token is one."""
    rows = reference(tokenizer, sentences)
    if not isinstance(tokenizer.model, models.Unigram):
        return rows
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    unknown = tokenizer.token_to_id("<unk>")
    return [[unknown if index in special else index for index in row] for row in rows]


def test_text_that_spells_a_special_token_is_text(encoder, given_kind):
    tokenizer = load_tokenizer(given_kind[1])
    ids_T, _ = encoder.encode(["a " + " ".join(tokenizer.specials), "".join(tokenizer.specials)])
    assert not {*tokenizer.facts.special_ids} - {tokenizer.facts.unk_id} & {*ids_T.tolist()}


def test_most_sentences_take_the_short_cut(encoder):
    sentences = [piece for text in TEXTS for piece in text.strip().split(". ")]
    assert encoder.cutter.odd(sentences) == []
    assert set(encoder.cutter.odd(["fine", "na\u00efve", "nul\0", "also fine"])) == {2}


# -- word starts ------------------------------------------------------------------------------------------------------


def apart(letter: str) -> bool:
    if any(first <= ord(letter) <= last for first, last in IDEOGRAPH_RANGES) or is_unspaced(letter):
        return True
    return not letter.isalnum() and unicodedata.category(letter)[0] != "M"


def slow_starts(text: str, tokenizer: Tokenizer) -> list[bool]:
    """Every character gets the number of its word; a token begins one where its first character is of another."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):  # where its own words begin
        borders = {begin for _, (begin, _) in tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    else:
        borders = {i for i, letter in enumerate(text) if letter.isspace()}
    word, words = 0, []
    for i, letter in enumerate(text):
        if i and i in borders:
            word += 1
        elif i and not letter.isspace() and not text[i - 1].isspace() and unicodedata.category(letter)[0] != "M":
            word += apart(letter) or apart(text[i - 1])
        words.append(word)
    starts, before = [], -1
    for begin, end in encoding.offsets:
        starts.append(words[begin] != before)
        before = words[max(begin, end - 1)]
    return starts


PLAIN = (
    "the cat sat don't it's x-y (a) 3.14 caf\u00e9 e-mail \u4e2d\u6587\u5b57 \u0e01\u0e33\u0e25\u0e31\u0e07 \U0001f600"
)
WORDS = st.lists(
    st.one_of(
        st.sampled_from(PLAIN.split()),
        st.text(alphabet="abcdez.,'!\u00e9\u4e2d\u6587\u0e01", min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=8,
).map(" ".join)


@given(sentences=st.lists(WORDS, min_size=1, max_size=5))
@settings(max_examples=20 * FUZZ, deadline=None)
def test_words_begin_where_their_characters_do(word_coder, sentences):
    tokenizer, encoder, encode = word_coder
    assert encoder.cached
    ids_T, lengths_S, starts_T = encode(sentences)
    assert ids_T.tolist() == [i for row in reference(tokenizer, sentences) for i in row]
    parts = np.split(starts_T, np.cumsum(lengths_S)[:-1])
    assert [part.tolist() for part in parts] == [slow_starts(sentence, tokenizer) for sentence in sentences]


@pytest.fixture(scope="module")
def word_coder(given_kind):
    tokenizer = load_tokenizer(given_kind[1])
    return tokenizer.backend, *word_encoder(tokenizer, False)


def test_the_words_of_a_sentence(word_coder):
    """The first has no space before it; a word goes on where no Ġ or ▁ stands; punctuation is apart."""
    tokenizer, _, encode = word_coder
    text = "Caterpillars, unbelievably zzqx."
    ids_T, _, starts_T = encode([text])
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    found = [begin for (begin, _), starts in zip(offsets, starts_T.tolist(), strict=True) if starts]
    assert len(found) == 5
    assert [text[begin:].split()[0][:4] for begin in found] == ["Cate", ",", "unbe", "zzqx", "."]
    assert len(ids_T) > 10


def test_chinese_words_are_those_of_jieba(given_kind):
    pytest.importorskip("jieba")
    tokenizer = load_tokenizer(given_kind[1])
    text = "\u6211\u4eec\u5728\u5b66\u4e60\u81ea\u7136\u8bed\u8a00\uff0cok"
    _, _, starts_T = word_encoder(tokenizer, True)[1]([text])
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    begins = {begin for (begin, _), starts in zip(encoding.offsets, starts_T.tolist(), strict=True) if starts}
    words = {0, 2, 3, 5, 9, 10}
    assert begins == words if tokenizer.kind.name == "bpe" else begins <= words  # unknown ones are one token to Unigram


def test_without_short_cuts_words_are_the_same(given_kind, monkeypatch):
    tokenizer = load_tokenizer(given_kind[1])
    sentences = ["The cat's hat, caf\u00e9 \u4e2d\u6587!", "x", "", *PROBES[:4]]
    rule = CharacterRule(False)
    fast = Encoder(tokenizer.backend, words=rule)
    monkeypatch.setattr(Encoder, "_agrees", lambda self: False)
    slow = Encoder(tokenizer.backend, words=rule)
    assert (fast.cached, slow.cached) == (True, False)
    for ours, theirs in zip(fast.encode_words(sentences), slow.encode_words(sentences), strict=True):
        assert ours.tolist() == theirs.tolist()


# -- when short cuts would be wrong -----------------------------------------------------------------------------------


def test_a_failing_self_check_turns_the_short_cuts_off(tmp_path, monkeypatch):
    monkeypatch.setattr(ByteLevelCutter, "encode", lambda self, words: [[7] for _ in words])
    encoder = Encoder(load_tokenizer(make("roberta", tmp_path)).backend)
    assert not encoder.cached
    assert encoded(encoder, list(PROBES)) == reference(encoder._tokenizer, list(PROBES))


@pytest.mark.parametrize("change", ["lowercase", "punctuation", "joins_words"])
def test_other_pipelines_are_encoded_by_tokenizers(tmp_path, change):
    backend = Tokenizer.from_file(str(make("roberta", tmp_path) / "tokenizer.json"))
    if change == "lowercase":
        backend.normalizer = normalizers.Lowercase()
    elif change == "punctuation":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), backend.pre_tokenizer])
    else:
        backend = Tokenizer(
            models.BPE({"a": 0, "\u2581": 1, "\u2581a": 2, "a\u2581a": 3}, [("\u2581", "a"), ("a", "\u2581a")])
        )
        backend.normalizer = normalizers.Replace(" ", "\u2581")
    encoder = Encoder(backend)
    assert not encoder.cached
    sentences = ["a a a", "The CAT's a", ""]
    assert encoded(encoder, sentences) == reference(backend, sentences)


# -- what shards and models are told ----------------------------------------------------------------------------------


def test_facts_are_those_of_the_files(given_kind):
    name, folder = given_kind
    tokenizer = load_tokenizer(folder)
    roles = {
        role: tokenizer.backend.id_to_token(getattr(tokenizer.facts, f"{role}_id"))
        for role in tokenizer.specials._fields
    }
    assert roles == tokenizer.specials._asdict()
    separators, types = {"roberta": (2, False), "modernbert": (1, False), "xlmr": (2, False), "mmbert": (1, False)}[
        name
    ]
    assert (tokenizer.facts.separators, tokenizer.facts.token_types) == (separators, types)
    never = {tokenizer.backend.id_to_token(index) for index in tokenizer.facts.never_drawn}
    unused = {"modernbert": {f"[unused{i}]" for i in range(4)} | {"|||IP_ADDRESS|||", "<|padding|>"}}
    assert never == {**unused, "mmbert": {"<unused0>", "<unused1>"}}.get(name, set())
    assert tokenizer.facts.vocab_size == max(tokenizer.vocabulary.values()) + 1


def test_saved_it_is_what_transformers_makes_of_it(given_kind, tmp_path):
    """Ids, layout of pairs and names; the inputs that a model gets have no token types where there are none."""
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(given_kind[1])
    save_tokenizer(tokenizer, tmp_path, 64)
    assert load_tokenizer(tmp_path).facts == tokenizer.facts
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == tokenizer.facts.mask_id
    assert (theirs.cls_token, theirs.sep_token, theirs.pad_token) == tokenizer.specials[2:4] + tokenizer.specials[:1]
    assert theirs.model_max_length == 64
    pair = theirs("The cat sat.", "It's \u4e2d\u6587")
    facts, backend = tokenizer.facts, load_tokenizer(given_kind[1]).backend
    first, second = (
        backend.encode(text, add_special_tokens=False).ids for text in ("The cat sat.", "It's \u4e2d\u6587")
    )
    between = [facts.sep_id] * facts.separators
    assert pair.input_ids == [facts.cls_id, *first, *between, *second, facts.sep_id]
    assert set(pair) == {"input_ids", "attention_mask"} | ({"token_type_ids"} if facts.token_types else set())


def test_fingerprints_tell_what_changes_ids(given_kind, tmp_path):
    _, folder = given_kind
    path = tmp_path / "tokenizer.json"
    body = json.loads((folder / "tokenizer.json").read_text())
    first = load_tokenizer(folder).facts.fingerprint

    def changed(**parts):
        path.write_text(json.dumps({**body, **parts}, indent=3))
        return load_tokenizer(path).facts.fingerprint != first

    assert not changed()
    model = body["model"]
    if "merges" in model:
        assert changed(model={**model, "merges": model["merges"][:-1]})
    else:
        piece, score = model["vocab"][-1]
        assert changed(model={**model, "vocab": [*model["vocab"][:-1], [piece, score - 1]]})
    assert changed(normalizer={"type": "Lowercase"})


@pytest.mark.parametrize("module", [bpe, unigram])
def test_trained(module):
    pieces = count_pieces(TEXTS, ideographs=False)
    options = (2,) if module is bpe else ()
    first, second = (module.train_tokenizer(module.words_of(pieces), 600, *options) for _ in range(2))
    assert first.vocabulary.keys() == second.vocabulary.keys()
    assert first.facts.vocab_size <= 600
    assert first.specials == ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
    assert (first.facts.separators, first.facts.token_types) == (2, False)
    if module is bpe:
        assert first.facts == second.facts
    backend = first.backend
    text = "The cat sat on the mat."
    assert backend.decode(backend.encode(text).ids) == text
    assert len(backend.encode("the cat sat", add_special_tokens=False).ids) <= 4
    assert Encoder(backend).cached


def test_bytes_are_written_as_the_library_writes_them():
    known = byte_of()
    assert sorted(known.values()) == list(range(256))
    for text in ("a \n\x7f\xad", "\u00e9\u4e2d\U0001f600\u07ff\uffff\U0010ffff\x00\x1f\x80"):
        ((word, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert bytes(known[letter] for letter in word) == text.encode()


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(path, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_an_encoder_cannot_use_is_refused_with_one_line(tmp_path):
    folder = make("roberta", tmp_path)
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    good, names = json.loads(file.read_text()), json.loads(config.read_text())

    def written(**parts):
        file.write_text(json.dumps({**good, **parts}))

    def without(token, **parts):
        model = {**good["model"], "vocab": {k: v for k, v in good["model"]["vocab"].items() if k != token}}
        written(model=model, added_tokens=[t for t in good["added_tokens"] if t["content"] != token], **parts)

    without("<mask>")
    refused(folder, "has no mask token; add it")
    without("<pad>")
    refused(folder, "has no pad token")
    without("</s>", post_processor=None)
    refused(folder, r"has no separator \(\[SEP\]\) token")
    config.write_text(json.dumps({**names, "pad_token": "</s>"}))
    written()
    refused(folder, "pad </s> and sep </s> have one id, 2; give")
    config.write_text(json.dumps(names))
    written(model={**good["model"], "dropout": 0.1})
    refused(folder, "drops merges at random")
    written(
        model={"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"},
        added_tokens=[],
        post_processor=None,
    )
    refused(
        folder,
        r"its model is WordLevel, which Cloze does not know; it knows BPE \(bpe\), Unigram \(unigram\), WordPiece",
    )
    written()
    (folder / "config.json").write_text('{"vocab_size": 400}')
    refused(folder, "ids go up to 4.., the model beside it has 400 rows")


def test_a_unigram_without_an_unknown_token_is_refused(tmp_path):
    folder = make("xlmr", tmp_path)
    body = json.loads((folder / "tokenizer.json").read_text())
    body["model"]["unk_id"] = None
    (folder / "tokenizer.json").write_text(json.dumps(body))
    refused(folder, "has no unknown token")


def test_layouts_that_are_not_ours(tmp_path):
    folder = make("roberta", tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    specials = [("<s>", 0), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=specials
    )
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).facts.separators == 0
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=specials)
    backend.save(str(folder / "tokenizer.json"))
    refused(folder, "its post-processor makes <s> A of a text A")


# -- words to add -----------------------------------------------------------------------------------------------------

NEW = ("Caterpillars", "zzqxzzqx", "na\u00efvet\u00e9")


@pytest.mark.parametrize("kind", ["roberta", "modernbert", "xlmr", "wordpiece"])
def test_added_words_are_one_token_and_nothing_else_changes(tmp_path, kind):
    if kind == "wordpiece":
        extra = ["[unused0]", "[unused1]", "##\u00e9", "\u00ef", "##\u00ef", "C"]
        old = load_tokenizer(vocabulary(tmp_path / "vocab.txt", *extra), Spelling(lowercase=False))
    else:
        old = load_tokenizer(make(kind, tmp_path))
    new = extended(old, [*NEW, "the"])
    save_tokenizer(new, tmp_path, 64)
    assert load_tokenizer(tmp_path).facts == new.facts
    filled = {"modernbert": 3, "wordpiece": 2}.get(kind, 0)
    assert new.facts.vocab_size == old.facts.vocab_size + len(NEW) - filled
    assert {i: t for t, i in old.vocabulary.items() if "unused" not in t}.items() <= {
        i: t for t, i in new.vocabulary.items()
    }.items()
    added = new.vocabulary.keys() - old.vocabulary.keys()
    assert not {new.vocabulary[token] for token in added} & {*new.facts.special_ids, *new.facts.never_drawn}
    for word in NEW:
        assert len(new.backend.encode(f"x {word}", add_special_tokens=False).ids) == 1 + len(
            new.backend.encode("x", add_special_tokens=False).ids
        )
    assert Encoder(new.backend).cached
    texts = [text for text in TEXTS if not any(word in text for word in NEW)]
    assert encoded(Encoder(new.backend), texts) == encoded(Encoder(old.backend), texts)
    assert new.specials == old.specials
    assert (new.facts.separators, new.facts.token_types) == (old.facts.separators, old.facts.token_types)


def test_a_tokenizer_that_splits_no_words_takes_none(tmp_path):
    with pytest.raises(UserError, match="words cannot be added to a tokenizer of kind bpe that does not cut"):
        extended(load_tokenizer(make("mmbert", tmp_path)), ["new"])


@pytest.mark.parametrize("kind", ["roberta", "xlmr", "wordpiece"])
def test_what_words_cost_is_counted(tmp_path, kind):
    """Against words counted by hand: pieces per word, the words cut most, and what the tokenizer with them saves."""
    path = vocabulary(tmp_path / "vocab.txt") if kind == "wordpiece" else make(kind, tmp_path)
    tokenizer = load_tokenizer(path)
    text = "a gnokat and a gnokat . and the wuwu . a cat the cat"
    tokens = [np.asarray([tokenizer.facts.cls_id, *tokenizer.backend.encode(text, add_special_tokens=False).ids])]
    found = cutting([*tokens, *tokens], tokenizer)
    words = [word for word in text.split() if word.isalpha()]
    pieces = {word: len(tokenizer.backend.encode(f" {word}", add_special_tokens=False).ids) for word in words}
    assert found.words == 2 * len(words)
    assert found.tokens == 2 * (len(tokens[0]) - 1)
    first = pieces["a"] if kind != "roberta" else 1  # without a space before it
    assert found.pieces == 2 * (sum(pieces[word] for word in words) - pieces["a"] + first)
    cut = {word.text: (word.times, word.pieces) for word in found.cut}
    assert cut["gnokat"] == (4, pieces["gnokat"])
    assert found.cut[0].text == "gnokat"
    assert cut["wuwu"] == (2, pieces["wuwu"])
    larger = extended(tokenizer, [word.text for word in found.cut[:2]])
    fewer = len(tokens[0]) - 1 - len(larger.backend.encode(text, add_special_tokens=False).ids)
    assert found.saved(2) == pytest.approx(fewer / (len(tokens[0]) - 1))


def test_what_another_tokenizer_does_not_know_is_found(tmp_path):
    """Of a script that it has no letters of, and of words that it cuts, the commonest first; and then it knows them."""
    ours = load_tokenizer(vocabulary(tmp_path / "ours.txt", "\u6211", "\u5f88", "\u3002", "gnokat", "##kat"))
    theirs = load_tokenizer(vocabulary(tmp_path / "theirs.txt"))
    text = "\u6211 \u5f88 \u5f88 the cat \u3002\u3002\u3002 gnokat gnokat gnokat gnokat \u6211"
    tokens = np.asarray([ours.facts.cls_id, *ours.backend.encode(text, add_special_tokens=False).ids])
    found = unknown_words([tokens, tokens[:-1]], ours, theirs)
    assert found == {"gnokat": 8, "\u3002": 6, "\u5f88": 4, "\u6211": 3}
    larger = extended(theirs, [*found])
    assert larger.facts.unk_id not in larger.backend.encode(text).ids
    assert larger.facts.vocab_size == theirs.facts.vocab_size + 4


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A corpus of a given byte-level BPE, which cuts some words."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [text.replace("red", "gnokat") for text in documents(30)]
    options = ["source=jsonl", f"source.paths=[{write_jsonl(folder / 'a.jsonl', texts)}]", "max_len=32"]
    options += [f"tokenizer.path={make('roberta', folder / 'given')}", "executor.workers=1"]
    assert prep_main([*options, f"out={folder / 'out'}"]) == 0
    return folder, options


def test_the_report_writes_the_extended_tokenizer(prepared, capsys):
    folder, options = prepared
    new = folder / "new"
    assert report_main([str(folder / "out"), "--extend", str(new), "--words", "1"]) == 0
    assert "1 words added, 1 of them in new rows; " in capsys.readouterr().out
    page = (folder / "out" / "report.html").read_text()
    assert "pieces per word" in page
    assert "<td>gnokat</td>" in page
    assert "\u0120gnokat" in load_tokenizer(new).vocabulary
    given = vocabulary(folder / "vocab.txt")
    other = [str(folder / "out"), "--extend", str(folder / "other"), "--into"]
    assert report_main([*other, str(given)]) == ExitCode.USAGE
    assert "no word of" in capsys.readouterr().err
    given.write_text(given.read_text().replace("\nthe\n", "\n"))
    assert report_main([*other, str(given)]) == 0
    assert "1 words added, 1 of them in new rows; 100.0% of what it cut or knew not" in capsys.readouterr().out
    assert "the" in load_tokenizer(folder / "other").vocabulary
    assert report_main([str(folder / "out"), "--into", str(given)]) == ExitCode.USAGE
    assert report_main([str(folder / "out"), "--extend", str(new)]) == ExitCode.USAGE
    assert report_main([str(folder / "out"), "--extend", str(folder / "none"), "--words", "0"]) == ExitCode.USAGE
    errors = capsys.readouterr().err
    assert "is there; name a new directory" in errors
    assert "--words 0: must be at least 1" in errors
    more = [*options, f"tokenizer.path={new}", f"out={folder / 'out-new'}"]
    assert prep_main(more) == 0
    before, after = (read_manifest(folder / name).splits["pass-00"].tokens for name in ("out", "out-new"))
    assert after < before


def test_version_3_tells_the_layout_and_is_checked(prepared):
    data = json.loads((prepared[0] / "out" / "manifest.json").read_text())
    assert data["version"] == 3
    assert {name: data["tokenizer"][name] for name in ("separators", "token_types", "never_drawn")} == {
        "separators": 2, "token_types": False, "never_drawn": []
    }  # fmt: skip
    for bad in (
        {"separators": 3},
        {"separators": 0},
        {"token_types": 0},
        {"never_drawn": [-1]},
        {"never_drawn": [10**6]},
    ):
        body = {**data, "tokenizer": {**data["tokenizer"], **bad}}
        with pytest.raises(UserError, match=next(iter(bad)).split("_")[0]):
            parse_manifest(sealed_json(body).encode(), "x")


def test_a_layout_of_pairs_that_is_not_ours_is_refused_for_pairs(prepared, tmp_path, capsys):
    folder, options = prepared
    body = json.loads((folder / "given" / "tokenizer.json").read_text())
    cls, sep = ({"id": name, "ids": [number], "tokens": [name]} for name, number in (("<s>", 0), ("</s>", 2)))
    one, a, b = {"SpecialToken": {"id": "<s>", "type_id": 0}}, *({"Sequence": {"id": i, "type_id": 0}} for i in "AB")
    last = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    body["post_processor"] = {
        "type": "TemplateProcessing", "single": [one, a, last], "pair": [one, a, b, last],
        "special_tokens": {"<s>": cls, "</s>": sep},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    more = [*options, f"tokenizer.path={tmp_path}", f"out={tmp_path / 'out'}"]
    assert prep_main(more) == ExitCode.USAGE
    assert "lays pairs out neither as [CLS] A [SEP] B [SEP] nor" in capsys.readouterr().err
    assert prep_main([*more, "objective=none"]) == 0
    assert (
        prep_main(
            [
                *more[:-1],
                f"out={tmp_path / 'x'}",
                "tokenizer.path=null",
                "tokenizer.kind=bpe",
                "tokenizer.vocab_size=99",
            ]
        )
        == 64
    )
    assert "kind=bpe has every byte, so at least 512 tokens" in capsys.readouterr().err
