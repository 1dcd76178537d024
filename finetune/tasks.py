"""The tasks by name: what family they are of, which columns they read, which score they are judged by. Pure.

The files of a benchmark and the hub's copy of it name their columns differently, hence the layouts. The scores are
those of GLUE (Wang et al. 2019, table 1) and CLUE (Xu et al. 2020, table 2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

Layout = tuple[str, ...]  # columns: the text, perhaps a second text, the label


class Family(Enum):
    classification = "classification"  # of a sentence or a pair
    regression = "regression"
    tokens = "tokens"  # a tag for each word
    qa = "qa"  # the answer is a span of the context
    summarization = "summarization"  # the summary is some of the sentences


@dataclass(frozen=True, kw_only=True)
class Task:
    family: Family
    score: str  # what early stopping, the choice among seeds and the suites look at; higher is better
    layouts: Sequence[Layout] = ()  # the first whose columns are all there
    hub: str | None = None  # NAME@CONFIG
    dev_split: str = "validation"
    mismatched_split: str | None = None  # of texts unlike those of training, scored beside dev
    header: Layout | None = None  # columns of its files where they have no header
    has_short_rows: bool = False  # its own file has some: they are left out, as by everyone
    labels: Sequence[str] = ()  # in the order of their ids, which stand in some copies instead; (): those of data.train
    label_range: tuple[float, float] | None = None  # of a regression
    unlabelled: Sequence[str] = ()  # labels which say that annotators did not agree: such examples are left out
    epochs: int = 3  # in a suite: a small set needs more (Mosbach et al. 2021)


_SINGLE, _PAIR = ("sentence", "label"), ("sentence1", "sentence2", "label")
_GLUE, _CLUE = "nyu-mll/glue", "clue/clue"
_CLASSES = Family.classification
_ENTAILED, _NOT_ENTAILED = "entailment", "not_entailment"
_NEWS = (100, 101, 102, 103, 104, 106, 107, 108, 109, 110, 112, 113, 114, 115, 116)

TASKS: Mapping[str, Task] = {
    "classification": Task(family=_CLASSES, score="accuracy", layouts=(_SINGLE, ("text", "label"), _PAIR)),
    "regression": Task(family=Family.regression, score="pearson", layouts=(_SINGLE, _PAIR, (*_PAIR[:2], "score"))),
    "ner": Task(family=Family.tokens, score="f1"),
    "squad": Task(family=Family.qa, score="f1", hub="rajpurkar/squad"),
    "summarization": Task(family=Family.summarization, score="rougeL"),
    # GLUE; where F1 counts, it is of the second label
    "cola": Task(
        family=_CLASSES, score="matthews", labels=("unacceptable", "acceptable"), hub=f"{_GLUE}@cola",
        layouts=(_SINGLE,), header=("source", "label", "star", "sentence"), epochs=5,
    ),
    "sst2": Task(
        family=_CLASSES, score="accuracy", labels=("negative", "positive"), hub=f"{_GLUE}@sst2", layouts=(_SINGLE,)
    ),
    "mrpc": Task(
        family=_CLASSES, score="f1", labels=("not_equivalent", "equivalent"), hub=f"{_GLUE}@mrpc",
        layouts=(_PAIR, ("#1 String", "#2 String", "Quality")), epochs=5,
    ),
    "stsb": Task(
        family=Family.regression, score="pearson", label_range=(0, 5), hub=f"{_GLUE}@stsb",
        layouts=((*_PAIR[:2], "score"), _PAIR), epochs=5,
    ),
    "qqp": Task(
        family=_CLASSES, score="f1", labels=("not_duplicate", "duplicate"), hub=f"{_GLUE}@qqp", has_short_rows=True,
        layouts=(("question1", "question2", "label"), ("question1", "question2", "is_duplicate")),
    ),
    "mnli": Task(
        family=_CLASSES, score="accuracy", labels=(_ENTAILED, "neutral", "contradiction"), hub=f"{_GLUE}@mnli",
        dev_split="validation_matched", mismatched_split="validation_mismatched", unlabelled=("-", "-1"),
        layouts=(("premise", "hypothesis", "label"), (*_PAIR[:2], "gold_label"), _PAIR),
    ),
    "qnli": Task(
        family=_CLASSES, score="accuracy", labels=(_ENTAILED, _NOT_ENTAILED), hub=f"{_GLUE}@qnli",
        layouts=(("question", *_SINGLE),),
    ),
    "rte": Task(
        family=_CLASSES, score="accuracy", labels=(_ENTAILED, _NOT_ENTAILED), hub=f"{_GLUE}@rte", layouts=(_PAIR,),
        epochs=10,
    ),
    "wnli": Task(
        family=_CLASSES, score="accuracy", labels=(_NOT_ENTAILED, _ENTAILED), hub=f"{_GLUE}@wnli", layouts=(_PAIR,)
    ),
    # Chinese
    "tnews": Task(
        family=_CLASSES, score="accuracy", labels=tuple(map(str, _NEWS)), hub=f"{_CLUE}@tnews", layouts=(_SINGLE,)
    ),
    "ocnli": Task(
        family=_CLASSES, score="accuracy", labels=("neutral", _ENTAILED, "contradiction"), hub=f"{_CLUE}@ocnli",
        layouts=(_PAIR,), unlabelled=("-", "-1"),
    ),
    "chnsenticorp": Task(
        family=_CLASSES, score="accuracy", labels=("negative", "positive"), hub="lansinuote/ChnSentiCorp",
        layouts=(("text_a", "label"), ("text", "label")), epochs=5,
    ),
}  # fmt: skip

SUITES: Mapping[str, Sequence[str]] = {
    "glue": ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"),
    "clue": ("tnews", "ocnli", "chnsenticorp"),
}
