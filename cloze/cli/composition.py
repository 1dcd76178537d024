"""Command-line overrides and YAML of `conf/` -> a frozen dataclass. Past it there is no OmegaConf object."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cloze.cli.explanation import explain, nearest
from cloze.cli.schemas import fields_of, groups, root
from cloze.errors import UserError
from cloze.schema import Variant

C = TypeVar("C")

HYDRA = "1.3"


def compose(config_name: str, schema: type[C], overrides: Sequence[str] = (), options: Sequence[str] = ()) -> C:
    """The typed configuration that these command-line overrides give, without running anything.

    `options` are what the command takes besides the keys of `schema`: a typo may mean one of them.
    """
    try:
        config = composed(config_name, schema, overrides)
    except HydraException as error:
        choices = group_choices(schema, overrides)
        if len(choices) == len(overrides):
            raise
        chosen = dict(chosen_kinds(schema, composed(config_name, schema, choices)))
        raise UserError(explain(error, schema, options, chosen)) from error
    return fill(config, schema)


def typed(values: Mapping[str, Any], schema: type[C]) -> C:
    """The typed configuration that `values` (a saved config.yaml, say) holds. Raises `UserError` like `run`."""
    return fill(OmegaConf.create(dict(values)), schema)


def refuse_renamed(schema: type[Any], overrides: Iterable[str]) -> None:
    """Raises `UserError` for a key or section whose old name stands in the schema's `renamed`."""
    renamed: Mapping[str, str] = getattr(schema, "renamed", {})
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        for old, new in renamed.items():
            if key == old or key.startswith(f"{old}."):
                raise UserError(f"{override}: is called {new} now; write {new}{override.lstrip('+~')[len(old) :]}")


def composed(config_name: str, schema: type[Any], overrides: Sequence[str]) -> DictConfig:
    refuse_renamed(schema, overrides)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(config_dir=str(root(schema)), version_base=HYDRA):
        try:
            return hydra.compose(config_name, overrides=list(overrides))
        except ValueError as error:
            raise UserError(explain(error, schema)) from error


def group_choices(schema: type[Any], overrides: Sequence[str]) -> list[str]:
    """Those overrides that choose an option of a group."""
    names = groups(schema)
    return [override for override in overrides if override.lstrip("+").partition("=")[0] in names]


def fill(config: DictConfig, schema: type[C]) -> C:
    chosen = dict(chosen_kinds(schema, config))
    try:
        merged = OmegaConf.merge(_template(schema, chosen), config)
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, schema, chosen=chosen)) from error
    assert isinstance(result, schema)
    return result


def _template(schema: type[Any], chosen: Mapping[str, type[Any]], prefix: str = "") -> DictConfig:
    """`schema` as an OmegaConf object that can be filled: OmegaConf takes frozen dataclasses for read-only ones."""
    template = OmegaConf.structured(schema)
    OmegaConf.set_readonly(template, False)
    for field, hint in fields_of(schema):
        if dataclasses.is_dataclass(hint):
            section = f"{prefix}{field.name}"
            template[field.name] = _template(chosen.get(section, typing.cast(type[Any], hint)), chosen, f"{section}.")
            OmegaConf.set_readonly(template[field.name], False)
    return typing.cast(DictConfig, template)


def chosen_kinds(schema: type[Any], config: DictConfig, prefix: str = "") -> Iterator[tuple[str, type[Variant]]]:
    """(dotted name, dataclass of the kind that `config` names) of every section that comes in kinds.

    `schema` itself, where it is a kind, has the name "". Raises `UserError` for a kind that does not exist.
    """
    if issubclass(schema, Variant) and schema in schema.kinds.values():
        yield prefix.removesuffix("."), schema
    for field, hint in fields_of(schema):
        section = config.get(field.name) if isinstance(config, DictConfig) else None
        if not dataclasses.is_dataclass(hint) or not isinstance(section, DictConfig):
            continue
        if issubclass(typing.cast(type[Any], hint), Variant):
            kind = str(section.get("kind"))
            kinds = typing.cast(type[Variant], hint).kinds
            if kind not in kinds:
                name = f"{prefix}{field.name}"
                raise UserError(
                    f"{name}.kind={kind}: no such kind{nearest(kind, [*kinds])}; there are {', '.join(kinds)}"
                )
            hint = kinds[kind]
        yield from chosen_kinds(typing.cast(type[Any], hint), section, f"{prefix}{field.name}.")
