"""Signals that a command notes for a while instead of ending by them."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noted(numbers: Sequence[int], note: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, `note` is called with these signals, but for those that our caller has us ignore (nohup).

    The main thread alone hears signals: in another one nothing changes.
    """
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if here}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
