"""The schema of conf/finetune/finetune.yaml. Pure."""

from dataclasses import dataclass
from enum import Enum

from data_prep.errors import UserError
from data_prep.schema import doc


class Task(Enum):
    classification = "classification"  # of a sentence or a pair of sentences


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str = doc("TSV (with a header) or JSONL with sentence, or sentence1 and sentence2, and label")
    dev: str = doc("the same for evaluation; its labels must occur in data.train")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = doc("peak learning rate of AdamW")
    weight_decay: float = doc("decoupled weight decay; biases and LayerNorm have none")
    warmup_fraction: float = doc("share of the steps in which the learning rate rises; then it falls linearly to 0")

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr={self.lr}: must be positive")
        _require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}: cannot be negative")
        _require(0 <= self.warmup_fraction <= 1, f"optim.warmup_fraction={self.warmup_fraction}: must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    task: Task = doc("what is learned: classification")
    model: str = doc("directory made by `python -m pretrain.export`, or any BERT in Hugging Face's format")
    out: str = doc("directory to write: the model, its tokenizer and metrics.json; must be new or empty")
    seed: int = doc("seed of the new layers, the order of the samples and dropout")
    data: DataConfig
    epochs: int = doc("passes over data.train")
    batch_size: int = doc("samples per optimizer step on each device")
    max_len: int = doc("tokens per sample at most; longer ones are cut, the longer sentence first")
    optim: OptimConfig

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            _require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        _require(self.max_len >= 5, f"max_len={self.max_len}: must be at least 5")
        _require(0 <= self.seed < 2**32, f"seed={self.seed}: must be in [0, 2^32)")
