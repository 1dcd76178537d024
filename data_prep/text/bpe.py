"""Learning byte-level BPE of RoBERTa's kind: words are counted in parts of the text, as in `wordpiece.py`."""

from collections import Counter
from collections.abc import Mapping

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cloze.corpus.tokenizer import CorpusTokenizer, checked

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def words_of(pieces: Mapping[str, int]) -> Counter[str]:
    """How often each word comes, in characters that stand for bytes: of pieces that follow a space."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words: Counter[str] = Counter()
    for piece, count in pieces.items():
        for word, _ in splitter.pre_tokenize_str(f" {piece}") if piece else ():
            words[word] += count
    return words


def train_tokenizer(words: Mapping[str, int], vocab_size: int, min_frequency: int) -> CorpusTokenizer:
    """A BPE of `vocab_size` tokens from how often each word comes. Same counts, same tokenizer.

    Text is brought into NFC, as preparation does by itself; nothing is lower-cased, and nothing is unknown.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend = Tokenizer(models.BPE())
    backend.train_from_iterator((word for word in sorted(words) for _ in range(words[word])), trainer)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return checked(laid_out(backend), "the trained tokenizer")


def laid_out(backend: Tokenizer) -> Tokenizer:
    """<s> A </s> and <s> A </s> </s> B </s> without token types, as RoBERTa and XLM-R have it (Liu et al. 2019)."""
    cls, _, sep, _, mask = SPECIALS
    added = [AddedToken(name, lstrip=name == mask, special=True, normalized=False) for name in SPECIALS]
    backend.add_special_tokens(added)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} {sep} $B {sep}",
        special_tokens=[(name, backend.token_to_id(name)) for name in (cls, sep)],
    )
    return backend
