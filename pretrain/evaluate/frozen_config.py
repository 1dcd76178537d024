"""The schemas of conf/evaluate/probes.yaml and words.yaml: how a frozen encoder is looked at."""

from dataclasses import dataclass
from enum import Enum

from cloze.schema import doc, require


class Pooling(Enum):
    """How the states of a text's tokens become one vector."""

    mean = "mean"  # over all tokens, [CLS] and [SEP] too, as sentence-transformers has it
    cls = "cls"  # that of [CLS]


@dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    model: str = doc("directory made by `python -m pretrain.export`, or any encoder in Hugging Face's format")
    data: str = doc("directory that holds the tasks' files, up to two levels down")
    tasks: list[str] | None = doc(
        "some of sst2 cola mr subj trec mrpc stsb stsb_zh ner; null: those whose files are there"
    )
    pooling: Pooling = doc("vector of a text: mean of its tokens' states, or cls, that of [CLS]")
    samples: int = doc("examples of a task that are learned from, drawn at random, and at most as many that are tested")
    words: int = doc("the same in words, of tasks that tag words")
    folds: int = doc("of the cross-validation where a task has no split of its own")
    regularization: float = doc("weight of the squared coefficients, against summed losses and standardized states")
    random_seeds: int = doc("compare with random weights of the same architecture, so many times; 0: do not")
    max_len: int = doc("tokens per text at most; longer ones are cut")
    seed: int = doc("of what is drawn: examples, folds, random weights, intervals")
    out: str | None = doc("JSON file to write, with everything that is printed and more digits")

    def __post_init__(self) -> None:
        require(self.samples >= 20, f"samples={self.samples}: must be at least 20")
        require(self.words >= 100, f"words={self.words}: must be at least 100")
        require(self.folds >= 2, f"folds={self.folds}: must be at least 2")
        require(self.regularization > 0, f"regularization={self.regularization}: must be positive")
        require(self.random_seeds >= 0, f"random_seeds={self.random_seeds}: cannot be negative")
        require(self.max_len >= 5, f"max_len={self.max_len}: must be at least 5")
        require(0 <= self.seed < 2**31, f"seed={self.seed}: must be in [0, 2^31)")


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    model: str = doc("directory made by `python -m pretrain.export`, or any encoder in Hugging Face's format")
    words: list[str] = doc("words whose nearest neighbours are shown")
    top: int = doc("neighbours of each word")
    similarity: list[str] | None = doc(
        "files of word pairs to compare with people's judgement: two words and a number, apart by tabs; "
        "null: WordSim-353 and SimLex-999 where gensim, which brings them, is installed"
    )
    random_seeds: int = doc("compare with random weights, so many times; 0: do not")
    seed: int = doc("of what is drawn: random weights, intervals")

    def __post_init__(self) -> None:
        require(bool(self.words), "words=[]: name some, such as words=[king,paris]")
        require(self.top >= 1, f"top={self.top}: must be at least 1")
        require(self.random_seeds >= 0, f"random_seeds={self.random_seeds}: cannot be negative")
        require(0 <= self.seed < 2**31, f"seed={self.seed}: must be in [0, 2^31)")
