"""What all tasks share: training a model by Hugging Face's Trainer for each seed, writing the best.

A family of tasks gives a `Prepared`: its data as features, a way to make its model, to read its predictions, to score.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import accelerate  # noqa: F401  # Trainer asks for it, and only when a run begins
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from cloze.errors import TrainingError
from cloze.files import write_whole
from cloze.log import log
from cloze.patience import telling
from finetune import page, ranks, resume
from finetune.card import write_card
from finetune.config import FinetuneConfig, facts
from finetune.data import sha256
from finetune.keys import Adversary, Head, Precision
from finetune.rates import settled, tell_rate
from finetune.side_by_side import teacher_and_student
from finetune.stopping import Stop
from finetune.tasks import EvaluationSet, Prepared, Scores
from finetune.techniques import losses
from finetune.techniques.adversary import add_adversarial_gradients
from finetune.techniques.distillation import Teacher
from finetune.techniques.layers import freeze, head_alone, parameter_groups, reinitialize
from finetune.techniques.lora import with_lora
from finetune.tracking import Tracker, tracking
from finetune.verdict import UNK_WARNED, unk_share, verdict
from pretrain.export.hugging_face import be_quiet, refuse_occupied

PREDICTIONS = "test-predictions.jsonl"  # in `out`, where data.test is given

_SECONDS = 10.0  # between two lines of progress
_STEPS_OF_RANKS = 8  # between two times that ranks ask rank 0 whether to save, which is a wait
_CHECKPOINT_SECONDS = 300.0  # between two checkpoints of a seed; with early stopping there is one after each epoch
_PROJECTION = "projection.safetensors"  # of a teacher's states, in a checkpoint: no part of the model


class _Progress(TrainerCallback):
    """Now and then a line on stderr, instead of Hugging Face's dictionaries on stdout; all of it to the trackers."""

    def __init__(self, seed: int, tracker: Tracker) -> None:
        self.seed, self.tracker, self.told = seed, tracker, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        self.tracker.log(self.seed, state.global_step, logs)
        if "loss" in logs and time.monotonic() > self.told + _SECONDS:
            step, loss = f"{state.global_step}/{state.max_steps}", float(logs["loss"])
            log.info(f"seed {self.seed}  step {step}  loss {loss:.3f}")
            self.told = time.monotonic()


class _Checkpoints(TrainerCallback):
    """Every few minutes all that a seed's training needs to go on to the same weights: whole, or not at all.

    Where a stop is asked for, once more, and then it is one.
    """

    def __init__(self, teacher: Teacher | None, stop: Stop) -> None:
        self.teacher, self.stop, self.saved = teacher, stop, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if ranks.world_size() > 1 and state.global_step % _STEPS_OF_RANKS:
            return
        if self.stop.requested:  # told here: a signal may come in the middle of another line
            log.info("stopping after this step, with a checkpoint; another Ctrl-C stops at once")
        if ranks.agreed(self.stop.requested or time.monotonic() > self.saved + _CHECKPOINT_SECONDS):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if ranks.all_have(folder.is_dir()) and ranks.is_first():  # now all have written their part
            if self.teacher is not None:
                save_file(self.teacher.project.state_dict(), folder / _PROJECTION)
            resume.seal(folder)
        self.saved = time.monotonic()
        if ranks.agreed(self.stop.requested):
            raise KeyboardInterrupt


class TaskTrainer(Trainer):
    """Hugging Face's Trainer with what `config` asks for beside it."""

    model: Any
    optimizer: Any

    def __init__(self, config: FinetuneConfig, prepared: Prepared, **rest: Any) -> None:
        super().__init__(**rest)
        self.cloze, self.layers = config, self.model.config.num_hidden_layers
        self.task_loss = prepared.loss
        self.weights: Tensor | None = None
        if config.loss.balanced and prepared.num_labels:
            labels = [torch.as_tensor(row["labels"]).reshape(-1) for row in prepared.train]
            weights = losses.balanced_weights(torch.cat(labels), prepared.num_labels)
            self.weights = weights.to(self.args.device)
        self.teacher = None
        if prepared.teacher is not None:
            self.teacher = Teacher(prepared.teacher, self.model).to(self.args.device)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.cloze.optim, self.layers)
            if self.teacher is not None:
                groups += parameter_groups(self.teacher.project, self.cloze.optim, self.layers)
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **rest: Any) -> Any:
        if self.task_loss is not None:
            outputs = model(**{name: value for name, value in inputs.items() if name not in self.args.label_names})
            value = self.task_loss(outputs, inputs)
            return (value, outputs) if return_outputs else value
        loss, crf = self.cloze.loss, self.cloze.head is Head.crf
        if not model.training or (loss.is_plain and self.teacher is None and not crf):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **rest)
        labels = {name: inputs[name] for name in self.args.label_names}
        texts = {name: value for name, value in inputs.items() if name not in labels}
        outputs = model(**texts, output_hidden_states=self.teacher is not None)
        if crf:
            return self.model.crf(outputs.logits.float(), labels["labels"])
        learned = losses.learned(outputs, labels)
        value = losses.mean_loss(learned, loss, self.weights)
        if loss.r_drop:
            again = losses.learned(model(**texts), labels)
            value = (value + losses.mean_loss(again, loss, self.weights)) / 2
            value = value + loss.r_drop * losses.symmetric_kl(learned[0][0], again[0][0])
        if self.teacher is not None:
            distill = self.cloze.distill
            soft, hidden = self.teacher(texts, labels, outputs, distill.temperature)
            value = (1 - distill.weight) * value + distill.weight * soft + distill.hidden * hidden
        return value

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        value = super().training_step(model, inputs, *rest)
        adversary = self.cloze.adversary
        if adversary.kind is not Adversary.none:
            again = super().training_step
            add_adversarial_gradients(self.model, adversary, lambda: again(model, inputs, *rest))
        return value


def run(config: FinetuneConfig, prepare: Callable[[FinetuneConfig], Prepared] | None = None) -> Scores:
    """Train for every seed, score on data.dev, write `out`; returns the mean scores. `out` appears whole or not at all.

    Killed, the same call goes on with the seeds that are missing. `prepare` stands in for that of the task's family.
    Raises `UserError` for unusable data, models and directories, `DiskError` where the disk fails.
    """
    if (there := resume.finished(config)) is not None:  # before ranks part: they all see it
        log.info(f"out={config.out}: is finished with these settings; remove it to learn anew")
        return resume.means(there)
    with ranks.as_rank(config) as own:
        return _run(own, prepare)


def _run(config: FinetuneConfig, prepare: Callable[[FinetuneConfig], Prepared] | None) -> Scores:
    out = Path(config.out)
    refuse_occupied(out, "out=")
    be_quiet()
    asked, config = config, settled(config)
    if config.max_len < asked.max_len:
        fit = f"model={config.model} has positions for {config.max_len} tokens: so many are used"
        log.warning(f"max_len={asked.max_len}: {fit}")
    with telling("reading the data"):
        prepared, read = (prepare or config.definition.family.prepare)(config), sha256(config)
    prepared.tokenizer.model_max_length = config.max_len
    tell_rate(asked, config)
    with resume.Seeds(out, resume.settings_of(config, read)) as seeds:
        beside = _beside(prepared)
        with tracking(config, seeds.folder) as tracker:
            learned = ranks.agreed(seeds.learned)
            for seed in range(config.seed, config.seed + config.num_seeds):
                if seed in learned:
                    log.info(f"seed {seed}  is learned already")
                else:
                    _learn(config, prepared, seed, seeds, beside["guessing"], tracker)
        if not ranks.is_first():
            return resume.means(resume.summary(seeds.learned or learned, None))
        body = {**resume.summary(seeds.learned, seeds.best), "score": config.definition.score}
        body |= {**beside, **prepared.facts, "train_examples": len(prepared.train)}
        body |= {"config": facts(config), "sha256": read}

        def write(folder: Path) -> None:
            prepared.tokenizer.save_pretrained(folder)
            text = json.dumps(body, indent=1, ensure_ascii=False) + "\n"
            write_whole(folder / "metrics.json", text.encode())
            losses = {seed: found.get("losses", []) for seed, found in sorted(seeds.learned.items())}
            write_whole(folder / page.LOSSES, json.dumps(losses).encode())
            write_card(folder, config, body)
            page.write_page(folder, out)

        seeds.publish(write)
    return resume.means(body)


def _beside(prepared: Prepared) -> dict[str, Any]:
    """What scores stand beside: those of guessing, under the same names, and the share of [UNK] in every set."""
    sets = {"dev": prepared.dev, **prepared.more}
    shares = {name: unk_share(each.features, prepared.tokenizer) for name, each in sets.items()}
    shares = {"train": unk_share(prepared.train, prepared.tokenizer), **shares}
    for name, share in shares.items():
        if share > UNK_WARNED:
            unknown = f"{share:.0%} of the tokens are {prepared.tokenizer.unk_token}"
            log.warning(f"data.{name}: {unknown}: the model cannot read them; is it of this language and script?")
    counts = {f"{name}_examples": len(each.guess) for name, each in sets.items()}
    guessing = _scores(prepared, {name: each.guess for name, each in sets.items()})
    return {**counts, "guessing": guessing, "unk_share": shares}


def _scores(prepared: Prepared, answers: Mapping[str, Sequence[Any]]) -> Scores:
    """Those of data.dev by their names, those of the other sets as `test_accuracy`."""
    found = prepared.dev.score(answers["dev"])
    for name, each in prepared.more.items():
        found |= {f"{name}_{score}": value for score, value in each.score(answers[name]).items()}
    return found


def _learn(
    config: FinetuneConfig, prepared: Prepared, seed: int, seeds: resume.Seeds, guessing: Scores, tracker: Tracker
) -> None:
    """Train with one seed, answer every set, and keep what came of it."""
    learned = _train(config, prepared, seed, ranks.agreed(seeds.checkpoints), tracker)
    model, answers = learned.model, learned.answers
    found: dict[str, Any] = {"scores": _scores(prepared, answers), "losses": learned.losses}
    score = config.definition.score
    tracker.log_scores(seed, found["scores"])
    if prepared.teacher is not None:
        found["distilled"] = teacher_and_student(prepared, model)
    if wrong := verdict(answers["dev"], found["scores"], guessing, score):
        log.warning(f"seed {seed}: the model {wrong}; more epochs, another optim.lr or another model may help")
        found["verdict"] = wrong

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        _write_rows(folder / page.PREDICTIONS, _with_answers(prepared.dev, answers["dev"], learned.wrong))
        if (test := prepared.more.get("test")) is not None:
            _write_rows(folder / PREDICTIONS, _with_answers(test, answers["test"], None))

    seeds.keep(seed, found, score, write)


def _with_answers(
    asked: EvaluationSet, answers: Sequence[Any], wrong: Sequence[float] | None
) -> Iterator[dict[str, Any]]:
    for number, (row, answer) in enumerate(zip(asked.shown, answers, strict=True)):
        yield {**row, "predicted": answer} | ({"wrong": round(wrong[number], 6)} if wrong is not None else {})


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class _Learned(NamedTuple):
    """What came of one seed."""

    model: Any
    answers: dict[str, Sequence[Any]]  # by the sets' names
    wrong: Sequence[float] | None  # how wrong each of data.dev is, where somebody says
    losses: list[tuple[int, float]]  # by step


def _train(config: FinetuneConfig, prepared: Prepared, seed: int, checkpoints: Path, tracker: Tracker) -> _Learned:
    """Train with one seed, and answer every set."""
    set_seed(seed)
    model = prepared.make_model()
    if config.reinit_layers >= 0:
        reinitialize(model, config.reinit_layers, model.config.num_hidden_layers)
    if config.freeze_layers >= 0:
        freeze(model, config.freeze_layers, model.config.num_hidden_layers)
    if config.lora.rank:
        model = with_lora(model, config.lora)
    if config.loss.r_drop:
        losses.require_dropout(model)
    dev, own = prepared.dev, checkpoints / f"seed-{seed}"
    there = ranks.agreed(resume.newest_whole(own) if ranks.is_first() else None)
    there = there if there is not None and ranks.all_have(there.is_dir()) else None
    if config.head_epochs and there is None:
        _learn_head(config, prepared, seed, model, own)
    trainer = TaskTrainer(
        config,
        prepared,
        model=model,
        args=_arguments(config, prepared, own, seed),
        train_dataset=prepared.train,
        eval_dataset=dev.features,
        data_collator=prepared.collate,
        compute_metrics=(lambda found: dev.score(dev.decide(found.predictions, model))) if config.patience else None,
        callbacks=[_Progress(seed, tracker), *([EarlyStoppingCallback(config.patience)] if config.patience else [])],
    )
    trainer.remove_callback(PrinterCallback)
    stop = Stop()
    trainer.add_callback(_Checkpoints(trainer.teacher, stop))
    if there is not None:
        log.info(f"seed {seed}  goes on at step {there.name.rpartition('-')[2]}")
        if trainer.teacher is not None:
            trainer.teacher.project.load_state_dict(load_file(there / _PROJECTION))
    with stop.heard():
        trainer.train(resume_from_checkpoint=str(there) if there else None)
    trainer.compute_metrics = None  # of data.dev alone
    answers: dict[str, Sequence[Any]] = {}
    wrong = None
    for name, each in {"dev": dev, **prepared.more}.items():
        with telling(f"seed {seed}  answers data.{name}"):
            predictions = trainer.predict(each.features).predictions
        arrays = predictions if isinstance(predictions, tuple) else [predictions]
        if not all(np.isfinite(array).all() for array in arrays):
            raise TrainingError(f"optim.lr={config.optim.lr}: training with seed {seed} diverged; lower it")
        answers[name] = each.decide(predictions, model)
        if each is dev and dev.wrong is not None:
            wrong = dev.wrong(predictions, answers[name])
    history = [(row["step"], round(row["loss"], 5)) for row in trainer.state.log_history if "loss" in row]
    return _Learned(model.merge_and_unload() if config.lora.rank else model, answers, wrong, history)


def _learn_head(config: FinetuneConfig, prepared: Prepared, seed: int, model: Any, folder: Path) -> None:
    """Let pooler and head learn alone; `model` has them when this returns. Nothing of it is kept on disk."""
    log.info(f"seed {seed}  pooler and head learn alone, epochs: {config.head_epochs}")
    plain = replace(config.adversary, kind=Adversary.none)  # it disturbs the embeddings, which rest
    alone = replace(config, epochs=config.head_epochs, patience=0, adversary=plain)
    with head_alone(model, model.config.num_hidden_layers):
        trainer = TaskTrainer(
            alone,
            prepared,
            model=model,
            args=_arguments(alone, prepared, folder, seed),
            train_dataset=prepared.train,
            data_collator=prepared.collate,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    set_seed(seed)


def _arguments(config: FinetuneConfig, prepared: Prepared, folder: Path, seed: int) -> TrainingArguments:
    devices = ranks.world_size() if ranks.world_size() > 1 else max(1, torch.cuda.device_count())
    steps = -(-len(prepared.train) // (config.batch_size * devices)) * config.epochs
    often = "epoch" if config.patience else "no"
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        learning_rate=config.optim.lr or 0.0,  # `settled` has set it; the groups of the optimizer have their own
        warmup_steps=round(steps * config.optim.warmup_fraction),
        lr_scheduler_type="linear",
        seed=seed,
        bf16=config.precision is Precision.bf16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy=often,
        save_strategy=often,
        save_total_limit=2,  # the one before stays until the new one is sealed
        load_best_model_at_end=bool(config.patience),
        metric_for_best_model=config.definition.score,
        greater_is_better=True,
        label_names=list(prepared.label_columns),
        remove_unused_columns=False,
        report_to="none",
        logging_steps=max(1, steps // 100),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
