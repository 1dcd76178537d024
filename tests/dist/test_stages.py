"""Two gloo ranks under every ZeRO stage against one process, and against plain PyTorch without DeepSpeed."""

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cloze import cli
from pretrain.config import TrainConfig
from pretrain.data.loader import MicroBatch, TrainingCorpus
from pretrain.model.bert import PackedBert
from pretrain.model.loss import means, pretraining_loss
from pretrain.optim.schedule import learning_rate
from tests.support import TINY, Result, Trainer, make_corpus

STAGES = (0, 1, 2, 3)
STEPS = 6
EXACT = ("samples", "tokens", "train/lr", "train/skipped_steps", "train/mlm_accuracy", "train/nsp_accuracy")
CLOSE = ("train/loss", "train/mlm_loss", "train/nsp_loss", "train/grad_norm", "eval/mlm_loss", "eval/nsp_loss")


@pytest.fixture(scope="module")
def two_ranks(trainer: Trainer, corpus: Path) -> Callable[[int], Result]:
    """The run of a stage on two ranks in fp32, unclipped, with a checkpoint of every step."""
    made: dict[int, Result] = {}

    def result(stage: int) -> Result:
        if stage not in made:
            made[stage] = trainer.run(
                f"data.path={corpus}", f"zero={stage}", "optim.clip=0", "checkpoint.every=1", "checkpoint.keep_last=9",
                "eval.every=4", ranks=2,
            )  # fmt: skip
            assert made[stage].codes == (0, 0), made[stage].stderrs
        return made[stage]

    return result


@pytest.fixture(scope="module")
def one_rank(trainer: Trainer, corpus: Path) -> Result:
    result = trainer.run(f"data.path={corpus}", "zero=0", "optim.clip=0", "eval.every=4")
    assert result.codes == (0,), result.stderrs
    return result


class Plain:
    """The same training as a loop in plain PyTorch: one process, the global batch at once, no DeepSpeed."""

    def __init__(self, corpus: Path, *overrides: str) -> None:
        self.config = cli.compose("train", TrainConfig, [*TINY, "run=r", f"data.path={corpus}", *overrides])
        self.corpus = TrainingCorpus(corpus)
        torch.manual_seed(self.config.seed)
        self.model = PackedBert(self.config.model, self.corpus.manifest.tokenizer, max_len=self.corpus.manifest.max_len)
        named = list(self.model.named_parameters())
        spared = [p for name, p in named if name.endswith(".bias") or ".LayerNorm." in name]
        decayed = [p for _, p in named if not any(p is other for other in spared)]
        optim = self.config.optim
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": spared, "weight_decay": 0.0}],
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.first_gradients: dict[str, Tensor] = {}

    def loss(self, batch: MicroBatch) -> Tensor:
        return pretraining_loss(
            self.model(batch),
            batch.mlm_labels_M,
            batch.nsp_labels_N,
            weights=self.config.loss,
            masked=len(batch.mlm_labels_M),
            pairs=len(batch.nsp_labels_N),
        ).loss

    def train(self, steps: int, skip: Collection[int] = ()) -> "Plain":
        """All updates but those of the steps `skip`."""
        size = self.config.global_batch_size
        for step in range(steps):
            batch = self.corpus.training_batch(self.config.seed, np.arange(step * size, (step + 1) * size))
            loss = self.loss(batch)
            loss.backward()
            gradients = {name.removeprefix("hf."): p.grad.clone() for name, p in self.model.named_parameters()}
            self.first_gradients = self.first_gradients or gradients
            self.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values())))
            clip = self.config.optim.clip or math.inf
            if self.norms[-1] > clip:
                for parameter in self.model.parameters():
                    parameter.grad *= clip / self.norms[-1]
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, self.config.steps, self.config.optim, self.config.schedule)
            if step not in skip:
                self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self


@pytest.fixture(scope="module")
def plain(corpus: Path) -> Plain:
    return Plain(corpus, "optim.clip=0").train(STEPS)


def test_one_process_equals_plain_pytorch(one_rank: Result, plain: Plain) -> None:
    assert one_rank.series("train/loss") == pytest.approx(plain.losses, abs=1e-5)
    assert one_rank.series("train/grad_norm") == pytest.approx(plain.norms, rel=1e-5)


def test_z_loss_is_in_the_gradient_and_not_in_what_is_logged(trainer: Trainer, corpus: Path, plain: Plain) -> None:
    overrides = ("loss.z_loss_weight=0.03", "optim.clip=0")
    result = trainer.run(f"data.path={corpus}", "zero=2", "stop_at=3", *overrides, ranks=2)
    assert result.codes == (75, 75), result.stderrs
    expected = Plain(corpus, *overrides).train(3)
    assert result.series("train/grad_norm") == pytest.approx(expected.norms, rel=1e-4)
    assert result.series("train/loss")[0] == pytest.approx(plain.losses[0], abs=1e-5)
    assert expected.losses[0] > plain.losses[0] + 0.1  # 0.03 times the square of ln 61 = 4.1


@pytest.mark.parametrize("stage", STAGES)
def test_losses_equal_those_of_one_process(two_ranks: Callable[[int], Result], one_rank: Result, stage: int) -> None:
    result = two_ranks(stage)
    assert [line["step"] for line in result.metrics] == list(range(1, STEPS + 1))
    for key in EXACT:
        assert result.series(key) == one_rank.series(key), key
    for key in CLOSE:
        assert result.series(key) == pytest.approx(one_rank.series(key), abs=1e-5), key
        assert len(result.series(key)) == (2 if key.startswith("eval") else STEPS)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_equal_those_of_plain_pytorch(two_ranks: Callable[[int], Result], plain: Plain, stage: int) -> None:
    """2 ranks x 2 accumulation steps against the batch at once; after one step exp_avg = (1 - beta1) * gradient."""
    moments = load_file(two_ranks(stage).run / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    names = {name.removesuffix(".exp_avg") for name in moments if name.endswith(".exp_avg")}
    assert names == set(plain.first_gradients)
    for name, gradient in plain.first_gradients.items():
        found = moments[f"{name}.exp_avg"] / (1 - plain.config.optim.beta1)
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("stage", STAGES)
def test_weights_equal_those_of_plain_pytorch(two_ranks: Callable[[int], Result], plain: Plain, stage: int) -> None:
    """Rates, weight decay by group and bias correction too."""
    weights = load_file(two_ranks(stage).run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    for name, parameter in plain.model.hf.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 8)])
def test_gradients_do_not_depend_on_ranks_and_accumulation(
    trainer: Trainer, corpus: Path, plain: Plain, ranks: int, micro: int
) -> None:
    result = trainer.run(
        f"data.path={corpus}", "zero=1", "optim.clip=0", f"micro_batch_size={micro}", "stop_at=1", ranks=ranks
    )
    assert set(result.codes) == {75}, result.stderrs
    moments = load_file(result.run / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    for name, gradient in plain.first_gradients.items():
        found = moments[f"{name}.exp_avg"] / (1 - plain.config.optim.beta1)
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", [0, 2])
def test_clipping_is_global(trainer: Trainer, corpus: Path, stage: int) -> None:
    clip = "optim.clip=0.3"
    plain = Plain(corpus, clip, "steps=4").train(4)
    assert min(plain.norms) > 0.3  # it does clip
    result = trainer.run(f"data.path={corpus}", f"zero={stage}", clip, "steps=4", ranks=2)
    assert result.codes == (0, 0), result.stderrs
    assert result.series("train/loss") == pytest.approx(plain.losses, abs=1e-5)
    assert result.series("train/grad_norm") == pytest.approx(plain.norms, rel=1e-4)  # before clipping


POISON = """
from pretrain.engine.engine import Engine

calls, real = 0, Engine.backward

def backward(self, batch, loss_of, last):
    global calls
    calls += 1
    poison = float("nan") if self.process.rank == 1 and calls == 5 else 1.0
    real(self, batch, lambda *arguments: loss_of(*arguments) * poison, last=last)

Engine.backward = backward
"""


@pytest.mark.parametrize("stage", [*STAGES, "2_offload", "3_offload"])
def test_one_bad_gradient_on_one_rank_costs_that_step_alone(trainer: Trainer, corpus: Path, stage: int | str) -> None:
    """NaN in the first micro-batch of rank 1 at the third step: no rank applies that step, and all go on."""
    result = trainer.run(f"data.path={corpus}", f"zero={stage}", ranks=2, before=POISON)
    assert result.codes == (0, 0), result.stderrs
    assert result.series("train/skipped_steps") == [0, 0, 1, 0, 0, 0]
    plain = Plain(corpus).train(STEPS, skip=[2])
    assert result.series("train/loss") == pytest.approx(plain.losses, abs=1e-5)
    skipped = [json.loads(line) for line in (result.run / "skipped.jsonl").read_text().splitlines()]
    assert skipped == [{"step": 2, "first_position": 32, "end_position": 48}]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_close(trainer: Trainer, corpus: Path, one_rank: Result, stage: int) -> None:
    result = trainer.run(f"data.path={corpus}", f"zero={stage}", "optim.clip=0", "precision=bf16", ranks=2)
    assert result.codes == (0, 0), result.stderrs
    losses = result.series("train/loss")
    assert losses == pytest.approx(one_rank.series("train/loss"), abs=0.03)
    assert losses != one_rank.series("train/loss")
    assert result.series("train/grad_norm") == pytest.approx(one_rank.series("train/grad_norm"), rel=0.1)


@pytest.mark.parametrize("optim", ["optim=lamb", "optim=muon"])
def test_bf16_stays_close_with_optimizers_that_see_whole_parameters(trainer: Trainer, corpus: Path, optim: str) -> None:
    plain = trainer.run(f"data.path={corpus}", "zero=0", optim)
    result = trainer.run(f"data.path={corpus}", "zero=1", optim, "precision=bf16", ranks=2)
    assert result.codes == (0, 0), result.stderrs
    assert result.series("train/loss") == pytest.approx(plain.series("train/loss"), abs=0.03)
    assert result.series("train/loss") != plain.series("train/loss")


@pytest.mark.parametrize("zero", ["1", "2_offload", pytest.param("3", marks=pytest.mark.slow)])
def test_many_micro_batches_add_up_in_fp32(trainer: Trainer, corpus: Path, zero: str) -> None:
    """256 of one sample each. Added up in bf16 the gradient was off by 2.5%, after 512 by 4.4%."""
    options = (f"data.path={corpus}", "optim.clip=0", "global_batch_size=256", "micro_batch_size=1")
    plain = Plain(corpus, *options).train(1)
    result = trainer.run(*options, f"zero={zero}", "precision=bf16", "stop_at=1", "eval.max_samples=1")
    assert result.codes == (75,), result.stderrs
    moments = load_file(result.run / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    names = list(plain.first_gradients)
    found = torch.cat([moments[f"{name}.exp_avg"].flatten() for name in names]) / (1 - plain.config.optim.beta1)
    expected = torch.cat([plain.first_gradients[name].flatten() for name in names])
    assert float((found - expected).norm() / expected.norm()) < 0.014  # 0.5% at stage 0, with weights in fp32


# Evaluation


def slow_evaluation(plain: Plain, weights: Path, samples: int) -> dict[str, float]:
    """One held-out sample at a time, with the weights of a checkpoint."""
    plain.model.load_weights(load_file(weights))
    plain.model.eval()
    sums, masked = torch.zeros(4, dtype=torch.float64), 0
    with torch.no_grad():
        for index in range(samples):
            batch = plain.corpus.val_batch(np.asarray([index]))
            logits = plain.model(batch)
            labels = batch.mlm_labels_M, batch.nsp_labels_N
            sums += pretraining_loss(logits, *labels, weights=plain.config.loss, masked=1, pairs=1).sums
            masked += len(batch.mlm_labels_M)
    result = means(sums.tolist(), weights=plain.config.loss, masked=masked, pairs=samples)
    return {f"eval/{name}": value for name, value in result.items()}


@pytest.mark.parametrize(("stage", "ranks", "limit"), [(1, 2, 0), (3, 2, 3), (0, 1, 17)])
def test_evaluation_is_exact(trainer: Trainer, corpus: Path, stage: int, ranks: int, limit: int) -> None:
    """37 samples do not divide by ranks x 4; of 3 the second rank gets none."""
    result = trainer.run(
        f"data.path={corpus}", f"zero={stage}", f"eval.max_samples={limit}", "steps=2", "optim.lr=0.02", ranks=ranks
    )
    assert set(result.codes) == {0}, result.stderrs
    weights = result.run / "checkpoints" / "step-00000002" / "model.safetensors"
    expected = slow_evaluation(Plain(corpus), weights, limit or 37)
    (found,) = [line for line in result.metrics if "eval/loss" in line]
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5)


def test_a_corpus_without_pairs(trainer: Trainer, tmp_path: Path) -> None:
    make_corpus(tmp_path, samples=64, objective="none")
    result = trainer.run(f"data.path={tmp_path}", "steps=3", "zero=2", ranks=2)
    assert result.codes == (0, 0), result.stderrs
    plain = Plain(tmp_path, "steps=3", "loss.nsp_weight=0").train(3)
    assert result.series("train/loss") == pytest.approx(plain.losses, abs=1e-5)
    assert result.series("train/loss") == result.series("train/mlm_loss")
    assert not [key for line in result.metrics for key in line if "nsp" in key]
