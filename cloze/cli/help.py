"""What `--help` prints: groups with their options, then every key with its default and meaning."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cloze.cli.composition import chosen_kinds, composed, group_choices
from cloze.cli.schemas import groups, key_names
from cloze.errors import ExitCode


class Key(NamedTuple):
    """One key of a command's configuration."""

    name: str  # dotted
    meaning: str
    default: str | None  # in YAML's notation, or "required"; None for a section


def help_text(config_name: str, schema: type[Any], overrides: Sequence[str] = ()) -> str:
    """Groups with their options, then every key with its default and meaning, as `overrides` choose among groups."""
    commands = {
        "prep": "python -m data_prep",
        "train": "deepspeed pretrain/train.py",
        "suite": "python -m finetune.suite",
        "grammar": "python -m pretrain.grammar",
        "predict": "python -m finetune.predict",
        "embeddings": "python -m finetune.embeddings",
        "probes": "python -m pretrain.probes",
        "words": "python -m pretrain.words",
    }
    command = commands.get(config_name, f"python -m {config_name}")
    lines = [f"{command} [key=value ...]"]
    if there := groups(schema):
        lines += [
            "",
            "Groups (group=option):",
            *(f"  {name:12} {' '.join(options)}" for name, options in there.items()),
        ]
    lines += ["", "Keys (key=value; default in brackets):"]
    for key in keys(config_name, schema, overrides):
        if key.meaning:
            lines.append(f"  {key.name:28} {key.meaning}" + (f" [{key.default}]" if key.default else ""))
    lines += [
        "",
        "--cfg job prints the composed configuration, --multirun sweeps, --hydra-help tells Hydra's own flags.",
    ]
    codes = ", ".join(f"{code.value} {code.name.lower()}" for code in ExitCode)
    return "\n".join([*lines, f"Exit codes: {codes} (docs/faults.md)."])


def keys(config_name: str, schema: type[Any], overrides: Sequence[str] | None = None) -> list[Key]:
    """Every key and section of `schema`, in order, with the default that `conf/{config_name}.yaml` gives.

    Of a section that comes in kinds: the keys of the kind that `overrides` choose; of all kinds where None.
    """
    defaults = composed(config_name, schema, group_choices(schema, overrides or ()))
    if overrides is not None:
        return [
            Key(name, meaning, _default(defaults, name))
            for name, meaning in key_names(schema, chosen_kinds(schema, defaults))
        ]
    options = groups(schema)
    variants = [
        composed(config_name, schema, [f"{section}={kind}"])
        for section, variant in chosen_kinds(schema, defaults)
        for kind in variant.kinds
        if kind in options.get(section, ())
    ]
    found = []
    for name, meaning in key_names(schema):
        holder = next((config for config in (defaults, *variants) if _holds(config, name)), defaults)
        found.append(Key(name, meaning, _default(holder, name)))
    return found


def _holds(config: DictConfig, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    section = OmegaConf.select(config, parent) if parent else config
    return isinstance(section, DictConfig) and leaf in list(section)  # `in section` misses what is required


def _default(config: DictConfig, name: str) -> str | None:
    parent, _, leaf = name.rpartition(".")
    value = OmegaConf.select(config, name, throw_on_missing=False)
    if OmegaConf.is_missing(OmegaConf.select(config, parent) if parent else config, leaf):
        return "required"
    if isinstance(value, DictConfig):
        return None
    plain = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    return plain if isinstance(plain, str) else json.dumps(plain)
