"""What all tasks share: loading the model, training it by Hugging Face's Trainer for each seed, writing the best.

A family of tasks gives a `Prepared`: its data as features, a way to make its model, to read its predictions, to score.
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from cloze.errors import TrainingError, UserError
from cloze.files import write_whole
from cloze.log import log
from finetune.config import Adversary, FinetuneConfig, Head, Init, Precision, facts
from finetune.data import sha256
from finetune.length import fitted
from finetune.techniques import losses
from finetune.techniques.adversary import add_adversarial_gradients
from finetune.techniques.distillation import Teacher
from finetune.techniques.layers import freeze, parameter_groups
from finetune.techniques.lora import with_lora
from pretrain.export.hugging_face import (
    be_quiet,
    load_pretrained,
    load_tokenizer,
    loading,
    refuse_occupied,
    replaced_directory,
)

Scores = dict[str, float]
Features = Sequence[dict[str, Any]]

_SECONDS = 10.0  # between two lines of progress


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A task as the Trainer takes it. From the predictions for `dev` and the model `decide` tells an answer for each
    example, and `score` how good these are.
    """

    tokenizer: Any
    make_model: Callable[[], Any]
    train: Features
    dev: Features
    collate: Any
    decide: Callable[[Any, Any], Sequence[Any]]
    score: Callable[[Sequence[Any]], Scores]
    label_columns: Sequence[str] = ("labels",)
    num_labels: int | None = None  # None: no labels to weigh
    teacher: Any = None
    facts: dict[str, Any] = field(default_factory=dict)  # for metrics.json


def load_encoder_tokenizer(config: FinetuneConfig, *, split_into_words: bool = False) -> Any:
    """The tokenizer of `config.model`, for so long samples as `config` has; more than it is made for are warned of."""
    tokenizer = load_tokenizer(Path(config.model), split_into_words=split_into_words)
    if config.max_len > tokenizer.model_max_length:
        seen = f"its tokenizer is made for {tokenizer.model_max_length} tokens, which is what pretraining saw"
        log.warning(f"max_len={config.max_len}: model={config.model}: {seen}; positions beyond may know little")
    return tokenizer


def load_model(config: FinetuneConfig, auto_class: Any, names: Sequence[str] | None = None, **head: Any) -> Any:
    """The model with the head of `auto_class`, for the labels `names`; its new layers are random, or all of it is.

    Raises `UserError` where the directory has other labels, or lacks weights of the encoder (but the pooler's).
    """
    folder = Path(config.model)
    if names is not None:
        head |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    with loading(folder):
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = AutoConfig.from_pretrained(folder, **head)
    if config.dropout is not None:
        for name, value in shape.to_dict().items():
            if "dropout" in name and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(shape, name, config.dropout)
    kind = auto_class.__name__.removeprefix("AutoModel")
    before = described.get("id2label", {"0": "", "1": ""})
    head_is_there = any(name.endswith(kind) for name in described.get("architectures") or [])
    if names is not None and head_is_there and len(before) != len(names):
        raise UserError(
            f"model={folder}: was fine-tuned for {len(before)} labels ({', '.join(map(str, before.values()))}), "
            f"the data have {len(names)}: {', '.join(names[:10])}; name the pretrained model"
        )
    if config.init is Init.random:
        return auto_class.from_config(shape)
    with loading(folder):
        model, told = auto_class.from_pretrained(folder, config=shape, dtype=torch.float32, output_loading_info=True)
    encoder = f"{model.base_model_prefix}."
    if missing := sorted(key for key in told["missing_keys"] if key.startswith(encoder) and ".pooler." not in key):
        raise UserError(
            f"model={folder}: has no {missing[0]}, nor {len(missing) - 1} other weights of the encoder, which would be "
            f"random; are its names those of {type(model).__name__}? Or ask for random weights by init=random"
        )
    return model.eval()


def load_teacher(config: FinetuneConfig, auto_class: Any, names: Sequence[str] | None, tokenizer: Any) -> Any:
    """The model that distill.teacher names, or None. It must know the same tokens and, if any, `names`."""
    if config.distill.teacher is None:
        return None
    folder, key = Path(config.distill.teacher), "distill.teacher"
    if load_tokenizer(folder, key).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{key}={folder}: has another vocabulary than model={config.model}; both need the same tokenizer"
        )
    teacher = load_pretrained(auto_class, folder, key, purpose="a teacher")
    if names is not None and [teacher.config.id2label[i] for i in range(teacher.config.num_labels)] != list(names):
        shown = ", ".join(teacher.config.id2label.values())
        raise UserError(f"{key}={folder}: its labels are {shown}; data.train has {', '.join(names)}")
    return teacher


class _Progress(TrainerCallback):
    """Now and then a line on stderr, instead of Hugging Face's dictionaries on stdout."""

    def __init__(self, seed: int) -> None:
        self.seed, self.told = seed, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if "loss" in logs and time.monotonic() > self.told + _SECONDS:
            step, loss = f"{state.global_step}/{state.max_steps}", float(logs["loss"])
            log.info(f"seed {self.seed}  step {step}  loss {loss:.3f}")
            self.told = time.monotonic()


class TaskTrainer(Trainer):
    """Hugging Face's Trainer with what `config` asks for beside it."""

    model: Any
    optimizer: Any

    def __init__(self, config: FinetuneConfig, prepared: Prepared, **rest: Any) -> None:
        super().__init__(**rest)
        self.cloze, self.layers = config, self.model.config.num_hidden_layers
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

    `prepare` stands in for that of the task's family.
    Raises `UserError` for unusable data, models and directories, `DiskError` where the disk fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("fine-tuning is one process that uses every GPU it sees: start it by `python -m finetune`")
    out = Path(config.out)
    refuse_occupied(out, "out=")
    be_quiet()
    asked, config = config.max_len, fitted(config)
    if config.max_len < asked:
        log.warning(
            f"max_len={asked}: model={config.model} has positions for {config.max_len} tokens: so many are used"
        )
    prepared, read = (prepare or config.definition.family.prepare)(config), sha256(config)
    prepared.tokenizer.model_max_length = config.max_len
    main = config.definition.score
    by_seed: dict[int, Scores] = {}
    with replaced_directory(out, "out=") as temporary:
        for seed in range(config.seed, config.seed + config.num_seeds):
            model, by_seed[seed] = _train(config, prepared, seed, temporary / "checkpoints")
            best = max(by_seed, key=lambda seed: by_seed[seed][main])
            if best == seed:
                model.save_pretrained(temporary)
        prepared.tokenizer.save_pretrained(temporary)
        shutil.rmtree(temporary / "checkpoints", ignore_errors=True)
        means = {name: statistics.fmean(s[name] for s in by_seed.values()) for name in by_seed[best]}
        body = {**means, "score": main, **prepared.facts, "train_examples": len(prepared.train)}
        body |= {"config": facts(config), "sha256": read}
        if config.num_seeds > 1:
            body |= {"by_seed": by_seed, "model_of_seed": best}
            body["std"] = {name: statistics.stdev(s[name] for s in by_seed.values()) for name in means}
        write_whole(temporary / "metrics.json", (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())
    return means


def _train(config: FinetuneConfig, prepared: Prepared, seed: int, checkpoints: Path) -> tuple[Any, Scores]:
    set_seed(seed)
    model = prepared.make_model()
    if config.freeze_layers >= 0:
        freeze(model, config.freeze_layers, model.config.num_hidden_layers)
    if config.lora.rank:
        model = with_lora(model, config.lora)
    if config.loss.r_drop:
        losses.require_dropout(model)

    def scored(predictions: Any) -> Scores:
        return prepared.score(prepared.decide(predictions, model))

    trainer = TaskTrainer(
        config,
        prepared,
        model=model,
        args=_arguments(config, prepared, checkpoints, seed),
        train_dataset=prepared.train,
        eval_dataset=prepared.dev,
        data_collator=prepared.collate,
        compute_metrics=(lambda found: scored(found.predictions)) if config.patience else None,
        callbacks=[_Progress(seed), *([EarlyStoppingCallback(config.patience)] if config.patience else [])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    predictions = trainer.predict(prepared.dev).predictions
    if not all(
        np.isfinite(array).all() for array in (predictions if isinstance(predictions, tuple) else [predictions])
    ):
        raise TrainingError(f"optim.lr={config.optim.lr}: training with seed {seed} diverged; lower it")
    return model.merge_and_unload() if config.lora.rank else model, scored(predictions)


def _arguments(config: FinetuneConfig, prepared: Prepared, folder: Path, seed: int) -> TrainingArguments:
    steps = -(-len(prepared.train) // (config.batch_size * max(1, torch.cuda.device_count()))) * config.epochs
    often = "epoch" if config.patience else "no"
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        learning_rate=config.optim.lr,
        warmup_steps=round(steps * config.optim.warmup_fraction),
        lr_scheduler_type="linear",
        seed=seed,
        bf16=config.precision is Precision.bf16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy=often,
        save_strategy=often,
        save_total_limit=1,
        save_only_model=True,
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
