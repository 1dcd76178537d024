"""The user's mistakes and the exit codes, shared by every command. Knows nothing else."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a Cloze command's exit status means (documented in docs/faults.md)."""

    OK = 0
    USAGE = 64  # bad configuration or input: the one line on stderr says what, where and what to do
    FAILED = 70  # training failed: non-finite or diverged
    STUCK = 71  # the watchdog found no progress
    DISK = 74  # a disk is full or failing: free space and run the same command again
    STOPPED = 75  # stopped on request with a checkpoint: run the same command again to go on


ORDERLY_ENDS = (ExitCode.OK, ExitCode.STOPPED)  # of a run: all that it had to write is written


class UserError(Exception):
    """Something only the user can mend. The message is one line: what is wrong, where, and what to do."""

    exit_code: ExitCode = ExitCode.USAGE
    one_rank_only = False  # True: other ranks of the job may not have met it, so the one that did must speak


class DiskError(UserError):
    """The disk is full or failing; nothing half-written is left that looks finished."""

    exit_code = ExitCode.DISK
    one_rank_only = True


class Stopped(UserError):
    """Ended on request before there was anything to save."""

    exit_code = ExitCode.STOPPED


class PeerFailed(UserError):
    """Another rank of the job met a fault and tells it; this one leaves with it, without a word."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PeerLost(UserError):
    """Another rank of the job is gone without a word."""

    exit_code = ExitCode.STUCK
    one_rank_only = True


class TrainingError(UserError):
    """Training cannot go on: non-finite or diverged."""

    exit_code = ExitCode.FAILED


def first_line(error: BaseException) -> str:
    """What an error says, for a line of ours."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
