"""Sentences -> token ids: what `tokenizers` gives, several times faster.

BERT's pre-tokenizer breaks at every space and around punctuation, so the pieces between those are encoded apart and
remembered: a dictionary from piece to entry, and a flat array of the entries' ids that numpy gathers from. A piece not
seen before goes word by word through the WordPiece model if it is printable ASCII, else to `tokenizers` whole. Text
that spells "[SEP]" is text.

Knows one process's cache, which outlives tasks; knows nothing of documents.

Shapes: S sentences, P pieces of them between spaces, T tokens, all one after another.
"""

import json
import re
from array import array
from collections.abc import Collection, Sequence
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_prep.ragged import Ints, offsets, ranges

Ids = npt.NDArray[np.uint32]

_MAX_PIECES = 150_000  # remembered, at some 200 bytes each; beyond that it starts afresh
_MAX_CHARACTERS = 40  # longer pieces are not remembered: they seldom come twice

# The ideographs around which BERT puts spaces (Devlin et al. 2019, multilingual model).
IDEOGRAPHS = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\U0002f800-\U0002fa1f"
)
_IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")
# Punctuation that would otherwise make many pieces of one word. BERT breaks at it anyway, so a space changes nothing.
_MARKS = (*((mark, f" {mark}") for mark in ",.;:!?)"), *((mark, f" {mark} ") for mark in "\"'-(_"))
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9]")

# Encoded both ways at start-up: everything that the short cuts assume about a tokenizer.
PROBES = (
    "Hello, World! It's 3.14 o'clock -- don't_stop [SEP] [MASK][CLS] a[PAD]b ##ing un##able me@x.org $5+5=10 ~`^|<>",
    "Caf\u00e9 na\u00efve \u00c5NGSTR\u00d6M \u0130stanbul Stra\u00dfe \ufb01n e\u0301a \u0301b \u00bd\u00b2 \u20ac5",
    "\u2018q\u2019 \u201cq\u201d\u2014don\u2019t\u2026 \u0418\u0432\u0430\u043d \u0395\u03bb\u03ac\u03c2 \u03a3\u03a3",
    "\u6211\u7231\u5317\u4eac\u3002ABC\u4e2d\u6587abc \u6771\u4eac\u30bf\u30ef\u30fc \uf900\u0301x \ud55c\uad6d\uc5b4",
    "tab\there\xa0nbsp\u3000wide zero\u200bwidth soft\xadhyphen \ufffd bom\ufeff \x07bell  two   spaces ",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d \u0939\u093f\u0928\u094d \U0001f600\U0001f1e9 \U00020000\U0002b820",
    "x" + "y" * 120 + " " + "-" * 50,
)


class Encoder:
    """Encodes sentences without special tokens. One per process: it remembers what it has seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Check the short cuts against `tokenizer`; if they would change a single id, `cached` is False."""
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._model = tokenizer.model
        settings = json.loads(tokenizer.to_str())
        normalizer = settings["normalizer"] or {}
        self._lowercase = bool(normalizer.get("lowercase"))
        self.spaces_ideographs = bool(normalizer.get("handle_chinese_chars"))
        self._forget_pieces()
        self.cached = (
            normalizer.get("type") == "BertNormalizer"
            and (settings["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer"
            and all(token["special"] for token in settings["added_tokens"])
            and self._agrees()
        )

    def encode(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        """Ids of all sentences (u32 [T]) and the length of each (int64 [S]).

        Call it with some 100 KB of text at a time: it needs about 50 bytes per character while it works.
        """
        if not sentences:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        return self._gather(sentences) if self.cached else self._reference(sentences)

    def _gather(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        if len(self._entries) > _MAX_PIECES:
            self._forget_pieces()
        text = "\n".join([self._spaced(s) for s in sentences])
        for mark, spaced in _MARKS:
            text = text.replace(mark, spaced)
        pieces_S = np.fromiter((line.count(" ") + 1 for line in text.split("\n")), np.int64, len(sentences))
        pieces = text.replace("\n", " ").split(" ")
        entries_P = np.fromiter(map(self._entries.get, pieces, repeat(-1)), np.int64, len(pieces))
        missing = np.flatnonzero(entries_P < 0).tolist()
        fresh = self._encode_pieces({pieces[i] for i in missing}) if missing else {}
        for piece, ids in fresh.items():
            if len(piece) <= _MAX_CHARACTERS:
                self._entries[piece] = self._append(ids)
        num_entries, num_ids = len(self._starts), len(self._ids)
        passing = {piece: self._append(ids) for piece, ids in fresh.items() if len(piece) > _MAX_CHARACTERS}
        for i in missing:
            entry = self._entries.get(pieces[i])
            entries_P[i] = passing[pieces[i]] if entry is None else entry

        lengths_P = np.frombuffer(self._lengths, np.int64)[entries_P]
        starts_P = np.frombuffer(self._starts, np.int64)[entries_P]
        ids_T = np.frombuffer(self._ids, np.uint32)[ranges(starts_P, lengths_P)]
        del self._starts[num_entries:], self._lengths[num_entries:], self._ids[num_ids:]
        return ids_T, np.diff(offsets(lengths_P)[offsets(pieces_S)])

    def _spaced(self, sentence: str) -> str:
        """With spaces around ideographs, where BERT puts them, and without line breaks, which are spaces to BERT."""
        if self.spaces_ideographs and not sentence.isascii():
            sentence = _IDEOGRAPH.sub(r" \g<0> ", sentence)
        return sentence.replace("\n", " ") if "\n" in sentence else sentence

    def _encode_pieces(self, pieces: Collection[str]) -> dict[str, Sequence[int]]:
        plain = [piece for piece in pieces if piece.isascii() and piece.isprintable()]
        result: dict[str, Sequence[int]] = {piece: self._ascii(piece) for piece in plain}
        others = [piece for piece in pieces if piece not in result]
        if others:
            encodings = self._tokenizer.encode_batch(others, add_special_tokens=False)
            result.update(zip(others, (encoding.ids for encoding in encodings), strict=True))
        return result

    def _ascii(self, piece: str) -> list[int]:
        lowered = piece.lower() if self._lowercase else piece
        return [token.id for word in _ASCII_WORD.findall(lowered) for token in self._model.tokenize(word)]

    def _append(self, ids: Sequence[int]) -> int:
        self._starts.append(len(self._ids))
        self._lengths.append(len(ids))
        self._ids.extend(ids)
        return len(self._starts) - 1

    def _forget_pieces(self) -> None:
        self._entries: dict[str, int] = {}
        self._starts, self._lengths, self._ids = array("q"), array("q"), array("I")

    def _reference(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        encodings = self._tokenizer.encode_batch(list(sentences), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths_S = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.uint32, int(lengths_S.sum())), lengths_S

    def _agrees(self) -> bool:
        for probes in (PROBES, PROBES[::-1]):  # seen for the first time, and remembered
            ours, reference = self._gather(probes), self._reference(probes)
            if not (np.array_equal(ours[0], reference[0]) and np.array_equal(ours[1], reference[1])):
                return False
        return True
