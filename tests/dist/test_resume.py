"""A resumed run is the uninterrupted run: bitwise at the same layout, and on across stages and world sizes."""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain import checkpoint
from tests.support import Result, Trainer, make_corpus

TIMINGS = ("throughput/", "data/wait_fraction", "memory/", "time")


def timeless(result: Result) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith(TIMINGS)} for line in result.metrics]


def final_tensors(result: Result) -> dict[str, torch.Tensor]:
    (newest,) = checkpoint.list_checkpoints(result.run / "checkpoints")[-1:]
    mapped = load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")
    return {name: tensor.clone() for name, tensor in mapped.items()}  # the file may be written over


def bitwise(one: Result, other: Result) -> bool:
    a, b = final_tensors(one), final_tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16"), ("2_offload", "fp32"), ("3_offload", "bf16")],
)
def test_resume_is_bitwise_the_uninterrupted_run(
    trainer: Trainer, corpus: Path, tmp_path: Path, stage: int | str, precision: str
) -> None:
    """With dropout. The second run starts from the first one's files as a kill after step 3 would leave them."""
    overrides = (
        f"data.path={corpus}", f"zero={stage}", f"precision={precision}", "model.dropout=0.1",
        "model.attention_dropout=0.1", "checkpoint.every=3", "eval.every=2",
    )  # fmt: skip
    whole = trainer.run(*overrides, ranks=2)
    assert whole.codes == (0, 0), whole.stderrs

    shutil.copytree(whole.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "torn')
    resumed = trainer.run(*overrides, f"runs_root={tmp_path}", ranks=2)
    assert resumed.codes == (0, 0), resumed.stderrs
    assert "resuming at step 3 of 6" in resumed.stderr
    assert timeless(resumed) == timeless(whole)
    assert bitwise(resumed, whole)


NAN_FIRST = """
from pretrain.engine.engine import Engine

calls, real = 0, Engine.backward

def backward(self, batch, loss_of, last):
    global calls
    calls += 1
    real(self, batch, lambda *given: loss_of(*given) * (float("nan") if calls <= 4 else 1.0), last=last)

Engine.backward = backward
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_saved_before_the_first_update(trainer: Trainer, corpus: Path, tmp_path: Path, stage: int) -> None:
    """The first two steps are skipped. A checkpoint of before any moment was made goes on like the run itself."""
    overrides = (f"data.path={corpus}", f"zero={stage}", "checkpoint.every=1", "checkpoint.keep_last=9")
    whole = trainer.run(*overrides, ranks=2, before=NAN_FIRST)
    assert whole.codes == (0, 0), whole.stderrs
    assert whole.series("train/skipped_steps") == [1, 1, 0, 0, 0, 0]
    shutil.copytree(whole.run, tmp_path / "run")
    for step in range(3, 7):
        shutil.rmtree(checkpoint.path_of(tmp_path / "run" / "checkpoints", step))
    resumed = trainer.run(*overrides, f"runs_root={tmp_path}", ranks=2)
    assert resumed.codes == (0, 0), resumed.stderrs
    assert "resuming at step 2 of 6" in resumed.stderr
    assert timeless(resumed) == timeless(whole)
    assert bitwise(resumed, whole)


@pytest.mark.slow
def test_a_streamed_run_on_other_layouts(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """Three epochs, by way of two ranks and back, with a loader process in between: the same global batches."""
    stream = ("data.access=stream", "data.lanes=4", "data.window=8", "checkpoint.every=0", "steps=54", "log.every=1")
    overrides = (f"data.path={corpus}", *stream, "optim.lr=1e-4")
    whole = trainer.run(*overrides, "zero=0")
    assert whole.code == 0, whole.stderr
    for stop, ranks, workers in ((20, 2, 1), (38, 1, 0), (54, 2, 0)):
        layout = (f"data.workers={workers}", f"stop_at={stop}", f"zero={ranks - 1}")
        result = trainer.run(*overrides, *layout, f"runs_root={tmp_path}", ranks=ranks)
        assert set(result.codes) == {0 if stop == 54 else 75}, result.stderrs
    assert result.series("samples") == whole.series("samples")
    assert result.series("train/masked_tokens") == whole.series("train/masked_tokens")
    assert result.series("train/loss") == pytest.approx(whole.series("train/loss"), abs=1e-4)


def test_a_fresh_machine_goes_on_from_the_uploaded_checkpoint(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    overrides = (f"data.path={corpus}", "model.dropout=0.1", "checkpoint.every=2")
    whole = trainer.run(*overrides, ranks=2)
    upload = f"checkpoint.upload={tmp_path}/store"
    stopped = trainer.run(*overrides, upload, "stop_at=3", ranks=2)
    assert stopped.codes == (75, 75), stopped.stderrs
    assert sorted(path.name for path in (tmp_path / "store" / "run").iterdir())[-1] == "step-00000003"
    resumed = trainer.run(*overrides, upload, ranks=2)  # in a run directory of its own, which is empty
    assert resumed.codes == (0, 0), resumed.stderrs
    assert "resuming at step 3 of 6" in resumed.stderr
    assert bitwise(resumed, whole)


@pytest.mark.slow
def test_stop_at_and_the_same_command_again(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    overrides = (f"data.path={corpus}", f"runs_root={tmp_path}", "model.dropout=0.1", "log.every=4", "eval.every=4")
    whole = trainer.run(*overrides, "run=whole")
    stopped = trainer.run(*overrides, "stop_at=3")
    assert stopped.code == 75
    assert [path.name for path in checkpoint.list_checkpoints(stopped.run / "checkpoints")] == ["step-00000003"]
    assert json.loads((stopped.run / "status.json").read_text())["exit_code"] == 75
    assert [line["step"] for line in stopped.metrics] == [3]  # what was done since the last line is not lost
    again = trainer.run(*overrides, "stop_at=3")
    assert again.code == 75  # it is there already
    assert [line["step"] for line in again.metrics] == [3]
    earlier = trainer.run(*overrides, "stop_at=2")
    assert earlier.code == 75
    resumed = trainer.run(*overrides)
    assert resumed.code == 0
    assert json.loads((stopped.run / "status.json").read_text())["step"] == 6
    assert bitwise(resumed, whole)
    assert timeless(resumed)[-1]["eval/loss"] == timeless(whole)[-1]["eval/loss"]
    done = trainer.run(*overrides)
    assert done.code == 0
    assert "already at step 6 of 6" in done.stderr
    assert done.metrics == resumed.metrics


def chain(
    trainer: Trainer, root: Path, overrides: Sequence[str], legs: Sequence[tuple[int, int | str, int, int]]
) -> Result:
    """Legs of (stop, stage, ranks, micro-batch size) in one run directory."""
    result: Result | None = None
    for stop, stage, ranks, micro in legs:
        layout = (f"zero={stage}", f"micro_batch_size={micro}")
        result = trainer.run(*overrides, f"runs_root={root}", *layout, f"stop_at={stop}", ranks=ranks)
        assert set(result.codes) == {0 if stop == 6 else 75}, result.stderrs
    assert result
    return result


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_across_stages_and_world_sizes(trainer: Trainer, corpus: Path, tmp_path: Path, precision: str) -> None:
    overrides = (f"data.path={corpus}", f"precision={precision}")
    whole = trainer.run(*overrides, "zero=1")
    fp32: list[tuple[int, int | str, int, int]] = [(2, 1, 2, 4), (4, "3_offload", 1, 16), (6, 0, 2, 4)]
    bf16: list[tuple[int, int | str, int, int]] = [(2, 3, 2, 4), (3, "2_offload", 1, 4), (6, 2, 2, 8)]
    legs = fp32 if precision == "fp32" else bf16
    result = chain(trainer, tmp_path, overrides, legs)
    assert [line["step"] for line in result.metrics] == [1, 2, 3, 4, 5, 6]
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    for key in ("train/loss", "train/grad_norm", "eval/mlm_loss", "eval/nsp_loss"):
        assert result.series(key) == pytest.approx(whole.series(key), abs=tolerance), key
    assert result.series("samples") == whole.series("samples")


@pytest.mark.slow
def test_a_growing_batch_resumes_with_the_same_samples(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """4, 8, 12, then 16 samples a step, on other layouts and a resume inside the ramp."""
    overrides = (f"data.path={corpus}", "batch_ramp.start=4", "batch_ramp.fraction=0.5")
    whole = trainer.run(*overrides, "zero=0")
    assert whole.code == 0, whole.stderr
    assert whole.series("samples") == [4, 12, 24, 40, 56, 72]
    result = chain(trainer, tmp_path, overrides, [(2, 2, 2, 2), (5, 3, 1, 4), (6, 1, 2, 1)])
    assert result.series("samples") == whole.series("samples")
    for key in ("train/loss", "train/grad_norm"):
        assert result.series(key) == pytest.approx(whole.series(key), abs=1e-5), key
    refused = trainer.run(*overrides, "micro_batch_size=8")
    assert refused.code == 64
    assert "global_batch_size=4: not a multiple of micro_batch_size=8" in refused.errors[0]


@pytest.mark.slow
def test_the_batch_grows_with_a_time_budget(trainer: Trainer, corpus: Path) -> None:
    """By the clock, and alike on both ranks, which would not end otherwise."""
    overrides = ("budget.hours=0.002", "steps=1_000_000", "batch_ramp.start=8", "batch_ramp.fraction=0.6")
    result = trainer.run(f"data.path={corpus}", *overrides, "global_batch_size=80", ranks=2)
    assert result.codes == (0, 0), result.stderrs
    sizes = [after - before for before, after in pairwise([0, *result.series("samples")])]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (8, 80)
    assert len(set(sizes)) > 2
    assert all(size % 8 == 0 for size in sizes)


def test_the_newest_whole_checkpoint_is_taken(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    overrides = (f"data.path={corpus}", f"runs_root={tmp_path}", "zero=2", "checkpoint.every=2")
    whole = trainer.run(*overrides)
    tensors, metrics = final_tensors(whole), timeless(whole)
    damaged = whole.run / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    resumed = trainer.run(*overrides, ranks=1)
    assert resumed.code == 0
    assert "warning: checkpoint" in resumed.stderr
    assert "resuming at step 4 of 6" in resumed.stderr
    assert all(torch.equal(value, tensors[name]) for name, value in final_tensors(resumed).items())
    assert timeless(resumed) == metrics


# What does not belong together


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=2", "was trained with seed=1, now it is 2"),
        ("global_batch_size=32", "was trained with global_batch_size=16, now it is 32"),
        ("model.num_layers=3", "resume with the same model options"),
        ("data.access=stream", "was trained with access=mapped, now it is stream (lanes=64, window=4096)"),
        ("batch_ramp.start=4", "was trained with batch_ramp=none, now it is from 4 in 0.1 of the run"),
        ("optim=muon", "its moments would mean something else; restore it, or name another run and add init_from="),
        ("data", "(300 samples in 1 passes), now it is"),
        ("max_len", "was trained with max_len=24, now it is 20: other samples would follow"),
        ("tokenizer", "ids would mean other words"),
    ],
)
def test_another_run_on_the_same_name_is_refused(
    trainer: Trainer, corpus: Path, stopped: Path, tmp_path: Path, override: str, words: str
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    path, given = corpus, override
    if override in ("data", "max_len", "tokenizer"):
        path, given = tmp_path / "corpus", "seed=1"
        path.mkdir()
        max_len = 20 if override == "max_len" else 24
        make_corpus(path, seed=4, vocab_size=60 if override == "tokenizer" else 61, max_len=max_len)
    result = trainer.run(f"data.path={path}", f"runs_root={tmp_path}", given)
    assert result.code == 64
    (line,) = result.errors
    assert words in line
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def stopped(trainer: Trainer, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that stopped at step 1."""
    root = tmp_path_factory.mktemp("stopped")
    result = trainer.run(f"data.path={corpus}", f"runs_root={root}", "stop_at=1")
    assert result.code == 75
    return result.run


def test_what_may_differ_on_request(trainer: Trainer, corpus: Path, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    result = trainer.run(
        f"data.path={corpus}", f"runs_root={tmp_path}", "seed=2", "global_batch_size=32", "stop_at=2",
        "resume.allow=[seed,global_batch_size]",
    )  # fmt: skip
    assert result.code == 75, result.stderr
    assert result.series("samples") == [16, 48]
    assert result.stderr.count("warning: ") == 2
    make_corpus(tmp_path / "other", samples=90, max_len=20)
    options = (f"data.path={tmp_path / 'other'}", f"runs_root={tmp_path}", "seed=2", "global_batch_size=32")
    refused = trainer.run(*options, "stop_at=3", "resume.allow=[data]")
    assert refused.code == 64
    assert "add resume.allow=[data,max_len]" in refused.errors[0]
    result = trainer.run(*options, "stop_at=3", "resume.allow=[data,max_len]")
    assert result.code == 75, result.stderr
    assert "(90 samples in 1 passes); going on from position 48, as resume.allow says" in result.stderr


def test_lanes_and_windows_decide_the_order(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    stream = (f"data.path={corpus}", f"runs_root={tmp_path}", "data.access=stream", "data.lanes=4")
    assert trainer.run(*stream, "data.window=8", "stop_at=1").code == 75
    refused = trainer.run(*stream, "data.window=16")
    assert refused.code == 64
    assert "with access=stream (lanes=4, window=8), now it is stream (lanes=4, window=16)" in refused.errors[0]
    assert trainer.run(*stream, "data.window=16", "stop_at=2", "resume.allow=[access]").code == 75
