"""Third parties' faults: told in one line, and never those of the run."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from cloze.errors import DiskError, UserError, first_line
from cloze.redact import redact_text


class Harmless:
    """Hands any `Exception` raised inside to `on_error` and swallows it: for third-party sinks, which must not stop us.

    They raise classes that no public base unites. Ctrl-C and exits pass through, and what the user can mend.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or (isinstance(error, UserError) and not isinstance(error, DiskError)):
            return False
        self._on_error(error)
        return True


def reason(error: BaseException) -> str:
    """What an error says, for a line of ours, without secrets."""
    return redact_text(first_line(error))
