"""What a run's configuration says that its recipe, or where it has none, conf/train.yaml, does not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cloze.schema import CONF
from pretrain.changes import changed, flat

_OPEN = ("null", "auto")  # what is found out at the start is no difference


class Differences(NamedTuple):
    """Of one configuration."""

    recipe: str | None
    keys: list[tuple[str, str, str]]  # (dotted key, as the recipe has it, as the run has it)


def differences(config: Mapping[str, Any]) -> Differences:
    """What was set otherwise, of all that has a bearing on the weights; of the recipes that fit, the nearest counts."""
    plain = _defaults(config)
    recipes: list[Path | None] = [None]
    if config.get("expect") != plain.get("expect"):  # only recipes set it
        recipes = [path for path in sorted((CONF / "recipe").glob("*.yaml")) if _expected(path) == config.get("expect")]
    found = [Differences(path.stem if path else None, _differing(plain, path, config)) for path in recipes or [None]]
    return min(found, key=lambda one: len(one.keys))


def differing(configs: list[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(dotted key, value in each) of the keys in which several runs differ, but for what their recipes expect."""
    tables = [{key: value for key, value in flat(config) if not key.startswith("expect.")} for config in configs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [_told(table.get(key)) if key in table else "not known" for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len({*values}) > 1 and key != "run"]


def _differing(plain: Mapping[str, Any], recipe: Path | None, config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    wanted = _over(plain, _read(recipe)) if recipe else plain
    pairs = changed(yaml.safe_dump(wanted), yaml.safe_dump(dict(config)))
    return [(key, then, now) for key, (then, now) in pairs.items() if then not in (*_OPEN, now)]


def _expected(recipe: Path) -> Any:
    """`expect` as a run under this recipe has it."""
    return _over(_read(CONF / "train.yaml"), _read(recipe)).get("expect")


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """What conf/ says, with the options that the run has chosen."""
    chosen = {"model": "name", "optim": "kind", "schedule": "kind"}
    parts = {group: CONF / group / f"{_section(config, group).get(key)}.yaml" for group, key in chosen.items()}
    return _read(CONF / "train.yaml") | {group: _read(path) for group, path in parts.items()}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: value for key, value in body.items() if key != "defaults"} if isinstance(body, dict) else {}


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with what `above` has instead."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        found[key] = _over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def _told(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
