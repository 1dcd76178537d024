"""Each technique does what its paper claims: losses against formulas, disturbances by norm, layers by what moves."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

from cloze.errors import UserError
from finetune import train as training
from finetune.__main__ import finetune
from finetune.families import classification
from finetune.keys import LossConfig
from finetune.tasks import IGNORED
from finetune.techniques import adversary
from finetune.techniques.distillation import soft_targets
from finetune.techniques.layers import depth
from finetune.techniques.losses import balanced_weights, symmetric_kl, task_loss
from finetune.train import TaskTrainer, run
from tests.unit.tiny_bert import config, write_tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"), layers=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two labels, three of four are x."""
    rows = [f"{'good' if i % 4 else 'bad'} film\t{'x' if i % 4 else 'y'}" for i in range(16)]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *rows]))
    return tmp_path


def loss_of(**changes: Any) -> LossConfig:
    return LossConfig(**{"balanced": False, "label_smoothing": 0.0, "focal_gamma": 0.0, "r_drop": 0.0, **changes})


def random_logits(seed: int, n: int = 7, num_labels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, num_labels, generator=generator, dtype=torch.float64)
    return logits, torch.randint(num_labels, (n,), generator=generator)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.9), st.floats(0, 4), st.booleans())
def test_losses_against_loops(seed: int, smoothing: float, gamma: float, weighted: bool) -> None:
    logits, labels = random_logits(seed)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64) if weighted else torch.ones(4, dtype=torch.float64)
    focal = smoothed = total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_p = [value - math.log(sum(math.exp(other) for other in row)) for value in row]
        weight = float(weights[label])
        focal -= weight * (1 - math.exp(log_p[label])) ** gamma * log_p[label]
        spread = [smoothing / 4 + (1 - smoothing) * (i == label) for i in range(4)]
        smoothed -= sum(share * float(weights[i]) * log_p[i] for i, share in enumerate(spread))
        total += weight
    given_weights = weights if weighted else None
    found = task_loss(logits, labels, loss_of(focal_gamma=gamma), given_weights)
    assert float(found) == pytest.approx(focal / total)
    found = task_loss(logits, labels, loss_of(label_smoothing=smoothing), given_weights)
    assert float(found) == pytest.approx(smoothed / total)


def test_divergences_are_torch_s() -> None:
    first, second = random_logits(1)[0], random_logits(2)[0]
    kl = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    assert float(symmetric_kl(first, second)) == pytest.approx(float(kl(q, p) + kl(p, q)) / 2)
    soft = 9 * kl((first / 3).log_softmax(-1), (second / 3).log_softmax(-1))
    assert float(soft_targets(first, second, 3)) == pytest.approx(float(soft))
    assert float(symmetric_kl(first, first)) == pytest.approx(0)


def test_balanced_labels_weigh_the_same_in_all() -> None:
    labels = torch.tensor([0] * 6 + [1] * 2 + [2] + [IGNORED] * 4)
    weights = balanced_weights(labels, 3)
    assert (weights * torch.tensor([6.0, 2.0, 1.0])).tolist() == pytest.approx([3.0] * 3)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForSequenceClassification.from_pretrained(folder).state_dict())


def moved(model: Path, out: Path) -> dict[int, float]:
    """By depth (0 embeddings, 1 to 3 layers, 4 above): the largest change of a weight."""
    before, after = weights_of(model), weights_of(out)
    changes: dict[int, float] = {}
    for name, value in after.items():
        if not name.startswith("classifier"):
            level = depth(name, 3)
            changes[level] = max(changes.get(level, 0.0), float((value - before[name]).abs().max()))
    return changes


def test_frozen_layers_keep_their_weights(folder: Path, model: Path) -> None:
    finetune(config(folder, model, "epochs=1", "freeze_layers=2"))
    changes = moved(model, folder / "out")
    assert [level for level in sorted(changes) if changes[level] == 0] == [0, 1, 2]
    with pytest.raises(UserError, match=r"freeze_layers=4: the model has 3 layers"):
        finetune(config(folder, model, "freeze_layers=4", f"out={folder}/b"))


def test_lower_layers_learn_slower_by_layer_decay(folder: Path, model: Path) -> None:
    """Adam's first step moves each weight by its learning rate."""
    own = ["epochs=1", "batch_size=16", "optim.layer_decay=0.5", "optim.warmup_fraction=0", "optim.weight_decay=0"]
    finetune(config(folder, model, *own))
    changes = moved(model, folder / "out")
    assert [changes[level] for level in range(5)] == pytest.approx(
        [3e-3 * 0.5 ** (4 - level) for level in range(5)], rel=0.01
    )


def test_lora_moves_the_encoder_by_matrices_of_its_rank(folder: Path, model: Path) -> None:
    """The written model is plain, its linear layers differ by rank 2, everything else of the encoder is as it was."""
    finetune(config(folder, model, "epochs=3", "lora.rank=2", "patience=3"))
    before, after = weights_of(model), weights_of(folder / "out")
    assert not any("lora" in name for name in after)
    for name, value in after.items():
        if name.startswith("bert."):
            change = value - before[name]
            linear = value.ndim == 2 and "embeddings" not in name
            rank = int(torch.linalg.matrix_rank(change, rtol=1e-3)) if value.ndim == 2 else int(change.any())
            assert rank == (2 if linear else 0), name


class Watch(TaskTrainer):
    """Notes the word embeddings that each forward pass of training sees."""

    seen: list[torch.Tensor]
    losses: list[float]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        value = super().compute_loss(model, inputs, *rest, **more)
        if model.training:
            self.seen.append(self.model.get_input_embeddings().weight.detach().clone())
        return value


def watched(monkeypatch: pytest.MonkeyPatch, folder: Path, model: Path, *overrides: str) -> list[torch.Tensor]:
    Watch.seen = []
    monkeypatch.setattr(training, "TaskTrainer", Watch)
    run(config(folder, model, "epochs=1", "batch_size=16", *overrides), classification.prepare)
    return Watch.seen


def test_fgm_disturbs_by_epsilon_along_the_gradient(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[torch.Tensor] = []
    ascent = adversary.ascent
    monkeypatch.setattr(adversary, "ascent", lambda g, size: (gradients.append(g.clone()), ascent(g, size))[1])
    clean, disturbed = watched(monkeypatch, folder, model, "adversary.kind=fgm", "adversary.epsilon=0.7")
    change = disturbed - clean
    assert float(change.norm()) == pytest.approx(0.7, rel=1e-4)
    assert float(torch.cosine_similarity(change.flatten(), gradients[0].flatten(), dim=0)) == pytest.approx(1, abs=1e-4)
    # what is written learned from both passes by one step of Adam, and the disturbance is gone
    after = weights_of(folder / "out")["bert.embeddings.word_embeddings.weight"]
    assert 0 < float((after - clean).abs().max()) < 3.1e-3


def test_pgd_stays_in_the_ball(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["adversary.kind=pgd", "adversary.epsilon=0.5", "adversary.step_size=0.3", "adversary.steps=3"]
    clean, *disturbed = watched(monkeypatch, folder, model, *own)
    norms = [float((words - clean).norm()) for words in disturbed]
    assert norms[0] == pytest.approx(0.3, rel=1e-4)
    assert len(norms) == 3
    assert max(norms) <= 0.5 + 1e-4
    assert norms[1] > 0.45
    assert float((weights_of(folder / "out")["bert.embeddings.word_embeddings.weight"] - clean).abs().max()) < 3.1e-3


def test_adversarial_gradients_are_the_sum_of_both_passes(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout, the gradient after the step is that at the clean plus that at the disturbed embeddings."""
    sums: list[torch.Tensor] = []

    class Compare(TaskTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            for part in model.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
            value = super().training_step(model, inputs, *rest)
            found = model.classifier.weight.grad.clone()
            words, expected = model.get_input_embeddings().weight, 0
            kept, model.training = words.detach().clone(), True
            shift = torch.zeros_like(words)
            for _ in range(2):
                model.zero_grad()
                with torch.no_grad():
                    words.copy_(kept + shift)
                model(**inputs).loss.backward()
                expected = expected + model.classifier.weight.grad.clone()
                shift = 0.7 * words.grad / words.grad.norm()
            with torch.no_grad():
                words.copy_(kept)
            sums.extend([found, expected])
            return value

    monkeypatch.setattr(training, "TaskTrainer", Compare)
    run(
        config(folder, model, "epochs=1", "batch_size=16", "adversary.kind=fgm", "adversary.epsilon=0.7"),
        classification.prepare,
    )
    assert torch.allclose(sums[0], sums[1], atol=1e-6)


def first_pass(folder: Path, model: Path, *overrides: str) -> tuple[float, TaskTrainer, dict[str, Any], list[Any]]:
    """The loss of one batch in training mode, what gave it, and the outputs of each forward pass that it took."""
    settings_ = config(folder, model, *overrides)
    prepared = settings_.definition.family.prepare(settings_)
    torch.manual_seed(5)
    network = prepared.make_model().train()
    seen: list[Any] = []
    network.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    arguments = training._arguments(settings_, prepared, folder / "none", 1)
    trainer = TaskTrainer(settings_, prepared, model=network, args=arguments, train_dataset=prepared.train)
    batch = prepared.collate([*prepared.train])
    return float(trainer.compute_loss(network, dict(batch)).detach()), trainer, batch, seen


def first_loss(folder: Path, model: Path, *overrides: str) -> tuple[float, list[torch.Tensor]]:
    loss, _, _, seen = first_pass(folder, model, *overrides)
    return loss, [output.logits.detach() for output in seen]


def test_r_drop_adds_the_kl_of_two_dropout_draws(folder: Path, model: Path) -> None:
    loss, (first, second) = first_loss(folder, model, "loss.r_drop=2.5")
    labels = torch.tensor([0 if i % 4 else 1 for i in range(16)])
    cross = [torch.nn.functional.cross_entropy(logits, labels) for logits in (first, second)]
    kl = symmetric_kl(first, second)
    assert float(kl) > 1e-6
    assert loss == pytest.approx(float((cross[0] + cross[1]) / 2 + 2.5 * kl))


def test_class_weights_reach_the_loss(folder: Path, model: Path) -> None:
    loss, (logits,) = first_loss(folder, model, "loss.balanced=true")
    labels = torch.tensor([0 if i % 4 else 1 for i in range(16)])
    expected = torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor([16 / 24, 16 / 8]))
    assert loss == pytest.approx(float(expected))


def test_smoothing_and_focus_reach_the_loss(folder: Path, model: Path) -> None:
    labels = torch.tensor([0 if i % 4 else 1 for i in range(16)])
    loss, (logits,) = first_loss(folder, model, "loss.label_smoothing=0.3")
    smoothed = float(torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3))
    assert loss == pytest.approx(smoothed)
    loss, (logits,) = first_loss(folder, model, "loss.focal_gamma=2")
    p = logits.softmax(-1)[torch.arange(16), labels]
    assert loss == pytest.approx(float(-((1 - p) ** 2 * p.log()).mean()))
    assert abs(smoothed - float(torch.nn.functional.cross_entropy(logits, labels))) > 1e-4


def write_questions(folder: Path) -> None:
    rows = [
        {"id": str(i), "question": "who met", "context": "the very bad film was ann", "answers": [answer]}
        for i, answer in enumerate([{"text": "ann", "answer_start": 22}, {"text": "film", "answer_start": 13}] * 4)
    ]
    for name in ("train.jsonl", "dev.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    ("task", "auto_class"),
    [
        ("classification", AutoModelForSequenceClassification), ("regression", AutoModelForSequenceClassification),
        ("squad", AutoModelForQuestionAnswering),
    ],
)  # fmt: skip
def test_a_teacher_s_part_of_the_loss(
    task: str, auto_class: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By a loop over Hugging Face's outputs: 2 layers of the student beside layers 0, 2 and 4 of the teacher's 4."""
    if task == "squad":
        write_questions(folder)
        tasked = {}
    else:
        rows = [f"{'good' if i % 4 else 'bad'} film\t{0 if i % 4 else 1}" for i in range(16)]
        for name in ("train.tsv", "dev.tsv"):
            (folder / name).write_text("\n".join(["sentence\tlabel", *rows]))
        tasked = (
            {"num_labels": 1} if task == "regression" else {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}}
        )
    student = write_tiny_bert(tmp_path_factory.mktemp("small"), layers=2)
    large = write_tiny_bert(tmp_path_factory.mktemp("large"), layers=4)
    torch.manual_seed(9)
    teacher = auto_class.from_pretrained(large, **tasked)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False).mul_(1.5)  # unlike the student
    teacher.eval().save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(large).save_pretrained(folder / "teacher")
    own = [f"task={task}", f"distill.teacher={folder}/teacher", "distill.weight=0.25", "distill.temperature=3"]
    own += [
        "distill.hidden=0.7",
        *([f"data.{name}={folder}/{name}.jsonl" for name in ("train", "dev")] if task == "squad" else []),
    ]
    loss, _, batch, (output,) = first_pass(folder, student, *own)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        its = teacher(**texts, output_hidden_states=True)
    soft = hard = 0.0
    names = ("start", "end") if task == "squad" else ("",)
    for name in names:
        logits, wanted = (getattr(one, f"{name}_logits" if name else "logits").detach() for one in (output, its))
        labels = batch[f"{name}_positions" if name else "labels"]
        for mine, theirs, label in zip(logits.tolist(), wanted.tolist(), labels.tolist(), strict=True):
            if task == "regression":
                hard += (mine[0] - label) ** 2 / len(labels)
                soft += (mine[0] - theirs[0]) ** 2 / len(labels)
                continue
            p = [math.exp(value / 3) / sum(math.exp(other / 3) for other in theirs) for value in theirs]
            q = [math.exp(value / 3) / sum(math.exp(other / 3) for other in mine) for value in mine]
            share = len(names) * len(labels)
            soft += 9 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / share
            hard -= math.log(math.exp(mine[label]) / sum(map(math.exp, mine))) / share
    hidden, real = 0.0, batch["attention_mask"].bool()
    for layer, hers in enumerate((0, 2, 4)):
        mine = output.hidden_states[layer].detach()
        hidden += float(((mine - its.hidden_states[hers])[real] ** 2).mean()) / 3
    assert hidden > 0.01
    assert soft > 1e-5
    assert loss == pytest.approx(0.75 * hard + 0.25 * soft + 0.7 * hidden, rel=1e-4)


def test_teachers_that_cannot_teach(folder: Path, model: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.teacher=.*: has no classifier\.bias, as a teacher needs"):
        finetune(config(folder, model, f"distill.teacher={model}"))
    with pytest.raises(UserError, match=r"distill\.teacher: a CRF cannot be distilled"):
        config(folder, model, "task=ner", "head=crf", "distill.teacher=x")


class Kept(TaskTrainer):
    """The trainer that `run` makes, to look at afterwards."""

    made: Any = None

    def __init__(self, *rest: Any, **more: Any) -> None:
        super().__init__(*rest, **more)
        Kept.made = self
        self.rates: list[list[float]] = []

    def training_step(self, *rest: Any) -> Any:
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        return super().training_step(*rest)


def test_the_learning_rate_rises_and_falls_and_weights_decay(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps, of which a quarter rise; the weights of norms and the biases do not decay."""
    monkeypatch.setattr(training, "TaskTrainer", Kept)
    own = ["epochs=10", "batch_size=8", "optim.warmup_fraction=0.25", "optim.weight_decay=0.3"]
    run(config(folder, model, *own), classification.prepare)
    expected = [3e-3 * (step / 5 if step < 5 else (20 - step) / 15) for step in range(20)]
    for rates in zip(*Kept.made.rates, strict=True):
        assert rates == pytest.approx(expected)
    named = {id(parameter): name for name, parameter in Kept.made.model.named_parameters()}
    for group in Kept.made.optimizer.param_groups:
        for parameter in group["params"]:
            name = named.pop(id(parameter))
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.3), name
    assert not named


def test_bf16_is_autocast(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bf16, weights and what is written in fp32; the predictions are still finite numbers."""
    seen: set[torch.dtype] = set()
    prepare = classification.prepare

    def watching(settings_: Any) -> Any:
        prepared = prepare(settings_)

        def make_model() -> Any:
            network = prepared.make_model()
            network.bert.encoder.layer[0].output.dense.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
            return network

        return replace(prepared, make_model=make_model)

    run(config(folder, model, "epochs=1", "precision=bf16", "loss.label_smoothing=0.1"), watching)
    assert torch.bfloat16 in seen
    assert {value.dtype for value in weights_of(folder / "out").values() if value.is_floating_point()} == {
        torch.float32
    }


@pytest.mark.slow
def test_a_smaller_model_learns_from_a_teacher_alone(
    folder: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The student's labels are wrong, and it follows the teacher; it has half the layers, and another width."""
    rows = ["sentence\tlabel", *["good film\tx", "the bad film\ty"] * 12]
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("\n".join(rows))
    large = write_tiny_bert(tmp_path_factory.mktemp("large"), layers=2)
    small = write_tiny_bert(tmp_path_factory.mktemp("small"), layers=1, hidden=16)
    assert finetune(config(folder, large, "epochs=20", f"out={folder}/teacher"))["accuracy"] == 1
    (folder / "train.tsv").write_text("\n".join([rows[0], *["good film\ty", "the bad film\tx"] * 12]))
    own = [f"distill.teacher={folder}/teacher", "distill.weight=1", "distill.hidden=0.1", "epochs=30", "optim.lr=0.01"]
    assert finetune(config(folder, small, *own))["accuracy"] == 1
    alone = ["epochs=30", "optim.lr=0.01", f"out={folder}/alone"]
    assert finetune(config(folder, small, *alone))["accuracy"] == 0
    other = write_tiny_bert(tmp_path_factory.mktemp("other"), words=["good", "bad"])
    with pytest.raises(UserError, match=r"distill\.teacher=.*: has another vocabulary"):
        finetune(config(folder, other, *own, f"out={folder}/c"))
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("sentence\tlabel\na\t0\nb\t1\n")
    with pytest.raises(UserError, match=r"distill\.teacher=.*: its labels are x, y; data\.train has 0, 1"):
        finetune(config(folder, small, *own, f"out={folder}/d"))


def test_random_weights_know_nothing_of_the_model(folder: Path, model: Path) -> None:
    finetune(config(folder, model, "epochs=1", "init=random", "optim.lr=1e-9"))
    before, after = weights_of(model), weights_of(folder / "out")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert before[name].shape == after[name].shape
    assert abs(np.corrcoef(before[name].flatten(), after[name].flatten())[0, 1]) < 0.2
