"""One way to speak: lines for people go to stderr through Python's `logging`; progress bars are apart from them.

A line of level INFO stands bare; others begin with their level ("warning: …", "error: …"). A rank other than 0 is
named, and its host where the job has several. What a script may read (a path, a table) is `print`ed to stdout instead.
"""

import logging
import os
import shlex
import socket
import sys
from typing import TextIO

from cloze.redact import redact_text

VERBOSE, QUIET = "--verbose", "--quiet"


class _Formatter(logging.Formatter):
    """`level: rank N on HOST: text`, of which only what says something is there, and no secret."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{level}{_speaker()}{redact_text(super().format(record))}"


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is at the time: commands replace it (`cloze.cli.outlive_terminal`)."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _speaker() -> str:
    """Who speaks, where it is not rank 0: `rank 3: `, or `rank 3 on node2: ` in a job of several hosts."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return ""
    here, all_ranks = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    host = f" on {socket.gethostname()}" if here and all_ranks and here != all_ranks else ""
    return f"rank {rank}{host}: "


def set_verbosity(*, verbose: bool = False, quiet: bool = False) -> None:
    """Speak of everything (DEBUG), or of warnings and errors only; else from INFO on."""
    log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def verbosity() -> tuple[str, ...]:
    """The arguments that make another command of ours speak as much as this one."""
    level = log.getEffectiveLevel()
    return (VERBOSE,) if level <= logging.DEBUG else (QUIET,) if level >= logging.WARNING else ()


def closing(line: str, *command: str) -> None:
    """The last line of a command: where it stands, what is saved, and the `command` to go on with, to paste."""
    log.info("; ".join(filter(None, (line, f"next: {shlex.join(command)}" if command else ""))))


def _logger() -> logging.Logger:
    logger = logging.getLogger("cloze")
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a framework around us that configures the root logger would say all of it twice
    return logger


log = _logger()
