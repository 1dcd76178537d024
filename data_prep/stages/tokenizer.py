"""The tokenizer of a corpus: given, or trained on what the sample stage counted; made once, loaded by every process."""

from collections import defaultdict
from pathlib import Path

from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.tokenizer import WordPiece, load_tokenizer, save_tokenizer
from cloze.log import log
from data_prep.plan import Plan, given_tokenizer, spelling_of
from data_prep.stages.base import temporary_path
from data_prep.stages.documents import source_of
from data_prep.stages.sample import SAMPLE, sampled_pieces, sampled_task
from data_prep.text.wordpiece import count_letters, fitted, scripts_of, train_tokenizer, words_of

_loaded: dict[Path, WordPiece] = {}  # the one this process has made or loaded: that costs as much as encoding a MB


def tokenizer_directory(plan: Plan) -> Path:
    return plan.out / "tokenizer"


def tokenizer_in(directory: Path) -> WordPiece:
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


def _trained(plan: Plan) -> WordPiece:
    """A tokenizer of the words that the samples counted, each source's as often as a pass holds them."""
    config = plan.config.tokenizer
    most = max(source.weight for source in plan.training_sources)
    letters: dict[str, float] = defaultdict(float)
    for number in range(SAMPLE.num_tasks(plan)):
        for letter, count in count_letters(sampled_pieces(plan, number)).items():
            letters[letter] += count
    spelling, line = fitted(spelling_of(config), scripts_of(letters))
    if line:
        log.info(line)
    words: dict[str, float] = defaultdict(float)
    for number in range(SAMPLE.num_tasks(plan)):
        weight = plan.sources[source_of(plan, sampled_task(plan, number))].weight / most
        for word, count in words_of(sampled_pieces(plan, number), spelling).items():
            words[word] += count * weight
    return train_tokenizer(
        {word: round(count) for word, count in words.items()},
        config.vocab_size,
        spelling,
        min_frequency=config.min_frequency,
        limit_alphabet=config.limit_alphabet,
    )
