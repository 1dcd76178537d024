"""WordPiece tokenizers: train one, load one, tell two apart, save one that `AutoTokenizer` loads as BERT's.

Knows the files of a tokenizer directory; knows neither corpora nor configuration. Needs `tokenizers`, not transformers.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_prep.encoder import IDEOGRAPHS
from data_prep.errors import UserError
from data_prep.manifest import TokenizerFacts

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_ALPHABET_SHARE = 0.75  # of the vocabulary that single characters may take
_MOST_CHARACTERS = 100  # of a word: WordPiece takes a longer one for unknown
_IDEOGRAPHS = re.compile(f"([{IDEOGRAPHS}]+)")
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9 ]")


class Spelling(NamedTuple):
    """How text is normalized before it is split."""

    lowercase: bool = True
    strip_accents: bool | None = None  # None: where it lower-cases
    ideographs: bool = True  # each a word of its own


BERT = Spelling()  # the uncased one


@dataclass(frozen=True)
class WordPiece:
    """A tokenizer and what shards say of it."""

    backend: Tokenizer
    facts: TokenizerFacts


def load_tokenizer(path: Path, spelling: Spelling = BERT) -> WordPiece:
    """The BERT WordPiece in directory `path` (tokenizer.json or vocab.txt), or of a vocab.txt file at `path`.

    `spelling` counts only where no file says it. Raises `UserError` for anything BERT cannot be pretrained with.
    """
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise UserError(f"tokenizer.path={path}: holds neither tokenizer.json nor vocab.txt; name a BERT tokenizer")
        path = found[0]
    elif not path.is_file():
        raise UserError(f"tokenizer.path={path}: no such file or directory; leave it out to train a tokenizer")
    try:
        return _finished(_from_json(path) if path.suffix == ".json" else _from_vocabulary(path, spelling), str(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"tokenizer.path={path}: cannot be read ({error}); restore the file") from error


def count_words(sentences: Iterable[str], spelling: Spelling = BERT) -> Counter[str]:
    """How often BERT's pre-tokenizer finds each word in `sentences`: what a tokenizer is trained on.

    It breaks at spaces and around ideographs, so each piece between them is looked at once, however often it comes.
    """
    normalizer, splitter = _normalizer(spelling), pre_tokenizers.BertPreTokenizer()
    pieces: Counter[str] = Counter()
    for sentence in sentences:
        if spelling.ideographs and not sentence.isascii():
            parts = _IDEOGRAPHS.split(sentence)
            pieces.update("".join(parts[1::2]))
            sentence = " ".join(parts[::2])
        pieces.update(sentence.split(" "))
    words: Counter[str] = Counter()
    for piece, count in pieces.items():
        if piece.isascii() and piece.isprintable():
            found = _ASCII_WORD.findall(piece.lower() if spelling.lowercase else piece)
        else:
            found = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(piece))]
        for word in found:
            words[word] += count
    return words


def train_tokenizer(
    words: Mapping[str, int],
    vocab_size: int,
    spelling: Spelling = BERT,
    *,
    min_frequency: int = 2,
    limit_alphabet: int | None = None,
) -> WordPiece:
    """A WordPiece of at most `vocab_size` tokens from how often each word comes. Same counts, same tokenizer.

    Left to itself the trainer numbers the letters in the order of a randomly seeded hash table and breaks ties by
    number: hence the alphabet is counted here and handed over in a fixed order. What the trainer would do for every
    word, normalize it and look for breaks in it, has been done: it gets words, those with pieces to join.
    """
    room = int(vocab_size * _ALPHABET_SHARE) - len(SPECIALS)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIALS, *_alphabet(words, spelling, room, limit_alphabet or room)],
        limit_alphabet=0,
        show_progress=False,
    )
    learner = Tokenizer(models.WordPiece(unk_token=UNK))
    joinable = [(word, count) for word, count in words.items() if 1 < len(word) <= _MOST_CHARACTERS]
    learner.train_from_iterator((word for word, count in joinable for _ in range(count)), trainer)
    vocabulary = learner.get_vocab()
    return _finished(_bert(sorted(vocabulary, key=vocabulary.__getitem__), spelling), "the trained tokenizer")


def save_tokenizer(tokenizer: WordPiece, directory: Path, max_len: int) -> None:
    """Write the four files that Hugging Face expects of a BERT tokenizer into the existing `directory`."""
    normalizer = _settings(tokenizer.backend.normalizer) or {}
    names = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    config = {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": max_len,
        "do_lower_case": bool(normalizer.get("lowercase")),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": bool(normalizer.get("handle_chinese_chars")),
        **names,
    }
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    files = {
        "vocab.txt": "\n".join(sorted(vocabulary, key=vocabulary.__getitem__)),
        "tokenizer.json": tokenizer.backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=1),
        "special_tokens_map.json": json.dumps(names, indent=1),
    }
    if len(vocabulary) < tokenizer.facts.vocab_size:  # a line's number is its id: no file can tell of gaps
        del files["vocab.txt"]
    for name, text in files.items():
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _from_vocabulary(path: Path, spelling: Spelling) -> Tokenizer:
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    tokens = [token.removesuffix("\r") for token in tokens]
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise UserError(
            f"tokenizer.path={path}: {twice[0]!r:.60} stands there twice; a vocabulary has one token per line"
        )
    config_path = path.parent / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    found = Spelling(
        bool(config.get("do_lower_case", spelling.lowercase)),
        config.get("strip_accents", spelling.strip_accents),
        bool(config.get("tokenize_chinese_chars", spelling.ideographs)),
    )
    return _bert(tokens, found)


def _from_json(path: Path) -> Tokenizer:
    text = path.read_text(encoding="utf-8")
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises nothing narrower
        body = json.loads(text)
        model = body.get("model") if isinstance(body, dict) else None
        _require_wordpiece(path, model.get("type") if isinstance(model, dict) else None)
        raise UserError(f"tokenizer.path={path}: {error}; restore the file") from error
    _require_wordpiece(path, type(backend.model).__name__)
    return backend


def _require_wordpiece(path: Path, model: str | None) -> None:
    if model != "WordPiece":
        raise UserError(f"tokenizer.path={path}: its model is {model}, not WordPiece; name a BERT tokenizer")


def _normalizer(spelling: Spelling) -> normalizers.BertNormalizer:
    lowercase, strip_accents, ideographs = spelling
    return normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=ideographs)


def _bert(tokens: Sequence[str], spelling: Spelling) -> Tokenizer:
    """BERT's pipeline around a vocabulary; a token's id is its place in `tokens`."""
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    backend.normalizer = _normalizer(spelling)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _finished(backend: Tokenizer, name: str) -> WordPiece:
    """Check that the specials are there; add what turns text into BERT's input and back."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    missing = [token for token in SPECIALS if token not in vocabulary]
    if missing:
        raise UserError(f"{name}: has no {' '.join(missing)}; BERT needs {' '.join(SPECIALS)}: name another tokenizer")
    backend.no_padding()
    backend.no_truncation()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, vocabulary[CLS]), (SEP, vocabulary[SEP])],
    )
    backend.decoder = decoders.WordPiece(prefix="##")
    facts = TokenizerFacts(
        fingerprint=_fingerprint(backend, vocabulary),
        vocab_size=max(vocabulary.values()) + 1,
        pad_id=vocabulary[PAD],
        unk_id=vocabulary[UNK],
        cls_id=vocabulary[CLS],
        sep_id=vocabulary[SEP],
        mask_id=vocabulary[MASK],
    )
    return WordPiece(backend, facts)


def _fingerprint(backend: Tokenizer, vocabulary: Mapping[str, int]) -> str:
    """sha256 over everything that decides which ids a text gets, and nothing else (not the layout of a file)."""
    model = backend.model
    deciding = {
        "vocabulary": sorted((index, token) for token, index in vocabulary.items()),
        "model": [model.unk_token, model.continuing_subword_prefix, model.max_input_chars_per_word],
        "normalizer": _settings(backend.normalizer),
        "pre_tokenizer": _settings(backend.pre_tokenizer),
    }
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(part: Any) -> Any:
    """Those of a normalizer or a pre-tokenizer as they stand in tokenizer.json, without all of the vocabulary."""
    return None if part is None else json.loads(part.__getstate__())


def _alphabet(words: Mapping[str, int], spelling: Spelling, room: int, most: int) -> list[str]:
    """The most frequent characters as pieces, `c` and where a word can go on with it `##c`: at most `room`, sorted.

    At most the `most` commonest characters are taken.
    """
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    normalizer, splitter = _normalizer(spelling), pre_tokenizers.BertPreTokenizer()
    pieces: list[str] = []
    for letter in sorted(letters, key=lambda letter: (-letters[letter], letter))[:most]:
        goes_on = len(splitter.pre_tokenize_str(normalizer.normalize_str(f"a{letter}"))) == 1
        forms = [letter, f"##{letter}"] if goes_on else [letter]
        if len(pieces) + len(forms) > room:
            break
        pieces += forms
    return sorted(pieces)
