"""What a person types, as Hydra reads it.

Hydra's grammar makes a number of `run=2024_01_15`, and refuses `data.path=数据` and `steps=1e5`. What the key takes is
known here: a key that takes text gets the text that was typed, one that takes a whole number any spelling of it.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

from cloze.cli.schemas import groups, key_types

_PLAIN = re.compile(r"(?:[A-Za-z_/]|\.\.?/)[\w./-]*", re.ASCII)  # Hydra reads it as it stands
_VALUES = {"null", "true", "false", "nan", "inf", "yes", "no", "on", "off"}  # unless it is one of these
_ITEM = re.compile(r"([\[,{]\s*(?:\w+:\s+|\w+:(?!/))?)([^\s\[\]{},'\"](?:[^\[\]{},]*[^\s\[\]{},])?)(?=\s*[,\]}])")
_TEXTS, _LISTS, _WHOLE = (str, str | None), (list[str], list[str] | None), (int, int | None)


def quoted(text: str) -> str:
    """`text` in Hydra's own quotes, whatever is in it."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def to_paste(override: str) -> str:
    """An override as a shell takes it."""
    return shlex.quote(override)


def as_meant(schema: type[Any], overrides: Sequence[str], *, sweep: bool = False) -> list[str]:
    """The overrides, in quotes where their key takes text that Hydra would read otherwise, numbers as digits.

    `sweep`: commas tell values apart. What is no `key=value` stays.
    """
    types, chosen = key_types(schema), groups(schema)
    return [_as_meant(one, types, sweep) if one.partition("=")[0] not in chosen else one for one in overrides]


def _as_meant(override: str, types: Mapping[str, frozenset[Any]], sweep: bool) -> str:
    typed, equals, value = override.partition("=")
    wanted = types.get(typed.lstrip("+"), frozenset())
    if not equals or not value.strip() or override.startswith(("-", "~")) or _PLAIN.fullmatch(value):
        return _null_as_text(typed, value, wanted) if equals and value.lower() in _VALUES else override
    if wanted and all(kind in _WHOLE for kind in wanted):
        return f"{typed}={_whole(value)}"
    if wanted and all(kind in _TEXTS for kind in wanted):
        return override if _is_text(value, sweep) else f"{typed}={quoted(value)}"
    if value[0] in "[{" and parsed(value) is None:
        mended = _ITEM.sub(lambda m: m[1] + (m[2] if parsed(f"[{m[2]}]") is not None else quoted(m[2])), value)
        return f"{typed}={mended}" if parsed(mended) is not None else override
    return override


def _null_as_text(typed: str, value: str, wanted: frozenset[Any]) -> str:
    """`run=true` is a name; `init_from=null` is none."""
    names = bool(wanted) and all(kind is str for kind in wanted)
    names |= bool(wanted) and all(kind in _TEXTS for kind in wanted) and value.lower() != "null"
    return f"{typed}={quoted(value)}" if names else f"{typed}={value}"


def _whole(value: str) -> str:
    """`100000` of `1e5`; what is no whole number stays, to be refused."""
    if not re.fullmatch(r"[+-]?\d[\d_]*(\.\d*)?([eE]\+?\d{1,2})?", value):
        return value
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else value


def _is_text(value: str, sweep: bool) -> bool:
    """Whether Hydra reads it as text, or as several where that is asked for."""
    found = parsed(value, sweep=sweep)
    return isinstance(found, str | QuotedString) or (sweep and found is not None and _is_sweep(found))


def _is_sweep(value: Any) -> bool:
    return type(value).__name__.endswith("Sweep")


def parsed(value: str, *, sweep: bool = False) -> Any:
    """What Hydra reads; None where it reads nothing, or several values where one is wanted."""
    try:
        (override,) = OverridesParser.create().parse_overrides([f"k={value}"])
        if override.is_sweep_override():
            return override.value() if sweep else None
        found = override.value()
    except (HydraException, ValueError):
        return None
    return found if found is not None else value


def takes_list(schema: type[Any], key: str) -> bool:
    """Whether a key takes a list of texts."""
    wanted = key_types(schema).get(key.lstrip("+"), frozenset())
    return bool(wanted) and all(kind in _LISTS for kind in wanted)


def listed(value: str) -> str:
    """`[a,'b c']` of `a,b c`."""
    items: Iterator[str] = (item.strip() for item in value.split(","))
    return "[" + ",".join(item if parsed(f"[{item}]") is not None else quoted(item) for item in items if item) + "]"
