"""An object store as the only disk: corpus streamed from it, checkpoints uploaded to it, nodes and their disks lost."""

import shutil
from pathlib import Path
from typing import Any

from pretrain.checkpoint import path_of
from tests.support import Trainer

DIES = """
import os, signal
from pretrain.checkpoint import mirror

push = mirror.Mirror.push

def push_and_die(self, path, tick):
    push(self, path, tick)
    if path.name == "step-00000004":
        os.kill(os.getpid(), signal.SIGKILL)

mirror.Mirror.push = push_and_die
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
