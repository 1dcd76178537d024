"""The one place that knows Hydra: command line -> composed YAML -> frozen dataclass -> `main` -> exit code.

Every command calls `run`. Past it there is no OmegaConf object: typos, wrong types and missing values have been
refused with one line that names the nearest valid key. What takes arguments instead of keys is a `command`.
"""

import argparse
import dataclasses
import difflib
import errno
import io
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cloze.errors import ExitCode, PeerFailed, UserError
from cloze.schema import CONF

C = TypeVar("C")

_HYDRA = "1.3"


class Key(NamedTuple):
    """One key of a command's configuration."""

    name: str  # dotted
    meaning: str
    default: str | None  # in YAML's notation, or "required"; None for a section


def run(config_name: str, schema: type[C], main: Callable[[C], int]) -> NoReturn:
    """Compose `conf/{config_name}.yaml` with the command line, call `main` with a `schema` object, exit with its code.

    `--local_rank=N`, which the `deepspeed` launcher puts into argv, is dropped (DeepSpeed issue 5357). `--help` prints
    the groups and keys of `schema`; `--cfg job`, `--multirun` and Hydra's other flags work as usual.
    """
    outlive_terminal()
    arguments = _without_local_rank(sys.argv[1:])
    if "--help" in arguments or "-h" in arguments:
        print(help_text(config_name, schema))
        sys.exit(ExitCode.OK)
    if any(argument.startswith("-") for argument in arguments):
        code = guarded(lambda: _by_hydra(arguments, config_name, schema, main), schema)
    else:  # in half the time
        code = guarded(lambda: main(compose(config_name, schema, arguments)), schema)
    sys.stdout.flush()
    sys.exit(code)


def _by_hydra(arguments: list[str], config_name: str, schema: type[C], main: Callable[[C], int]) -> int:
    """Let Hydra obey its flags."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of Hydra's own printer
    codes: list[int] = []
    composed = False

    @hydra.main(version_base=_HYDRA, config_path=str(_root(schema)), config_name=config_name)
    def task(config: DictConfig) -> None:
        nonlocal composed
        composed = True
        codes.append(guarded(lambda: main(_typed(config, schema)), schema))

    sys.argv[1:] = arguments
    _refuse_one_run_for_all(config_name, schema, arguments)
    try:
        task()
    except ValueError as error:  # Hydra's, of an override such as `model=3`
        if composed:
            raise
        raise UserError(_explain(error, schema)) from error
    return max(codes, default=ExitCode.OK)


def _refuse_one_run_for_all(config_name: str, schema: type[Any], arguments: Sequence[str]) -> None:
    """Raises `UserError` where two jobs of a sweep would train in one run directory: the second finds nothing to do."""
    names = {field.name for field in dataclasses.fields(schema)}
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if (
        not {"--multirun", "-m"} & {*arguments}
        or not {"run", "runs_root"} <= names
        or "${hydra:" in " ".join(overrides)
    ):
        return
    parsed = OverridesParser.create().parse_overrides(overrides)
    seen: dict[tuple[str, str], Sequence[str]] = {}
    for job in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]:
        config = _composed(config_name, schema, job)
        where = str(config.runs_root), str(config.run)
        if where in seen:
            swept = [change.key_or_group for change in parsed if change.is_sweep_override()]
            raise UserError(
                f"run={where[1]}: is that of several jobs of the sweep; name one for each, such as "
                f"run={where[1]}-${{hydra:job.num}}" + (f" or run={where[1]}-${{{swept[0]}}}" if swept else "")
            )
        seen[where] = job


def compose(config_name: str, schema: type[C], overrides: Sequence[str] = ()) -> C:
    """The typed configuration that these command-line overrides give, without running anything."""
    return _typed(_composed(config_name, schema, overrides), schema)


def typed(values: Mapping[str, Any], schema: type[C]) -> C:
    """The typed configuration that `values` (a saved config.yaml, say) holds. Raises `UserError` like `run`."""
    return _typed(OmegaConf.create(dict(values)), schema)


def help_text(config_name: str, schema: type[Any]) -> str:
    """Groups with their options, then every key with its default and meaning."""
    commands = {
        "prep": "python -m data_prep",
        "train": "deepspeed pretrain/train.py",
        "suite": "python -m finetune.suite",
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
    for key in keys(config_name, schema):
        if key.meaning:
            lines.append(f"  {key.name:28} {key.meaning}" + (f" [{key.default}]" if key.default else ""))
    lines += [
        "",
        "--cfg job prints the composed configuration, --multirun sweeps, --hydra-help tells Hydra's own flags.",
    ]
    codes = ", ".join(f"{code.value} {code.name.lower()}" for code in ExitCode)
    return "\n".join([*lines, f"Exit codes: {codes} (docs/faults.md)."])


def keys(config_name: str, schema: type[Any]) -> list[Key]:
    """Every key and section of `schema`, in order, with the default that `conf/{config_name}.yaml` gives."""
    defaults = _composed(config_name, schema, ())
    found = []
    for name, meaning in _names(schema):
        parent, _, leaf = name.rpartition(".")
        value = OmegaConf.select(defaults, name, throw_on_missing=False)
        if OmegaConf.is_missing(OmegaConf.select(defaults, parent) if parent else defaults, leaf):
            default: str | None = "required"
        elif isinstance(value, DictConfig):
            default = None
        else:
            plain = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
            default = plain if isinstance(plain, str) else json.dumps(plain)
        found.append(Key(name, meaning, default))
    return found


def groups(schema: type[Any]) -> dict[str, list[str]]:
    """Config groups of this schema (top-level fields; `recipe` of training) with the options that `conf/` offers."""
    names = [field.name for field in dataclasses.fields(schema)]
    found: dict[str, list[str]] = {}
    for name in [*names, *(["recipe"] if "expect" in names else [])]:  # a recipe tells what corpus it expects
        if options := sorted(path.stem for path in (_root(schema) / name).glob("*.yaml")):
            found[name] = options
    return found


class _Help(argparse.HelpFormatter):
    """Defaults in brackets, as those of keys."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = (None, False, argparse.SUPPRESS)
        return action.help if any(action.default is one for one in plain) else f"{action.help} [%(default)s]"


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """For `python -m {module}`, a command that takes arguments instead of keys."""
    return argparse.ArgumentParser(f"python -m {module}", description=description, formatter_class=_Help)


def command(arguments: argparse.ArgumentParser) -> Callable[[Callable[[argparse.Namespace], int]], Callable[..., int]]:
    """Make `main(options)` a `main(argv)`, of the process where none is given, that returns an exit code."""

    def with_parser(main: Callable[[argparse.Namespace], int]) -> Callable[..., int]:
        return lambda argv=None: guarded(lambda: main(arguments.parse_args(_none_empty(argv))))

    return with_parser


def _none_empty(argv: Sequence[str] | None) -> Sequence[str] | None:
    """The arguments, all with something in them. Raises `UserError`: an empty path would be the working directory."""
    for number, argument in enumerate(sys.argv[1:] if argv is None else argv, 1):
        if not argument.strip() or (argument.startswith("--") and argument.endswith("=")):
            named = argument.strip() or f"argument {number}"
            raise UserError(f"{named}: empty (is a variable of the shell unset?); give it a value")
    return argv


def outlive_terminal() -> None:
    """From now on stdout and stderr drop what nobody can read: neither a closed terminal nor `| head` ends a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):  # somebody else's
            continue
        stream.flush()
        raw = _Patient(stream.fileno(), "w", closefd=False)
        buffer: Any = raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw)  # raw: python -u
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, **how))


class _Patient(io.FileIO):
    """A file descriptor whose reader may go away."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return len(data)


def guarded(action: Callable[[], int], schema: type[Any] | None = None, options: Sequence[str] = ()) -> int:
    """Run `action`; a user's mistake becomes one line on stderr and an exit code. No schema: no keys.

    `options` are what the command takes besides the keys of `schema`: a typo may mean one of them.
    """
    try:
        return int(action())
    except PeerFailed as error:
        return int(error.exit_code)
    except UserError as error:
        _complain(str(error), everywhere=error.one_rank_only)
        return int(error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        if schema is None:
            raise
        _complain(_explain(error, schema, options))
        return int(ExitCode.USAGE)
    except KeyboardInterrupt:
        _complain("interrupted; run the same command again to go on")
        return int(ExitCode.STOPPED)
    except SystemExit as stop:  # argparse exits 2 after its own line
        return int(ExitCode.USAGE) if stop.code == 2 else int(stop.code or 0)


def _complain(message: str, *, everywhere: bool = False) -> None:
    """The one line on stderr. What every rank of a job finds is said once per node."""
    rank = os.environ.get("RANK", "0")
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}" if rank == "0" else f"error: rank {rank}: {message}", file=sys.stderr, flush=True)


def _root(schema: type[Any]) -> Path:
    """The folder of YAML that the command of `schema` composes from: `conf`, or a folder of its own within.

    A package gets its own where one of its keys (`model=<directory>` of finetune) is a group for the others: Hydra
    takes any key that is the name of a folder for the choice of an option.
    """
    own = CONF / schema.__module__.partition(".")[0]
    return own if own.is_dir() else CONF


def _composed(config_name: str, schema: type[Any], overrides: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(config_dir=str(_root(schema)), version_base=_HYDRA):
        try:
            return hydra.compose(config_name, overrides=list(overrides))
        except ValueError as error:
            raise UserError(_explain(error, schema)) from error


def _typed(config: DictConfig, schema: type[C]) -> C:
    try:
        merged = OmegaConf.merge(_template(schema), config)
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema)) from error
    assert isinstance(result, schema)
    _refuse_empty(dataclasses.asdict(typing.cast(Any, result)))
    return result


def _refuse_empty(value: Any, key: str = "") -> None:
    """Raises `UserError` where a text is empty, as `init_from=$UNSET` is: to train without it is not what was meant."""
    if isinstance(value, Mapping):
        for name, item in value.items() if key != "deepspeed.extra" else ():  # DeepSpeed's own keys
            _refuse_empty(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_empty(item, key)
    elif isinstance(value, str) and not value.strip():
        raise UserError(f"{key}: empty (is a variable of the shell unset?); give it a value, or {key}=null for none")


def _template(schema: type[Any]) -> DictConfig:
    """`schema` as an OmegaConf object that can be filled: OmegaConf takes frozen dataclasses for read-only ones."""
    template = OmegaConf.structured(schema)
    OmegaConf.set_readonly(template, False)
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            template[field.name] = _template(typing.cast(type[Any], hints[field.name]))
            OmegaConf.set_readonly(template[field.name], False)
    return typing.cast(DictConfig, template)


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def _explain(error: Exception, schema: type[Any], options: Sequence[str] = ()) -> str:
    """One line for a Hydra or OmegaConf error, with the nearest valid name where a name is wrong."""
    names = [*options, *(name for name, _ in _names(schema))]
    message = str(error)
    first = message.strip().splitlines()[0].rstrip(".")
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not a key=value that Hydra can read; quote special characters, or see --help"
    if match := re.search(r"Could not (?:find|load) '?([\w-]+)/([\w/.-]+)'", message):
        group, option = match.groups()
        options = groups(schema).get(group, [])
        return f"{group}={option}: no such option{_nearest(option, options)}; there are {', '.join(options)}"
    if match := re.search(r"Could not override '([^']+)'", message):
        key = match.group(1)
        return f"{key}: no such key{_nearest(key, names)}; --help lists them all"
    if match := re.search(r"Key '([^']+)' (?:not in|is not in)", message):
        full = re.search(r"full_key: (\S+)", message)
        key = full.group(1) if full else match.group(1)
        return f"{key}: no such key{_nearest(key, names)}; --help lists them all"
    if isinstance(error, MissingMandatoryValue) and (match := re.search(r"full_key: (\S+)", message)):
        return (
            f"{match.group(1)}: has no value; add {match.group(1)}=… to the command line (--help tells what it means)"
        )
    if (match := re.search(r"full_key: (\S+)", message)) and "ListConfig" in first:
        return f"{match.group(1)}: is a list; put brackets around it: {match.group(1)}=[…]"
    if match := re.search(r"full_key: (\S+)", message):
        return f"{match.group(1)}: {first[0].lower()}{first[1:]}; correct the value (--help tells what each key means)"
    return f"{first}; correct the command line (--help lists groups and keys)"


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if not close:  # a right leaf under a wrong parent: `lr` for `optim.lr`
        close = [key for key in valid if key.rpartition(".")[2] == name.rpartition(".")[2]]
    return f" (did you mean {close[0]}?)" if close else ""


def _names(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, help text) of every field; a nested dataclass comes before its fields."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name, field.metadata.get("help", "")
        for candidate in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(candidate):
                yield from _names(typing.cast(type[Any], candidate), f"{prefix}{field.name}.")
