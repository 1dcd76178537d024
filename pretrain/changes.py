"""What differs between the start that wrote a checkpoint and the one that goes on from it: refused, told, or no matter.

The checkpoint's own config.yaml is compared, so older checkpoints say it, too; a key that one of the two does not know
is left out. Identity (config.py) compares what decides which samples come when.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cloze.errors import UserError
from cloze.files import parsed
from pretrain.config import TrainConfig
from pretrain.optim.schedule import learning_rate

CHANGES = "changes.jsonl"  # in the run directory: what every stretch of the run was trained with

# Keys of the model that leave it the same function of the same weights: all others are its architecture.
# The distance bias is for training alone.
_SAME_FUNCTION = (
    *("name", "dropout", "attention_dropout", "attention", "pad_vocab_to", "activation_checkpointing"),
    *("init", "init_std", "position_init", "distance_bias"),
)
_NO_WEIGHT = (  # keys and sections that change neither weights nor their order
    *(
        "run",
        "runs_root",
        "stop_at",
        "world_size",
        "init_from",
        "init_allow",
        "init_positions",
        "branch_from",
        "expect",
        "resume",
        "log",
        "eval",
        "checkpoint",
    ),
    *("watchdog", "wandb", "data.path", "data.cache_dir", "data.cache_gib", "data.workers", "data.prefetch"),
    *("model.name", "model.init", "model.init_std", "model.position_init"),
)
JUMP = 1.5  # of the learning rate from one step to the next: no schedule of ours does that


def refuse_other_architecture(where: str, then_yaml: str, now: Mapping[str, Any]) -> None:
    """Raises `UserError` where the model of a saved configuration is not that of `now`, be the shapes the same."""
    then = _section(then_yaml, "model")
    other = [key for key in now if key in then and key not in _SAME_FUNCTION and then[key] != now[key]]
    if other:
        was = ", ".join(f"model.{key}={_told(then[key])}" for key in other)
        told = ", ".join(_told(now[key]) for key in other)
        raise UserError(
            f"{where}: was trained with {was}, now it is {told}: the same weights would be another function; resume "
            "with the same model options, or name another run"
        )


def changed(then_yaml: str, now_yaml: str) -> dict[str, tuple[str, str]]:
    """What was set otherwise, (then, now) by dotted key, of all that has a bearing on the weights."""
    then, now = dict(flat(yaml.safe_load(then_yaml))), dict(flat(yaml.safe_load(now_yaml)))
    weighty = [key for key in now if not any(key == one or key.startswith(f"{one}.") for one in _NO_WEIGHT)]
    return {key: (_told(then[key]), _told(now[key])) for key in weighty if key in then and then[key] != now[key]}


def describe_changes(found: Mapping[str, tuple[str, str]], step: int) -> str:
    """What `changed` since the checkpoint of `step`, in a line."""
    return f"changed since step {step}: " + ", ".join(f"{key} {a} -> {b}" for key, (a, b) in found.items())


def learning_rate_jump(then_yaml: str, config: TrainConfig, step: int) -> str | None:
    """A warning where the learning rate jumps at `step`, since the run had another length."""
    before = yaml.safe_load(then_yaml).get("steps")
    budgets = config.budget.hours or _section(then_yaml, "budget").get("hours")
    if isinstance(before, int) and 1 <= step <= before != config.steps and not budgets and not config.optim.rates:
        last = learning_rate(step - 1, before, config.optim, config.schedule)
        next_one = learning_rate(step, config.steps, config.optim, config.schedule)
        if next_one > JUMP * last:
            return (
                f"the learning rate jumps from {last:.1e} to {next_one:.1e} at step {step}, since steps was "
                f"{before} and is {config.steps}; to go on evenly lower optim.lr, or name another run with init_from"
            )
    return None


def note(folder: Path, found: Mapping[str, tuple[str, str]], step: int) -> None:
    """Append what changed to the run's record. Raises OSError."""
    if found:
        with (folder / CHANGES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "changed": found, "time": round(time.time(), 3)}) + "\n")


def read_changes(folder: Path) -> dict[str, str]:
    """`step 4,000`: `optim.lr 0.0001 -> 5e-05` of each stretch of a run; of several starts from a step the last."""
    found: dict[str, str] = {}
    try:
        lines = (folder / CHANGES).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    for line in lines:
        try:
            row = parsed(line)
            told_of = ", ".join(f"{key} {a} -> {b}" for key, (a, b) in row["changed"].items())
            found[f"{row['step']:,}"] = told_of
        except (ValueError, KeyError, TypeError, AttributeError):  # a torn line
            continue
    return {f"changed at step {step}": text for step, text in found.items()}


def _section(text: str, name: str) -> Mapping[str, Any]:
    body = yaml.safe_load(text)
    found = body.get(name) if isinstance(body, dict) else None
    return found if isinstance(found, dict) else {}


def flat(body: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a configuration as data."""
    for key, value in body.items() if isinstance(body, dict) else ():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _told(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)
