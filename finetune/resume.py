"""Which seeds of a fine-tuning are learned, and from what, so that the same command goes on with the others.

Until all are learned they stand in `.NAME.unfinished` beside `out`: their scores, the model of the best one, and
checkpoints of the one that is being learned. Its mark has the settings and checksums of what was read, as metrics.json
has them afterwards: what other settings gave is never taken for these. One process at a time.
"""

import fcntl
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from cloze import ownership
from cloze.errors import DiskError, TrainingError, UserError
from cloze.files import write_whole
from finetune.config import FinetuneConfig, facts, flat, saved
from finetune.data import sha256
from finetune.rates import settled

_NO_MATTER = ("out", "log.", "wandb.")  # keys that leave the model what it is
_TRACKED = ("tensorboard", "wandb")  # folders that trackers make
_WHOLE = "whole"  # an empty file in a checkpoint of which all is on disk


def settings_of(config: FinetuneConfig, checksums: Mapping[str, str]) -> dict[str, Any]:
    """What decides a seed's model, by dotted key; where a path's checksum is known it stands for the path."""
    every = {**dict(flat(facts(settled(config)))), **checksums}
    return {key: value for key, value in every.items() if not key.startswith(_NO_MATTER)}


def finished(config: FinetuneConfig) -> dict[str, Any] | None:
    """The metrics.json of `config.out`; None where there is none of ours yet.

    Raises `UserError` where it was made with other settings.
    """
    body = metrics(Path(config.out))
    if body is None:
        return None
    then, now = settings_of(saved(body["config"]), body.get("sha256", {})), settings_of(config, sha256(config))
    if other := _different(then, now):
        raise UserError(f"out={config.out}: was made with another {', '.join(other)}; remove it, or name another out")
    return body


def metrics(folder: Path) -> dict[str, Any] | None:
    """What `python -m finetune` wrote into `folder`; None where it did not."""
    try:
        body = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(body, dict) and isinstance(body.get("config"), dict) and "by_seed" in body
    return body if known else None


def summary(learned: Mapping[int, Mapping[str, Any]], best: int | None) -> dict[str, Any]:
    """What metrics.json tells of the seeds: mean scores, each seed's, their standard deviation, and what is wrong.

    Of the `best` one, whose model is kept, also what it is beside its teacher.
    """
    by_seed = {seed: learned[seed]["scores"] for seed in sorted(learned)}
    every = [*by_seed.values()]
    body: dict[str, Any] = {name: statistics.fmean(scores[name] for scores in every) for name in every[0]}
    body |= {"by_seed": by_seed, "model_of_seed": best}
    if best is not None and "distilled" in learned[best]:
        body["distilled"] = learned[best]["distilled"]
    if len(every) > 1:
        body["std"] = {name: statistics.stdev(scores[name] for scores in every) for name in every[0]}
    if wrong := {seed: learned[seed]["verdict"] for seed in sorted(learned) if "verdict" in learned[seed]}:
        body["verdicts"] = wrong
    return body


def means(body: Mapping[str, Any]) -> dict[str, float]:
    """The mean scores that a metrics.json tells."""
    return {name: body[name] for name in next(iter(body["by_seed"].values()))}


def standing(out: str) -> str:
    """Where an interrupted fine-tuning into `out` stands, and what the same command does."""
    folder = _unfinished(Path(out))
    learned = sorted((ownership.marked(folder, _KIND) or {}).get("seeds", {}), key=int)
    begun = [(path.name, there) for path in folder.glob("checkpoints/seed-*") if (there := newest_whole(path))]
    told = [f"{_many('seed', learned)} learned"] if learned else []
    told += [f"{name.replace('-', ' ')} saved at step {there.name.rpartition('-')[2]}" for name, there in begun]
    if told:
        return f"out={out}: interrupted; {', '.join(told)}; the same command goes on there"
    return f"out={out}: interrupted before there was anything to save; the same command begins anew"


def _many(what: str, names: Sequence[str]) -> str:
    """`seeds 1, 2 are`."""
    return f"{what} {names[0]} is" if len(names) == 1 else f"{what}s {', '.join(names)} are"


def _unfinished(out: Path) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def seal(checkpoint: Path) -> None:
    """From now on a checkpoint counts: all of it is on disk, also after a crash. Raises OSError."""
    for path in filter(Path.is_file, checkpoint.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_whole(checkpoint / _WHOLE, b"")


def newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint that was sealed; None where there is none."""
    sealed = [path.parent for path in checkpoints.glob(f"checkpoint-*/{_WHOLE}")]
    return max(sealed, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class Seeds:
    """The learned seeds of one fine-tuning that is not finished."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Raises `UserError` where another process is at it, or seeds of other settings are there."""
        self._out, self._settings = out, dict(settings)
        self.folder = _unfinished(out)
        self.checkpoints = self.folder / "checkpoints"
        self.learned: dict[int, dict[str, Any]] = {}
        self.best: int | None = None
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        with _disk(self._out):
            if self.folder.exists() and any(self.folder.iterdir()) and not ownership.is_of(self.folder, _KIND):
                raise UserError(f"out={self._out}: {self.folder} is there, and not ours; name another out")
            there = ownership.marked(self.folder, _KIND) or {}
            if other := _different(there.get("settings", self._settings), self._settings):
                raise UserError(
                    f"out={self._out}: {self.folder} has seeds that were learned with another {', '.join(other)}; "
                    "remove it, or name another out"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a")
            if not _locked(self._lock):
                self._lock.close()
                raise UserError(f"out={self._out}: another process learns it; wait for it")
            for torn in self.checkpoints.glob("seed-*/checkpoint-*"):
                if not (torn / _WHOLE).exists():  # of a process that was killed while it wrote
                    shutil.rmtree(torn)
            if (self.folder / f"seed-{there.get('best')}").is_dir():
                self.learned = {int(seed): found for seed, found in there["seeds"].items()}
                self.best = there["best"]
            self._note()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """What is learned stays, if anything is and it is not `publish`ed: of a seed that diverged, nothing."""
        assert self._lock is not None
        with _disk(self._out):
            goes_on = not isinstance(error, TrainingError) and any(map(newest_whole, self.checkpoints.glob("seed-*")))
            if not goes_on:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            if not (self.learned or goes_on) or self._out.is_dir():
                ownership.clear(self.folder, _KIND)
        self._lock.close()

    @property
    def model(self) -> Path:
        """The directory of the best seed's model."""
        return self.folder / f"seed-{self.best}"

    def keep(self, seed: int, found: Mapping[str, Any], score: str, write: Callable[[Path], None]) -> None:
        """A seed is learned: its `scores` and whatever else; where it is the best so far, `write` writes its model."""
        better = self.best is None or found["scores"][score] > self.learned[self.best]["scores"][score]
        before = self.best
        with _disk(self._out):
            if better:
                folder = self.folder / f"seed-{seed}"
                shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed while it wrote
                folder.mkdir()
                write(folder)
                self.best = seed
            self.learned[seed] = dict(found)
            self._note()
            if better and before is not None:
                shutil.rmtree(self.folder / f"seed-{before}")
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def publish(self, write: Callable[[Path], None]) -> None:
        """All seeds are learned: the best one's directory, with what `write` adds, becomes `out`."""
        with _disk(self._out):
            write(self.model)
            for folder in [self.folder / name for name in _TRACKED if (self.folder / name).is_dir()]:
                folder.rename(self.model / folder.name)
            self.model.rename(self._out)  # over an empty directory, too

    def _note(self) -> None:
        ownership.mark(self.folder, _KIND, settings=self._settings, seeds=self.learned, best=self.best)


_KIND = ownership.FINETUNING


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"out={out}: {error}; free space and run the same command again") from error


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _different(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
