"""The tokenizer of a corpus: given, or trained on what the sample stage counted; made once, loaded by every process."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.tokenizer import CorpusTokenizer, load_tokenizer, save_tokenizer
from cloze.log import log
from data_prep.config import TokenizerConfig, TokenizerKind
from data_prep.plan import Plan, given_tokenizer, spelling_of
from data_prep.stages.base import temporary_path
from data_prep.stages.documents import source_of
from data_prep.stages.sample import SAMPLE, sampled_pieces, sampled_task
from data_prep.text import bpe, unigram, wordpiece
from data_prep.text.encoder import Encoder

Counted = tuple[Mapping[str, int], float]  # how often pieces come, and what each time weighs

_loaded: dict[
    Path, CorpusTokenizer
] = {}  # the one this process has made or loaded: that costs as much as encoding a MB


def tokenizer_directory(plan: Plan) -> Path:
    return plan.out / "tokenizer"


def tokenizer_in(directory: Path) -> CorpusTokenizer:
    """That of a corpus, once it is there."""
    if directory not in _loaded:
        _loaded.clear()
        _loaded[directory] = load_tokenizer(directory)
    return _loaded[directory]


def make_tokenizer(plan: Plan) -> TokenizerFacts:
    """Put the tokenizer that was given, or one trained on the samples, into `out/tokenizer`, once."""
    config, directory = plan.config.tokenizer, tokenizer_directory(plan)
    if not directory.is_dir():
        tokenizer = given_tokenizer(config) if config.path is not None else _trained(plan)
        temporary = temporary_path(plan, directory.name)
        temporary.mkdir(exist_ok=True)
        save_tokenizer(tokenizer, temporary, plan.config.max_len)
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another call was quicker, with the same
                raise
        _loaded.clear()
        _loaded[directory] = tokenizer
    return tokenizer_in(directory).facts


def has_short_cuts(plan: Plan) -> bool:
    """Whether the encoder has short cuts that pass its own check."""
    tokenizer = tokenizer_in(tokenizer_directory(plan))
    return Encoder(tokenizer.backend, tokenizer.vocabulary).cached


def _trained(plan: Plan) -> CorpusTokenizer:
    """A tokenizer of what the samples counted, each source's as often as a pass holds it."""
    most = max(source.weight for source in plan.training_sources)

    def counted() -> Iterator[Counted]:
        for number in range(SAMPLE.num_tasks(plan)):
            weight = plan.sources[source_of(plan, sampled_task(plan, number))].weight / most
            yield sampled_pieces(plan, number), weight

    return learned(plan.config.tokenizer, counted)


def learned(config: TokenizerConfig, counted: Callable[[], Iterable[Counted]]) -> CorpusTokenizer:
    """A tokenizer of the configured kind from how often pieces between spaces come, and what each count weighs."""
    return _LEARNERS[config.kind](config, counted)


def _word_piece(config: TokenizerConfig, counted: Callable[[], Iterable[Counted]]) -> CorpusTokenizer:
    letters: dict[str, float] = defaultdict(float)
    for pieces, _ in counted():
        for letter, count in wordpiece.count_letters(pieces).items():
            letters[letter] += count
    spelling, line = wordpiece.fitted(spelling_of(config), wordpiece.scripts_of(letters))
    if line:
        log.info(line)
    words = _weighted((wordpiece.words_of(pieces, spelling), weight) for pieces, weight in counted())
    return wordpiece.train_tokenizer(
        words,
        config.vocab_size,
        spelling,
        min_frequency=config.min_frequency,
        limit_alphabet=config.limit_alphabet,
    )


def _bpe(config: TokenizerConfig, counted: Callable[[], Iterable[Counted]]) -> CorpusTokenizer:
    words = _weighted((bpe.words_of(pieces), weight) for pieces, weight in counted())
    return bpe.train_tokenizer(words, config.vocab_size, config.min_frequency)


def _unigram(config: TokenizerConfig, counted: Callable[[], Iterable[Counted]]) -> CorpusTokenizer:
    words = _weighted((unigram.words_of(pieces), weight) for pieces, weight in counted())
    return unigram.train_tokenizer(words, config.vocab_size)


_LEARNERS = {TokenizerKind.wordpiece: _word_piece, TokenizerKind.bpe: _bpe, TokenizerKind.unigram: _unigram}


def _weighted(parts: Iterable[Counted]) -> dict[str, int]:
    words: dict[str, float] = defaultdict(float)
    for part, weight in parts:
        for word, count in part.items():
            words[word] += count * weight
    return {word: round(count) for word, count in words.items()}
