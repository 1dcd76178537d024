"""BERT's WordPiece: its special tokens have fixed names, its layout is BERT's whatever the file says."""

from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders

from cloze.corpus.kinds.base import Kind, Specials, bert_layout
from cloze.errors import UserError

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordPiece(Kind, name="wordpiece", model="WordPiece"):
    continuation = "##"

    def specials(self, backend: Tokenizer, given: Mapping[str, str], where: str) -> Specials:
        missing = [token for token in SPECIALS if backend.token_to_id(token) is None]
        if missing:
            raise UserError(
                f"{where}: has no {' '.join(missing)}; BERT needs {' '.join(SPECIALS)}: name another tokenizer"
            )
        return Specials(*SPECIALS)

    def prepare(self, backend: Tokenizer, specials: Specials) -> None:
        ids = {token: index for token in specials if (index := backend.token_to_id(token)) is not None}
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
        backend.post_processor = bert_layout(specials, ids)
        backend.decoder = decoders.WordPiece(prefix=self.continuation)

    def never_drawn(self, backend: Tokenizer, vocabulary: Mapping[str, int]) -> Iterable[int]:
        """None besides the five, as ever: a corpus made again must be the same."""
        return ()

    def token_of(self, backend: Tokenizer, word: str) -> str:
        return word

    def deciding(self, backend: Tokenizer, vocabulary: Mapping[str, int]) -> Any:
        model = backend.model
        return [model.unk_token, model.continuing_subword_prefix, model.max_input_chars_per_word]
