"""Fidelity: the same training through Hugging Face's Trainer and model, and a run whose figures are written down."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import BertConfig, BertForPreTraining, Trainer, TrainingArguments

from cloze import cli
from pretrain.config import TrainConfig
from pretrain.data.loader import IGNORED, TrainingCorpus
from pretrain.model.bert import PackedBert
from tests import support
from tests.support import PAD, TINY, make_corpus

GOLDEN = Path(__file__).parent / "golden.json"
STEPS, WARMUP = 100, 10
MODEL = (
    "model.hidden_size=64", "model.num_heads=2", "model.intermediate_size=128", "model.pad_vocab_to=1",
    f"steps={STEPS}", f"schedule.warmup_fraction={WARMUP / STEPS}", "optim.lr=0.002", "optim.clip=1",
)  # fmt: skip


class Padded(Dataset[dict[str, Tensor]]):
    """The corpus' samples in the order of the run, each a row of `max_len` with padding, as Hugging Face wants them."""

    def __init__(self, corpus: TrainingCorpus, seed: int, num_samples: int) -> None:
        self.corpus, self.seed, self.num_samples = corpus, seed, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.corpus.training_batch(self.seed, np.asarray([index]))
        length = self.corpus.manifest.max_len

        def row(values_T: Tensor, padding: int) -> Tensor:
            return torch.cat([values_T, values_T.new_full((length - len(values_T),), padding)])

        labels_T = torch.full_like(batch.input_ids_T, IGNORED)
        labels_T[batch.masked_index_M] = batch.mlm_labels_M
        return {
            "input_ids": row(batch.input_ids_T, PAD),
            "token_type_ids": row(batch.token_type_ids_T, 0),
            "attention_mask": row(torch.ones_like(batch.input_ids_T), 0),
            "labels": row(labels_T, IGNORED),
            "next_sentence_label": batch.nsp_labels_N[0],
        }


class Recorder(Trainer):
    """Keeps every step's loss as it is: logs round."""

    losses: list[float]

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)
        self.losses.append(loss.item())
        return loss

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def hugging_face_losses(config: TrainConfig, corpus: TrainingCorpus, folder: Path) -> list[float]:
    """`Trainer` over `BertForPreTraining` with torch's AdamW, from the weights that our run starts from."""
    torch.manual_seed(config.seed)
    ours = PackedBert(config.model, corpus.manifest.tokenizer, max_len=corpus.manifest.max_len).hf
    model = BertForPreTraining(BertConfig(**ours.config.to_dict()))
    model.load_state_dict(ours.state_dict())
    names = {False: [], True: []}
    for name, parameter in model.named_parameters():
        names[name.endswith(".bias") or ".LayerNorm." in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": names[False], "weight_decay": 0.01}, {"params": names[True], "weight_decay": 0.0}],
        lr=0.002, betas=(0.9, 0.999), eps=1e-6,
    )  # fmt: skip
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
    )
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=config.global_batch_size,
        max_grad_norm=1.0, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = Padded(corpus, config.seed, STEPS * config.global_batch_size)
    trainer = Recorder(model, arguments, train_dataset=data, optimizers=(optimizer, rates))
    trainer.losses = []
    trainer.train()
    return trainer.losses


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of ten different tokens: a hundred steps learn something of it."""
    path = tmp_path_factory.mktemp("easy")
    make_corpus(path, vocab_size=15)
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_losses_equal_those_of_hugging_face(trainer: support.Trainer, easy: Path, tmp_path: Path) -> None:
    """100 steps in fp32 without dropout: padded rows in one process there; packed rows, 2 ranks and ZeRO 2 here."""
    config = cli.compose("train", TrainConfig, [*TINY, "run=r", f"data.path={easy}", *MODEL])
    theirs = hugging_face_losses(config, TrainingCorpus(easy), tmp_path)
    result = trainer.run(f"data.path={easy}", *MODEL, "zero=2", ranks=2)
    assert result.codes == (0, 0), result.stderrs
    assert len(theirs) == STEPS
    assert result.series("train/loss") == pytest.approx(theirs, abs=1e-4)
    assert theirs[-1] < theirs[0] - 0.4  # it does learn


def test_golden_run(trainer: support.Trainer, easy: Path) -> None:
    """A change of any of these figures changes what users train: golden.json says when that is meant."""
    golden = json.loads(GOLDEN.read_text())
    result = trainer.run(f"data.path={easy}", *golden["overrides"])
    assert result.codes == (0,), result.stderrs
    found = {key: result.series(key) for key in golden["metrics"]}
    for key, values in golden["metrics"].items():
        tolerance = golden["relative_tolerance"] if isinstance(values[0], float) else 0
        assert found[key] == pytest.approx(values, rel=tolerance), json.dumps(found)
