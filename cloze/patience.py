"""A line every ten seconds while something takes long, so that nobody wonders whether it hangs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cloze.log import log

_SECONDS = 10.0


@contextmanager
def telling(what: str | Callable[[], str]) -> Iterator[None]:
    """`what: 20 s`, as long as this lasts; nothing where it is over sooner."""
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(_SECONDS):
            log.info(f"{what if isinstance(what, str) else what()}: {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=tell, name="telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
