"""The schema of conf/train.yaml, and batch arithmetic. Pure: what is wrong here is said before any process group."""

import math
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from cloze.corpus.manifest import Manifest, pass_name
from cloze.errors import UserError
from cloze.schema import doc, require
from pretrain.curves import Curve, is_curve, parse_curve, shares_that_tell
from pretrain.mixture import Part, parse_mixture
from pretrain.optim.options import OptimConfig
from pretrain.optim.schedules import ScheduleConfig

_PARTS = 10_000  # of a run, at which its batch sizes are looked at to count its samples
BUCKET_ELEMENTS = 200_000_000  # of gradients that ZeRO reduces, and of weights that it gathers, at a time


class Access(Enum):
    mapped = "mapped"
    stream = "stream"


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Architecture(Enum):
    """Each has a module of its name in pretrain/model/architectures; here is what is known without torch."""

    bert = "bert"
    modernbert = "modernbert"
    roberta = "roberta"
    xlm_roberta = "xlm_roberta"

    @property
    def has_pairs(self) -> bool:
        """Whether there is a next-sentence head."""
        return self is Architecture.bert

    @property
    def is_gated(self) -> bool:
        """Whether feed-forward parts are gated, positions rotary and most layers local."""
        return self is Architecture.modernbert


class Attention(Enum):
    auto = "auto"
    varlen = "varlen"
    flash = "flash"
    flex = "flex"
    sdpa = "sdpa"
    cpu = "cpu"


class Init(Enum):
    width = "width"
    fixed = "fixed"


class PositionInit(Enum):
    sinusoid = "sinusoid"
    normal = "normal"


class MorePositions(Enum):
    fresh = "fresh"
    repeated = "repeated"
    interpolated = "interpolated"


class WandbMode(Enum):
    auto = "auto"  # online with a key, offline without
    online = "online"
    offline = "offline"
    disabled = "disabled"


class ZeroStage(Enum):
    """A stage of DeepSpeed ZeRO (Rajbhandari et al. 2020), spelled as on the command line: `ZeroStage("2_offload")`."""

    _ignore_ = "members spelling"
    members = vars()
    for spelling in ("0", "1", "2", "3", "2_offload", "3_offload"):
        members[spelling] = spelling

    @classmethod
    def _missing_(cls, value: object) -> "ZeroStage | None":
        return cls.__members__.get(str(value))  # YAML reads a plain stage as a number

    @property
    def stage(self) -> int:
        return int(str(self.value)[0])

    @property
    def offload(self) -> bool:
        """Whether fp32 weights and moments stay in the CPU's memory, and are updated there."""
        return str(self.value).endswith("_offload")


_MASKING = ("masking_probability", "mask_share", "random_share")
INIT_CHECKS = ("tokenizer", "rope_theta")
RESUME_CHECKS = ("data", "max_len", "seed", "global_batch_size", "batch_ramp", "access")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str | None = doc(
        "corpus made by `python -m data_prep`: a directory, or an fsspec URL (s3://, gs://, https://); or data.mixture"
    )
    mixture: Any = doc(
        "several corpora of one tokenizer in its place: [{path: …, weight: …, name: …}, …]; weights, numbers or "
        "curves, are shares of the samples, names stand in metrics (by default the folders')"
    )
    temperature: Any = doc(
        "of a mixture without weights, they are the corpora's samples to this power: a number or a curve; 1: each is "
        "read equally often, 0: all weigh alike"
    )
    cache_dir: str | None = doc(
        "copy the corpus here first, once per node; needed for URLs, good for slow file systems"
    )
    cache_gib: float = doc("largest size of the copies in data.cache_dir, GiB; those used longest ago make room")
    access: Access = doc("mapped (memory-mapped files, perfect shuffle) or stream (for corpora larger than the disks)")
    lanes: int = doc("stretches of an epoch that are streamed side by side; best a multiple of the number of ranks")
    window: int = doc("streamed samples per lane that are shuffled together")
    workers: int = doc("loader processes per rank; 0 loads in the training process")
    prefetch: int = doc("micro-batches that each worker keeps ready")
    masking_probability: Any = doc("share of the tokens to predict: a number or a curve; null: as the corpus has it")
    mask_share: Any = doc("share of those that are shown as [MASK]: a number or a curve; prepared corpora have 0.8")
    random_share: Any = doc("share of those that are shown as a random token: a number or a curve; prepared: 0.1")

    def __post_init__(self) -> None:
        require(
            self.path is not None or self.mixture is not None,
            "data.path: has no value; add data.path=…, or data.mixture=[…] of several corpora",
        )
        require(
            self.path is None or self.mixture is None,
            f"data.mixture: and data.path={self.path} name corpora; leave one out, data.path=null or data.mixture=null",
        )
        for key in ("lanes", "window"):
            require(getattr(self, key) >= 1, f"data.{key}={getattr(self, key)}: must be at least 1")
        require(self.workers >= 0, f"data.workers={self.workers}: cannot be negative")
        require(self.prefetch >= 1, f"data.prefetch={self.prefetch}: must be at least 1")
        probability, *shown = (self.curves.get(f"data.{key}") for key in _MASKING)
        require(
            probability is None or min(probability.values) > 0,
            f"data.masking_probability={self.masking_probability}: must be above 0, or nothing is learned",
        )
        both = [curve for curve in shown if curve]
        require(
            all(sum(curve.at(share) for curve in both) <= 1 + 1e-9 for share in shares_that_tell(*both)),
            f"data.mask_share={self.mask_share}, data.random_share={self.random_share}: are more than 1 together",
        )

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The corpora: one, or those of the mixture."""
        if self.path is not None:
            return (Part(path=self.path, name="", weight=None),)
        return parse_mixture(self.mixture)

    @cached_property
    def temperature_curve(self) -> Curve:
        return parse_curve(self.temperature, "data.temperature", least=0.0)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """By key, whatever may change over the run; without the masking probability where it is the corpus'."""
        values = {key: getattr(self, key) for key in _MASKING}
        if self.masking_probability is None:
            del values["masking_probability"]
        found = {f"data.{key}": parse_curve(value, f"data.{key}", least=0.0, most=1.0) for key, value in values.items()}
        found |= {f"data.mixture.{part.name}": part.weight for part in self.parts if part.weight}
        by_size = self.mixture is not None and not any(part.weight for part in self.parts)
        return found | ({"data.temperature": self.temperature_curve} if by_size else {})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = doc("name of the size, for people")
    architecture: Architecture = doc(
        "bert (Devlin et al. 2019), or, without pairs (prepare with objective=none), modernbert (Warner et al. 2024), "
        "roberta (Liu et al. 2019) or xlm_roberta (Conneau et al. 2020)"
    )
    hidden_size: int = doc("width of the encoder")
    num_layers: int = doc("transformer layers")
    num_heads: int = doc("attention heads; must divide hidden_size")
    intermediate_size: int = doc("width of the feed-forward layer")
    max_positions: int = doc("position embeddings: the longest sequence the exported model takes, tokens")
    dropout: Any = doc("dropout on embeddings and hidden states, probability: a number or a curve")
    attention_dropout: Any = doc("dropout on attention weights, probability: a number or a curve")
    attention: Attention = doc(
        "kernel: varlen (torch's), flash (flash-attn's), flex (no dropout), sdpa (padded), cpu, or auto"
    )
    pad_vocab_to: int = doc("rows of the embedding matrix are rounded up to a multiple of this; removed at export")
    activation_checkpointing: bool = doc(
        "recompute activations in the backward pass: less memory, about a third slower"
    )
    init: Init = doc("fresh weights: width (standard deviation sqrt(2 / (5 hidden_size))) or fixed (model.init_std)")
    init_std: float = doc("standard deviation of fresh weights under model.init=fixed; BERT's own is 0.02")
    position_init: PositionInit = doc("fresh position embeddings: sinusoid, as large as other weights, or normal")
    distance_bias: Any = doc(
        "in training, attention scores get minus this times distance in tokens: a number, or a curve of [share of the "
        "run, value] that ends at 0, geometric in between; evaluation and export are always without it"
    )
    extra: dict[str, Any] | None = doc(
        "what else is not as the architecture was published, by its name in Hugging Face's config.json: "
        "layer_norm_eps, type_vocab_size, global_rope_theta, …"
    )

    def __post_init__(self) -> None:
        for key in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions", "pad_vocab_to"):
            require(getattr(self, key) >= 1, f"model.{key}={getattr(self, key)}: must be at least 1")
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.num_heads={self.num_heads}: does not divide model.hidden_size={self.hidden_size}",
        )
        for key, curve in self.curves.items():
            require(curve.peak < 1 or key == "model.distance_bias", f"{key}: the value {curve.peak:g} is not below 1")
        require(
            not self.attention_dropout_curve.peak or self.attention is not Attention.flex,
            "model.attention=flex: knows no dropout; set model.attention_dropout=0, or use model.attention=auto",
        )
        require(0 < self.init_std < 1, f"model.init_std={self.init_std}: must be in (0, 1)")
        curve = self.distance_curve
        require(
            curve.is_constant or curve.at(1.0) == 0,
            f"model.distance_bias: ends at {curve.at(1.0):g}; a curve must end at 0, so that what is left is a BERT",
        )
        require(
            not self.architecture.is_gated or not any(curve.values),
            f"model.distance_bias: not with architecture={self.architecture.value}; rotary positions learn what is "
            "near by themselves",
        )

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """By key, whatever may change over the run."""
        keys = ("distance_bias", "dropout", "attention_dropout")
        return {f"model.{key}": parse_curve(getattr(self, key), f"model.{key}", least=0.0) for key in keys}

    @property
    def distance_curve(self) -> Curve:
        """Slope of the distance bias over the run, per token."""
        return self.curves["model.distance_bias"]

    @property
    def dropout_curve(self) -> Curve:
        return self.curves["model.dropout"]

    @property
    def attention_dropout_curve(self) -> Curve:
        return self.curves["model.attention_dropout"]

    @property
    def weights_std(self) -> float:
        """Standard deviation of fresh weights (by width: Nguyen and Salazar 2019, section 2.2)."""
        return math.sqrt(2 / (5 * self.hidden_size)) if self.init is Init.width else self.init_std


@dataclass(frozen=True, kw_only=True)
class ExpectConfig:
    init_from: bool = doc("the recipe is for training on from other weights: init_from must be given")
    objective: str | None = doc("objective that the recipe was made for: nsp, sop or none; null: any")
    max_len: list[int] = doc("sample lengths that the recipe was made for, tokens; empty: any")
    masking_probability: float | None = doc("share of tokens to predict that the recipe was made for; null: any")

    def unmet(self, manifest: Manifest) -> list[str]:
        """What the corpus is and should not be, each with the `data_prep` override that makes it so."""
        found = []
        if self.objective not in (None, manifest.objective):
            found.append(f"objective={manifest.objective}, not objective={self.objective}")
        if self.max_len and manifest.max_len not in self.max_len:
            found.append(f"max_len={manifest.max_len}, not max_len={' or '.join(map(str, self.max_len))}")
        probability = manifest.masking.probability
        if self.masking_probability is not None and not math.isclose(self.masking_probability, probability):
            found.append(f"masking.probability={probability}, not masking.probability={self.masking_probability}")
        return found


@dataclass(frozen=True, kw_only=True)
class BatchRampConfig:
    start: int | None = doc("global batch size of the first step, which grows in multiples of it; null: no ramp")
    fraction: float = doc("share of the run after which it is global_batch_size")

    def __post_init__(self) -> None:
        require(self.start is None or self.start >= 1, f"batch_ramp.start={self.start}: must be at least 1")
        require(0 < self.fraction <= 1, f"batch_ramp.fraction={self.fraction}: must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    mlm_weight: Any = doc("weight of the masked-LM loss: a number or a curve")
    nsp_weight: Any = doc("weight of the next-sentence loss: a number or a curve")
    z_loss_weight: float = doc(
        "weight, within the masked-LM loss, of the squared log of the softmax's denominator (PaLM has 1e-4); 0: none"
    )

    def __post_init__(self) -> None:
        require(
            0 <= self.z_loss_weight < math.inf, f"loss.z_loss_weight={self.z_loss_weight}: must be in [0, infinity)"
        )
        both = self.curves.values()
        idle = [share for share in shares_that_tell(*both) if not any(curve.at(share) for curve in both)]
        where = "" if all(curve.is_constant for curve in both) else f" at {idle[0]:g} of the run" if idle else ""
        require(not idle, f"loss: both weights are 0{where}, there is nothing to learn")

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """By key, whatever may change over the run."""
        keys = ("mlm_weight", "nsp_weight")
        return {f"loss.{key}": parse_curve(getattr(self, key), f"loss.{key}", least=0.0) for key in keys}


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = doc("optimizer steps between two lines of metrics")
    layers_every: int = doc(
        "optimizer steps between two looks at each layer: gradient norm, update against weights, and at evaluations "
        "the entropy of attention; 0: never; zero=0 only"
    )
    tensorboard: bool = doc("also write TensorBoard events")
    sinks: list[str] = doc("sinks of your own for metrics, each as module:factory; see docs/training.md")

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every={self.every}: must be at least 1")
        require(self.layers_every >= 0, f"log.layers_every={self.layers_every}: cannot be negative")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = doc("optimizer steps between held-out evaluations; 0 evaluates at the end only")
    max_samples: int = doc("held-out samples to use at most; 0 uses all")
    grammar: str | None = doc(
        "minimal pairs to score, too: a file, folder or zip archive, such as BLiMP.zip; null none"
    )
    grammar_every: int = doc("optimizer steps between two scorings of them; 0 scores at the end only")
    grammar_pairs: int = doc("pairs of each paradigm at most; 0 takes all")
    predictions: int = doc(
        "held-out sentences whose missing word the model guesses at every evaluation, for the report; 0 none"
    )

    def __post_init__(self) -> None:
        for key in ("every", "max_samples", "grammar_every", "grammar_pairs", "predictions"):
            require(getattr(self, key) >= 0, f"eval.{key}={getattr(self, key)}: cannot be negative")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = doc("optimizer steps between checkpoints; 0 saves at the end only")
    keep_last: int = doc("newest checkpoints to keep")
    keep_every: int = doc("also keep for ever the checkpoints whose step is a multiple of this; 0 keeps none")
    at: list[float] = doc("also save, and keep for ever, when these shares of the run's steps are done")
    upload: str | None = doc("fsspec URL or directory: each whole checkpoint is copied to UPLOAD/run in the background")
    patience_seconds: int = doc("rank 0 waits so long for the other ranks' shares before a save counts as failed")

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every={self.every}: cannot be negative")
        require(self.keep_last >= 1, f"checkpoint.keep_last={self.keep_last}: must be at least 1")
        require(self.keep_every >= 0, f"checkpoint.keep_every={self.keep_every}: cannot be negative")
        for share in self.at:
            require(0 < share <= 1, f"checkpoint.at: the share {share} must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    allow: list[str] = doc(f"what may differ from the checkpoint: {', '.join(RESUME_CHECKS)}")

    def __post_init__(self) -> None:
        for name in self.allow:
            require(name in RESUME_CHECKS, f"resume.allow=[{name}]: there are {', '.join(RESUME_CHECKS)}")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    hours: float | None = doc("end the run after so much training time; the schedule is stretched to it, hours")

    def __post_init__(self) -> None:
        require(self.hours is None or self.hours > 0, f"budget.hours={self.hours}: must be positive")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    spike_factor: float | None = doc("roll back when a logged loss exceeds its running mean by this factor; null never")
    max_rollbacks: int = doc("roll back at most so often, then give up (exit 70)")
    give_up_loss: float | None = doc(
        "give up (exit 70) when five logged losses in a row exceed this after the warm-up; null never"
    )

    def __post_init__(self) -> None:
        factor, most = self.spike_factor, self.give_up_loss
        require(most is None or 0 < most < math.inf, f"guard.give_up_loss={most}: must be positive, or null")
        require(factor is None or factor > 1, f"guard.spike_factor={factor}: must be above 1")
        require(self.max_rollbacks >= 1, f"guard.max_rollbacks={self.max_rollbacks}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ChecksConfig:
    weights_every: int = doc(
        "optimizer steps between two looks whether all ranks hold the same weights, also before checkpoints; 0: never"
    )
    arithmetic_every: int = doc(
        "optimizer steps between two looks whether all ranks compute the same from one micro-batch; 0: never"
    )

    def __post_init__(self) -> None:
        for key in ("weights_every", "arithmetic_every"):
            require(getattr(self, key) >= 0, f"checks.{key}={getattr(self, key)}: cannot be negative")


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    seconds: int = doc("without progress for so long, write every thread's stack and exit 71; 0 never does")
    start_seconds: int = doc(
        "the same up to the end of the first step, in which ranks meet, a corpus is copied, kernels are built, and "
        "after the last one, while trackers take what is left"
    )

    def __post_init__(self) -> None:
        for key in ("seconds", "start_seconds"):
            require(getattr(self, key) >= 0, f"watchdog.{key}={getattr(self, key)}: cannot be negative")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    mode: WandbMode = doc("auto (online with a key, else offline), online, offline or disabled")
    project: str | None = doc("W&B project; null: WANDB_PROJECT, else cloze")
    entity: str | None = doc("W&B user or team")
    tags: list[str] = doc("W&B tags")
    artifact: bool = doc("also send the newest checkpoint as an artifact when the run ends")


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    extra: dict[str, Any] | None = doc(
        "more DeepSpeed configuration, deep-merged; may add keys, never change Cloze's own"
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    run: str = doc("name of the run: its directory is runs_root/run, and the same name resumes it")
    runs_root: str = doc("directory that holds the runs")
    seed: int = doc("seed of the weights, the order of the samples and dropout")
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    expect: ExpectConfig
    loss: LossConfig
    zero: ZeroStage = doc(
        "DeepSpeed ZeRO stage (Rajbhandari et al. 2020): 0, 1, 2, 3; 2_offload, 3_offload keep the optimizer on the CPU"
    )
    precision: Precision = doc(
        "fp32, bf16, fp16 (GPU only, dynamic loss scale), or auto: what this device is fastest in"
    )
    compile: bool = doc("torch.compile the layers, once for all shapes: zero=0, 1, 2; needs Triton, or g++ on a CPU")
    global_batch_size: Any = doc("samples per optimizer step over all ranks: a number, or a curve of whole numbers")
    micro_batch_size: int = doc("samples per forward pass of one rank; accumulation steps follow")
    world_size: int | None = doc(
        "ranks to insist on (launch sets it): deepspeed trains locally where it finds no hostfile; null takes any"
    )
    batch_ramp: BatchRampConfig
    steps: int = doc("optimizer steps of the whole run: the schedule ends there")
    phases: Any = doc(
        "what is otherwise from a share of the steps on: [{from: 0.9, data.path: …, …}, …], each on top of the one "
        "before; null: nothing"
    )
    stop_at: int | None = doc("stop in an orderly way at this optimizer step, with a checkpoint and exit code 75")
    log: LogConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    init_from: str | None = doc(
        "start from these weights: a run, a checkpoint or a published encoder (a directory in Hugging Face's format, "
        "or a name on the hub); weights only"
    )
    init_allow: list[str] = doc(
        "what may differ from init_from: tokenizer (tokens with the same text keep their embeddings, the others start "
        "afresh), rope_theta (for longer samples)"
    )
    init_positions: MorePositions = doc(
        "where init_from has fewer position embeddings: those behind its last are fresh, or its own repeated, or its "
        "whole table interpolated"
    )
    branch_from: str | None = doc(
        "go on where this run, or checkpoint of one, stands, optimizer, step and samples included, in a run of its own"
    )
    resume: ResumeConfig
    budget: BudgetConfig
    guard: GuardConfig
    checks: ChecksConfig
    watchdog: WatchdogConfig
    wandb: WandbConfig
    deepspeed: DeepSpeedConfig

    def __post_init__(self) -> None:
        plain = self.run not in ("", ".", "..") and not set(self.run) & set("/\\") and self.run.isprintable()
        require(plain, f"run={self.run!r}: must be a plain name; the directory goes into runs_root")
        require(
            not (self.compile and self.zero.stage == 3),
            f"compile=true: not with zero={self.zero.value}, which gathers weights in hooks inside the layers; "
            "use zero=1 or 2, or compile=false",
        )
        for key in ("micro_batch_size", "steps"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        require(self.stop_at is None or self.stop_at >= 1, f"stop_at={self.stop_at}: must be at least 1")
        self._check_batches()
        layers = f"log.layers_every={self.log.layers_every}"
        require(
            not self.log.layers_every or self.zero.stage == 0,
            f"{layers}: with zero={self.zero.value} no rank has a layer's whole gradient; set zero=0, or leave it out",
        )
        require(
            not (self.log.layers_every and self.compile),
            f"{layers}: not with compile=true, whose code hides the scores of attention; set compile=false",
        )
        if self.expect.init_from and not self.init_from:
            raise UserError(
                "init_from: this recipe goes on from other weights; add init_from=<run of the phase before>"
            )
        for name in self.init_allow:
            require(name in INIT_CHECKS, f"init_allow=[{name}]: there are {', '.join(INIT_CHECKS)}")
        require(0 <= self.seed < 2**63, f"seed={self.seed}: must be in [0, 2^63)")
        object.__setattr__(self, "optim", self.optim.with_lr(self.model.hidden_size))
        changing = [key for key, curve in self.curves.items() if not curve.is_constant]
        require(
            self.budget.hours is None or not changing,
            f"{' '.join(changing[:1])}: a curve stretches over the samples of a run, and budget.hours leaves their "
            "number open; give a number, or leave out budget.hours",
        )
        dropout = [key for key in changing if key.endswith("dropout")]
        require(
            not (self.compile and dropout),
            f"{' '.join(dropout[:1])}: a curve, and compile=true builds a probability into its code; give a number, or "
            "set compile=false",
        )
        require(
            self.budget.hours is None or not self.checkpoint.at,
            "checkpoint.at: shares are of the run's steps, and budget.hours leaves their number open; use "
            "checkpoint.every, or leave out budget.hours",
        )

    def _check_batches(self) -> None:
        sizes, start = self.batch_sizes, self.batch_ramp.start
        require(
            all(size == int(size) for size in sizes.values),
            f"global_batch_size={self.global_batch_size}: sizes must be whole numbers",
        )
        require(
            start is None or not is_curve(self.global_batch_size),
            f"batch_ramp.start={start}: global_batch_size is a curve, which says how the batch grows; leave one out",
        )
        require(
            start is None or self.peak_batch_size % start == 0,
            f"batch_ramp.start={start}: must divide global_batch_size={self.peak_batch_size}",
        )

    @cached_property
    def batch_sizes(self) -> Curve:
        """Samples per optimizer step over the run, before they are cut to multiples of `batch_unit`."""
        return parse_curve(self.global_batch_size, "global_batch_size", least=1)

    @property
    def peak_batch_size(self) -> int:
        return int(self.batch_sizes.peak)

    @property
    def batch_unit(self) -> int:
        """What every global batch of a curve is a multiple of, whatever the number of ranks."""
        return math.gcd(*map(int, self.batch_sizes.values))

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """By key, whatever may change over the run."""
        rates = {"optim.lr": self.optim.rates} if self.optim.rates else {}
        batch = {"global_batch_size": self.batch_sizes}
        return batch | rates | self.model.curves | self.loss.curves | self.data.curves

    @property
    def kept_steps(self) -> frozenset[int]:
        """The steps of `checkpoint.at`."""
        return frozenset(max(1, round(share * self.steps)) for share in self.checkpoint.at)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run has in common with the checkpoint it goes on from: which samples come when, what numbers mean."""

    tokenizer: str  # fingerprint
    optimizer: str
    data: str  # sha256 of the manifest
    num_samples: int  # of all passes
    passes: int
    max_len: int
    seed: int
    global_batch_size: int
    batch_ramp: str
    access: str

    @classmethod
    def of(cls, config: TrainConfig, manifest: Manifest, manifest_sha256: str) -> "Identity":
        data = config.data
        streamed = f"stream (lanes={data.lanes}, window={data.window})"
        return cls(
            tokenizer=manifest.tokenizer.fingerprint,
            optimizer=config.optim.kind,
            data=manifest_sha256,
            num_samples=sum(manifest.splits[pass_name(p)].samples for p in range(manifest.passes)),
            passes=manifest.passes,
            max_len=manifest.max_len,
            seed=config.seed,
            global_batch_size=config.peak_batch_size,
            batch_ramp=_told_ramp(config),
            access=streamed if data.access is Access.stream else data.access.value,
        )

    def describe(self, name: str) -> str:
        """The value of a field, for people."""
        found = f"{name}={getattr(self, name)}"
        return f"{found} ({self.num_samples:,} samples in {self.passes} passes)" if name == "data" else found


def _told_ramp(config: TrainConfig) -> str:
    ramp = config.batch_ramp
    if not config.batch_sizes.is_constant:
        return f"the curve {config.global_batch_size}"
    return f"from {ramp.start} in {ramp.fraction:g} of the run" if ramp.start else "none"


def batch_size(done: float, config: TrainConfig) -> int:
    """Samples of the optimizer step that begins when this share of the run is done.

    Of a curve, the share of its samples; of batch_ramp, the share of its steps, or of the time budget.
    """
    sizes, ramp = config.batch_sizes, config.batch_ramp
    if not sizes.is_constant:
        return int(sizes.at(done) / config.batch_unit + 1e-9) * config.batch_unit
    if ramp.start is None or done >= ramp.fraction:
        return config.peak_batch_size
    multiples = config.peak_batch_size // ramp.start
    return ramp.start * (1 + int(done / ramp.fraction * (multiples - 1) + 1e-9))


def total_samples(config: TrainConfig) -> int:
    """Samples of all optimizer steps of a run without a time budget.

    Of a curve of batch sizes they are as many as `steps` steps consume: steps over the mean of 1 / size, to within a
    batch or a thousandth.
    """
    if not config.batch_sizes.is_constant:
        sizes = (batch_size((part + 0.5) / _PARTS, config) for part in range(_PARTS))
        return round(config.steps * _PARTS / math.fsum(1 / size for size in sizes))
    ramped = min(config.steps, math.ceil(config.batch_ramp.fraction * config.steps)) if config.batch_ramp.start else 0
    sizes = (batch_size(step / config.steps, config) for step in range(ramped))
    return sum(sizes) + (config.steps - ramped) * config.peak_batch_size


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Rows of the embedding matrix."""
    return -(-vocab_size // multiple) * multiple


def check_ranks(config: TrainConfig, world_size: int) -> None:
    """Raises `UserError` where so many ranks are not those insisted on, or cannot share every batch of the run."""
    if config.world_size not in (None, world_size):
        raise UserError(
            f"world_size={config.world_size}: there are {world_size} ranks; correct it, or the "
            f"hostfile; python -m launch procs={config.world_size} starts so many here"
        )
    unit, stretch = config.batch_unit, config.micro_batch_size * world_size
    if not config.batch_sizes.is_constant and unit % stretch:
        raise UserError(
            f"global_batch_size: grows in steps of {unit}, the common divisor of its points, which is no multiple of "
            f"micro_batch_size={config.micro_batch_size} x {world_size} rank{'s' if world_size > 1 else ''} = {stretch}"
            "; give points that are"
        )
    for size in (config.peak_batch_size, config.batch_ramp.start or config.peak_batch_size):
        accumulation_steps(size, config.micro_batch_size, world_size)


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per optimizer step and rank. Raises `UserError` naming the nearest sizes that divide."""
    per_step = micro_batch_size * world_size
    if global_batch_size % per_step == 0:
        return global_batch_size // per_step
    below = global_batch_size // per_step * per_step
    globals_near = [size for size in (below, below + per_step) if size]
    hint = f"nearest global_batch_size {' or '.join(map(str, globals_near))}"
    if global_batch_size % world_size == 0:
        share = global_batch_size // world_size
        divisors = [d for d in range(1, math.isqrt(share) + 1) if share % d == 0]
        divisors += [share // d for d in divisors]
        nearest = sorted({min(divisors, key=lambda d: (abs(d - micro_batch_size), -d))})
        hint += f", or nearest micro_batch_size {nearest[0]}"
    raise UserError(
        f"global_batch_size={global_batch_size}: not a multiple of micro_batch_size={micro_batch_size} x "
        f"{world_size} rank{'s' if world_size > 1 else ''} = {per_step}; {hint}"
    )


def sums_in_fp32(config: TrainConfig, world_size: int) -> bool:
    """Whether ZeRO adds up gradients of micro-batches in more than the precision of the run (stage 0 always has fp32).

    A sum in bf16 loses what is below 1/256 of it: over 512 micro-batches 4% of the gradient.
    """
    accumulates = config.peak_batch_size > config.micro_batch_size * world_size
    return accumulates and config.zero.stage > 0 and config.precision is not Precision.fp32


def as_data(value: Any) -> Any:
    """Dataclass values as YAML knows them: enums by their value."""
    if isinstance(value, dict):
        return {key: as_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(item) for item in value]
    return value.value if isinstance(value, Enum) else value
