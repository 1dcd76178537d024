"""The keys of a fine-tuning in sections, and their choices. Knows no tasks."""

from dataclasses import dataclass, fields
from enum import Enum

from cloze.encodings import codec_named
from cloze.schema import doc, require
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
    head_lr: float | None = doc("that of what stands above the layers, the pooler and the head; null: lr")
    crf_lr: float = doc("that of a CRF's own weights (head=crf): at the encoder's they would hardly move")
    weight_decay: float = doc("decoupled weight decay; biases and LayerNorm have none")
    warmup_fraction: float = doc("share of the steps in which the learning rate rises; then it falls linearly to 0")
    layer_decay: float = doc("the learning rate of each layer is that of the layer above times this; 1: all the same")

    def __post_init__(self) -> None:
        for key in ("lr", "head_lr", "crf_lr"):
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
    project: str | None = doc("W&B project; null: WANDB_PROJECT, else cloze; the run is named after `out`")
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
