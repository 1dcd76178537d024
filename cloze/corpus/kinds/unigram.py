"""Unigram of SentencePiece, as XLM-R's: a piece that begins with U+2581 begins after a space."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from cloze.corpus.kinds.base import Kind, Specials
from cloze.corpus.kinds.bpe import METASPACE
from cloze.errors import UserError


class Unigram(Kind, name="unigram", model="Unigram"):
    def specials(self, backend: Tokenizer, given: Mapping[str, str], where: str) -> Specials:
        if self.unknown(backend) is None:  # it could not even be asked how it lays texts out
            raise UserError(f"{where}: has no unknown token (unk_id of its model); name one there")
        return super().specials(backend, given, where)

    def unknown(self, backend: Tokenizer) -> str | None:
        index = json.loads(backend.model.__getstate__())["unk_id"]
        token: str | None = None if index is None else backend.id_to_token(index)
        return token

    def token_of(self, backend: Tokenizer, word: str) -> str:
        return METASPACE + word

    def place(self, backend: Tokenizer, model: dict[str, Any], placed: Mapping[str, int]) -> None:
        """A new piece scores as its old ones do on average, which is more than they do together."""
        scores = dict(model["vocab"])
        rows = [tuple(row) for row in model["vocab"]]
        for token, index in sorted(placed.items(), key=lambda item: item[1]):
            known = [scores.get(piece.value, min(scores.values())) for piece in backend.model.tokenize(token)]
            row = (token, sum(known) / len(known))
            rows[index : index + 1] = [row]  # at the end: one more
        model["vocab"] = rows

    def begins_word(self, token: str) -> bool:
        return token.startswith(METASPACE)

    def readable(self, token: str) -> str:
        return token.replace(METASPACE, " ").strip(" ") or token
