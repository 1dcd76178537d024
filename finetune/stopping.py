"""A stop that is asked for while a seed trains: after the step, with a checkpoint; asked for again, at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cloze.signals import noted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """SIGINT or SIGTERM, as far as this is the main thread, which alone hears them."""

    requested = False

    @contextmanager
    def heard(self) -> Iterator["Stop"]:
        """Inside, note them, but those that our caller has us ignore; the second one is a KeyboardInterrupt."""
        with noted(_SIGNALS, self._note):
            yield self

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
