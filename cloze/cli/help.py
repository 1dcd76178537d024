"""What `--help` prints: what a command does, examples, groups with options, every key with default and meaning."""

import json
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cloze.cli.commands import COMMANDS, Command, examples
from cloze.cli.composition import chosen_kinds, composed, group_choices
from cloze.cli.schemas import groups, key_names
from cloze.errors import ExitCode

_WIDTH, _COLUMN = 100, 28


class Key(NamedTuple):
    """One key of a command's configuration."""

    name: str  # dotted
    meaning: str
    default: str | None  # in YAML's notation, or "required"; None for a section


def help_text(
    config_name: str,
    schema: type[Any],
    overrides: Sequence[str] = (),
    own: Sequence[Key] = (),
    needless: Collection[str] = (),
) -> str:
    """What the command does, examples, groups with their options, every key with its default and meaning.

    Keys are those that `overrides` choose among groups. `own` keys of the command come first; `needless` are those that
    it takes and does not need.
    """
    command = COMMANDS.get("plan" if own else config_name) or Command(f"python -m {config_name}", "", ())
    lines = [f"{command.start} [key=value ...]", *command.about.splitlines()]
    if command.examples:
        lines += ["", "Examples:", *(f"  {example}" for example in examples(command))]
    if there := groups(schema):
        chosen = {one.partition("=")[0]: one.partition("=")[2] for one in group_choices(schema, overrides)}
        lines += ["", "Choices (group=option):"]
        for name, options in there.items():
            lines += _entry(name, " ".join(options) + (f" [{chosen[name]}]" if name in chosen else ""))
    every = keys(config_name, schema, overrides)
    required = [key for key in every if key.default == "required" and key.name not in needless]
    if required:
        lines += ["", "Must be given:", *_entries(required)]
    if own:
        lines += ["", "Keys of this command (key=value; default in brackets):", *_entries(own)]
    rest = [key for key in every if key not in required]
    lines += ["", "Keys (key=value; default in brackets):", *_by_section(rest, needless)]
    lines += [
        "",
        "--cfg job prints the composed configuration; --multirun sweeps, with --fail-fast until a job fails;",
        "--hydra-help tells Hydra's own flags.",
    ]
    codes = ", ".join(f"{code.value} {code.name.lower()}" for code in ExitCode)
    return "\n".join([*lines, f"Exit codes: {codes} (docs/faults.md)."])


def _by_section(given: Sequence[Key], needless: Collection[str]) -> Iterator[str]:
    """Top-level keys first, then one section after the other, each below its own meaning."""
    sections = [key for key in given if key.default is None and not _is_inner(key, given)]
    inner = {key.name for key in given for section in sections if key.name.startswith(f"{section.name}.")}
    plain = [key for key in given if key not in sections and key.name not in inner]
    yield from _entries([key._replace(default="null") if key.name in needless else key for key in plain])
    for section in sections:
        mine = [key for key in given if key.name.startswith(f"{section.name}.")]
        if mine or section.meaning:
            yield ""
            yield f"  {section.name}: {section.meaning}" if section.meaning else f"  {section.name}:"
            yield from _entries([key._replace(default="null") if key.name in needless else key for key in mine])


def _is_inner(key: Key, given: Sequence[Key]) -> bool:
    return any(other.default is None and key.name.startswith(f"{other.name}.") for other in given)


def _entries(given: Sequence[Key]) -> Iterator[str]:
    for key in given:
        if key.meaning:
            yield from _entry(key.name, key.meaning + (f" [{key.default}]" if key.default else ""))


def _entry(name: str, text: str) -> list[str]:
    """`  name   text`, folded."""
    wide = textwrap.wrap(text, _WIDTH - _COLUMN - 3, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"  {name:{_COLUMN}} {wide[0]}", *(f"  {'':{_COLUMN}} {line}" for line in wide[1:])]


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
