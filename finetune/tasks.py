"""What a task and a family of tasks are. Pure; the tasks themselves stand in families/, each beside what learns it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.readers import Row, read_rows

if TYPE_CHECKING:  # train takes seconds to import, and config needs the tasks
    from finetune.config import FinetuneConfig
    from finetune.prediction.trained import Predictor, Trained
    from finetune.train import Prepared

Layout = tuple[str, ...]  # columns: the text, perhaps a second text, the label


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tasks that are learned in the same way."""

    prepare: "Callable[[FinetuneConfig], Prepared]"  # imports what takes seconds inside: --help needs none of it
    read: "Callable[[str, str, FinetuneConfig], list[Row]]" = read_rows  # of (text of a file, name for errors, config)
    # of a row what must not be on both sides where data.dev is cut from data.train
    text: "Callable[[Row, FinetuneConfig], Any]" = lambda row, config: row.columns
    usage: str = ""  # for the card: code that loads the model {name} and answers about {texts}
    tag: str = "feature-extraction"  # the hub's name of such models
    predictor: "Callable[[Trained, Row], Predictor] | None" = None  # for rows like the first; None: vectors
    options: frozenset[str] = frozenset()  # keys, not all tasks': loss head data.mismatched …


@dataclass(frozen=True, kw_only=True)
class Task:
    family: Family
    score: str  # what early stopping, the choice among seeds and the suites look at; higher is better
    layouts: Sequence[Layout] = ()  # the first whose columns are all there
    hub: str | None = None  # NAME@CONFIG
    dev_split: str = "validation"
    mismatched_split: str | None = None  # of texts unlike those of training, scored beside dev
    header: Layout | None = None  # columns of its files where they have no header
    labels: Sequence[str] = ()  # in the order of their ids, which stand in some copies instead; (): those of data.train
    label_range: tuple[float, float] | None = None  # of a regression
    unlabelled: Sequence[str] = ()  # labels which say that annotators did not agree: such examples are left out
    submits_names: bool = False  # whether GLUE's submission files have the labels' names, not their numbers
    suite: str | None = None  # which benchmark it belongs to
    epochs: int = 3  # in a suite: a small set needs more (Mosbach et al. 2021)
