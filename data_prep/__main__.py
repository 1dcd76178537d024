"""`python -m data_prep key=value …`. Imports what it needs where it runs: workers import this module, too."""

import atexit
import gc
import signal
import sys
from collections.abc import Sequence


def main(overrides: Sequence[str] | None = None) -> int:
    """Prepare a corpus as `overrides` say, of the process where none are given; returns the exit code."""
    from cloze.cli import hydra_command
    from data_prep.config import PrepConfig

    @hydra_command("prep", PrepConfig)
    def command(config: PrepConfig) -> int:
        from data_prep.prepare import main as prepare  # not above: `--help` does not wait for it

        return prepare(config)

    return command(overrides)


if __name__ == "__main__":
    gc.disable()  # imports leave no garbage
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else we were started to ignore it
    if heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has begun: Ctrl-C just ends us, without a traceback

    if not {"executor.workers=1", "executor=array", "executor=ray", "--help", "-h", "--cfg"} & set(sys.argv):
        from data_prep.executors.fork_server import start_server

        start_server()  # beside our own imports, which take as long

    import cloze.cli  # noqa: F401

    if not {"--help", "-h"} & set(sys.argv):
        import data_prep.prepare  # noqa: F401

    gc.freeze()
    gc.enable()
    atexit.register(gc.freeze)  # else all that is left is searched once more before it is thrown away: 0.1 s
    if heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
