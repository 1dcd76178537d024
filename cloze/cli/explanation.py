"""Errors of Hydra and OmegaConf in one line for a person, with the name that was meant where a name is wrong."""

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf.errors import MissingMandatoryValue

from cloze.cli.overrides import listed, quoted, takes_list, to_paste
from cloze.cli.schemas import groups, key_names, key_of
from cloze.cli.synonyms import Meaning, meaning_of, option_of, plain
from cloze.errors import first_line
from cloze.schema import Variant


def explain(
    error: Exception,
    schema: type[Any],
    options: Sequence[str] = (),
    chosen: Mapping[str, type[Variant]] = types.MappingProxyType({}),
    overrides: Sequence[str] = (),
) -> str:
    """One line for a Hydra or OmegaConf error, with the name that was meant where a name is wrong.

    `chosen` are the kinds of the sections that come in kinds, `overrides` what was typed, as far as known.
    """
    names = [*options, *(name for name, _ in key_names(schema, chosen.items()))]
    message = str(error)
    first = first_line(error).rstrip(".")
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override), schema, [*names, *groups(schema)])
    if match := re.search(r"Ambiguous value for argument '(.*)'", first):
        return _several(match[1], schema)
    if match := re.search(r"Could not (?:find|load) '?([\w-]+)/([\w/.-]+)'", message):
        group, option = match.groups()
        options = groups(schema).get(group, [])
        return f"{group}={option}: no such option{nearest(option, options, group)}; there are {', '.join(options)}"
    if match := re.search(r"Could not override '([^']+)'", message):
        return _no_such_key(match.group(1), names, chosen, overrides, groups(schema))
    if match := re.search(r"Key '([^']+)' (?:not in|is not in)", message):
        full = re.search(r"full_key: (\S+)", message)
        key = full.group(1) if full else match.group(1)
        return _no_such_key(key, names, chosen, overrides, groups(schema))
    if isinstance(error, MissingMandatoryValue) and (match := re.search(r"full_key: (\S+)", message)):
        key = key_of(match.group(1))
        return f"{key}: has no value; add {key}=… to the command line (--help tells what it means)"
    if (match := re.search(r"full_key: (\S+)", message)) and "ListConfig" in first:
        return _no_list(match.group(1), overrides)
    if (match := re.search(r"full_key: (\S+)", message)) and (value := re.search(r"Value '(.*?)' .*to Integer", first)):
        return f"{key_of(match[1])}={value[1]}: is not a whole number; correct the value (--help tells what it means)"
    if match := re.search(r"full_key: (\S+)", message):
        key, why = key_of(match.group(1)), f"{first[0].lower()}{first[1:]}"
        return f"{key}: {why}; correct the value (--help tells what each key means)"
    return f"{first}; correct the command line (--help lists groups and keys)"


def no_such_option(argument: str, names: Sequence[str], options: Mapping[str, Sequence[str]]) -> str:
    """Of `--out`, where a key is wanted: the key that is meant, as it is written here. `options` of groups, by name."""
    word, _, value = argument.lstrip("-").partition("=")
    meaning = Meaning(word) if word in names else meaning_of(word, names)
    if meaning is None:
        return f"{argument}: no such option{nearest(plain(word), names)}; write key=value without dashes, or see --help"
    return f"{argument}: options are written without dashes here; write {written_as(meaning, value, options)}"


def _unreadable(override: str, schema: type[Any], names: Sequence[str]) -> str:
    """Of what is no key=value for Hydra: its quoted form, or what is wrong with it."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        if key in names:
            return f"{override}: has no value; write {key}=… (--help tells what it means)"
        hint = nearest(key.strip(), names) if key.strip() else ""
        return f"{override}: not a key=value{hint}; see --help"
    if takes_list(schema, key):
        written = to_paste(f"{key}={listed(value.strip('[]'))}")
        return f"{override}: is a list; write {written}"
    return f"{override}: not a key=value that Hydra can read; for text write {to_paste(f'{key}={quoted(value)}')}"


def _several(override: str, schema: type[Any]) -> str:
    """Of `a=1,2` where one value is wanted."""
    key, _, value = override.partition("=")
    if takes_list(schema, key):
        return f"{override}: is a list; write {to_paste(f'{key}={listed(value)}')}"
    return f"{override}: has several values; add --multirun to run one after the other, or give one"


def _no_list(key: str, overrides: Sequence[str]) -> str:
    values = [one.partition("=")[2] for one in overrides if one.lstrip("+").partition("=")[0] == key]
    written = to_paste(f"{key}={listed(values[-1])}") if values else f"{key}=[…]"
    return f"{key}: is a list; put brackets around it: {written}"


def _no_such_key(
    key: str,
    names: Sequence[str],
    chosen: Mapping[str, type[Variant]],
    overrides: Sequence[str],
    options: Mapping[str, Sequence[str]],
) -> str:
    """Of a section that comes in kinds, the keys of the kind are few enough to name them all."""
    section, _, leaf = key.rpartition(".")
    variant = chosen.get(section)
    if variant is not None and any(leaf in other.__dataclass_fields__ for other in variant.kinds.values()):
        kind = next(kind for kind, other in variant.kinds.items() if other is variant)
        mine = ", ".join(field.name for field in dataclasses.fields(variant))
        return f"{key}: of no use to {section + '=' if section else ''}{kind}, whose keys are {mine}"
    if meaning := meaning_of(key, names):
        values = [one.partition("=")[2] for one in overrides if one.lstrip("+").partition("=")[0] == key]
        written = written_as(meaning, values[-1] if values else "", options)
        return f"{key}: no such key (did you mean {meaning.key}?); write {written}"
    return f"{key}: no such key{nearest(key, names)}; --help lists them all"


def written_as(meaning: Meaning, value: str, options: Mapping[str, Sequence[str]]) -> str:
    """What to paste, and what it is not."""
    text = meaning.value.format(value or "…")
    if meaning.value == "{}" and value and (option := option_of(meaning.key, value, options.get(meaning.key, ()))):
        text = option
    given = f"{meaning.key}={text}"
    return (given if "…" in given else to_paste(given)) + (f" ({meaning.note})" if meaning.note else "")


def nearest(name: str, valid: Sequence[str], group: str = "") -> str:
    """` (did you mean …?)`: of the options of a `group` first by meaning, else by spelling; nothing where none is."""
    if group and (option := option_of(group, name, valid)):
        return f" (did you mean {option}?)"
    # a right leaf under a wrong parent, `lr` for `optim.lr`, before a word that looks like it
    close = [key for key in valid if key.rpartition(".")[2] == name.rpartition(".")[2]]
    close = close or difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
