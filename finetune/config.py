"""The schemas of conf/finetune/*.yaml, checked against the tasks that there are, which stand in families/."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cloze import cli
from cloze.encodings import codec_named
from cloze.schema import doc, require
from finetune.families import SUITES, TASKS
from finetune.keys import Precision
from finetune.tasks import Task, TaskConfig
from pretrain.evaluate.frozen_config import Pooling


def _meant(task: str | None) -> str:
    return cli.nearest(str(task).lower(), [*TASKS], "task")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TaskConfig):
    task: str = doc("what is learned: " + " ".join(TASKS))

    def __post_init__(self) -> None:
        require(self.task in TASKS, f"task={self.task}: no such task{_meant(self.task)}; there are {', '.join(TASKS)}")
        super().__post_init__()

    @property
    def definition(self) -> Task:
        return TASKS[self.task]


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    suite: str = doc("which tasks: " + ", ".join(f"{name} ({' '.join(tasks)})" for name, tasks in SUITES.items()))
    tasks: list[str] | None = doc("some of the suite's tasks; null: all")
    model: str = doc("directory made by `python -m pretrain.export`; the table goes into its README.md, too")
    out: str = doc("directory to write: results.md, results.json and a directory for each task; finished ones are kept")
    data: str | None = doc("directory with TASK/train.* and TASK/dev.*; tasks it lacks are left out; null: the hub")
    baseline: bool = doc("compare with random weights of the same architecture: twice the time")
    num_seeds: int = doc("runs of each task, with the seeds 1, 2, …; at least 2, for the deviation")
    epochs: int | None = doc("passes over each task's training data; null: 3, of the small sets 5 or 10")
    batch_size: int = doc("samples per optimizer step")
    max_len: int = doc("tokens per sample at most")
    lr: float | None = doc("peak learning rate; null: by the size of the model")

    def __post_init__(self) -> None:
        require(self.suite in SUITES, f"suite={self.suite}: no such suite; there are {', '.join(SUITES)}")
        require(self.num_seeds >= 2, f"num_seeds={self.num_seeds}: must be at least 2, to tell chance from skill")
        for task in self.tasks or ():
            require(
                task in SUITES[self.suite], f"tasks: suite={self.suite} has {', '.join(SUITES[self.suite])}, no {task}"
            )


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    model: str = doc(
        "directory that `python -m finetune` or `python -m finetune.compress` wrote, or one in Hugging Face's format; "
        "or an .onnx file in it. An encoder without a task gives vectors"
    )
    in_: str = doc("file or URL to read: .tsv .csv .jsonl .json .txt (a text a line) .conll, also compressed")
    out: str = doc("file to write, which must not be there: .tsv .csv .jsonl .json .txt (answers alone) .conll, or .gz")
    task: str | None = doc("what the model was fine-tuned for; null: what its directory says")
    columns: list[str] | None = doc(
        "columns of the text, or of both texts; of CoNLL the number of the words', from 1; null: those of training"
    )
    encoding: str | None = doc("of `in`: gb18030, latin-1, …; null: UTF-8, or what a byte order mark says")
    in_format: str | None = doc("how `in` is written: tsv csv jsonl text conll; null: as its name says")
    format: str | None = doc(
        "how `out` is written: tsv csv jsonl json text conll, glue (a submission) or squad (answers by id); null: as "
        "its name says"
    )
    prefix: str | None = doc("put before the names of the new columns: prediction, probability, …")
    probabilities: bool = doc("of classification: those of all labels, too")
    max_len: int | None = doc("tokens per text or pair at most, the rest is cut and told; null: as in training")
    batch_tokens: int | None = doc("tokens of a batch, with padding; null: 4,096, on a GPU 65,536")
    precision: Precision = doc("of the matrix products: fp32, or bf16, faster on GPUs")

    def __post_init__(self) -> None:
        known = self.task is None or self.task in TASKS
        require(known, f"task={self.task}: no such task{_meant(self.task)}; there are {', '.join(TASKS)}")
        require(self.max_len is None or self.max_len >= 5, f"max_len={self.max_len}: must be at least 5")
        known = self.encoding is None or codec_named(self.encoding) is not None
        require(known, f"encoding={self.encoding}: no such encoding; gb18030 and latin-1 are some")
        positive = self.batch_tokens is None or self.batch_tokens >= 1
        require(positive, f"batch_tokens={self.batch_tokens}: must be positive")


def defaults() -> dict[str, Any]:
    """Every key as conf/ has it, in the form of `facts`."""
    return facts(cli.compose("finetune", FinetuneConfig, ["model=any", "out=any"]))


def saved(body: Mapping[str, Any]) -> FinetuneConfig:
    """The configuration that `facts` gave, perhaps of an earlier version: keys that are newer have their defaults."""
    today = defaults()
    sections = {key: {**value, **body.get(key, {})} for key, value in today.items() if isinstance(value, dict)}
    return cli.typed({**today, **body, **sections}, FinetuneConfig)


def facts(config: FinetuneConfig) -> dict[str, Any]:
    """The configuration as metrics.json repeats it."""
    return dict(json.loads(json.dumps(asdict(config), default=lambda choice: choice.value)))


def flat(body: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`facts` by dotted key."""
    for key, value in body.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig:
    model: str = doc("directory made by `python -m finetune` or sentence-transformers, or any encoder")
    sts: list[str] | None = doc(
        "files of judged pairs: sentence, sentence, number, with or without a header (.csv .tsv)"
    )
    retrieval: list[str] | None = doc("directories in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/test.tsv")
    pooling: Pooling | None = doc(
        "vector of a text: mean of its tokens' states, or cls; null: the model's own, else mean"
    )
    max_len: int = doc("tokens per text at most; longer ones are cut")
    random_seeds: int = doc("compare with random weights of the same architecture, so many times; 0: do not")
    bm25: bool = doc("compare retrieval with BM25, too (needs bm25s)")
    seed: int = doc("of what is drawn: random weights, intervals")

    def __post_init__(self) -> None:
        require(bool(self.sts or self.retrieval), "nothing to evaluate: name sts=[FILE] or retrieval=[DIRECTORY]")
        require(self.random_seeds >= 0, f"random_seeds={self.random_seeds}: cannot be negative")
        require(self.max_len >= 5, f"max_len={self.max_len}: must be at least 5")
        require(0 <= self.seed < 2**31, f"seed={self.seed}: must be in [0, 2^31)")
