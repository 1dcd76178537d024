"""Python imports this when it starts, where PYTHONPATH has this folder: so a launcher's ranks get the faults."""

import os

if {"RANK", "CHAOS_LOG"} <= os.environ.keys():  # a rank, not its launcher
    import tests.chaos.faults  # noqa: F401
