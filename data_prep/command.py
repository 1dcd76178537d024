"""What the small commands about a corpus share: arguments in, an exit code and at most one line of complaint out."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.errors import ExitCode, UserError
from data_prep.storage import is_remote, local_path


def parser_of(name: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"python -m data_prep.{name}", description=description)
    parser.add_argument("directory", type=_local, help="what `python -m data_prep out=…` made")
    return parser


def run(parser: ArgumentParser, arguments: Sequence[str], action: Callable[[Namespace], int]) -> int:
    """Do `action` with the parsed arguments; a user's mistake becomes one line on stderr and an exit code."""
    try:
        return action(parser.parse_args(arguments))
    except SystemExit as stop:  # argparse has said its own line
        return ExitCode.USAGE if stop.code else ExitCode.OK
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _local(text: str) -> Path:
    if is_remote(text):
        raise UserError(f"{text}: not on this machine; copy the corpus into a directory, and name that")
    return local_path(text)
