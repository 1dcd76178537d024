"""Running a command: arguments in, exit code out. A user's mistake is one line on stderr."""

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cloze import arrival
from cloze.cli.commands import COMMANDS, examples
from cloze.cli.composition import HYDRA, compose, fill, refuse_one_run_for_all, refuse_renamed
from cloze.cli.explanation import explain, no_such_option
from cloze.cli.help import help_text
from cloze.cli.overrides import as_meant, quoted
from cloze.cli.schemas import groups, key_names, root
from cloze.cli.terminal import outlive_terminal
from cloze.errors import ExitCode, PeerFailed, UserError
from cloze.log import QUIET, VERBOSE, log, set_verbosity

C = TypeVar("C")
Main = Callable[..., int]  # of arguments, or of nothing: then those of the process

# Hydra stays out of the way: no folder and no log of its own, and the working directory is the user's.
_HYDRA_SETTINGS = (
    "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.run.dir=.", "hydra.sweep.subdir=.",
    "hydra.output_subdir=null", "hydra.job.chdir=false",
)  # fmt: skip


def hydra_command(
    config_name: str,
    schema: type[C],
    positional: Sequence[str] = (),
    *,
    launched: Callable[[], object] | None = None,
    after_sweep: Callable[[Sequence[C]], None] = lambda configs: None,
) -> Callable[[Callable[[C], int]], Main]:
    """Make `main(config)` a `main(overrides)` that composes `conf/{config_name}.yaml` into a `schema` object.

    `--local_rank=N`, which the `deepspeed` launcher puts into argv, is dropped (DeepSpeed issue 5357). `--help` prints
    the groups and keys of `schema`; `--cfg job`, `--multirun` and Hydra's other flags work as usual. Words that are no
    `key=value` stand for the keys `positional`, in their order. A command that launchers start on many hosts is
    `launched`: that is called before anything is composed, and the arguments must have arrived as they were typed.
    `after_sweep` is told what the jobs of a sweep were that began.
    """

    def with_schema(main: Callable[[C], int]) -> Main:
        def run(overrides: list[str]) -> int:
            overrides = arrival.without_local_rank(overrides)
            overrides = _with_keys(arrival.opened(overrides) if launched else overrides, positional)
            if "--help" in overrides or "-h" in overrides:
                print(help_text(config_name, schema, overrides))
                return ExitCode.OK
            if launched:
                launched()
            if any(override.startswith("-") for override in overrides):
                return _by_hydra(overrides, config_name, schema, main, after_sweep)
            return main(compose(config_name, schema, overrides))  # in half the time

        return overrides_command(schema, once=launched is not None, goes_on=_goes_on(config_name))(run)

    return with_schema


def _goes_on(config_name: str) -> bool:
    return config_name in COMMANDS and COMMANDS[config_name].goes_on


def overrides_command(
    schema: type[Any], *, once: bool = False, goes_on: bool = False
) -> Callable[[Callable[[list[str]], int]], Main]:
    """Make `main(overrides)`, which may raise, one that returns an exit code and knows `--verbose` and `--quiet`.

    `once`: a command line gives a key one value; in a list from Python the last one counts. `goes_on`: what the same
    command does after Ctrl-C; else it begins anew.
    """

    def with_schema(main: Callable[[list[str]], int]) -> Main:
        def run(overrides: Sequence[str] | None = None) -> int:
            with _process(overrides) as given:
                if once and overrides is None:
                    return guarded(lambda: main(_given_once(_with_verbosity(given))), schema, goes_on=goes_on)
                return guarded(lambda: main(_with_verbosity(given)), schema, goes_on=goes_on)

        return run

    return with_schema


class _Help(argparse.RawDescriptionHelpFormatter):
    """Defaults in brackets, as those of keys; examples as they stand."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = (None, False, argparse.SUPPRESS)
        return action.help if any(action.default is one for one in plain) else f"{action.help} [%(default)s]"


class _Parser(argparse.ArgumentParser):
    """What it cannot read is one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--?)(\S+)", message)
        options = [option for option in self._option_string_actions if option.startswith("--")]
        close = [option for option in options if unknown and option[2:].startswith(unknown[2])]
        close = close or difflib.get_close_matches(f"--{unknown[2]}", options, 1) if unknown else []
        command = COMMANDS.get(self.prog.removeprefix("python -m "))
        usage = f"; such as: {examples(command)[0]}" if command and "required" in message else ""
        hint = f" (did you mean {close[0]}?)" if close else usage
        raise UserError(f"{message[0].lower()}{message[1:]}{hint}; {self.prog} --help tells what there is")


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """For `python -m {module}`, a command that takes arguments instead of keys."""
    command = COMMANDS.get(module)
    lines = "\n".join(f"  {example}" for example in examples(command)) if command else ""
    made = _Parser(
        f"python -m {module}",
        description=description,
        epilog=f"examples:\n{lines}" if lines else None,
        formatter_class=_Help,
    )
    loudness = made.add_mutually_exclusive_group()
    loudness.add_argument(VERBOSE, action="store_true", help="tell more")
    loudness.add_argument(QUIET, action="store_true", help="tell warnings and errors only")
    return made


def command(arguments: argparse.ArgumentParser) -> Callable[[Callable[[argparse.Namespace], int]], Main]:
    """Make `main(options)` a `main(argv)` that returns an exit code."""

    def with_parser(main: Callable[[argparse.Namespace], int]) -> Main:
        def parsed(argv: Sequence[str]) -> int:
            _refuse_empty_arguments(argv)
            options = arguments.parse_args(argv)
            set_verbosity(verbose=options.verbose, quiet=options.quiet)
            return main(options)

        def run(argv: Sequence[str] | None = None) -> int:
            with _process(argv) as given:
                return guarded(lambda: parsed(given))

        return run

    return with_parser


def _refuse_empty_arguments(argv: Sequence[str]) -> None:
    """Raises `UserError` where an argument has nothing in it: an empty path would be the working directory."""
    for number, argument in enumerate(argv, 1):
        if not argument.strip() or (argument.startswith("--") and argument.endswith("=")):
            named = argument.strip() or f"argument {number}"
            raise UserError(f"{named}: empty (is a variable of the shell unset?); give it a value")


def guarded(action: Callable[[], int], schema: type[Any] | None = None, *, goes_on: bool = False) -> int:
    """Run `action`; a user's mistake becomes one line on stderr and an exit code. No schema: no keys."""
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
        _complain(explain(error, schema))
        return int(ExitCode.USAGE)
    except KeyboardInterrupt:
        _complain("interrupted; the same command " + ("goes on" if goes_on else "begins anew"))
        return int(ExitCode.STOPPED)
    except SystemExit as stop:  # argparse's, of --help
        return int(stop.code or 0)


def _complain(message: str, *, everywhere: bool = False) -> None:
    """The one line on stderr. What every rank of a job finds is said once per node."""
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        log.error(message)


@contextmanager
def _process(arguments: Sequence[str] | None) -> Iterator[list[str]]:
    """The arguments; where none are given this process is the command's own, and so are its standard streams."""
    if arguments is not None:
        yield list(arguments)
        return
    outlive_terminal()
    yield sys.argv[1:]
    sys.stdout.flush()


def _given_once(arguments: list[str]) -> list[str]:
    arrival.refuse_given_twice(arguments)
    return arguments


def _with_verbosity(arguments: list[str]) -> list[str]:
    """The arguments without `--verbose` and `--quiet`, which from now on hold."""
    set_verbosity(verbose=VERBOSE in arguments, quiet=QUIET in arguments)
    return [argument for argument in arguments if argument not in (VERBOSE, QUIET)]


def _with_keys(arguments: Sequence[str], positional: Sequence[str]) -> list[str]:
    """Give the words that come before any `key=value` the names `positional`; what is in them, Hydra takes as it is."""
    words = list(itertools.takewhile(lambda one: not one.startswith("-") and "=" not in one, arguments))
    named = [f"{key}={quoted(word)}" for key, word in zip(positional, words, strict=False)]
    return [*named, *arguments[len(named) :]]


_FAIL_FAST = "--fail-fast"  # ours: the first job of a sweep that fails ends it
_SWEEPS = {"--multirun", "-m"}
_NEXT_AFTER = (ExitCode.OK, ExitCode.USAGE, ExitCode.FAILED)  # else the next job would meet the same end

# Hydra's flags that are of use here, and how many words follow each
_FLAGS = {
    **dict.fromkeys((*_SWEEPS, _FAIL_FAST, "--resolve", "--hydra-help", "--version", "--run", "-r"), 0),
    **dict.fromkeys(
        ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd", "--config-name", "-cn"), 1
    ),
}


def refuse_options(schema: type[Any], arguments: Sequence[str], own: Sequence[str] = ()) -> None:
    """Raises `UserError` of `--out X`, which Hydra's parser would answer with its own usage.

    `own` are the flags and the keys that the command has beside those of `schema`.
    """
    for number, argument in enumerate(arguments):
        if not argument.startswith("-") or argument.partition("=")[0] in (*_FLAGS, *own):
            continue
        following = arguments[number + 1] if number + 1 < len(arguments) else ""
        value = "" if "=" in argument or following.startswith("-") or "=" in following else following
        names = [*own, *(name for name, _ in key_names(schema))]
        raise UserError(no_such_option(f"{argument}={value}" if value else argument, names, groups(schema)))


def _by_hydra(
    arguments: list[str],
    config_name: str,
    schema: type[C],
    main: Callable[[C], int],
    after_sweep: Callable[[Sequence[C]], None],
) -> int:
    """Let Hydra obey its flags. A sweep goes on after a job that fails, unless told otherwise, and ends with a stop."""
    refuse_options(schema, arguments)
    sweeps, fail_fast = bool(_SWEEPS & {*arguments}), _FAIL_FAST in arguments
    arguments = as_meant(schema, [one for one in arguments if one != _FAIL_FAST], sweep=sweeps)
    refuse_renamed(schema, arguments)
    refuse_one_run_for_all(config_name, schema, arguments)
    configs: list[C] = []
    codes: list[int] = []
    composed, num_left = False, 0

    def job(config: DictConfig) -> int:
        configs.append(fill(config, schema))
        return main(configs[-1])

    @hydra.main(version_base=HYDRA, config_path=str(root(schema)), config_name=config_name)
    def task(config: DictConfig) -> None:
        nonlocal composed, num_left
        composed = True
        if codes and codes[-1] not in (_NEXT_AFTER[:1] if fail_fast else _NEXT_AFTER):
            num_left += 1
        else:
            codes.append(guarded(lambda: job(config), schema, goes_on=_goes_on(config_name)))

    folder = "${runs_root}" if "runs_root" in {field.name for field in fields(schema)} else "runs"  # type: ignore[arg-type]
    try:
        with _as_process(_with_settings(arguments, [*_HYDRA_SETTINGS, f"hydra.sweep.dir={folder}"])):
            task()
    except ValueError as error:  # Hydra's, of an override such as `model=3`
        if composed:
            raise
        raise UserError(explain(error, schema)) from error
    if sweeps and os.environ.get("RANK", "0") == "0":
        after_sweep(configs)
        log.info(_end_of_sweep(codes, num_left))
    return max(codes, default=ExitCode.OK)


def _end_of_sweep(codes: Sequence[int], num_left: int) -> str:
    """Which jobs did not finish."""
    total = len(codes) + num_left
    told = [f"job {n} of {total} ended with exit code {code}" for n, code in enumerate(codes, 1) if code]
    told += [f"{num_left} not begun"] if num_left else []
    again = "; the same command goes on" if told else ""
    return (
        f"sweep: {sum(not code for code in codes)} of {total} jobs finished{''.join(f', {one}' for one in told)}{again}"
    )


def _with_settings(arguments: list[str], settings: list[str]) -> list[str]:
    """Flags, then the settings, then the user's overrides, whose word is the last: Hydra wants these side by side."""
    flags: list[str] = []
    overrides: list[str] = []
    words = iter(arguments)
    for word in words:
        if word.startswith("-"):
            flags += [word, *itertools.islice(words, 0 if "=" in word else _FLAGS.get(word, 0))]
        else:
            overrides.append(word)
    return [*flags, *settings, *overrides]


@contextmanager
def _as_process(arguments: list[str]) -> Iterator[None]:
    """For a while `sys.argv`, which is all that Hydra reads, has these; and its errors reach us unprinted."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [argv[0], *arguments], "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full
