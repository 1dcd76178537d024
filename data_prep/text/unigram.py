"""Learning a Unigram of XLM-R's kind (Kudo 2018): words are counted in parts of the text, as in `wordpiece.py`."""

import json
from collections import Counter
from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cloze.corpus.kinds.bpe import METASPACE
from cloze.corpus.tokenizer import CorpusTokenizer, checked
from data_prep.text.bpe import SPECIALS, laid_out

_DIGITS = 4  # of a score: sums in an order of the library's own differ beyond


def words_of(pieces: Mapping[str, int]) -> Counter[str]:
    """How often each word comes, what stands between spaces after NFKC."""
    normalizer, splitter = normalizers.NFKC(), pre_tokenizers.Metaspace()
    words: Counter[str] = Counter()
    for piece, count in pieces.items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(piece)) if piece else ():
            words[word] += count
    return words


def train_tokenizer(words: Mapping[str, int], vocab_size: int) -> CorpusTokenizer:
    """A Unigram of at most `vocab_size` tokens from how often each word comes. Same counts, same tokens."""
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), unk_token=SPECIALS[3], show_progress=False
    )
    learner = Tokenizer(models.Unigram())
    learner.train_from_iterator((word for word in sorted(words) for _ in range(words[word])), trainer)
    state = json.loads(learner.model.__getstate__())
    scores = {token: round(score, _DIGITS) for token, score in state["vocab"]}
    pieces = sorted(scores.keys() - {*SPECIALS}, key=lambda token: (-scores[token], token))
    vocabulary = [(token, 0.0) for token in SPECIALS] + [(token, scores[token]) for token in pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIALS.index("<unk>"), byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement=METASPACE, prepend_scheme="always")
    return checked(laid_out(backend), "the trained tokenizer")
