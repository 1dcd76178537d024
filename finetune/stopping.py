"""A stop that is asked for while a seed trains: after the step, with a checkpoint; asked for again, at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """SIGINT or SIGTERM, as far as this is the main thread, which alone hears them."""

    requested = False

    @contextmanager
    def heard(self) -> Iterator["Stop"]:
        """Inside, note them, but those that our caller has us ignore; the second one is a KeyboardInterrupt."""
        here = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in _SIGNALS if here}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
