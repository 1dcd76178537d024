"""BPE: byte-level as RoBERTa's and ModernBERT's, or of characters, a space written as U+2581, as mmBERT's."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders

from cloze.corpus.kinds.base import Kind, Specials
from cloze.errors import UserError

SPACE, METASPACE = "\u0120", "\u2581"  # how byte-level BPE and SentencePiece write a space


class Bpe(Kind, name="bpe", model="BPE"):
    def specials(self, backend: Tokenizer, given: Mapping[str, str], where: str) -> Specials:
        if backend.model.dropout:
            raise UserError(
                f"{where}: its BPE drops merges at random (dropout {backend.model.dropout:g}), so that a text has many "
                "ids; set dropout to null there"
            )
        return super().specials(backend, given, where)

    def unknown(self, backend: Tokenizer) -> str | None:
        token: str | None = backend.model.unk_token
        return token

    def may_be_unknown(self, backend: Tokenizer) -> bool:
        return not (is_byte_level(backend) or backend.model.byte_fallback)

    def prepare(self, backend: Tokenizer, specials: Specials) -> None:
        super().prepare(backend, specials)
        if backend.decoder is None and is_byte_level(backend):
            backend.decoder = decoders.ByteLevel()

    def token_of(self, backend: Tokenizer, word: str) -> str:
        if not is_byte_level(backend):
            return super().token_of(backend, word)
        letters = {byte: letter for letter, byte in byte_of().items()}
        return SPACE + "".join(letters[byte] for byte in word.encode())

    def place(self, backend: Tokenizer, model: dict[str, Any], placed: Mapping[str, int]) -> None:
        """A word that is a token is then that token: no merges lead to the new ones."""
        super().place(backend, model, placed)
        model["ignore_merges"] = True

    def begins_word(self, token: str) -> bool:
        return token.startswith((SPACE, METASPACE))

    def readable(self, token: str) -> str:
        known = byte_of()
        if all(letter in known for letter in token):
            token = bytes(known[letter] for letter in token).decode(errors="replace")
        return token.replace(METASPACE, " ").strip(" ") or token


def is_byte_level(backend: Tokenizer) -> bool:
    """Whether the tokens are of bytes, each written as a character, so that no text is unknown."""
    return "ByteLevel(" in repr(backend.pre_tokenizer)


@lru_cache(maxsize=1)
def byte_of() -> dict[str, int]:
    """The byte that each character of byte-level tokens stands for (Radford et al. 2019, their bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
