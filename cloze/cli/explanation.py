"""Errors of Hydra and OmegaConf in one line for a person, with the name that was meant where a name is wrong."""

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf.errors import MissingMandatoryValue

from cloze.cli.overrides import listed, quoted, takes_list, to_paste
from cloze.cli.schemas import fields_of, groups, key_names, key_of
from cloze.cli.synonyms import OPTIONS, SECTIONS, Meaning, meaning_of, option_of, plain
from cloze.errors import first_line
from cloze.schema import Variant

_FLAGS = ("help", "verbose", "quiet", "multirun")  # that are typed without their dashes


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
    if match := re.search(r"Could not append to config. An item is already at '(.*)'", first):
        return f"+{match[1]}: is there already; write {match[1]}=… without +"
    if (match := re.search(r"full_key: (\S+)", message)) and (value := re.search(r"Value '(.*?)' .*to Float", first)):
        share = f"; {value[1]} is {float(value[1][:-1]) / 100:g}" if re.fullmatch(r"[\d.]+%", value[1]) else ""
        return f"{key_of(match[1])}={value[1]}: is not a number{share}; correct the value (--help tells what it means)"
    if match := re.search(r"^(?:Merge error: )?(\w+) is not a subclass of (\w+)", first):
        return _value_of_a_section(schema, match[2], names, overrides)
    if (match := re.search(r"full_key: (\S+)", message)) and (
        found := re.search(r"[Ii]nvalid value '(.*)', expected one of \[(.*)\]", first)
    ):
        return _no_such_value(key_of(match[1]), found[1], found[2].split(", "))
    if isinstance(error, MissingMandatoryValue) and (match := re.search(r"full_key: (\S+)", message)):
        key = key_of(match.group(1))
        if f"~{key}" in overrides:
            return f"~{key}: a key cannot be taken away; leave this out, or set it to null where it may be"
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
    if meaning is None and plain(word) in _FLAGS:
        return f"{argument}: takes no value; write --{plain(word)}"
    if meaning is None:
        return f"{argument}: no such option{nearest(plain(word), names)}; write key=value without dashes, or see --help"
    if not meaning.value:
        return f"{argument}: no such option; {meaning.note.format(value or 'N')}"
    return f"{argument}: options are written without dashes here; write {written_as(meaning, value, options)}"


def _unreadable(override: str, schema: type[Any], names: Sequence[str]) -> str:
    """Of what is no key=value for Hydra: its quoted form, or what is wrong with it."""
    key, equals, value = override.partition("=")
    if equals and (key != key.strip() or value != value.strip()) and key.strip() in names:
        return f"{override}: spaces around =; write {to_paste(f'{key.strip()}={value.strip()}')}"
    if not equals or not key.strip():
        if override.startswith("-"):
            return f"{override}: not a key=value, and no flag of this command; see --help"
        if (word := plain(key)) in _FLAGS:
            return f"{override}: not a key=value; write --{word}"
        if (colon := key.partition(":"))[0] in names and colon[2]:
            return f"{override}: not a key=value; write {to_paste(f'{colon[0]}={colon[2]}')}"
        if "source.paths" in names and Path(key).exists():
            return f"{override}: not a key=value; for text write {to_paste(f'source.paths=[{key}]')} and source=text"
        if key in names:
            return f"{override}: has no value; write {key}=… (--help tells what it means)"
        if (meaning := meaning_of(key, names)) and meaning.value:
            return f"{override}: not a key=value; write {written_as(meaning, '', {})}"
        hint = nearest(key.strip(), names) if key.strip() else ""
        return f"{override}: not a key=value{hint}; see --help"
    if re.search(r"\s[a-z_][\w.]*=", value):
        return f"{override}: several overrides in one word; take the quotes away: {override}"
    if takes_list(schema, key):
        written = to_paste(f"{key}={listed(value.strip('[]'))}")
        return f"{override}: is a list; write {written}"
    return f"{override}: not a key=value that Hydra can read; for text write {to_paste(f'{key}={quoted(value)}')}"


def _value_of_a_section(schema: type[Any], section: str, names: Sequence[str], overrides: Sequence[str]) -> str:
    """Of `wandb=false`, where `wandb` has keys of its own; `section` is the name of their dataclass."""
    sections = {key_of(field.name): getattr(hint, "__name__", "") for field, hint in fields_of(schema)}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if sections.get(key) == section:
            known = [name for name in names if name.startswith(f"{key}.")]
            meant = SECTIONS.get(key)
            hint = ""
            if meant is not None and meant in known:
                hint = f"write {to_paste(f'{meant}={OPTIONS.get((meant, plain(value)), value)}')}; "
            return f"{override}: {key} has keys of its own; {hint}there are {', '.join(known)}"
    return f"{section}: has keys of its own; --help lists them"


def _no_such_value(key: str, value: str, known: Sequence[str]) -> str:
    if (meant := option_of(key, value, known)) or (meant := next(iter(difflib.get_close_matches(value, known, 1)), "")):
        return f"{key}={value}: no such value (did you mean {meant}?); write {key}={meant}"
    return f"{key}={value}: no such value; there are {', '.join(known)}"


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
    values = [one.partition("=")[2] for one in overrides if one.lstrip("+").partition("=")[0] == key]
    value = values[-1] if values else ""
    meaning = meaning_of(key, names)
    if meaning and not meaning.value:
        return f"{key}: no such key; {meaning.note.format(value or 'N')}"
    if meaning:
        return f"{key}: no such key (did you mean {meaning.key}?); write {written_as(meaning, value, options)}"
    if value and (close := _closest(key, names)):
        written = written_as(Meaning(close), value, options)
        return f"{key}: no such key (did you mean {close}?); write {written}, or see --help"
    return f"{key}: no such key{nearest(key, names)}; --help lists them all"


def written_as(meaning: Meaning, value: str, options: Mapping[str, Sequence[str]]) -> str:
    """What to paste, and what it is not."""
    text = value if meaning.value == "[{}]" and value.startswith("[") else meaning.value.format(value or "…")
    if meaning.value == "{}" and value and (option := option_of(meaning.key, value, options.get(meaning.key, ()))):
        text = option
    given = f"{meaning.key}={text}"
    return (given if "…" in given else to_paste(given)) + (f" ({meaning.note})" if meaning.note else "")


def nearest(name: str, valid: Sequence[str], group: str = "") -> str:
    """` (did you mean …?)`: of the options of a `group` first by meaning, else by spelling; nothing where none is."""
    if group and (option := option_of(group, name, valid)):
        return f" (did you mean {option}?)"
    close = _closest(name, valid, 0.5 if group else 0.6)  # of options there are few, and all are named
    return f" (did you mean {close}?)" if close else ""


def _closest(name: str, valid: Sequence[str], cutoff: float = 0.6) -> str | None:
    """A right leaf under a wrong parent, `lr` for `optim.lr`, before a word that looks like it."""
    close = [key for key in valid if key.rpartition(".")[2] == name.rpartition(".")[2]]
    return next(iter(close or difflib.get_close_matches(name, valid, n=1, cutoff=cutoff)), None)
