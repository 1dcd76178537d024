"""Phases: one run whose corpus, rate, batch or masks change at given shares of it.

`phases: [{from: 0.9, data.path: shards/512}]` says what is otherwise from that share of the run's steps on; before it
the configuration holds as it stands, and each phase goes on from the one before. With names, `phases: {long: {from:
0.9}}`, they can be added to: `+phases.long.data.path=shards/512`. A curve, or a schedule, goes over the
stretch in which it holds: from the phase that writes it to the next one that does, or to the end. All phases are
composed and checked before the first step. Where each stands, in steps and in samples, follows from the configuration
alone, so a run resumes in any of them, and between two. Pure, but for the YAML of a group that a phase names.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from cloze import cli
from cloze.errors import UserError
from pretrain.config import Identity, ModelConfig, TrainConfig, as_data, batch_size, total_samples
from pretrain.optim.schedules import ScheduleConfig

_FROM, _BATCH = "from", "global_batch_size"
_SETTABLE = (
    *("data.path", "data.mixture", "data.temperature", "data.masking_probability", "data.mask_share"),
    *("data.random_share", "schedule", "optim.lr", "optim.weight_decay", "global_batch_size", "micro_batch_size"),
    *("loss", "model.dropout", "model.attention_dropout", "model.distance_bias", "model.extra", "expect"),
)
_TOGETHER = {  # what is set together goes over one stretch
    "data.path": "data", "data.mixture": "data", "data.temperature": "data",
    "data.masking_probability": "masks", "data.mask_share": "masks", "data.random_share": "masks",
    "optim.lr": "schedule",
}  # fmt: skip
_ROTARY = "rope"  # what of model.extra may change: no weight depends on it


class Span(NamedTuple):
    """A stretch of the run."""

    first_step: int
    end_step: int
    first_sample: int  # of those that steps consume
    end_sample: int

    def share(self, samples: int) -> float:
        """Of the stretch, in [0, 1], where the run has consumed so many samples."""
        return min(1.0, max(0.0, (samples - self.first_sample) / max(1, self.samples)))

    @property
    def steps(self) -> int:
        return self.end_step - self.first_step

    @property
    def samples(self) -> int:
        return self.end_sample - self.first_sample


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run under one configuration."""

    number: int  # from 1
    config: TrainConfig
    span: Span
    spans: Mapping[str, Span]  # over which what a key says goes, by `stretch_of`
    data_start: int  # the run position at which the order of its corpus begins, as if it had been read all along
    data_samples: int  # of the corpus, over all phases that read it

    @property
    def data_position(self) -> int:
        """Of the corpus' own order, where the phase begins."""
        return self.span.first_sample - self.data_start

    def reads_as(self, other: "Phase") -> bool:
        """Whether its data are the other's."""
        return bool(_corpora(self.config) == _corpora(other.config))

    def span_of(self, key: str) -> Span:
        """The stretch over which a curve, or the schedule, goes."""
        return self.spans[stretch_of(key)]


def stretch_of(key: str) -> str:
    """The name under which a key shares its stretch with those that go with it."""
    if key.startswith("data.mixture."):
        return "data"
    return _TOGETHER.get(key, "schedule" if key.startswith("schedule.") else key)


def phases_of(config: TrainConfig) -> tuple[Phase, ...]:
    """The phases of a run, of one at least. Raises `UserError` where they are not what they must be."""
    starts, written = _written(config)
    configs = [config]
    for number, overrides in enumerate(written[1:], 2):
        configs.append(_with(configs[-1], overrides, number))
    steps = [*starts, config.steps]
    sets = [{stretch_of(key) for key in overrides} for overrides in written]
    spans = _spans(steps, sets, configs)
    found: list[Phase] = []
    for index, own in enumerate(configs):
        alike = [one for one in range(len(configs)) if _corpora(configs[one]) == _corpora(own)]
        earlier = sum(spans[one]["steps"].samples for one in alike if one < index)
        found.append(
            Phase(
                number=index + 1,
                config=own,
                span=spans[index]["steps"],
                spans=spans[index],
                data_start=spans[index]["steps"].first_sample - earlier,
                data_samples=sum(spans[one]["steps"].samples for one in alike),
            )
        )
    return tuple(found)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of the optimizer step `step`, counted from 0; behind the end, the last one."""
    return next((phase for phase in phases if step < phase.span.end_step), phases[-1])


def phase_before(phases: Sequence[Phase], step: int) -> Phase:
    """The phase that has led to `step`: in whose configuration its checkpoint was written."""
    return phase_at(phases, max(0, step - 1))


def model_to_build(phases: Sequence[Phase], phase: Phase) -> ModelConfig:
    """The model of a phase with as much dropout as any has: some have modules for it only where there is some."""
    model, every = phase.config.model, [one.config.model for one in phases]
    if len(phases) == 1:
        return model
    hidden, attention = (
        max(curve.peak for curve in curves)
        for curves in zip(*((one.dropout_curve, one.attention_dropout_curve) for one in every), strict=True)
    )
    return replace(model, dropout=hidden, attention_dropout=attention)


def config_of_engine(phases: Sequence[Phase]) -> TrainConfig:
    """What the engine is set up by, in whichever phase a run resumes: that of the most micro-batches a step."""
    configs = [phase.config for phase in phases]
    return max(configs, key=lambda config: config.peak_batch_size / config.micro_batch_size)


def identity_of(phases: Sequence[Phase], identities: Sequence[Identity]) -> Identity:
    """Of a run, from that of each of its phases: where and of how many samples they are counts."""
    if len(phases) == 1:
        return identities[0]
    whole = [(phase.span, phase.data_start, one) for phase, one in zip(phases, identities, strict=True)]
    return replace(
        identities[0],
        data=hashlib.sha256(repr(whole).encode()).hexdigest(),
        num_samples=sum(one.num_samples for one in identities),
        passes=sum(one.passes for one in identities),
        max_len=max(one.max_len for one in identities),
    )


def _written(config: TrainConfig) -> tuple[list[int], list[dict[str, Any]]]:
    """(first step, what is set by dotted key) of every phase; of the first, which is the configuration's own, all."""
    phases = config.phases
    if phases is None:
        return [0], [{}]
    example = "such as [{from:0.9,data.path:shards/512}]"
    if isinstance(phases, Mapping) and all(isinstance(one, Mapping) and _FROM in one for one in phases.values()):
        phases = sorted(phases.values(), key=lambda one: _share(one[_FROM]))
    if not isinstance(phases, list | tuple) or not all(isinstance(one, Mapping) and _FROM in one for one in phases):
        raise UserError(f"phases: is no list of phases, each from a share of the run on, {example}")
    shares, starts, written = [0.0], [0], [dict[str, Any]()]
    for number, one in enumerate(phases, 2):
        share = _share(one[_FROM])
        overrides = dict(_flat({key: value for key, value in one.items() if key != _FROM}))
        for key in overrides:
            if not any(key == may or key.startswith(f"{may}.") for may in _SETTABLE):
                raise UserError(f"phases: phase {number} sets {key}; a phase may set {', '.join(_SETTABLE)}")
        shares.append(share)
        starts.append(round(share * config.steps))
        written.append(overrides)
    for (before, after), (first, second) in zip(pairwise(shares), pairwise([*starts]), strict=True):
        if after <= before or second <= first:
            raise UserError(
                f"phases: one begins at {after:g} of the run after one at {before:g}, and steps={config.steps} leaves "
                "no step between; give shares that rise, or more steps"
            )
    if starts[-1] >= config.steps:
        raise UserError(f"phases: of steps={config.steps} none is left for the last one; train longer")
    if config.budget.hours is not None:
        raise UserError("phases: begin at shares of steps, and budget.hours leaves their number open; leave one out")
    if config.batch_ramp.start is not None:
        raise UserError("phases: not with batch_ramp; write global_batch_size as a curve")
    return starts, written


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"phases: one begins at {_FROM}={value}, no share of the run between 0 and 1")
    return float(value)


def _flat(body: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in body.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _with(before: TrainConfig, overrides: Mapping[str, Any], number: int) -> TrainConfig:
    """The configuration of a phase. Raises `UserError` with its number where it is none."""
    where = f"phases: phase {number}: "
    values = as_data(asdict(before))
    if "data.path" in overrides and "data.mixture" in overrides:
        raise UserError(f"{where}sets data.path and data.mixture; leave one out")
    try:
        for key, value in overrides.items():
            if key == "schedule" and isinstance(value, str):  # the choice of a kind, as on the command line
                if value not in ScheduleConfig.kinds:
                    raise UserError(f"schedule={value}: no such kind; there are {', '.join(ScheduleConfig.kinds)}")
                chosen = cli.compose("train", TrainConfig, ["run=any", "data.path=any", f"schedule={value}"])
                value = as_data(asdict(chosen.schedule)) | {
                    name.removeprefix("schedule."): own for name, own in overrides.items() if name[:9] == "schedule."
                }
            elif key.startswith("schedule.") and "schedule" in overrides:
                continue
            _set(values, key, value)
            if key in ("data.path", "data.mixture"):
                _set(values, "data.mixture" if key == "data.path" else "data.path", None)
        found = cli.typed(
            {key: value for key, value in values.items() if key != "phases"} | {"phases": None}, TrainConfig
        )
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    _require_same_weights(before, found, where)
    return replace(found, phases=before.phases)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
    values[leaf] = value


def _require_same_weights(before: TrainConfig, after: TrainConfig, where: str) -> None:
    """Raises `UserError` where a phase would change what weights there are, or how they are updated."""
    was, now = before.model.extra or {}, after.model.extra or {}
    for key in sorted({*was, *now}):
        if was.get(key) != now.get(key) and _ROTARY not in key:
            raise UserError(
                f"{where}sets model.extra.{key}, which weights depend on; only rope keys may change in a run"
            )
    dropout = [(one.model.dropout, one.model.attention_dropout) for one in (before, after)]
    if after.compile and dropout[0] != dropout[1]:
        raise UserError(f"{where}sets dropout, and compile=true builds a probability into its code; set compile=false")
    if bool(before.optim.weight_decay) != bool(after.optim.weight_decay):
        raise UserError(f"{where}sets optim.weight_decay to or from 0; use a small one, such as 1e-9, in its place")


def _spans(steps: Sequence[int], sets: Sequence[set[str]], configs: Sequence[TrainConfig]) -> list[dict[str, Span]]:
    """Of every phase the stretch of each key; `steps` are those where phases begin, and the end."""
    count, keys = len(configs), {key for one in sets for key in one} | {_BATCH}
    samples = _samples(steps, sets, configs)
    found: list[dict[str, Span]] = []
    for index in range(count):
        spans = _Spans(Span(0, steps[-1], 0, samples[-1]))
        spans["steps"] = Span(steps[index], steps[index + 1], samples[index], samples[index + 1])
        for key in keys:
            first = max((one for one in range(1, index + 1) if key in sets[one]), default=0)
            end = next((one for one in range(first + 1, count) if key in sets[one]), count)
            spans[key] = Span(steps[first], steps[end], samples[first], samples[end])
            if key == _BATCH:  # as they are dealt: of a curve, to within a batch what is consumed
                own = replace(configs[first], steps=spans[key].steps)
                spans[key] = spans[key]._replace(end_sample=samples[first] + total_samples(own))
        found.append(spans)
    return found


class _Spans(dict[str, Span]):
    """Of what no phase sets, the whole run."""

    def __init__(self, whole: Span) -> None:
        super().__init__()
        self._whole = whole

    def __missing__(self, key: str) -> Span:
        return self._whole


def _samples(steps: Sequence[int], sets: Sequence[set[str]], configs: Sequence[TrainConfig]) -> list[int]:
    """Samples that are consumed where each phase begins, and at the end; of a curve of batch sizes step by step."""
    firsts = [index for index in range(len(configs)) if index == 0 or _BATCH in sets[index]]
    found = [0]
    for first, end in pairwise([*firsts, len(configs)]):
        own, start = replace(configs[first], steps=steps[end] - steps[first]), found[-1]
        if len(configs) == 1 or own.batch_sizes.is_constant:
            lengths = (steps[index + 1] - steps[first] for index in range(first, end))
            found += [start + total_samples(replace(own, steps=length)) for length in lengths]
            continue
        total, consumed, done = total_samples(own), 0, steps[first]
        for index in range(first, end):
            while done < steps[index + 1]:
                consumed += batch_size(min(1.0, consumed / total), own)
                done += 1
            found.append(start + consumed)
    return found


def _corpora(config: TrainConfig) -> Any:
    """What decides which samples its data are."""
    data = config.data
    return data.parts, data.temperature_curve if data.mixture is not None else None
