"""Command-line overrides and YAML of `conf/` -> a frozen dataclass. Past it there is no OmegaConf object."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cloze.cli.explanation import explain, nearest
from cloze.cli.overrides import as_meant
from cloze.cli.schemas import fields_of, groups, key_of, root
from cloze.errors import UserError
from cloze.schema import Variant

C = TypeVar("C")

HYDRA = "1.3"


def compose(config_name: str, schema: type[C], overrides: Sequence[str] = (), options: Sequence[str] = ()) -> C:
    """The typed configuration that these command-line overrides give, without running anything.

    `options` are what the command takes besides the keys of `schema`: a typo may mean one of them.
    """
    overrides = as_meant(schema, overrides)
    try:
        config = composed(config_name, schema, overrides)
    except HydraException as error:
        choices = group_choices(schema, overrides)
        if len(choices) == len(overrides):
            raise
        chosen = dict(chosen_kinds(schema, composed(config_name, schema, choices)))
        raise UserError(explain(error, schema, options, chosen, overrides)) from error
    return fill(config, schema, overrides)


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


def refuse_one_run_for_all(config_name: str, schema: type[Any], arguments: Sequence[str]) -> None:
    """Raises `UserError` where two jobs of a sweep would train in one run directory: the second finds nothing to do."""
    names = {field.name for field, _ in fields_of(schema)}
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if (
        not {"--multirun", "-m"} & {*arguments}
        or not {"run", "runs_root"} <= names
        or "${hydra:" in " ".join(overrides)
    ):
        return
    parsed = OverridesParser.create().parse_overrides(overrides)
    seen: set[tuple[str, str]] = set()
    for job in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]:
        config = composed(config_name, schema, job)
        where = str(config.runs_root), str(config.run)
        if where in seen:
            swept = [change.key_or_group for change in parsed if change.is_sweep_override()]
            raise UserError(
                f"run={where[1]}: is that of several jobs of the sweep; name one for each, such as "
                f"run={where[1]}-${{hydra:job.num}}" + (f" or run={where[1]}-${{{swept[0]}}}" if swept else "")
            )
        seen.add(where)


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


def fill(config: DictConfig, schema: type[C], overrides: Sequence[str] = ()) -> C:
    chosen = dict(chosen_kinds(schema, config))
    try:
        merged = OmegaConf.merge(_template(schema, chosen), _by_field(config, schema))
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, schema, chosen=chosen, overrides=overrides)) from error
    assert isinstance(result, schema)
    refuse_empty(dataclasses.asdict(typing.cast(Any, result)))
    return result


def _by_field(config: DictConfig, schema: type[Any]) -> DictConfig:
    """`config` under the names of the fields, where those of keys are other ones."""
    names = {key_of(field.name): field.name for field, _ in fields_of(schema)}
    if all(key == name for key, name in names.items()):
        return config
    values = typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    return OmegaConf.create({names.get(key, key): value for key, value in values.items()})


def refuse_empty(value: Any, key: str = "") -> None:
    """Raises `UserError` where a text is empty, as `init_from=$UNSET` is: to train without it is not what was meant."""
    if isinstance(value, Mapping):
        for name, item in value.items() if key != "deepspeed.extra" else ():  # DeepSpeed's own keys
            refuse_empty(item, f"{key}.{name}" if key else key_of(str(name)))
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_empty(item, key)
    elif isinstance(value, str) and not value.strip():
        raise UserError(f"{key}: empty (is a variable of the shell unset?); give it a value, or {key}=null for none")


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
