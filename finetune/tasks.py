"""What a task and a family of tasks are, what is asked of them, and what they make of it. Imports no torch.

The tasks themselves stand in families/, each beside what learns it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloze.schema import doc, require
from finetune.keys import (
    Adversary,
    AdversaryConfig,
    DataConfig,
    DistillConfig,
    EmbeddingConfig,
    Head,
    Init,
    LogConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    Precision,
    WandbConfig,
)
from finetune.predictor import Predictor, Trained
from finetune.readers import Columns, Layout, Row, read_rows
from pretrain.evaluate.frozen_config import Pooling

Scores = dict[str, float]
Features = Sequence[dict[str, Any]]

IGNORED = -100  # label of positions that have none


@dataclass(frozen=True, kw_only=True)
class TaskConfig(ABC):
    """What a fine-tuning is asked for. Which tasks there are `finetune.config` knows, which stands on the families."""

    task: str
    model: str = doc("directory made by `python -m pretrain.export`, or any BERT in Hugging Face's format")
    out: str = doc("directory to write: the model, its tokenizer and metrics.json; must be new or empty")
    init: Init = doc("start from the model's weights, or, to compare, from random ones of the same architecture")
    seed: int = doc("seed of the new layers, the order of the samples and dropout")
    num_seeds: int = doc("train with seed, seed + 1, …; metrics.json has mean and deviation, `out` the best model")
    data: DataConfig
    epochs: int = doc("passes over data.train")
    patience: int = doc(
        "stop after so many epochs without a better score on data.dev, and keep the best; 0: never stop"
    )
    batch_size: int = doc("samples per optimizer step on each device")
    precision: Precision = doc("of the matrix products in training: fp32, or bf16, faster on GPUs")
    max_len: int = doc("tokens per sample at most; longer ones are cut, or for questions slid over")
    stride: int = doc("tokens that neighbouring windows of a long context share (question answering)")
    top_sentences: int = doc("sentences in a summary (summarization)")
    dropout: float | None = doc("of hidden states and attention while fine-tuning; null: what the model has")
    head: Head = doc("of token classification: linear or crf")
    pooling: Pooling | None = doc(
        "what the head of a classification or regression reads: cls, or the mean of the tokens' states; null: what the "
        "model's own head does, [CLS] of most"
    )
    head_epochs: int = doc(
        "epochs in which pooler and head learn alone, before all learns (Kumar et al. 2022); 0: none"
    )
    reinit_layers: int = doc(
        "the pooler and so many of the highest layers begin with new random weights (Zhang et al. 2021); 0: the pooler "
        "alone; -1: none"
    )
    freeze_layers: int = doc("embeddings and so many lowest layers keep their weights; -1: everything is trained")
    optim: OptimConfig
    embedding: EmbeddingConfig
    loss: LossConfig
    adversary: AdversaryConfig
    lora: LoraConfig
    distill: DistillConfig
    log: LogConfig
    wandb: WandbConfig

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "num_seeds", "stride", "top_sentences"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        require(self.max_len >= 5, f"max_len={self.max_len}: must be at least 5")
        require(0 <= self.seed < 2**32 - self.num_seeds, f"seed={self.seed}: must be in [0, 2^32)")
        require(self.patience >= 0, f"patience={self.patience}: cannot be negative")
        for key in ("freeze_layers", "reinit_layers"):
            require(getattr(self, key) >= -1, f"{key}={getattr(self, key)}: must be at least -1")
        require(self.head_epochs >= 0, f"head_epochs={self.head_epochs}: cannot be negative")
        require(self.dropout is None or 0 <= self.dropout < 1, f"dropout={self.dropout}: must be in [0, 1)")
        self._techniques_fit()

    @property
    @abstractmethod
    def definition(self) -> "Task":
        """What `task` is."""

    @property
    def columns(self) -> Columns:
        """Those to read."""
        return Columns(self.data.columns, self.definition.layouts, self.definition.header)

    def _techniques_fit(self) -> None:
        """Refuse what the task has no use for, rather than ignore it."""
        useful, crf = self.definition.family.options, self.head is Head.crf
        require("head" in useful or not crf, f"head=crf: task={self.task} has no tags; leave head=linear")
        tags = "data.repair_tags" in useful or not self.data.repair_tags
        require(tags, f"data.repair_tags: task={self.task} has no tags; leave it false")
        why = "head=crf" if crf else f"task={self.task}"
        own_loss = crf or "loss" not in useful
        require(self.loss.is_plain or not own_loss, f"loss: {why} has a loss of its own; leave loss.* at its defaults")
        vectors = "embedding" in useful
        pools, instead = (
            "pooling" in useful or self.pooling is None,
            "set embedding.pooling" if vectors else "leave it null",
        )
        require(pools, f"pooling: task={self.task} is no classification or regression; {instead}")
        require(not (vectors and self.head_epochs), f"head_epochs: task={self.task} has no head; leave it 0")
        unset = self.embedding.pooling is None and self.embedding.temperature is None
        require(vectors or unset, f"embedding: task={self.task} makes no vectors; leave embedding.* null")
        distills = self.distill.teacher is not None
        require(not (distills and vectors), f"distill.teacher: task={self.task} has no teacher; leave it null")
        require(not (distills and crf), "distill.teacher: a CRF cannot be distilled; leave head=linear")
        single = "data.mismatched" in useful or self.data.mismatched is None
        require(single, f"data.mismatched: task={self.task} has none; leave it null")
        require(not (distills and self.loss.r_drop), "distill.teacher: excludes loss.r_drop; set one of them")
        frozen_words = self.lora.rank > 0 or self.freeze_layers >= 0
        disturbed = self.adversary.kind is not Adversary.none
        require(
            not (disturbed and frozen_words), "adversary.kind: needs trained embeddings; no lora.rank, no freeze_layers"
        )
        frozen = self.lora.rank > 0 and self.freeze_layers >= 0
        require(not frozen, "lora.rank: freezes the whole encoder already; leave freeze_layers at -1")
        anew = self.lora.rank > 0 and self.reinit_layers >= 0
        require(not anew, "lora.rank: would leave new random weights as they are; leave reinit_layers at -1")


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A set of examples that a model answers. From its predictions and the model `decide` tells an answer for each, as
    JSON has it, and `score` how good these are.
    """

    features: Features
    decide: Callable[[Any, Any], Sequence[Any]]
    score: Callable[[Sequence[Any]], Scores]
    shown: Sequence[dict[str, Any]]  # texts and right answers, for the file of answers
    guess: Sequence[Any]  # what is commonest, or comes first, for each: an answer that takes no model
    # of predictions and answers how wrong each answer is: 0 is right; None: nobody says
    wrong: Callable[[Any, Sequence[Any]], Sequence[float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A task as the Trainer takes it."""

    tokenizer: Any
    make_model: Callable[[], Any]
    train: Features
    dev: EvaluationSet
    collate: Any
    more: Mapping[str, EvaluationSet] = field(default_factory=dict)  # test, mismatched: scores begin with the name
    loss: Callable[[Any, Mapping[str, Any]], Any] | None = None  # of outputs and inputs; None: the model tells its own
    label_columns: Sequence[str] = ("labels",)
    num_labels: int | None = None  # None: no labels to weigh
    teacher: Any = None
    facts: dict[str, Any] = field(default_factory=dict)  # for metrics.json


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tasks that are learned in the same way."""

    prepare: Callable[[TaskConfig], Prepared]  # imports what takes seconds inside: --help needs none of it
    read: Callable[[str, str, Columns], list[Row]] = read_rows  # of the text of a file and its name
    # of a row what must not be on both sides where data.dev is cut from data.train
    text: Callable[[Row, Columns], Any] = lambda row, columns: row.columns
    usage: str = ""  # for the card: code that loads the model {name} and answers about {texts}
    pooled_usage: str = ""  # the same, where the head is not one of transformers'
    tag: str = "feature-extraction"  # the hub's name of such models
    predictor: Callable[[Trained, Row], Predictor] | None = None  # for rows like the first; None: vectors
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
