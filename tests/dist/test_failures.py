"""What goes wrong in a job of two ranks: one line, the right exit code, nothing half-done, nobody left waiting."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cloze.corpus.manifest import read_manifest
from pretrain import checkpoint
from pretrain.telemetry.standing import standing_of
from tests.support import Result, Trainer, all_gone, make_corpus, read_metrics, served


def weights(result: Result, step: int) -> dict[str, torch.Tensor]:
    path = checkpoint.path_of(result.run / "checkpoints", step)
    assert checkpoint.verify(path) == []
    return load_file(path / "model.safetensors")


# Gradients that are not finite


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16")])
def test_gradients_that_are_not_finite(trainer: Trainer, corpus: Path, stage: int, precision: str) -> None:
    """A rate of 1e30 is applied once; from then on every stage alike skips each step, until enough is enough."""
    result = trainer.run(
        f"data.path={corpus}", f"zero={stage}", f"precision={precision}", "optim.lr=1e30", "schedule.warmup_fraction=0",
        "optim.max_skipped_steps=3", "checkpoint.every=1", "checkpoint.keep_last=9", "steps=20", ranks=2,
    )  # fmt: skip
    assert result.codes == (70, 70), result.stderrs
    (line,) = result.errors
    assert "gradients were not finite for 3 steps in a row" in line
    assert "Lower optim.lr" in line
    assert not any("Traceback" in text for text in result.stderrs)
    skipped = [json.loads(text) for text in (result.run / "skipped.jsonl").read_text().splitlines()]
    assert skipped == [
        {"step": step, "first_position": 16 * step, "end_position": 16 * step + 16} for step in (1, 2, 3)
    ]
    assert result.series("train/skipped_steps") == [0, 1, 1]
    # The third skipped step ends the run before it is saved; the weights are those of step 1, and finite.
    steps = [int(path.name[5:]) for path in checkpoint.list_checkpoints(result.run / "checkpoints")]
    assert steps == [1, 2, 3]
    first = weights(result, 1)
    assert all(torch.isfinite(value).all() for value in first.values())
    for step in (2, 3):
        assert all(torch.equal(value, first[name]) for name, value in weights(result, step).items())
    for path in checkpoint.list_checkpoints(result.run / "checkpoints"):
        assert json.loads((path / "state.json").read_text())["optimizer_steps"] == 1
    status = json.loads((result.run / "status.json").read_text())
    assert (status["exit_code"], status["step"]) == (70, 4)
    if stage < 2:
        again = trainer.run(
            f"data.path={corpus}", f"zero={stage}", f"precision={precision}", f"runs_root={result.run.parent}", ranks=2
        )
        assert again.codes == (64, 64), again.stderrs
        (line,) = again.errors
        assert "the checkpoint's weights give outputs that are not finite; remove it" in line


# What every rank finds


def test_a_corpus_without_its_tokenizer(trainer: Trainer, tmp_path: Path) -> None:
    make_corpus(tmp_path, samples=20, val=0)
    shutil.rmtree(tmp_path / "tokenizer")
    result = trainer.run(f"data.path={tmp_path}", ranks=2)
    assert result.codes == (64, 64)
    (line,) = result.errors
    assert "tokenizer: not there; copy or prepare the corpus again" in line


def test_a_place_where_no_run_can_be(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = trainer.run(f"data.path={corpus}", f"runs_root={tmp_path / 'file'}", ranks=2)
    assert result.codes == (74, 74)
    (line,) = result.errors
    assert "cannot be created" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["global_batch_size=18"], "nearest global_batch_size 16 or 24, or nearest micro_batch_size 3"),
        (["global_batch_size=15"], "nearest global_batch_size 8 or 16"),
        (["model.max_positions=20"], "set model.max_positions=24 or prepare with a smaller max_len"),
        (["precision=fp16"], "not possible on a CPU"),
        (["deepspeed.extra={zero_optimisation:{stage:3}}"], "did you mean zero_optimization?"),
        (["deepspeed.extra={gradient_clipping:3}"], "Cloze sets this key itself"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_once(trainer: Trainer, corpus: Path, overrides: list[str], words: str) -> None:
    result = trainer.run(f"data.path={corpus}", *overrides, ranks=2)
    assert result.codes == (64, 64)
    (line,) = result.errors
    assert words in line
    assert not any("Traceback" in text for text in result.stderrs)


@pytest.mark.slow
def test_a_second_job_on_the_directory_is_refused(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    arguments = (f"data.path={corpus}", f"runs_root={tmp_path}", "steps=5000")
    first = trainer.start(*arguments, ranks=2)
    first.wait_for(1)
    second = trainer.run(*arguments, ranks=2)
    assert second.codes == (64, 64)
    (line,) = second.errors
    assert "another job is training in it; wait for it, or name another run" in line
    assert first.codes() == [None, None]
    first.signal(0, signal.SIGTERM)
    assert first.wait().codes == (75, 75)


# Shards


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_damaged_in_mid_run(trainer: Trainer, tmp_path: Path, workers: int) -> None:
    """Exit 64 and one line, from each rank that read it, which names it; the checkpoint before it stands."""
    make_corpus(tmp_path / "corpus", samples=160, samples_per_block=2, shards_per_split=1, val=0)
    path = tmp_path / "corpus" / "pass-00" / "000000.tar"
    data = bytearray(path.read_bytes())
    entry = read_manifest(tmp_path / "corpus").split_shards("pass-00")[0]
    data[entry.blocks.offsets[40] + 600] ^= 1
    path.write_bytes(data)
    result = trainer.run(
        f"data.path={tmp_path / 'corpus'}", "checkpoint.every=1", "steps=10", f"data.workers={workers}",
        "data.prefetch=1", ranks=2,
    )  # fmt: skip
    assert 64 in result.codes, result.stderrs
    assert 1 <= len(result.errors) <= 2, result.stderrs
    for line in result.errors:
        assert "pass-00/000000.tar: block 40: its checksum differs from the manifest's" in line
        assert "copy or prepare the corpus again" in line
    assert -signal.SIGKILL not in result.codes  # the other rank left by itself
    speaker = result.codes.index(64)
    assert "Traceback" not in result.stderrs[speaker]
    for found in checkpoint.list_checkpoints(result.run / "checkpoints"):
        assert checkpoint.verify(found) == []


# Disks


def limit_file_size(pids: tuple[int, ...], size: int) -> None:
    """Stands for a full disk: writing beyond it fails with EFBIG, in whatever library it happens."""
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_in_a_checkpoint(trainer: Trainer, corpus: Path) -> None:
    """One checkpoint fails: a warning, and training goes on. Space comes back: the run ends well."""
    job = trainer.start(f"data.path={corpus}", "checkpoint.every=1", "steps=3000", ranks=2)
    job.wait_for(2)
    limit_file_size(job.pids, 60_000)
    stderr = job.logs / "stderr-0"
    end = time.monotonic() + 60
    while "warning: " not in stderr.read_text():
        assert time.monotonic() < end
        time.sleep(0.002)
    limit_file_size(job.pids, resource.RLIM_INFINITY)
    failed_at = read_metrics(job.run)[-1]["step"]
    job.wait_for(failed_at + 5)
    job.signal(0, signal.SIGTERM)
    result = job.wait()
    assert result.codes == (75, 75), result.stderrs
    assert "not saved (" in result.stderr
    assert "free space and run the same command again" in result.stderr
    found = checkpoint.list_checkpoints(result.run / "checkpoints")
    assert found[-1] == checkpoint.path_of(result.run / "checkpoints", result.metrics[-1]["step"])
    assert all(checkpoint.verify(path) == [] for path in found)
    assert not list((result.run / "checkpoints").glob(".writing-*"))


def test_a_disk_that_stays_full(trainer: Trainer, corpus: Path) -> None:
    """After three failures exit 74 with one line; what was saved before is whole."""
    job = trainer.start(f"data.path={corpus}", "checkpoint.every=2", "steps=5000", "checkpoint.patience_seconds=1")
    job.wait_for(4)
    limit_file_size(job.pids, 60_000)
    result = job.wait()
    assert result.codes == (74,), result.stderrs
    (line,) = result.errors
    assert "not saved (" in line
    assert "Traceback" not in result.stderr
    assert 3 <= result.stderr.count("warning: ") <= 4
    found = checkpoint.list_checkpoints(result.run / "checkpoints")
    assert found
    assert all(checkpoint.verify(path) == [] for path in found)


@pytest.mark.parametrize("full", [(0, 1), (0,), (1,)])
def test_a_disk_that_stays_full_ends_all_ranks(trainer: Trainer, corpus: Path, full: tuple[int, ...]) -> None:
    """Whose ever disk it is, all leave together with 74."""
    job = trainer.start(
        f"data.path={corpus}", "checkpoint.every=2", "steps=50000", "checkpoint.patience_seconds=2", ranks=2
    )
    job.wait_for(4)
    limit_file_size(tuple(job.pids[rank] for rank in full), 60_000)
    result = job.wait(150)
    assert result.codes == (74, 74), result.stderrs
    assert 1 <= len(result.errors) <= 2  # rank 0 says that rank 1 could not, and that one why
    assert all("not saved (" in line for line in result.errors)
    assert not any("Traceback" in text for text in result.stderrs)
    assert all(checkpoint.verify(path) == [] for path in checkpoint.list_checkpoints(result.run / "checkpoints"))


FULL_AT_THE_END = """
import errno
from pretrain.checkpoint import writer

def write(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

writer.write = write
"""


def test_a_disk_that_is_full_at_the_end(trainer: Trainer, corpus: Path) -> None:
    result = trainer.run(f"data.path={corpus}", ranks=2, before=FULL_AT_THE_END)
    assert result.codes == (74, 74), result.stderrs
    (line,) = result.errors
    assert "step-00000006: not saved ([Errno 28] No space left on device); free space and run" in line
    assert not any("Traceback" in text for text in result.stderrs)


def test_a_network_file_system_that_loses_a_renaming(trainer: Trainer, corpus: Path) -> None:
    """The second checkpoint does not get its name: a warning. Of the third the answer is lost, and it stands."""
    loses = (
        "import os; from tests.support import lose_renames; "
        "os.replace = lose_renames({'step-00000002': 'the renaming', 'step-00000003': 'the answer'})"
    )
    result = trainer.run(f"data.path={corpus}", "checkpoint.every=1", "steps=4", "checkpoint.keep_last=9", before=loses)
    assert result.code == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "not saved" in line]
    assert "step-00000002: not saved ([Errno 5] its renaming was lost" in line
    found = checkpoint.list_checkpoints(result.run / "checkpoints")
    assert [checkpoint.step_of(path) for path in found] == [1, 3, 4]
    assert all(checkpoint.verify(path) == [] for path in found)


# A user and a clock that are not as they should be

NOBODY = """
import os, pwd

def unknown(_):
    raise KeyError("no such user")

pwd.getpwuid = pwd.getpwnam = unknown
for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME"):
    os.environ.pop(name, None)
"""


def test_a_user_without_an_entry_in_passwd(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """As in a container that runs with some number: nobody has a home. Nothing is written where the run began."""
    result = trainer.run(f"data.path={corpus}", "data.workers=1", cwd=tmp_path, before=NOBODY)
    assert result.code == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert [*tmp_path.iterdir()] == []


JUMPS = """
import time
from pretrain.metrics import MetricsAccumulator

real, count_step = time.time, MetricsAccumulator.count_step

def jumping():
    return real() + 86400 * jumping.days

def counting(self, *given):
    count_step(self, *given)
    jumping.days = {3: 1000, 4: 1000}.get(self._session.progress.step, 0 if self._session.progress.step < 3 else -1000)

jumping.days, time.time = 0, jumping
MetricsAccumulator.count_step = counting
"""


def test_a_clock_that_jumps(trainer: Trainer, corpus: Path) -> None:
    """By years, on every rank, ahead and back: neither time budget nor watchdog nor the list of runs goes by it."""
    command = (f"data.path={corpus}", "checkpoint.every=2", "budget.hours=1", "watchdog.seconds=100")
    result = trainer.run(*command, ranks=2, before=JUMPS)
    assert result.codes == (0, 0), result.stderrs
    assert [row["step"] for row in result.metrics] == [1, 2, 3, 4, 5, 6]
    times = result.series("time")
    assert times[2] - times[1] > 900 * 86400
    assert times[1] - times[5] > 900 * 86400
    newest = checkpoint.load(checkpoint.path_of(result.run / "checkpoints", 6))
    assert 0 < newest.state.seconds < 3600
    assert "days" not in result.stderr
    assert standing_of(result.run).state == "finished"


# A node's copy of the corpus


def test_a_copy_that_is_damaged_is_mended_by_the_same_command(trainer: Trainer, tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", samples=300, samples_per_block=2, val=0)
    overrides = (f"data.path={tmp_path / 'corpus'}", f"data.cache_dir={tmp_path / 'cache'}", f"runs_root={tmp_path}")
    assert trainer.run(*overrides, "stop_at=1").code == 75
    (shard,) = tmp_path.glob("cache/*/pass-00/000000.tar")
    data = bytearray(shard.read_bytes())
    for start in range(600, len(data), 512):  # in every block
        data[start] ^= 1
    shard.write_bytes(data)
    damaged = trainer.run(*overrides)
    assert damaged.code == 64
    (line,) = damaged.errors
    assert f"{shard}: block" in line
    assert "this is a copy, and the same command mends it" in line
    again = trainer.run(*overrides)
    assert again.code == 0, again.stderr


@pytest.mark.slow
def test_a_signal_while_the_corpus_is_copied(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """Exit 75 soon; the same command goes on."""
    overrides = (f"data.cache_dir={tmp_path / 'cache'}", f"runs_root={tmp_path}")
    with served(corpus, delay_seconds=1.0) as (url, requests):
        job = trainer.start(f"data.path={url}", *overrides, ranks=2)
        end = time.monotonic() + 60
        while not any(".tar" in request for request in requests):
            assert time.monotonic() < end
            time.sleep(0.02)
        for rank in (0, 1):
            job.signal(rank, signal.SIGTERM)
        result = job.wait()
    assert result.codes == (75, 75), result.stderrs
    (line,) = result.errors
    assert "stopped while copying; the same command goes on" in line
    assert not list(tmp_path.glob("cache/*/manifest.json"))
    with served(corpus) as (url, requests):
        assert trainer.run(f"data.path={url}", *overrides, ranks=2).codes == (0, 0)


# Ranks that stop, hang or die


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR1), (1, signal.SIGINT)])
def test_a_signal_to_one_rank_stops_all_at_one_step(trainer: Trainer, corpus: Path, rank: int, number: int) -> None:
    job = trainer.start(f"data.path={corpus}", "steps=5000", ranks=2)
    job.wait_for(2)
    for _ in range(3):
        job.signal(rank, number)
    result = job.wait()
    assert result.codes == (75, 75), result.stderrs
    (path,) = checkpoint.list_checkpoints(result.run / "checkpoints")
    assert checkpoint.verify(path) == []
    step = result.metrics[-1]["step"]
    assert path == checkpoint.path_of(result.run / "checkpoints", step)
    assert json.loads((result.run / "status.json").read_text())["step"] == step


def test_a_signal_to_the_whole_group_spares_the_loader(trainer: Trainer, corpus: Path) -> None:
    """Slurm, `timeout` and Ctrl-C signal every process, loader workers too: the end is orderly all the same."""
    job = trainer.start(f"data.path={corpus}", "steps=5000", "data.workers=1", ranks=2)
    job.wait_for(5)
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        for pid in job.pids:
            os.killpg(pid, number)
    result = job.wait()
    assert result.codes == (75, 75), result.stderrs
    assert not any("Traceback" in text for text in result.stderrs)


def test_a_rank_that_hangs_is_noticed(trainer: Trainer, corpus: Path) -> None:
    job = trainer.start(f"data.path={corpus}", "steps=5000", "watchdog.seconds=4", ranks=2)
    job.wait_for(2)
    job.signal(1, signal.SIGSTOP)
    end = time.monotonic() + 30
    while job.codes()[0] is None and time.monotonic() < end:
        time.sleep(0.02)
    job.signal(1, signal.SIGCONT)
    result = job.wait()
    assert result.codes[0] == 71, result.stderrs
    assert "error: rank 0: no progress for" in result.stderr
    stacks = (result.run / "stacks-rank0.txt").read_text()
    assert 'loop.py"' in stacks
    assert "distributed_c10d.py" in stacks


def test_a_rank_that_hangs_before_it_trains_is_noticed(trainer: Trainer, corpus: Path) -> None:
    """The steps have a limit of their own, which these would not reach."""
    hang = "import os, time\nif os.environ['RANK'] == '1': time.sleep(60)"
    job = trainer.start(f"data.path={corpus}", "watchdog.start_seconds=3", ranks=2, before=hang)
    end = time.monotonic() + 30
    while job.codes()[0] is None and time.monotonic() < end:
        time.sleep(0.02)
    assert job.codes()[0] == 71
    assert "no progress for 3 s (watchdog.start_seconds=3)" in (job.logs / "stderr-0").read_text()
    assert 'dist.py"' in (job.run / "stacks-rank0.txt").read_text()
    job.kill()


GIVES_UP = """
import os, signal

signal.signal(signal.SIGUSR2, lambda *_: os._exit(71))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGUSR2, 71)])
def test_a_rank_that_ends_takes_its_loader_along(trainer: Trainer, corpus: Path, number: int, code: int) -> None:
    """Killed, or at once as by the watchdog: loader processes, their parent and its tracker do not outlive it."""
    job = trainer.start(f"data.path={corpus}", "steps=5000", "data.workers=2", before=GIVES_UP)
    job.wait_for(3)
    processes = job.processes()
    assert len(processes) == 1 + 2 + 2
    job.signal(0, number)
    assert all_gone(processes)
    assert job.wait().codes == (code,)


def test_a_rank_that_dies_ends_the_other(trainer: Trainer, corpus: Path) -> None:
    job = trainer.start(f"data.path={corpus}", "steps=5000", "checkpoint.every=1", ranks=2)
    job.wait_for(3)
    job.signal(1, signal.SIGKILL)
    result = job.wait()
    assert result.codes == (71, -9), result.stderrs
    (line,) = result.errors
    assert "another rank is gone" in line
    assert "Traceback" not in result.stderr
    assert json.loads((result.run / "status.json").read_text())["exit_code"] == 71
    assert checkpoint.newest_verified(result.run / "checkpoints", lambda _: None)


SLOW = """
import time
from pretrain import loop
from pretrain.checkpoint import mirror

push, evaluate = mirror.Mirror.push, loop.evaluate

def slow_push(self, path, tick):
    for _ in range({pieces}):
        time.sleep({seconds})
        tick()
    push(self, path, tick)

def slow_evaluation(*given):
    for _ in range({pieces}):
        time.sleep({seconds})
        given[-1]()
    return evaluate(*given)

mirror.Mirror.push = slow_push
loop.evaluate = slow_evaluation
"""


@pytest.mark.slow
def test_the_watchdog_lets_slow_work_be(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """An evaluation, the last save and its upload each take longer than its limit, but get ahead."""
    overrides = (f"data.path={corpus}", f"checkpoint.upload={tmp_path}", "eval.every=6", "watchdog.seconds=8")
    result = trainer.run(*overrides, ranks=2, before=SLOW.format(pieces=10, seconds=1), timeout=150)
    assert result.codes == (0, 0), result.stderrs
    assert checkpoint.verify(tmp_path / "run" / "step-00000006") == []


@pytest.mark.slow
def test_an_upload_that_hangs_is_noticed(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    hangs = SLOW.format(pieces=1, seconds=1000).replace("loop.evaluate = ", "")
    overrides = (f"data.path={corpus}", f"checkpoint.upload={tmp_path}", "watchdog.seconds=8")
    result = trainer.run(*overrides, ranks=2, before=hangs, timeout=150)
    assert result.codes == (71, 71), result.stderrs
    assert checkpoint.verify(checkpoint.path_of(result.run / "checkpoints", 6)) == []


@pytest.mark.slow
def test_an_upload_that_hangs_does_not_hold_up_the_end(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """The other rank is gone, so rank 0 is about to go, too: the thread that uploads would keep it for ever."""
    hangs = SLOW.format(pieces=1, seconds=1000).replace("loop.evaluate = ", "")
    overrides = (f"data.path={corpus}", f"checkpoint.upload={tmp_path}", "watchdog.seconds=8")
    job = trainer.start(*overrides, ranks=2, before=hangs)
    job.wait_for(6)
    while checkpoint.verify(checkpoint.path_of(job.run / "checkpoints", 6)):
        assert job.codes() == [None, None]
        time.sleep(0.02)
    job.signal(1, signal.SIGKILL)
    result = job.wait()
    assert result.codes == (71, -9), result.stderrs
    assert any("another rank is gone" in line for line in result.errors)


# Spikes and budgets

SPIKES = """
from pretrain import metrics

real, count = metrics.means, 0

def means(*given, **options):
    global count
    count += 1
    found = real(*given, **options)
    return {{**found, "loss": found["loss"] * (100 if count in {lines} else 1)}}

metrics.means = means
"""


@pytest.mark.slow
def test_after_a_spike_the_run_goes_back_and_on(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """The seventh line, of steps 13 and 14, tells of a spike. Checkpoints of 13 and 14 may hold it: back to 12, and on
    with the samples after step 14, as a run that starts from that checkpoint there.
    """
    overrides = (
        f"data.path={corpus}", "steps=20", "checkpoint.every=1", "checkpoint.keep_last=99", "log.every=2",
        "guard.spike_factor=3", "guard.max_rollbacks=1", "data.workers=1", f"checkpoint.upload={tmp_path / 'store'}",
    )  # fmt: skip
    result = trainer.run(*overrides, "stop_at=18", f"runs_root={tmp_path}", ranks=2, before=SPIKES.format(lines=(7,)))
    assert result.codes == (75, 75), result.stderrs
    assert "; back to step 12, leaving out samples 192 to 224 of the run" in result.stderr
    assert [line["step"] for line in result.metrics] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert result.series("samples") == [*range(32, 193, 32), *range(256, 321, 32)]
    newest = checkpoint.load(checkpoint.path_of(result.run / "checkpoints", 18))
    assert (newest.state.samples, newest.state.rollbacks) == (320, 1)
    uploaded = checkpoint.list_checkpoints(tmp_path / "store" / "run")
    assert {checkpoint.load(path).state.rollbacks for path in uploaded if checkpoint.step_of(path) > 12} == {1}
    first = weights(result, 12)
    assert all(torch.isfinite(value).all() for value in first.values())
    # Another start remembers how often the run has gone back.
    (tmp_path / "run" / "metrics.jsonl").unlink()
    again = trainer.run(*overrides, "steps=40", f"runs_root={tmp_path}", ranks=2, before=SPIKES.format(lines=(6,)))
    assert again.codes == (70, 70), again.stderrs
    (line,) = again.errors
    assert "1 rollbacks did not help: lower optim.lr" in line


def test_a_spike_before_any_checkpoint(trainer: Trainer, corpus: Path) -> None:
    overrides = (f"data.path={corpus}", "steps=20", "guard.spike_factor=3", "checkpoint.every=7", "log.every=1")
    result = trainer.run(*overrides, before=SPIKES.format(lines=(7,)))
    assert result.code == 70
    (line,) = result.errors
    assert "there is no checkpoint to go back to: lower optim.lr or checkpoint.every" in line


@pytest.mark.slow
def test_a_time_budget_ends_a_run_in_an_orderly_way(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """The rate falls to its end with the clock, and a run that is resumed has what is left of its time."""
    overrides = (f"data.path={corpus}", f"runs_root={tmp_path}", "steps=1000000", "budget.hours=0.003")
    job = trainer.start(*overrides, ranks=2)
    job.wait_for(2)
    job.signal(1, signal.SIGTERM)
    assert job.wait().codes == (75, 75)
    result = trainer.run(*overrides, ranks=2)
    assert result.codes == (0, 0), result.stderrs
    rates = result.series("train/lr")
    assert max(rates) > 0.002
    assert rates[-1] < 0.0006
    newest = checkpoint.load(checkpoint.list_checkpoints(result.run / "checkpoints")[-1])
    assert newest.state.step == result.metrics[-1]["step"]
    assert newest.state.seconds == pytest.approx(0.003 * 3600, abs=4)
