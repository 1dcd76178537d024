"""An object store as the only disk: corpus streamed from it, checkpoints uploaded to it, nodes and their disks lost."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.checkpoint import path_of
from tests.s3_front import front_of, write_key
from tests.support import Job, Trainer, read_metrics

DIES = """
import os, signal
from pretrain.checkpoint import mirror, writer

push, submit = mirror.Mirror.push, writer.Writer.submit

def push_and_die(self, path, tick):
    push(self, path, tick)
    if path.name == "step-00000004":
        os.kill(os.getpid(), signal.SIGKILL)

def submit_after_uploads(self, *given):  # on a slow machine a newer one would take the place of the fourth
    while self.busy(0.1):
        pass
    submit(self, *given)

mirror.Mirror.push, writer.Writer.submit = push_and_die, submit_after_uploads
"""


def test_a_node_that_is_lost_with_its_disk(trainer: Trainer, corpus: Path, store: Any, tmp_path: Path) -> None:
    """It goes on elsewhere, bitwise as a run that nothing happened to; what there is, is in the store alone."""
    store.put(str(corpus), "bucket/corpus", recursive=True)
    own = (
        "data.path=s3://bucket/corpus", "data.access=stream", "data.lanes=4", "data.window=16", "steps=9",
        "checkpoint.every=2", "checkpoint.keep_last=2", "model.dropout=0.1",
    )  # fmt: skip

    def on(node: str, home: str) -> tuple[str, ...]:
        disk = tmp_path / node
        return (*own, f"data.cache_dir={disk}/cache", f"runs_root={disk}/runs", f"checkpoint.upload=s3://bucket/{home}")

    whole = trainer.run(*on("undisturbed", "whole"), ranks=2)
    assert whole.codes == (0, 0), whole.stderrs
    killed = trainer.run(*on("lost", "home"), ranks=2, before=DIES)
    assert killed.codes == (-9, 71), killed.stderrs
    shutil.rmtree(tmp_path / "lost")
    again = trainer.run(*on("other", "home"), ranks=2)
    assert again.codes == (0, 0), again.stderrs
    assert "resuming at step 4" in again.stderr
    expected = path_of(whole.run / "checkpoints", 9)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert store.cat_file(f"bucket/home/run/{expected.name}/{name}") == (expected / name).read_bytes()
    found = {row["step"]: row["train/loss"] for row in again.metrics}
    assert found == {row["step"]: row["train/loss"] for row in whole.metrics if row["step"] > 4}


def test_credentials_that_expire_in_mid_run(trainer: Trainer, corpus: Path, store: Any, tmp_path: Path) -> None:
    """Training goes on, and is told; renewed, they are used without a new start. What was not sent at the end of one
    start, the next one sends, also where nothing is left to train.
    """
    keys, home = tmp_path / "keys", "bucket/expiring"
    own = (f"data.path={corpus}", f"runs_root={tmp_path}", f"checkpoint.upload=s3://{home}", "checkpoint.every=1")

    def sent() -> int:
        store.invalidate_cache()
        return max((int(path.split("step-")[1][:8]) for path in store.glob(f"{home}/run/*/MANIFEST.json")), default=0)

    with front_of(os.environ["AWS_ENDPOINT_URL"]) as front:
        variables = {"AWS_ENDPOINT_URL": front.url, **write_key(keys, "FIRST")}
        job = trainer.start(*own, "steps=1000000", "checkpoint.keep_last=2", env=variables)
        wait_until(job, lambda: sent() > 0)
        front.expired.add("FIRST")
        refused = "was not uploaded (s3://bucket/expiring/run: The provided token has expired.; check"
        wait_until(job, lambda: refused in (job.logs / "stderr-0").read_text())
        last = sent()
        job.wait_for(read_metrics(job.run)[-1]["step"] + 3)
        assert sent() == last
        write_key(keys, "SECOND")
        wait_until(job, lambda: sent() > last)
        refusals = (job.logs / "stderr-0").read_text().count(refused)
        front.expired.add("SECOND")
        wait_until(job, lambda: (job.logs / "stderr-0").read_text().count(refused) > refusals)
        job.signal(0, signal.SIGTERM)
        stopped = job.wait()
        assert stopped.code == 75, stopped.stderr
        step = stopped.metrics[-1]["step"]
        assert sent() < step
        write_key(keys, "THIRD")
        again = trainer.run(*own, f"steps={step}", env=variables)
        assert again.code == 0, again.stderr
        assert "already at step" in again.stderr
        assert sent() == step
    name = path_of(tmp_path / "run" / "checkpoints", step)
    for file in ("model.safetensors", "optimizer.safetensors", "MANIFEST.json"):
        assert store.cat_file(f"{home}/run/{name.name}/{file}") == (name / file).read_bytes()


def wait_until(job: Job, is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 150
    while not is_so():
        assert job.codes() == [None], (job.logs / "stderr-0").read_text()
        assert time.monotonic() < end, (job.logs / "stderr-0").read_text()
        time.sleep(0.05)
