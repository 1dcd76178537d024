"""Standard streams that outlive whoever reads them."""

import codecs
import errno
import io
import sys
from typing import Any


def outlive_terminal() -> None:
    """From now on stdout and stderr drop what nobody can read: neither a closed terminal nor `| head` ends a run.

    Nor does a locale that lacks a character.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):  # somebody else's
            continue
        stream.flush()
        raw = _Patient(stream.fileno(), "w", closefd=False)
        buffer: Any = raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw)  # raw: python -u
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, _errors(stream), **how))


def _errors(stream: Any) -> str:
    """What becomes of a character that the terminal's encoding has not: it is told, and no command fails for it."""
    if stream.errors != "strict":
        return str(stream.errors)
    return "surrogateescape" if codecs.lookup(stream.encoding).name == "utf-8" else "backslashreplace"


class _Patient(io.FileIO):
    """A file descriptor whose reader may go away."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return len(data)
