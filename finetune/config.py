"""The schemas of conf/finetune/*.yaml. What the tasks are stands in families/."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from cloze import cli
from cloze.encodings import codec_named
from cloze.errors import UserError
from cloze.schema import doc
from finetune.families import SUITES, TASKS
from finetune.tasks import Layout, Task
from pretrain.config import WandbMode
from pretrain.evaluate.frozen_config import Pooling


class Init(Enum):
    pretrained = "pretrained"
    random = "random"  # the same architecture, to see what pretraining is worth


class Head(Enum):
    linear = "linear"
    crf = "crf"  # a linear-chain conditional random field over the words' tags (token classification)


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # autocast; the weights stay fp32


class Adversary(Enum):
    none = "none"
    fgm = "fgm"  # one step along the gradient (Miyato et al. 2017)
    pgd = "pgd"  # several, projected back into the ball (Madry et al. 2018)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str | None = doc("file (.tsv .csv .jsonl .json .conll, also compressed) or hub:NAME@CONFIG:SPLIT; null: hub")
    dev: str | None = doc("the same for evaluation; null: the hub's, or a share of data.train where that is given")
    dev_fraction: float = doc("that share: examples whose text's hash is lowest, never the same text on both sides")
    test: str | None = doc("scored once by each seed's model, with a file of its answers; nothing is chosen by it")
    mismatched: str | None = doc("scored beside dev: MNLI's mismatched half, say; null: the hub's where dev is its")
    columns: list[str] | None = doc(
        "columns of the text, or of both texts, and then of the label, by name or, of a table without a header, by "
        "number from 1; of ner those of the words' and the tags' (CoNLL: numbers); null: the task's own"
    )
    labels: list[str] | None = doc("names of labels that the data have as numbers, from 0 on; null: as they stand")
    encoding: str | None = doc("of the files: gb18030, latin-1, …; null: UTF-8, or what a byte order mark says")
    max_bad_fraction: float = doc("share of rows that may be unusable and are left out; a single one always may")
    repair_tags: bool = doc("spell entities anew that do not begin or end as BIO or BIOES has it (ner)")

    def __post_init__(self) -> None:
        known = self.encoding is None or codec_named(self.encoding) is not None
        require(known, f"data.encoding={self.encoding}: no such encoding; utf-8, gb18030, latin-1 and cp1252 are some")
        require(0 < self.dev_fraction < 1, f"data.dev_fraction={self.dev_fraction}: must be in (0, 1)")
        require(0 <= self.max_bad_fraction < 1, f"data.max_bad_fraction={self.max_bad_fraction}: must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float | None = doc("peak learning rate of AdamW; null: by the size of the model, and told")
    crf_lr: float = doc("that of a CRF's own weights (head=crf): at the encoder's they would hardly move")
    weight_decay: float = doc("decoupled weight decay; biases and LayerNorm have none")
    warmup_fraction: float = doc("share of the steps in which the learning rate rises; then it falls linearly to 0")
    layer_decay: float = doc("the learning rate of each layer is that of the layer above times this; 1: all the same")

    def __post_init__(self) -> None:
        for key in ("lr", "crf_lr"):
            value = getattr(self, key)
            require(value is None or value > 0, f"optim.{key}={value}: must be positive")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}: cannot be negative")
        require(0 <= self.warmup_fraction <= 1, f"optim.warmup_fraction={self.warmup_fraction}: must be in [0, 1]")
        require(0 < self.layer_decay <= 1, f"optim.layer_decay={self.layer_decay}: must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Of classification and of the linear head of token classification."""

    balanced: bool = doc("weigh each label by the inverse of its frequency in data.train")
    label_smoothing: float = doc("share of the probability that is spread over all labels (Szegedy et al. 2016)")
    focal_gamma: float = doc("focal loss: weigh an example by (1 - p)^gamma (Lin et al. 2017); 0: cross-entropy")
    r_drop: float = doc("weight of the KL divergence between two dropout draws (Liang et al. 2021); 0: off")

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, f"loss.label_smoothing={self.label_smoothing}: must be in [0, 1)")
        for key in ("focal_gamma", "r_drop"):
            require(getattr(self, key) >= 0, f"loss.{key}={getattr(self, key)}: cannot be negative")
        plain = not self.focal_gamma or not self.label_smoothing
        require(plain, "loss: focal_gamma and label_smoothing exclude each other; set one of them to 0")

    @property
    def is_plain(self) -> bool:
        return not any(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    kind: Adversary = doc("training on word embeddings that are disturbed for the worse: none, fgm or pgd")
    epsilon: float = doc("L2 norm of the disturbance of a batch's word embeddings")
    steps: int = doc("steps of pgd")
    step_size: float = doc("L2 norm of one step of pgd")

    def __post_init__(self) -> None:
        for key in ("epsilon", "steps", "step_size"):
            require(getattr(self, key) > 0, f"adversary.{key}={getattr(self, key)}: must be positive")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = doc("rank of the low-rank updates (Hu et al. 2021), merged into the written model; 0: full fine-tuning")
    alpha: float = doc("the updates are scaled by alpha / rank")
    dropout: float = doc("dropout before the updates")

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank={self.rank}: cannot be negative")
        require(self.alpha > 0, f"lora.alpha={self.alpha}: must be positive")
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout}: must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    teacher: str | None = doc("directory that `python -m finetune` wrote for the same task; null: no distillation")
    weight: float = doc("share of the teacher in the loss; the labels have the rest")
    temperature: float = doc("both distributions are softened by it (Hinton et al. 2015)")
    hidden: float = doc("weight of the squared error to the teacher's hidden states (Jiao et al. 2020); 0: off")

    def __post_init__(self) -> None:
        require(0 <= self.weight <= 1, f"distill.weight={self.weight}: must be in [0, 1]")
        require(self.temperature > 0, f"distill.temperature={self.temperature}: must be positive")
        require(self.hidden >= 0, f"distill.hidden={self.hidden}: cannot be negative")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    tensorboard: bool = doc("also write TensorBoard events, into out/tensorboard")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    mode: WandbMode = doc("disabled, auto (online with a key, else offline), online or offline")
    project: str = doc("W&B project; the run is named after `out`")
    entity: str | None = doc("W&B user or team")
    tags: list[str] = doc("W&B tags")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Of task=embedding and task=retrieval."""

    pooling: Pooling | None = doc(
        "vector of a text: mean of its tokens' states, or cls; null: the model's own, else mean"
    )
    temperature: float | None = doc("cosines are divided by it in the contrastive loss; null: 0.05")

    def __post_init__(self) -> None:
        positive = self.temperature is None or self.temperature > 0
        require(positive, f"embedding.temperature={self.temperature}: must be positive")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    task: str = doc("what is learned: " + " ".join(TASKS))
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
        require(self.task in TASKS, f"task={self.task}: no such task; there are {', '.join(TASKS)}")
        for key in ("epochs", "batch_size", "num_seeds", "stride", "top_sentences"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        require(self.max_len >= 5, f"max_len={self.max_len}: must be at least 5")
        require(0 <= self.seed < 2**32 - self.num_seeds, f"seed={self.seed}: must be in [0, 2^32)")
        require(self.patience >= 0, f"patience={self.patience}: cannot be negative")
        require(self.freeze_layers >= -1, f"freeze_layers={self.freeze_layers}: must be at least -1")
        require(self.dropout is None or 0 <= self.dropout < 1, f"dropout={self.dropout}: must be in [0, 1)")
        self._techniques_fit()

    @property
    def definition(self) -> Task:
        """What `task` is."""
        return TASKS[self.task]

    @property
    def layouts(self) -> Sequence[Layout]:
        """The columns to read: data.columns, or those that the task's files may have."""
        return (tuple(self.data.columns),) if self.data.columns else self.definition.layouts

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
        require(known, f"task={self.task}: no such task; there are {', '.join(TASKS)}")
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
