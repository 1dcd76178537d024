"""BERT's own way from sentences to samples, in plain Python (Devlin et al. 2019, section 3 and appendix A).

A peer to measure, not a part of Cloze: one character, one token and one sample at a time, as the algorithm is told.
"""

import json
import random
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

from cloze.corpus.scripts import IDEOGRAPH_RANGES

MAX_WORD_CHARACTERS = 100


def tokenize(text: str, vocabulary: Mapping[str, int]) -> list[str]:
    """Basic tokenization, pass by pass, then WordPiece."""
    tokens: list[str] = []
    for chunk in space_ideographs(clean(text)).split():
        for word in split_punctuation(strip_accents(chunk.lower())):
            tokens += word_pieces(word, vocabulary)
    return tokens


def clean(text: str) -> str:
    """Without control characters; every white space is a space."""
    kept: list[str] = []
    for character in text:
        if ord(character) in (0, 0xFFFD) or is_control(character):
            continue
        kept.append(" " if is_whitespace(character) else character)
    return "".join(kept)


def space_ideographs(text: str) -> str:
    spaced: list[str] = []
    for character in text:
        spaced += [" ", character, " "] if is_ideograph(character) else [character]
    return "".join(spaced)


def strip_accents(word: str) -> str:
    return "".join([c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn"])


def split_punctuation(word: str) -> list[str]:
    """Runs of other characters, and every punctuation mark by itself."""
    parts: list[list[str]] = []
    begins = True
    for character in word:
        if is_punctuation(character):
            parts.append([character])
            begins = True
        elif begins:
            parts.append([character])
            begins = False
        else:
            parts[-1].append(character)
    return ["".join(part) for part in parts]


def is_whitespace(character: str) -> bool:
    return character in " \t\n\r" or unicodedata.category(character) == "Zs"


def is_control(character: str) -> bool:
    return character not in "\t\n\r" and unicodedata.category(character).startswith("C")


def is_ideograph(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in IDEOGRAPH_RANGES)


def is_punctuation(character: str) -> bool:
    code = ord(character)
    ascii_symbol = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return ascii_symbol or unicodedata.category(character).startswith("P")


def word_pieces(word: str, vocabulary: Mapping[str, int]) -> list[str]:
    """The longest piece that fits, again and again; [UNK] where none does."""
    if len(word) > MAX_WORD_CHARACTERS:
        return ["[UNK]"]
    pieces: list[str] = []
    start = 0
    while start < len(word):
        end = len(word)
        while end > start and ("##" if start else "") + word[start:end] not in vocabulary:
            end -= 1
        if end == start:
            return ["[UNK]"]
        pieces.append(("##" if start else "") + word[start:end])
        start = end
    return pieces


def pairs(
    documents: Sequence[Sequence[list[str]]], index: int, max_len: int, rng: random.Random
) -> Iterator[tuple[list[str], list[str], int]]:
    """(A, B, is random next) of one document: create_pretraining_data's gathering, choosing and truncating."""
    document, room = documents[index], max_len - 3
    target = rng.randint(2, room) if rng.random() < 0.1 else room
    chunk: list[list[str]] = []
    i = 0
    while i < len(document):
        chunk.append(document[i])
        if i == len(document) - 1 or sum(map(len, chunk)) >= target:
            cut = rng.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
            a = [token for sentence in chunk[:cut] for token in sentence]
            b: list[str] = []
            is_random = len(chunk) == 1 or rng.random() < 0.5
            if is_random:
                other = next((o for o in (rng.randrange(len(documents)) for _ in range(10)) if o != index), index)
                for sentence in documents[other][rng.randrange(len(documents[other])) :]:
                    b += sentence
                    if len(a) + len(b) >= target:
                        break
                i -= len(chunk) - cut
            else:
                b = [token for sentence in chunk[cut:] for token in sentence]
            while len(a) + len(b) > room:
                longer = a if len(a) > len(b) else b
                longer.pop(0 if rng.random() < 0.5 else -1)
            yield a, b, int(is_random)
            chunk = []
        i += 1


def masked(tokens: Sequence[str], words: Sequence[str], rng: random.Random) -> tuple[list[str], list[int], list[str]]:
    """Tokens with 15% masked (80% [MASK], 10% random, 10% kept), where, and what stood there."""
    shown = list(tokens)
    places = [place for place, token in enumerate(tokens) if token not in ("[CLS]", "[SEP]")]
    rng.shuffle(places)
    chosen = sorted(places[: min(20, max(1, round(len(tokens) * 0.15)))])
    for place in chosen:
        if rng.random() < 0.8:
            shown[place] = "[MASK]"
        elif rng.random() < 0.5:
            shown[place] = rng.choice(words)
    return shown, chosen, [tokens[place] for place in chosen]


def write_samples(
    documents: Sequence[Sequence[str]], vocabulary: Mapping[str, int], file: TextIO, max_len: int = 128
) -> list[list[list[str]]]:
    """One padded record per sample, as JSON lines, of documents that are lists of sentences; returns their tokens."""
    rng, words = random.Random(1), list(vocabulary)
    tokens = [[tokenize(sentence, vocabulary) for sentence in document] for document in documents]
    kept = [[sentence for sentence in document if sentence] for document in tokens]
    kept = [document for document in kept if document]
    for index in range(len(kept)):
        for a, b, is_random in pairs(kept, index, max_len, rng):
            sample = ["[CLS]", *a, "[SEP]", *b, "[SEP]"]
            shown, places, labels = masked(sample, words, rng)
            padding = [0] * (max_len - len(sample))
            record = {
                "input_ids": [vocabulary[token] for token in shown] + padding,
                "input_mask": [1] * len(sample) + padding,
                "segment_ids": [0] * (len(a) + 2) + [1] * (len(b) + 1) + padding,
                "masked_lm_positions": places + [0] * (20 - len(places)),
                "masked_lm_ids": [vocabulary[label] for label in labels] + [0] * (20 - len(places)),
                "next_sentence_labels": [is_random],
            }
            file.write(json.dumps(record) + "\n")
    return tokens
