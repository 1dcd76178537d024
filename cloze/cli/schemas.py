"""What a configuration dataclass says of itself: its keys, its groups of options and where their YAML lies."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cloze.schema import CONF, Variant


def groups(schema: type[Any]) -> dict[str, list[str]]:
    """Config groups of this schema (top-level fields; `recipe` of training) with the options that `conf/` offers."""
    names = [field.name for field in dataclasses.fields(schema)]
    found: dict[str, list[str]] = {}
    for name in [*names, *(["recipe"] if "expect" in names else [])]:  # a recipe tells what corpus it expects
        if options := sorted(path.stem for path in (root(schema) / name).glob("*.yaml")):
            found[name] = options
    return found


def root(schema: type[Any]) -> Path:
    """The folder of YAML that the command of `schema` composes from: `conf`, or a folder of its own within.

    A package gets its own where one of its keys (`model=<directory>` of finetune) is a group for the others: Hydra
    takes any key that is the name of a folder for the choice of an option.
    """
    package, *inner = schema.__module__.split(".")[:-1] or [schema.__module__]
    folders = [CONF / name for name in (*reversed(inner), package)]
    return next((folder for folder in folders if folder.is_dir()), CONF)


def fields_of(schema: type[Any]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass, each with its type."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield field, hints[field.name]


def key_of(field_name: str) -> str:
    """`in` of `in_`."""
    return field_name.removesuffix("_")


def key_names(
    schema: type[Any], chosen: Iterable[tuple[str, type[Variant]]] | None = None, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """(dotted key, help text) of every field; a nested dataclass comes before its fields.

    Of a section that comes in kinds: the fields of the kind in `chosen`, else of every kind, each once.
    """
    kinds = dict(chosen or ())
    for field, hint in fields_of(schema):
        section = f"{prefix}{key_of(field.name)}"
        help_text = field.metadata.get("help", "")
        if issubclass(schema, Variant) and field.name == "kind":
            help_text = f"{help_text}: {', '.join(schema.kinds)}"
        yield section, help_text
        for candidate in (hint, *typing.get_args(hint)):
            if not dataclasses.is_dataclass(candidate):
                continue
            candidate = typing.cast(type[Any], candidate)
            if issubclass(candidate, Variant) and section not in kinds:
                yield from _names_of_kinds(candidate, f"{section}.")
            else:
                yield from key_names(kinds.get(section, candidate), kinds.items(), f"{section}.")


def key_types(schema: type[Any]) -> dict[str, frozenset[Any]]:
    """What each key takes, by its dotted name: one type, or several where kinds of a section differ in it."""
    found: dict[str, set[Any]] = {}

    def walk(section: type[Any], prefix: str) -> None:
        for field, hint in fields_of(section):
            key = f"{prefix}{key_of(field.name)}"
            found.setdefault(key, set()).add(hint)
            for candidate in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(candidate):
                    inner = typing.cast(type[Any], candidate)
                    for each in (inner, *(inner.kinds.values() if issubclass(inner, Variant) else ())):
                        walk(each, f"{key}.")

    walk(schema, "")
    return {key: frozenset(types) for key, types in found.items()}


def _names_of_kinds(variant: type[Variant], prefix: str) -> Iterator[tuple[str, str]]:
    """`_names` of all kinds together; what only some have begins with their names."""
    owners: dict[str, list[str]] = {}
    meanings: dict[str, str] = {}
    for kind, schema in variant.kinds.items():
        for name, meaning in key_names(schema, prefix=prefix):
            owners.setdefault(name, []).append(kind)
            meanings.setdefault(name, meaning)
    for name, meaning in meanings.items():
        shared = len(owners[name]) == len(variant.kinds)
        yield name, meaning if shared else f"{', '.join(owners[name])}: {meaning}"
