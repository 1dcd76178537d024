"""Learning a WordPiece vocabulary: words are counted in parts of the text, and a tokenizer is made of the counts."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tokenizers import Tokenizer, models, trainers

from cloze.corpus.kinds.wordpiece import SPECIALS, UNK
from cloze.corpus.scripts import ACCENTED, IDEOGRAPHS, character, is_unspaced
from cloze.corpus.tokenizer import (
    BERT,
    CorpusTokenizer,
    Spelling,
    bert_normalizer,
    bert_pipeline,
    bert_pre_tokenizer,
    checked,
)

_ALPHABET_SHARE = 0.75  # of the vocabulary that single characters may take
_MOST_CHARACTERS = 100  # of a word: WordPiece takes a longer one for unknown
_IDEOGRAPHS = re.compile(f"([{IDEOGRAPHS}]+)")
_NOTABLE = 0.01  # share of the letters from which a script decides how the tokenizer spells
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9 ]")


def count_pieces(sentences: Iterable[str], ideographs: bool = True) -> Counter[str]:
    """How often each piece between spaces comes in `sentences`, and each ideograph if it is a word of its own."""
    pieces: Counter[str] = Counter()
    for sentence in sentences:
        if ideographs and not sentence.isascii():
            parts = _IDEOGRAPHS.split(sentence)
            pieces.update("".join(parts[1::2]))
            sentence = " ".join(parts[::2])
        pieces.update(sentence.split(" "))
    return pieces


def words_of(pieces: Mapping[str, int], spelling: Spelling = BERT) -> Counter[str]:
    """How often the pre-tokenizer finds each word in `pieces`, at whose edges it breaks anyway."""
    normalizer, splitter = bert_normalizer(spelling), bert_pre_tokenizer(spelling)
    words: Counter[str] = Counter()
    for piece, count in pieces.items():
        if piece.isascii() and piece.isprintable():
            found = _ASCII_WORD.findall(piece.lower() if spelling.lowercase else piece)
        else:
            found = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(piece))]
        for word in found:
            words[word] += count
    return words


def count_words(sentences: Iterable[str], spelling: Spelling = BERT) -> Counter[str]:
    """How often BERT's pre-tokenizer finds each word in `sentences`: what a tokenizer is trained on."""
    return words_of(count_pieces(sentences, spelling.ideographs), spelling)


class Scripts(NamedTuple):
    """Of a text's letters, which share is written without spaces, and which loses something as accents are stripped."""

    unspaced: float
    losing: float  # of scripts whose marks are no accents
    names: tuple[str, ...]  # of those that lose, the commonest first


def count_letters(pieces: Mapping[str, int]) -> Counter[str]:
    """How often each character comes; those of ASCII are not told apart."""
    letters: Counter[str] = Counter()
    for piece, count in pieces.items():
        if piece.isascii():
            letters["a"] += count * len(piece)
            continue
        for letter in piece:
            letters[letter] += count
    return letters


def scripts_of(letters: Mapping[str, float]) -> Scripts:
    """What the scripts of a text ask for, from how often each character comes."""
    total = unspaced = 0.0
    losing: dict[str, float] = defaultdict(float)
    for letter, count in letters.items():
        script, is_letter, loses = character(letter)
        total += count * is_letter
        unspaced += count * (is_letter and is_unspaced(letter))
        if loses and script not in ACCENTED:
            losing[script] += count
    total = max(1, total)
    names = tuple(sorted(losing, key=lambda name: -losing[name]))
    return Scripts(unspaced / total, sum(losing.values()) / total, names)


def fitted(spelling: Spelling, scripts: Scripts) -> tuple[Spelling, str | None]:
    """The spelling that suits the scripts of a text, where it leaves that open, and one line that says so."""
    said: list[str] = []
    if spelling.lowercase and spelling.strip_accents is None and scripts.losing >= _NOTABLE:
        spelling = spelling._replace(strip_accents=False)
        names = ", ".join(scripts.names[:3])
        said.append(f"keeps the marks of {names} (tokenizer.strip_accents=true would take them off)")
    if scripts.unspaced >= _NOTABLE:
        spelling = spelling._replace(clusters=True)
        said.append("cuts scripts without spaces between letters (with their marks)")
    return spelling, f"tokenizer: {'; '.join(said)}" if said else None


def train_tokenizer(
    words: Mapping[str, int],
    vocab_size: int,
    spelling: Spelling = BERT,
    *,
    min_frequency: int = 2,
    limit_alphabet: int | None = None,
) -> CorpusTokenizer:
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
    return checked(bert_pipeline(sorted(vocabulary, key=vocabulary.__getitem__), spelling), "the trained tokenizer")


def _alphabet(words: Mapping[str, int], spelling: Spelling, room: int, most: int) -> list[str]:
    """The most frequent characters as pieces, `c` and where a word can go on with it `##c`: at most `room`, sorted.

    At most the `most` commonest characters are taken.
    """
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    normalizer, splitter = bert_normalizer(spelling), bert_pre_tokenizer(spelling)
    pieces: list[str] = []
    for letter in sorted(letters, key=lambda letter: (-letters[letter], letter))[:most]:
        goes_on = len(splitter.pre_tokenize_str(normalizer.normalize_str(f"a{letter}"))) == 1
        forms = [letter, f"##{letter}"] if goes_on else [letter]
        if len(pieces) + len(forms) > room:
            break
        pieces += forms
    return sorted(pieces)
