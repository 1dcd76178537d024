"""A random BERT as `pretrain.export` writes it, and the command line of `python -m finetune`."""

from pathlib import Path

import torch
from transformers import BertConfig, BertForPreTraining, BertTokenizer

from cloze import cli
from finetune.config import FinetuneConfig

torch.set_num_threads(1)  # two cost more than they give on so small a model

WORDS = [
    "good",
    "bad",
    "film",
    "a",
    "the",
    "very",
    "was",
    "##s",
    "ann",
    "bob",
    "rome",
    "in",
    "met",
    "?",
    "who",
    "where",
]


def write_tiny_bert(folder: Path, *, layers: int = 2, hidden: int = 32, words: list[str] = WORDS) -> Path:
    """Pretraining heads and tokenizer; 64 positions."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertForPreTraining(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=64,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def config(folder: Path, model: Path, *overrides: str, suffix: str = "tsv") -> FinetuneConfig:
    """Data are `train.tsv` and `dev.tsv` of `folder`, the result is its `out`."""
    files = [f"data.{name}={folder}/{name}.{suffix}" for name in ("train", "dev")]
    own = [f"model={model}", f"out={folder}/out", *files, "batch_size=8", "optim.lr=3e-3"]
    return cli.compose("finetune", FinetuneConfig, [*own, *overrides])
