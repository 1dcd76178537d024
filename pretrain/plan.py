"""`python -m pretrain.plan recipe=lamb_phase1 gpus=64 gpu=h200`: what a run needs before it is started.

Takes training's overrides and a few of its own (`PlanConfig`); starts nothing. Parameters and the bytes of weights,
gradients and optimizer are exact up to DeepSpeed's padding; activations are those that autograd keeps, counted by
tensors; time follows from model FLOPs and an assumed MFU.
"""

import functools
import re
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import psutil

from cloze import cli, storage
from cloze.corpus.manifest import Manifest, TokenizerFacts, pass_name, read_manifest
from cloze.errors import ExitCode, UserError
from cloze.log import closing
from cloze.schema import doc
from pretrain.config import (
    BUCKET_ELEMENTS,
    Attention,
    DataConfig,
    ModelConfig,
    Precision,
    TrainConfig,
    ZeroStage,
    accumulation_steps,
    batch_size,
    check_ranks,
    padded_vocab_size,
    sums_in_fp32,
    total_samples,
)
from pretrain.curves import Curve
from pretrain.data.live_masks import check_masking
from pretrain.mixture import Weights
from pretrain.optim.schedule import learning_rate
from pretrain.phases import Phase, phases_of
from pretrain.telemetry.throughput import GPUS, Gpu, training_flops

GIB = 2**30
CPU = "cpu"
_RESERVED = int(1.5 * GIB)  # CUDA's context, NCCL's buffers, what the allocator cannot use
_CAPABILITY = (8, 0)  # all GPUs that are offered here have it, or more
_WIDE, _MFU_WIDE, _MFU_NARROW = 1024, 0.4, 0.25  # what published runs reached: docs/scaling.md
_BARS = "▁▂▃▄▅▆▇█"
_NOT_NEEDED = ("run", "data.path")  # of training's keys
_NO_CORPUS = "no-corpus-given"  # their value where they are not
_MAGNITUDES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_GPUS_PER_NODE = 8
_SPANS = ((1.5, 60.0, "minutes"), (48.0, 1.0, "hours"), (float("inf"), 1 / 24, "days"))
_MATRIX = 1024  # rows of the matrices that a processor is timed with
_MFU_CPU = 0.4  # of what matrix products reach here


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """plan's own keys. What a corpus at data.path tells (lengths, vocabulary, masking) comes from there."""

    gpus: int = doc("number of GPUs, over all nodes")
    gpu: str = doc("kind of GPU: " + ", ".join(gpu.name for gpu in GPUS if gpu.name) + "; cpu: this machine")
    nodes: int = doc(f"number of machines: without gpus= with {_GPUS_PER_NODE} GPUs each")
    tokens: str | None = doc("tokens to train on, as 10B, 300M or 5e9: sets steps; null: steps says it")
    mfu: float = doc(
        "share of the peak that is reached: an assumption; a run logs its own as throughput/mfu; 0: what published "
        "runs reached, 0.4 from width 1024 on, else 0.25"
    )
    max_len: int = doc("tokens of the longest sample; 0: the recipe's, else 128")
    mean_len: int = doc("tokens of a mean sample; 0: all are of max_len")
    vocab_size: int = doc("tokens of the vocabulary")
    masking: float = doc("share of the tokens to predict; 0: the recipe's, else 0.15")

    def __post_init__(self) -> None:
        names = [gpu.name for gpu in GPUS if gpu.name]
        if self.gpu not in (*names, CPU):
            raise UserError(f"gpu={self.gpu}: there are {', '.join(names)}, and cpu for this machine")
        for key, least in (("gpus", 1), ("nodes", 1), ("vocab_size", 1), ("max_len", 0), ("mean_len", 0)):
            if not getattr(self, key) >= least:
                raise UserError(f"{key}={getattr(self, key)}: must be at least {least}")
        for key in ("mfu", "masking"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key}={getattr(self, key)}: must be in [0, 1]")
        if self.tokens is not None and not self.num_tokens:
            raise UserError(f"tokens={self.tokens}: is no number of tokens; write 10B, 300M or 5e9")

    @property
    def num_tokens(self) -> int:
        """What `tokens` means; 0 where it means nothing."""
        found = re.fullmatch(r"([\d_.]+(?:e\d+)?)\s*([kmbgt]?)", (self.tokens or "").strip().lower().replace(",", ""))
        try:
            return round(float(found[1].replace("_", "")) * _MAGNITUDES[found[2]]) if found else 0
        except ValueError:
            return 0


DEFAULTS = PlanConfig(
    gpus=1, gpu="h200", nodes=1, tokens=None, mfu=0.0, max_len=0, mean_len=0, vocab_size=30_522, masking=0.0
)


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int  # of ZeRO's communication
    activations: int
    update: int = 0  # beside the gradients, when activations are gone
    in_turns: bool = False  # gradients come as activations go: there are none from micro-batches before

    @property
    def peak(self) -> int:
        """Of what tensors hold: where the backward pass begins, or where it has ended."""
        begun = self.activations + (0 if self.in_turns else self.gradients)
        return self.weights + self.optimizer + self.buffers + max(begun, self.gradients + self.update)

    @property
    def total(self) -> int:
        return self.peak + _RESERVED


class Shape(NamedTuple):
    """A mean micro-batch."""

    padded: int  # tokens of the rectangle that holds its samples
    tokens: int
    masked: int
    read: int  # tokens that the last layer is run to its end for
    vocab_rows: int


def memory(config: TrainConfig, num_parameters: int, world_size: int, shape: Shape) -> Memory:
    """What the peak of a step holds on one GPU.

    Stage 0 keeps fp32 weights, gradients and two moments, and autocast's copies of the weights as long as activations;
    the embedding matrix gets gradients from both its uses, which are added up. Else weights and gradients are in the
    run's precision (sums of several micro-batches in fp32), and every rank has its share of fp32 masters, two moments
    and, during the update, fp32 gradients (Rajbhandari et al. 2020, section 3); stage 2 shares the gradients too, stage
    3 the weights. LAMB and Muon hold a whole update.
    """
    count, share = num_parameters, -(-num_parameters // world_size)
    size = 4 if config.precision is Precision.fp32 else 2
    activations = activation_bytes(config, shape)
    update = 0 if config.optim.kind == "adamw" else 4 * share
    if config.zero.stage == 0:
        copies = count * size if size == 2 else 0
        added = 8 * shape.vocab_rows * config.model.hidden_size
        single = config.peak_batch_size == config.micro_batch_size * world_size
        return Memory(4 * count, 4 * count, 8 * count, 0, activations + copies, max(update, added), in_turns=single)
    in_fp32 = sums_in_fp32(config, world_size)
    summed = 4 if in_fp32 else size
    bucket = min(BUCKET_ELEMENTS, count)
    live = bucket if config.zero.stage == 3 else 0  # gathered weights
    weights = size * (share + live if config.zero.stage == 3 else count)
    gradients = summed * (count + share if config.zero.stage == 1 else share)
    optimizer = 12 * share + (0 if in_fp32 and config.zero.stage < 3 else 4 * share)  # there the sums are what it takes
    if config.zero.offload:
        gradients, optimizer = (gradients if in_fp32 and config.zero.stage == 2 else 0), 0
    buffers = 2 * bucket * (summed if config.zero.stage == 1 else size)  # two buckets: one is sent, one filled
    return Memory(weights, gradients, optimizer, buffers, activations, update)


def activation_bytes(config: TrainConfig, shape: Shape) -> int:
    """What autograd keeps of a forward pass, and the logits on their way back.

    A layer of width h and feed-forward width f keeps, per token: its input, q, k, v, the attention's output, what goes
    into and comes out of the norms (8 h together), and f before and after the activation (ModernBERT, gated: 4 f); a
    byte per element for each of two dropouts; statistics of norms and softmax in fp32. `sdpa` keeps q, k, v and its
    output padded, and the output as it is, too. At stage 0 autocast leaves the norms' tensors in fp32. Of the last
    layer, what follows attention is of the tokens that are read. Checkpointing keeps a layer's input, and recomputes
    one layer at a time.
    """
    from pretrain.model.loss import (
        CHUNK_ELEMENTS,  # here, and below: transformers takes seconds, and --help none of them
    )

    model, size = config.model, 4 if config.precision is Precision.fp32 else 2
    h, f, tokens, read = model.hidden_size, model.intermediate_size, shape.tokens, shape.read
    gated = model.architecture.is_gated
    attention, rest = size * 5 * h + 4 * model.num_heads, size * (3 * h + (4 if gated else 2) * f) + 16
    if model.attention is Attention.sdpa:
        attention += size * h * (4 * shape.padded // tokens - 3)
    if model.dropout_curve.peak:
        rest += 2 * h if not gated else f
    if config.zero.stage == 0 and size == 2:
        rest += 8 * h
    whole, last = tokens * (attention + rest), tokens * attention + read * (rest + size * 2 * h)
    inputs = tokens * size * h * model.num_layers
    kept = inputs + whole if model.activation_checkpointing else whole * (model.num_layers - 1) + last
    ends = tokens * (size * h + (h if model.dropout_curve.peak else 0))  # embeddings before their norm
    logits = shape.masked * shape.vocab_rows  # and beside them some of them in fp32, into and out of the softmax
    fp32 = (8 if size == 2 else 4) * min(logits, CHUNK_ELEMENTS["cuda"])
    head = size * logits + fp32 + 6 * size * h * shape.masked + size * h * read
    return kept + ends + head


def check_memory(
    config: TrainConfig, options: PlanConfig, num_parameters: int, world_size: int, available_gib: float
) -> None:
    """Raises `UserError` where the run cannot fit. `config.model.attention` is the kernel itself."""
    rows = padded_vocab_size(options.vocab_size, config.model.pad_vocab_to)
    need = memory(config, num_parameters, world_size, shape_of(config.micro_batch_size, options, rows))
    if need.total > available_gib * GIB:
        raise UserError(
            f"micro_batch_size={config.micro_batch_size}: with zero={config.zero.value} this needs about "
            f"{need.total / GIB:.0f} GiB of a GPU that has {available_gib:.0f}; python -m pretrain.plan shows what fits"
        )


def shape_of(samples: int, options: PlanConfig, vocab_rows: int) -> Shape:
    tokens = samples * (options.mean_len or options.max_len)
    masked = round(tokens * options.masking)
    return Shape(samples * options.max_len, tokens, masked, min(tokens, masked + samples), vocab_rows)


def corpus_options(options: PlanConfig, manifest: Manifest, data: DataConfig | None = None) -> PlanConfig:
    """`options` with what the corpus knows better; `data` may mask more of it, or less."""
    splits = [manifest.splits[pass_name(number)] for number in range(manifest.passes)]
    mean = sum(split.tokens for split in splits) / max(1, sum(split.samples for split in splits))
    live = data.curves.get("data.masking_probability") if data else None
    probability = live.peak if live else manifest.masking.probability
    share = min(probability, manifest.masking.max_predictions / max(1.0, mean))
    return replace(
        options,
        max_len=manifest.max_len,
        mean_len=round(mean),
        vocab_size=manifest.tokenizer.vocab_size,
        masking=share,
    )


def parameters_of(model: ModelConfig, vocab_size: int, max_len: int = 1) -> int:
    """Counted on a model without storage. Raises `UserError` where its positions do not suffice."""
    import torch  # here, and below: it takes seconds, and --help none of them

    from pretrain.model.bert import PackedBert

    facts = TokenizerFacts(fingerprint="", vocab_size=vocab_size, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4)
    with torch.device("meta"):
        module = PackedBert(model, facts, max_len=max_len)
    return sum(parameter.numel() for parameter in module.parameters())


class Stretch(NamedTuple):
    """A phase of the run, and what a step of it takes."""

    phase: Phase
    options: PlanConfig
    step: Shape
    flops: float  # of a step
    seconds: float

    @property
    def length(self) -> int:
        """Tokens of a mean sample."""
        return self.step.tokens // self.phase.config.peak_batch_size


def plan(config: TrainConfig, options: PlanConfig) -> list[str]:
    """The lines of the plan. Raises `UserError` where the batch does not divide, or positions do not suffice."""
    gpu, here = gpu_of(options), options.gpu == CPU
    rows = padded_vocab_size(options.vocab_size, config.model.pad_vocab_to)
    phases, every = zip(*by_phase(config, options), strict=True)
    count = parameters_of(config.model, options.vocab_size, max(one.max_len for one in every))
    peak = gpu.fp32_tflops if config.precision is Precision.fp32 else gpu.peak_tflops
    usual = _MFU_CPU if here else _MFU_WIDE if config.model.hidden_size >= _WIDE else _MFU_NARROW
    mfu = options.mfu or usual
    stretches = [stretch_of(*one, rows, mfu * peak * 1e12) for one in zip(phases, every, strict=True)]
    first, batch, gpus = stretches[0], config.peak_batch_size, options.gpus
    accumulation = accumulation_steps(batch, config.micro_batch_size, gpus)
    step, flops, seconds = first.step, first.flops, first.seconds
    steps, batches = run_length(config, seconds)
    if len(phases) == 1:
        totals = [batches * each for each in (step.tokens, flops, seconds)]
    else:
        parts = [(one.phase.span.samples / one.phase.config.peak_batch_size, one) for one in stretches]
        totals = [
            sum(n * each for n, each in column)
            for column in (
                [(n, one.step.tokens) for n, one in parts],
                [(n, one.flops) for n, one in parts],
                [(n, one.seconds) for n, one in parts],
            )
        ]
    tokens, all_flops, hours = totals[0], totals[1], totals[2] / 3600
    heaviest = max(stretches, key=lambda one: one.phase.config.micro_batch_size * one.options.max_len)
    return [
        f"model       {config.model.name}: {count:,} parameters, {rows:,} vocabulary rows; "
        f"attention by {config.model.attention.value}",
        head_line(first, rows, count),
        *draw_mixture(phases[0]),
        f"batch       {batch:,} = {gpus} {options.gpu} x accumulation {accumulation} x micro-batch "
        f"{config.micro_batch_size}; samples of {first.length} tokens, {step.masked / batch:.1f} to predict",
        f"step        {step.tokens:,} tokens, {flops / 1e15:.2f} PFLOP",
        f"speed       {step.tokens / seconds:,.0f} tokens/s, {seconds:.3f} s a step, if MFU is {mfu:.0%} of "
        f"{peak:.{0 if peak >= 10 else 2}f} TFLOP/s in {config.precision.value}"
        + (", measured here just now" if here else ""),
        *(line for one in stretches[1:] for line in phase_lines(one)),
        f"run         {steps:,} steps, {tokens / 1e9:,.1f} G tokens, {all_flops:.2e} FLOP: "
        f"" + (long(hours) if here else f"{long(hours)}, {hours * gpus:,.0f} GPU-hours"),
        f"checkpoint  {12 * count / 1e9:.2f} GB each (fp32 weights and two moments)",
        f"schedule    {draw_schedule(config, phases[0].span_of('schedule').steps if len(phases) > 1 else steps)}",
        *draw_curves(config),
        *([] if here else ["", f"GiB of memory per GPU; {gpu.memory_gib:.0f} are there"]),
        *([] if here else memory_table(heaviest.phase.config, heaviest.options, count, rows, gpu.memory_gib)),
    ]


def stretch_of(phase: Phase, options: PlanConfig, rows: int, speed: float) -> Stretch:
    """A phase at `speed` FLOP/s on each GPU. Raises `UserError` where its batch does not divide."""
    config = phase.config
    check_ranks(replace(config, world_size=None), options.gpus)
    step = shape_of(config.peak_batch_size, options, rows)
    pairs = config.peak_batch_size if config.model.architecture.has_pairs else 0
    length = step.tokens // config.peak_batch_size
    flops = training_flops(config.model, rows, step.tokens, step.tokens * length, step.masked, pairs)
    return Stretch(phase, options, step, flops, flops / (speed * options.gpus))


def head_line(stretch: Stretch, rows: int, count: int) -> str:
    """What the vocabulary costs: of the parameters, of a step's FLOPs, and of the memory of a micro-batch."""
    config, step = stretch.phase.config, stretch.step
    width = config.model.hidden_size
    product = 6.0 * step.masked * width * rows
    micro = shape_of(config.micro_batch_size, stretch.options, rows)
    need = memory(config, count, stretch.options.gpus, micro)
    logits = activation_bytes(config, micro) - activation_bytes(config, micro._replace(vocab_rows=0))
    table = rows * width
    return (
        f"head        {rows:,} x {width} weights are {table / count:.0%} of the model; predicting takes "
        f"{product / stretch.flops:.0%} of a step's FLOPs, its logits {logits / GIB:.2f} GiB of {need.total / GIB:.2f} "
        f"at micro-batch {config.micro_batch_size}"
    )


def phase_lines(stretch: Stretch) -> list[str]:
    """What a phase behind the first has otherwise."""
    phase, config = stretch.phase, stretch.phase.config
    return [
        f"phase {phase.number}     from step {phase.span.first_step:,}: {config.peak_batch_size:,} samples of "
        f"{stretch.length} tokens, micro-batch {config.micro_batch_size}, {stretch.seconds:.3f} s a step; rate to "
        f"{config.optim.peak_lr:g}, schedule {config.schedule.kind}",
        *draw_mixture(phase),
    ]


def draw_mixture(phase: Phase, columns: int = 60) -> list[str]:
    """A line for each corpus of a mixture: its share of the samples over the phase, as bars."""
    data = phase.config.data
    if data.mixture is None or any(storage.is_remote(part.path) for part in data.parts):
        return []
    manifests = [read_manifest(storage.local_path(part.path)) for part in data.parts]
    sizes = [sum(one.splits[pass_name(p)].samples for p in range(one.passes)) / one.passes for one in manifests]
    weights = Weights.of(data.parts, sizes, data.temperature_curve)
    shares = [weights.shares(column / (columns - 1)) for column in range(columns)]
    lines = []
    for number, (part, size) in enumerate(zip(data.parts, sizes, strict=True)):
        own = [row[number] for row in shares]
        bars = "".join(_BARS[round(value * (len(_BARS) - 1))] for value in own)
        epochs = sum(own) / columns * phase.data_samples / size
        lines.append(f"mixture     {bars}  {own[0]:.0%} to {own[-1]:.0%}: {part.name}, {epochs:.2g} epochs")
    return lines


def long(hours: float) -> str:
    """Hours as a person says them, to three digits: `12 minutes`, `3.25 hours`, `4.17 days`."""
    value, unit = next((hours * per, unit) for most, per, unit in _SPANS if hours < most)
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def gpu_of(options: PlanConfig) -> Gpu:
    """The kind of GPU, or this machine's processor, whose speed is measured."""
    if options.gpu == CPU:
        return _this_machine()
    return next(gpu for gpu in GPUS if gpu.name == options.gpu)


@functools.cache
def _this_machine() -> Gpu:
    """TFLOP/s of large matrix products, the best of some tries."""
    import torch

    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.rand(_MATRIX, _MATRIX).to(dtype)
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - started)
        best[dtype] = 2 * _MATRIX**3 / min(seconds) / 1e12
    return Gpu(CPU, max(best.values()), best[torch.float32], psutil.virtual_memory().total / GIB, CPU)


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def run_length(config: TrainConfig, seconds: float) -> tuple[int, float]:
    """(steps, full batches' worth of samples) of a run whose full step takes `seconds`."""
    batch = config.peak_batch_size
    if not config.budget.hours:
        return config.steps, total_samples(config) / batch
    batches, parts = config.budget.hours * 3600 / seconds, 1000
    steps = sum(batches / parts * batch / batch_size((part + 0.5) / parts, config) for part in range(parts))
    return int(steps), batches


def draw_schedule(config: TrainConfig, steps: int, columns: int = 60) -> str:
    """The learning rate from first step to last, as bars."""
    if config.optim.rates:
        return f"{draw_curve(config.optim.rates, columns)}, as optim.lr says"
    wide, peak = max(steps, columns), max(config.optim.peak_lr, 1e-30)
    moments = [column * (wide - 1) // (columns - 1) for column in range(columns)]
    rates = [learning_rate(step, wide, config.optim, config.schedule) for step in moments]
    bars = "".join(_BARS[round(rate / peak * (len(_BARS) - 1))] for rate in rates)
    warmup = round(config.schedule.warmup_fraction * steps)
    return f"{bars}  to {config.optim.lr:g} in {warmup:,} steps, ends at {rates[-1]:.2g}"


def draw_curves(config: TrainConfig, columns: int = 60) -> list[str]:
    """A line of bars for each value that changes over the run, but the learning rate, which is the schedule's."""
    changing = {key: curve for key, curve in config.curves.items() if not curve.is_constant and key != "optim.lr"}
    return [f"curve       {draw_curve(curve, columns)}: {key}" for key, curve in changing.items()]


def draw_curve(curve: Curve, columns: int) -> str:
    """A curve as bars, and the values of its ends; its peak where that is not one of them."""
    values, peak = [curve.at(column / (columns - 1)) for column in range(columns)], max(curve.peak, 1e-30)
    bars = "".join(_BARS[round(value / peak * (len(_BARS) - 1))] for value in values)
    over = "" if peak in (values[0], values[-1]) else f", at most {peak:g}"
    return f"{bars}  {values[0]:g} to {values[-1]:g}{over}"


def memory_table(config: TrainConfig, options: PlanConfig, count: int, rows: int, available_gib: float) -> list[str]:
    """A line per ZeRO stage: parts that do not depend on the micro-batch, totals, and the largest that fits."""
    share = config.peak_batch_size // options.gpus
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    shown = sorted({config.micro_batch_size, *(size for size in (8, 32, 64, 128, 256) if share % size == 0)})
    head = ["weights", "gradients", "optimizer", "buffers", *(f"mb {size}" for size in shown), "largest mb".rjust(12)]
    lines = ["zero".ljust(12) + "".join(f"{name:>10}" for name in head)]
    for zero in ZeroStage:
        try:
            changed = replace(config, zero=zero)
        except UserError:  # not with compiled layers
            continue
        needs = {size: memory(changed, count, options.gpus, shape_of(size, options, rows)) for size in sizes}
        fitting = [size for size, need in needs.items() if need.total <= available_gib * GIB]
        values = [*needs[1][:4], *(needs[size].total for size in shown)]
        marked = f"{zero.value} *" if zero is config.zero else zero.value
        cells = "".join(f"{value / GIB:10.2f}" for value in values)
        lines.append(f"{marked:12}{cells}{max(fitting, default='none'):>12}")
    return lines


def composed(arguments: list[str]) -> tuple[TrainConfig, PlanConfig]:
    """Training's configuration and plan's, from one command line; the kernel is what `auto` comes to on these GPUs."""
    own = {field.name for field in fields(PlanConfig)}
    parts = [argument.removeprefix("+").partition("=") for argument in arguments]
    mine = {key: value for key, equals, value in parts if key in own and equals}
    rest = [argument for argument, (key, *_) in zip(arguments, parts, strict=True) if key not in mine]
    given = {key for key, *_ in parts}
    given |= {"data.path"} if "data.mixture" in given else set()
    rest += [f"{key}={_NO_CORPUS}" for key in (*_NOT_NEEDED, "init_from") if key not in given]
    config = cli.compose("train", TrainConfig, rest)
    options = cli.typed({**asdict(DEFAULTS), **mine}, PlanConfig)
    if "nodes" in mine and "gpus" not in mine:
        options = replace(options, gpus=options.nodes * (1 if options.gpu == CPU else _GPUS_PER_NODE))
    share = config.peak_batch_size // options.gpus
    if "micro_batch_size" not in given and share and config.micro_batch_size > share:  # nobody insists on it
        config = replace(config, micro_batch_size=share)
    import torch

    from pretrain.model.attention import choose_kernel

    if options.gpu == CPU:
        from pretrain.precision import with_precision

        config = with_precision(config, torch.device("cpu"))
    if config.precision is Precision.auto:
        config = replace(config, precision=Precision.bf16)  # as on the GPUs that are planned for
    if config.model.attention is not Attention.flash:  # which must be installed there, not here
        kernel = choose_kernel(config.model, config.precision, None if options.gpu == CPU else _CAPABILITY)
        config = replace(config, model=replace(config.model, attention=kernel))
    return _with_corpus(config, options)


def options_of(phase: Phase, options: PlanConfig) -> PlanConfig:
    """What the corpora of a phase, where they are at hand, or else its recipe, say of lengths and masks."""
    config, data = phase.config, phase.config.data
    paths = [part.path for part in data.parts]
    if _NO_CORPUS not in paths and not any(map(storage.is_remote, paths)):
        every = []
        for path in paths:
            manifest = read_manifest(storage.local_path(path))
            check_masking(data, manifest)
            every.append(corpus_options(options, manifest, data))
        return replace(
            every[0],
            max_len=max(one.max_len for one in every),
            mean_len=round(sum(one.mean_len for one in every) / len(every)),
            masking=sum(one.masking for one in every) / len(every),
        )
    length = options.max_len or max(config.expect.max_len, default=128)
    if options.mean_len > length:
        raise UserError(f"mean_len={options.mean_len}: must be at most max_len={length}")
    live = data.curves.get("data.masking_probability")
    masking = options.masking or (live.peak if live else config.expect.masking_probability) or 0.15
    return replace(options, max_len=length, masking=masking)


def _with_corpus(config: TrainConfig, options: PlanConfig) -> tuple[TrainConfig, PlanConfig]:
    """What the corpus, or else the recipe, says of lengths and masks; and as many steps as the tokens make."""
    if options.num_tokens:
        parts = [(phase, options_of(phase, options)) for phase in phases_of(config)]
        per_step = sum(
            phase.span.steps / config.steps * phase.config.peak_batch_size * (own.mean_len or own.max_len)
            for phase, own in parts
        )
        config = replace(config, steps=max(1, round(options.num_tokens / per_step)))
    phases = phases_of(config)
    found = options_of(phases[0], options)
    return config, found if len(phases) == 1 else replace(options, vocab_size=found.vocab_size)


def by_phase(config: TrainConfig, options: PlanConfig) -> list[tuple[Phase, PlanConfig]]:
    """Each phase with what its corpora say; of a run of one phase `options` know it already."""
    phases = phases_of(config)
    return [(phase, options_of(phase, options) if len(phases) > 1 else options) for phase in phases]


@cli.overrides_command(TrainConfig)
def main(arguments: list[str]) -> int:
    if "--help" in arguments:
        own = [
            cli.Key(field.name, field.metadata["help"], _shown(getattr(DEFAULTS, field.name)))
            for field in fields(PlanConfig)
        ]
        print(cli.help_text("train", TrainConfig, arguments, own, _NOT_NEEDED))
        return ExitCode.OK
    cli.refuse_options(TrainConfig, arguments, [field.name for field in fields(PlanConfig)])
    config, options = composed(arguments)
    print("\n".join(plan(config, options)))
    count = parameters_of(config.model, options.vocab_size)
    for phase, asked in by_phase(config, options) if options.gpu != CPU else ():
        check_memory(phase.config, asked, count, options.gpus, gpu_of(options).memory_gib)
    closing("nothing is started; the same keys but for those of the plan train, with data.path=… run=…")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
