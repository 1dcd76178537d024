"""A prepared corpus: its manifest, shards, masks and tokenizer. `open_corpus` is how others look into one.

Stands on numpy and tokenizers; knows neither torch nor a command line.
"""

from typing import TYPE_CHECKING

from cloze.lazy import exports

if TYPE_CHECKING:
    from cloze.corpus.reader import Corpus, MaskedSplit, Sample, open_corpus

__all__ = ["Corpus", "MaskedSplit", "Sample", "open_corpus"]
__getattr__ = exports(__name__, dict.fromkeys(__all__, "cloze.corpus.reader"))
