"""A second home for a run's checkpoints: object storage, or any place that fsspec reaches.

Checkpoints come one after another from the writer's background, MANIFEST.json last, so one without it is unfinished.
On a machine without checkpoints the newest whole one is fetched back.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePath

from cloze import ownership, storage
from cloze.errors import DiskError, UserError
from cloze.files import rename
from cloze.ownership import CHECKPOINT
from pretrain.checkpoint.format import FILES, MANIFEST, TEMPORARY, Retention, step_of, verify
from pretrain.config import TrainConfig


class Mirror:
    """The checkpoints of one run below `url`. Raises `UserError` where that cannot be reached, tried several times."""

    def __init__(self, url: str, retention: Retention) -> None:
        try:
            storage.require(url)
        except UserError as error:
            raise UserError(f"checkpoint.upload={error}") from error
        self._url, self._retention = url, retention

    def push(self, path: Path, tick: Callable[[], None] = lambda: None) -> None:
        """Copy a whole checkpoint there, `tick` after each file, then remove what retention does not keep."""
        remote = f"{self._url}/{path.name}"
        steps = self._steps()
        if step_of(path) in steps:  # of an earlier try, or of before a rollback
            if storage.download(f"{remote}/{MANIFEST}") == (path / MANIFEST).read_bytes():
                return
            _remove(remote)
        storage.patiently(partial(storage.make_folder, remote))
        for name in (*FILES, MANIFEST):
            storage.patiently(partial(storage.upload, path / name, f"{remote}/{name}"))
            tick()
        older = {step: there for step, there in steps.items() if step < step_of(path)}
        for step in self._retention.removes([*older, step_of(path)]):
            with suppress(storage.Unreachable):  # the next one tries again
                _remove(older[step])

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: of a future that was given up."""
        for later, there in self._steps().items():
            if later > step:
                _remove(there)

    def pull(self, folder: Path, report: Callable[[str], None]) -> Path | None:
        """Fetch the newest checkpoint that verifies into `folder`; `report` is told of each that does not.

        Raises `UserError` where the place cannot be read: to train from the start instead would not be what was meant.
        """
        try:
            return self._pull(folder, report)
        except OSError as error:
            raise DiskError(f"{folder}: {error}; free space and run the same command again") from error

    def _pull(self, folder: Path, report: Callable[[str], None]) -> Path | None:
        for remote in reversed(self._steps().values()):
            there = storage.patiently(partial(storage.listed, remote))
            if MANIFEST not in there:
                continue
            final = folder / PurePath(remote).name
            unfinished = folder / f"{TEMPORARY}{final.name}"
            if unfinished.exists():
                ownership.clear(unfinished, CHECKPOINT)
            unfinished.mkdir(parents=True)
            for name in there.intersection((*FILES, MANIFEST)):
                with suppress(storage.Missing):  # a listing may tell of what is no more: then it does not verify
                    storage.fetch(f"{remote}/{name}", unfinished / name)
            if faults := verify(unfinished):
                report(f"{remote}: damaged ({faults[0]}); trying the one before it")
                ownership.clear(unfinished, CHECKPOINT)
                continue
            if final.exists():  # a damaged one
                ownership.clear(final, CHECKPOINT)
            return rename(unfinished, final)
        return None

    def _steps(self) -> dict[int, str]:
        """Where each step's checkpoint lies, whole or not, ascending."""
        names = storage.patiently(lambda: storage.listed(self._url))
        steps = {step_of(PurePath(name)): f"{self._url}/{name}" for name in names}
        return {step: steps[step] for step in sorted(steps) if step >= 0}


def _remove(remote: str) -> None:
    """Remove a checkpoint's files; where somebody put more beside them, that stays."""
    there = storage.patiently(partial(storage.listed, remote))
    if there <= {*FILES, MANIFEST}:
        storage.patiently(partial(storage.remove, remote))
        return
    for name in sorted(there & {*FILES, MANIFEST}, key=(MANIFEST, *FILES).index):  # first what makes it look whole
        storage.patiently(partial(storage.remove, f"{remote}/{name}"))


def open_mirror(config: TrainConfig) -> Mirror | None:
    """Where a run's checkpoints are uploaded to, if anywhere."""
    url = config.checkpoint.upload
    return None if url is None else Mirror(f"{url.rstrip('/')}/{config.run}", retention_of(config))


def retention_of(config: TrainConfig) -> Retention:
    """Which checkpoints of a run stay."""
    rules = config.checkpoint
    return Retention(keep_last=rules.keep_last, keep_every=rules.keep_every, keep_steps=config.kept_steps)
