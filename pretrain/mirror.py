"""A second home for a run's checkpoints: object storage, or any place that fsspec reaches.

Checkpoints come one after another from the writer's background, MANIFEST.json last, so one without it is unfinished.
On a machine without checkpoints the newest whole one is fetched back.
"""

import shutil
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import fsspec

from data_prep.errors import UserError, first_line
from pretrain.checkpoint import FILES, MANIFEST, TEMPORARY, let_go, step_of, verify


class Mirror:
    """The checkpoints of one run below `url`; what fsspec raises is passed on."""

    def __init__(self, url: str, *, keep_last: int, keep_every: int) -> None:
        try:
            self._files, self._root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoint.upload={url}: {error}") from error
        self._keep_last, self._keep_every = keep_last, keep_every

    def push(self, path: Path) -> None:
        """Copy a whole checkpoint there, then remove what the rules of retention let go."""
        remote = f"{self._root}/{path.name}"
        manifest = (path / MANIFEST).read_bytes()
        steps = self._steps()
        if step_of(path) in steps:  # of an earlier try, or of before a rollback
            if self._manifest(remote) == manifest:
                return
            self._files.rm(remote, recursive=True)
        self._files.makedirs(remote, exist_ok=True)
        for name in FILES:
            self._files.put_file(str(path / name), f"{remote}/{name}")
        self._files.pipe_file(f"{remote}/{MANIFEST}", manifest)
        older = {step: there for step, there in steps.items() if step < step_of(path)}
        for step in let_go([*older, step_of(path)], keep_last=self._keep_last, keep_every=self._keep_every):
            self._files.rm(older[step], recursive=True)

    def pull(self, folder: Path, report: Callable[[str], None]) -> Path | None:
        """Fetch the newest checkpoint that verifies into `folder`; `report` is told of each that does not.

        Raises `UserError` where the place cannot be read: to train from the start instead would not be what was meant.
        """
        try:
            return self._pull(folder, report)
        except Exception as error:  # fsspec's backends raise errors of many families
            raise UserError(
                f"checkpoint.upload: {self._root} cannot be read ({first_line(error)}); check the network and "
                "credentials"
            ) from error

    def _pull(self, folder: Path, report: Callable[[str], None]) -> Path | None:
        for _, remote in sorted(self._steps().items(), reverse=True):
            if self._manifest(remote) is None:
                continue
            final = folder / remote.rsplit("/", 1)[-1]
            partial = folder / f"{TEMPORARY}{final.name}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name in (*FILES, MANIFEST):
                if self._files.exists(f"{remote}/{name}"):
                    self._files.get_file(f"{remote}/{name}", str(partial / name))
            if faults := verify(partial):
                report(f"{remote}: damaged ({faults[0]}); trying the one before it")
                shutil.rmtree(partial)
                continue
            if final.exists():  # a damaged one
                shutil.rmtree(final)
            return partial.rename(final)
        return None

    def _steps(self) -> dict[int, str]:
        """Where each step's checkpoint lies, whole or not, ascending."""
        self._files.invalidate_cache()
        try:
            found: list[Any] = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return {}
        steps = {step_of(PurePath(path)): str(path).rstrip("/") for path in found}
        return {step: steps[step] for step in sorted(steps) if step >= 0}

    def _manifest(self, remote: str) -> bytes | None:
        try:
            data: bytes = self._files.cat_file(f"{remote}/{MANIFEST}")
        except FileNotFoundError:
            return None
        return data
