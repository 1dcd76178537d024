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
    header: Layout | None = None  # columns of its files where they have no header
    num_labels: int | None = None  # None: as many as data.train has
    label_range: tuple[float, float] | None = None  # of a regression
    unlabelled: Sequence[str] = ()  # labels which say that annotators did not agree: such examples are left out


_SINGLE, _PAIR = ("sentence", "label"), ("sentence1", "sentence2", "label")
_GLUE, _CLUE = "nyu-mll/glue", "clue/clue"
_CLASSES = Family.classification

TASKS: Mapping[str, Task] = {
    "classification": Task(family=_CLASSES, score="accuracy", layouts=(_SINGLE, ("text", "label"), _PAIR)),
    "regression": Task(family=Family.regression, score="pearson", layouts=(_SINGLE, _PAIR, (*_PAIR[:2], "score"))),
    "ner": Task(family=Family.tokens, score="f1"),
    "squad": Task(family=Family.qa, score="f1", hub="rajpurkar/squad"),
    "summarization": Task(family=Family.summarization, score="rougeL"),
    # GLUE
    "cola": Task(
        family=_CLASSES, score="matthews", num_labels=2, hub=f"{_GLUE}@cola", layouts=(_SINGLE,),
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": Task(family=_CLASSES, score="accuracy", num_labels=2, hub=f"{_GLUE}@sst2", layouts=(_SINGLE,)),
    "mrpc": Task(
        family=_CLASSES, score="f1", num_labels=2, hub=f"{_GLUE}@mrpc",
        layouts=(_PAIR, ("#1 String", "#2 String", "Quality")),
    ),
    "stsb": Task(
        family=Family.regression, score="pearson", label_range=(0, 5), hub=f"{_GLUE}@stsb",
        layouts=((*_PAIR[:2], "score"), _PAIR),
    ),
    "qqp": Task(
        family=_CLASSES, score="f1", num_labels=2, hub=f"{_GLUE}@qqp",
        layouts=(("question1", "question2", "label"), ("question1", "question2", "is_duplicate")),
    ),
    "mnli": Task(
        family=_CLASSES, score="accuracy", num_labels=3, hub=f"{_GLUE}@mnli", dev_split="validation_matched",
        layouts=(("premise", "hypothesis", "label"), (*_PAIR[:2], "gold_label"), _PAIR), unlabelled=("-", "-1"),
    ),
    "qnli": Task(
        family=_CLASSES, score="accuracy", num_labels=2, hub=f"{_GLUE}@qnli", layouts=(("question", *_SINGLE),)
    ),
    "rte": Task(family=_CLASSES, score="accuracy", num_labels=2, hub=f"{_GLUE}@rte", layouts=(_PAIR,)),
    "wnli": Task(family=_CLASSES, score="accuracy", num_labels=2, hub=f"{_GLUE}@wnli", layouts=(_PAIR,)),
    # Chinese
    "tnews": Task(family=_CLASSES, score="accuracy", num_labels=15, hub=f"{_CLUE}@tnews", layouts=(_SINGLE,)),
    "ocnli": Task(
        family=_CLASSES, score="accuracy", num_labels=3, hub=f"{_CLUE}@ocnli", layouts=(_PAIR,), unlabelled=("-", "-1")
    ),
    "chnsenticorp": Task(
        family=_CLASSES, score="accuracy", num_labels=2, hub="lansinuote/ChnSentiCorp",
        layouts=(("text_a", "label"), ("text", "label")),
    ),
}  # fmt: skip

SUITES: Mapping[str, Sequence[str]] = {
    "glue": ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"),
    "clue": ("tnews", "ocnli", "chnsenticorp"),
}
