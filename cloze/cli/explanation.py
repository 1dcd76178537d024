"""Errors of Hydra and OmegaConf in one line for a person, with the nearest valid name where a name is wrong."""

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf.errors import MissingMandatoryValue

from cloze.cli.schemas import groups, key_names, key_of
from cloze.errors import first_line
from cloze.schema import Variant


def explain(
    error: Exception,
    schema: type[Any],
    options: Sequence[str] = (),
    chosen: Mapping[str, type[Variant]] = types.MappingProxyType({}),
) -> str:
    """One line for a Hydra or OmegaConf error, with the nearest valid name where a name is wrong.

    `chosen` are the kinds of the sections that come in kinds.
    """
    names = [*options, *(name for name, _ in key_names(schema, chosen.items()))]
    message = str(error)
    first = first_line(error).rstrip(".")
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not a key=value that Hydra can read; quote special characters, or see --help"
    if match := re.search(r"Could not (?:find|load) '?([\w-]+)/([\w/.-]+)'", message):
        group, option = match.groups()
        options = groups(schema).get(group, [])
        return f"{group}={option}: no such option{nearest(option, options)}; there are {', '.join(options)}"
    if match := re.search(r"Could not override '([^']+)'", message):
        return _no_such_key(match.group(1), names, chosen)
    if match := re.search(r"Key '([^']+)' (?:not in|is not in)", message):
        full = re.search(r"full_key: (\S+)", message)
        return _no_such_key(full.group(1) if full else match.group(1), names, chosen)
    if isinstance(error, MissingMandatoryValue) and (match := re.search(r"full_key: (\S+)", message)):
        key = key_of(match.group(1))
        return f"{key}: has no value; add {key}=… to the command line (--help tells what it means)"
    if (match := re.search(r"full_key: (\S+)", message)) and "ListConfig" in first:
        return f"{match.group(1)}: is a list; put brackets around it: {match.group(1)}=[…]"
    if match := re.search(r"full_key: (\S+)", message):
        key, why = key_of(match.group(1)), f"{first[0].lower()}{first[1:]}"
        return f"{key}: {why}; correct the value (--help tells what each key means)"
    return f"{first}; correct the command line (--help lists groups and keys)"


def _no_such_key(key: str, names: Sequence[str], chosen: Mapping[str, type[Variant]]) -> str:
    """Of a section that comes in kinds, the keys of the kind are few enough to name them all."""
    section, _, leaf = key.rpartition(".")
    variant = chosen.get(section)
    if variant is None or not any(leaf in other.__dataclass_fields__ for other in variant.kinds.values()):
        return f"{key}: no such key{nearest(key, names)}; --help lists them all"
    kind = next(kind for kind, other in variant.kinds.items() if other is variant)
    mine = ", ".join(field.name for field in dataclasses.fields(variant))
    return f"{key}: of no use to {section + '=' if section else ''}{kind}, whose keys are {mine}"


def nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if not close:  # a right leaf under a wrong parent: `lr` for `optim.lr`
        close = [key for key in valid if key.rpartition(".")[2] == name.rpartition(".")[2]]
    return f" (did you mean {close[0]}?)" if close else ""
