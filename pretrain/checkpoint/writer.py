"""Writing checkpoints in the background, each rank its own share.

Training waits only while each rank copies its own share to the CPU. In the background every rank writes that share as
fragments keyed by name and range, and rank 0 puts them together: no collective, and no rank needs to know the layout.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cloze.errors import DiskError, first_line
from cloze.files import rename
from pretrain.checkpoint.format import (
    MOMENTS,
    TEMPORARY,
    WEIGHT,
    Fragment,
    Retention,
    Snapshot,
    TrainingState,
    assemble,
    discard,
    path_of,
    retain,
    write,
)

_MAX_FAILED_SAVES = 3
_POLL_SECONDS = 0.05
_HURRIED_SECONDS = 10.0  # less than the 30 s that a launcher gives a rank to go


@dataclass(frozen=True, kw_only=True)
class WriterOptions:
    """Which share is this rank's, and which checkpoints stay."""

    rank: int
    num_writers: int  # ranks 0 … num_writers-1 each hold a share
    retention: Retention
    patience_seconds: float  # how long rank 0 waits for the other shares
    token: str = ""  # of this start of the run, the same on all ranks


class Writer:
    """Writes checkpoints in a background thread, one at a time; every rank that holds a share has one.

    A save that fails for want of disk space leaves the previous checkpoint, says so and lets training go on; after
    `_MAX_FAILED_SAVES` in a row there is a `failure`, at the end of the run a `DiskError`. Rank 0 knows of all of them.
    `upload` is given each checkpoint that is whole, in a thread of its own, and what to call when it gets ahead; while
    it is busy only the newest waits. Where it fails, that is said. `on_saved` is called after each checkpoint, with its
    step.
    """

    def __init__(
        self,
        folder: Path,
        options: WriterOptions,
        warn: Callable[[str], object],
        upload: Callable[[Path, Callable[[], None]], None] | None = None,
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.folder, self._options, self._warn, self._on_saved = folder, options, warn, on_saved
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._upload, self._uploading = upload, list[Future[None]]()
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._failures: list[str] = []
        self._attempt = 0
        self.progress = 0  # files written or uploaded so far
        self._latest = math.inf  # on the monotonic clock: when to wait for shares no more

    def shorten_patience(self) -> None:
        """A rank may be gone: wait for the others' shares only a moment more."""
        self._latest = time.monotonic() + _HURRIED_SECONDS

    def submit(
        self,
        state: TrainingState,
        fragments: Sequence[Fragment],
        shapes: Mapping[str, Sequence[int]],
        config_yaml: str,
    ) -> None:
        """Start writing this rank's share; waits for the checkpoint before it. All ranks call this equally often."""
        self.wait()
        self._attempt += 1
        if self._options.rank < self._options.num_writers:
            self._pending = self._pool.submit(self._save, state, fragments, shapes, config_yaml)

    @property
    def failure(self) -> DiskError | None:
        """Why it is no use to go on."""
        return DiskError(self._failures[-1]) if len(self._failures) >= _MAX_FAILED_SAVES else None

    def busy(self, seconds: float) -> bool:
        """Whether a checkpoint is still being written or uploaded after so many seconds."""
        futures.wait(self._under_way(), seconds)
        return not all(future.done() for future in self._under_way())  # a save that is done has begun its upload

    def _under_way(self) -> list[Future[None]]:
        return [*self._uploading, *([self._pending] if self._pending else [])]

    def wait(self) -> None:
        """Wait for the one being written, if any."""
        if self._pending is not None:
            self._pending.result()  # raises what the thread raised
            self._pending = None

    def close(self) -> None:
        """Wait for the last one, and its upload. Raises `DiskError` if it could not be written."""
        self.wait()
        self._pool.shutdown()
        self._uploader.shutdown()
        if self._failures:
            raise DiskError(self._failures[-1])

    def _save(
        self,
        state: TrainingState,
        fragments: Sequence[Fragment],
        shapes: Mapping[str, Sequence[int]],
        config_yaml: str,
    ) -> None:
        options, final = self._options, path_of(self.folder, state.step)
        # A share that comes late must not meet another try at the same step, after a rollback or another start.
        temporary = self.folder / f"{TEMPORARY}{final.name}-{self._attempt}{options.token}"
        try:
            if options.rank:
                _write_share(temporary, options.rank, fragments)
            else:
                others = _read_shares(
                    temporary, range(1, options.num_writers), options.patience_seconds, lambda: self._latest
                )
                full = assemble(chain(fragments, others), shapes)
                moments = {f"{name}.{kind}": value for kind in MOMENTS for name, value in full[kind].items()}
                self._note_progress()
                write(self.folder, Snapshot(state, full[WEIGHT], moments, config_yaml), temporary)
                self._on_saved(state.step)
                retain(self.folder, state.step, options.retention)
                self.upload(final)
            self._note_progress()
            self._failures.clear()
        except (OSError, SafetensorError) as error:
            if options.rank == 0:
                discard(temporary)
            else:
                with suppress(OSError):  # an empty file fits on a full disk; without it rank 0 waits in vain
                    _failed_path(temporary, options.rank).touch()
            self._failures.append(f"{final}: not saved ({error}); free space and run the same command again")
            self._warn(self._failures[-1])

    def upload(self, path: Path) -> None:
        """Begin to upload a checkpoint that is whole, where there is a place for it."""
        if self._upload is None:
            return

        def report(uploaded: Future[None]) -> None:
            if not uploaded.cancelled() and (error := uploaded.exception()):
                self._warn(f"{path} was not uploaded ({first_line(error)}); it goes on with the next checkpoint")

        for older in self._uploading:
            older.cancel()  # has not begun, and this one is newer
        newest = self._uploader.submit(self._upload, path, self._note_progress)
        self._uploading = [*(older for older in self._uploading if not older.done()), newest]
        newest.add_done_callback(report)

    def _note_progress(self) -> None:
        self.progress += 1


def _share_path(temporary: Path, rank: int) -> Path:
    return temporary / f"share-{rank:05d}.safetensors"


def _failed_path(temporary: Path, rank: int) -> Path:
    return _share_path(temporary, rank).with_suffix(".failed")


def _write_share(temporary: Path, rank: int, fragments: Sequence[Fragment]) -> None:
    """One rank's fragments, under their final name only when whole."""
    temporary.mkdir(parents=True, exist_ok=True)
    final = _share_path(temporary, rank)
    part = final.with_suffix(".part")
    save_file({f"{kind}:{start}:{name}": values for name, kind, start, values in fragments}, part)
    rename(part, final)


def _read_shares(
    temporary: Path, ranks: Iterable[int], patience_seconds: float, latest: Callable[[], float]
) -> Iterator[Fragment]:
    """The other ranks' fragments, as their files appear. Raises OSError when one failed or does not appear."""
    deadline = time.monotonic() + patience_seconds
    for rank in ranks:
        path = _share_path(temporary, rank)
        while not path.exists():
            if _failed_path(temporary, rank).exists():
                raise OSError(f"rank {rank} could not write its share")
            if time.monotonic() > min(deadline, latest()):
                raise TimeoutError(f"the share of rank {rank} did not appear in time as {path}")
            time.sleep(_POLL_SECONDS)
        for key, values in load_file(path).items():
            kind, start, name = key.split(":", 2)
            yield Fragment(name, kind, int(start), values)
