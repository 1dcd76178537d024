"""What launch decides before it starts anything."""

import base64
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from cloze.arrival import checksum
from cloze.cli import compose
from cloze.errors import UserError
from launch.__main__ import main
from launch.agent import CRASHED, ENDED, Requests, true_exit_code
from launch.command import LOCALHOST, Command, Machine, NodeStart, forwarded, node_command, read_hostfile, this_machine
from launch.job import Job, job_of
from launch.nodes import LOST
from launch.options import Options, parse
from launch.preflight.check import compare, table
from launch.preflight.facts import facts
from launch.slurm import script, seconds_of
from launch.supervise import most_hosts, outcome
from pretrain.config import TrainConfig
from pretrain.dist import threads_each
from tests.support import environment

ODD = (
    "a={0..3}",
    "b=${oc.env:X}",
    "c=$(id)",
    "d=%n",
    "e='\"",
    "f= g ",
    "h=日本",
    "i=*",
    "j=\n",
    "~k",
    "l=;ls|&",
    "m=\\",
)


def command(*overrides: str, gpus: tuple[int, ...] = (), cpus: int = 8, procs: int | None = None) -> Command:
    start = NodeStart(overrides=overrides, hosts={LOCALHOST: procs}, port=1234)
    return node_command(start, Machine(gpus=gpus, cpus=cpus))


def world(command: Command) -> dict[str, list[int]]:
    (encoded,) = (argument for argument in command.arguments if argument.startswith("--world_info="))
    result: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(encoded.partition("=")[2]))
    return result


def test_own_options_are_taken_out_and_the_rest_passes() -> None:
    options = parse(["run=a", "procs=3", "--dry-run", "hosts=h", "ssh=ssh -F 'a b'", "restarts=0", *ODD])
    assert (options.procs, options.dry_run, options.overrides) == (3, True, ("run=a", *ODD))
    assert (options.hosts, options.ssh, options.restarts) == (Path("h"), ("ssh", "-F", "a b"), 0)
    assert parse(["procs=auto"]) == Options()


@pytest.mark.parametrize(
    "bad", ["procs=0", "procs=x", "procs=", "procs=-1", "--procs=2", "-q", "restarts=-1", "lost_after=2", "ssh='"]
)
def test_bad_options_are_one_line(bad: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        parse([bad])


@pytest.mark.parametrize(
    ("argument", "slurm", "line"),
    [
        ("nodes=4", False, "nodes: an option only of `launch slurm`; there are hosts, procs, restarts, lost_after, "),
        ("hosts=h", True, "hosts: an option not of `launch slurm`; there are nodes, gpus_per_node, time, sbatch here"),
    ],
)
def test_an_option_of_the_other_command_is_told_so(argument: str, slurm: bool, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(["run=a", argument], slurm=slurm)
    assert str(caught.value).startswith(line)


def test_processes_and_threads_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    on_cpu = command()
    assert world(on_cpu) == {LOCALHOST: [0, 1]}
    assert on_cpu.environment == {"CUDA_VISIBLE_DEVICES": None, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "4"}
    assert world(command(cpus=1)) == {LOCALHOST: [0]}
    assert world(command(procs=5)) == {LOCALHOST: [0, 1, 2, 3, 4]}
    assert "world_size=5" in command(procs=5).arguments
    on_gpu = command(gpus=(2, 5, 7))
    assert world(on_gpu) == {LOCALHOST: [2, 5, 7]}
    assert "DS_ACCELERATOR" not in on_gpu.environment
    assert world(command(gpus=(2, 5, 7), procs=2)) == {LOCALHOST: [2, 5]}
    with pytest.raises(UserError, match="4 processes for 3 GPUs"):
        command(gpus=(2, 5, 7), procs=4)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in command().environment


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, None), ({"LOCAL_SIZE": "1"}, None), ({"LOCAL_SIZE": "2"}, 4), ({"LOCAL_WORLD_SIZE": "3"}, 2),
        ({"LOCAL_SIZE": "16"}, 1), ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "8"}, None), ({"LOCAL_SIZE": "x"}, None),
    ],
)  # fmt: skip
def test_ranks_that_deepspeed_starts_share_the_cores(environment: dict[str, str], threads: int | None) -> None:
    """As those of launch do, which sets the variable itself."""
    assert threads_each(environment, 8) == threads


def test_visible_devices_decide_which_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine().gpus == (0, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert this_machine().gpus == (4, 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    with pytest.raises(UserError, match="indices only"):
        this_machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine().gpus == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert this_machine().gpus == ()


def test_the_printed_command_is_what_a_shell_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    shown = Command(arguments=("printf", "%s\\0", *ODD), environment={"CUDA_VISIBLE_DEVICES": None, "A": "b c"})
    assert str(shown).startswith("env -u CUDA_VISIBLE_DEVICES A='b c' printf ")
    ran = subprocess.run(["bash", "-c", str(shown)], capture_output=True, check=True)
    assert tuple(ran.stdout.decode().split("\0")[:-1]) == ODD
    assert shlex.split(str(command(*ODD)))[-len(ODD) - 1 : -1] == list(ODD), "the last is their checksum"


@pytest.mark.parametrize(
    ("written", "launcher", "asked", "expected"),
    [
        ('{"exit_code": 75, "step": 3}', 250, False, 75),
        ('{"exit_code": 0}', 250, False, 0),
        ('{"exit_code": 75}', -9, False, 75),
        ('{"exit_code": 70}', -9, True, CRASHED),
        ('{"exit_code": 70}', 1, False, CRASHED),  # a traceback: perhaps of a rank whose peer was killed
        ('{"exit_code": 70}', 70, False, 70),
        (None, 64, False, 64),
        (None, 71, False, 71),
        (None, -9, False, CRASHED),
        (None, -15, True, 75),
        (None, 256 - 15, True, 75),  # a rank that had not begun
        (None, 256 - 9, True, CRASHED),  # perhaps in the middle of its save
        ('{"exit_code": 71}', 256 - 9, False, 71),  # a rank was killed, and rank 0 says so
        (None, 256 - 9, False, 71),  # rank 0 was
        ('{"exit_code": 70}', 1, True, CRASHED),  # the save failed
        ("{torn", 1, False, CRASHED),
        ("[]", 1, False, CRASHED),
    ],
)
def test_true_exit_code(tmp_path: Path, written: str | None, launcher: int, asked: bool, expected: int) -> None:
    status = tmp_path / "status.json"
    if written is not None:
        status.write_text(written)
    assert true_exit_code(status, launcher, stop_requested=asked) == expected


def test_dry_run_and_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["--dry-run", "procs=3", "run=a b", "data.path=x"]) == 0
    printed = capsys.readouterr().out
    seal = checksum(["world_size=3", "run=a b", "data.path=x"])
    assert printed.endswith(f"--module pretrain.train world_size=3 'run=a b' data.path=x {seal}\n")
    for word in ("--quiet", "--verbose"):
        assert main([word, "--dry-run", "procs=3", "run=a b", "data.path=x"]) == 0
        assert capsys.readouterr().out.endswith(f"world_size=3 'run=a b' data.path=x {word} {seal}\n"), (
            "ranks speak alike"
        )
    assert main(["run=a", "check", "--dry-run", "procs=3", "data.path=x"]) == 0
    assert capsys.readouterr().out.endswith("--module launch.preflight.speed runs localhost\n"), (
        "of what check would run"
    )
    assert main(["--dry-run", "run=a", "data.path=x", "micro_batch_size=0"]) == 64
    assert capsys.readouterr().err.startswith("error: micro_batch_size=0")


def test_a_mistyped_option_is_one_of_launchs(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "host=h", "run=a", "data.path=x"],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        64,
        "error: host: no such key (did you mean hosts?); write hosts=h, or see --help\n",
    )


def test_who_reads_only_the_head_of_the_help_breaks_nothing() -> None:
    """With a reader that is gone before the first byte, which `head` may be or not."""
    with subprocess.Popen(
        [sys.executable, "-m", "launch", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_an_agent_that_hears_no_more_ends_its_ranks() -> None:
    ours, launchs = os.pipe()
    with io.FileIO(ours) as stream, io.FileIO(launchs, "w") as pipe:
        requests = Requests(stream, lost_after=1.5)
        for _ in range(4):
            time.sleep(0.5)
            pipe.write(b"heartbeat\n")
            assert not requests.requested("end")
        time.sleep(1.7)
        assert requests.requested("end")
        assert not requests.requested("kill")
        patient = Requests(stream, lost_after=0)  # of a run on this machine
        time.sleep(0.1)
        assert not patient.requested("end")
        pipe.close()
        time.sleep(0.2)
        assert patient.requested("end"), "launch is gone"


def test_a_hostfile_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# cluster\nnode1 slots=4\n\n  10.0.0.2   slots=8  # the big one\n")
    assert read_hostfile(path) == {"node1": 4, "10.0.0.2": 8}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        ("a\n", ":1: 'a' is not `host slots=N`"),
        ("a slots=0", "is not"),
        ("a slots=x", "is not"),
        ("a slots=2 b", "is not"),
        ("a slots=2\na slots=2", ":2: a: is there twice"),
        ("-oProxyCommand=x slots=2", "is not a host"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_hostfile_is_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
        read_hostfile(tmp_path / "hosts")


def test_what_other_nodes_get_of_the_environment() -> None:
    mine = {"NCCL_DEBUG": "INFO", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "WANDB_API_KEY": "k", "MY_PASSWORD": "p"}
    assert forwarded(mine) == {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "k"}
    more = {"MINE": "1", "SENTRY_DSN": "2", "https_proxy": "3", "LD_LIBRARY_PATH": "4"}
    asked = parse(["forward=MINE,SENTRY_"]).forward
    assert forwarded(mine | more, asked) == {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "k", **more}


def test_the_hosts_of_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Ranks and rendezvous on every host; values of the environment, which may be secret, are nowhere."""
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    (tmp_path / "hosts").write_text("".join(f"node{i} slots=8\n" for i in range(1, 5)))
    arguments = ["--dry-run", f"hosts={tmp_path / 'hosts'}", "run=a", "data.path=x", "global_batch_size=1024"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    *lines, last = printed.splitlines()
    assert "WANDB_API_KEY" in last
    assert "hunter2" not in printed
    for rank, line in enumerate(lines):
        assert line.startswith(f"node{rank + 1}: ")
        assert f"--node_rank={rank} --master_addr=node1 " in line
        assert "world_size=32" in line
    assert len(lines) == 4
    for option, line in (
        ("micro_batch_size=3", "not a multiple of micro_batch_size=3 x 32 ranks"),
        ("procs=3", "write slots=N there"),
    ):
        assert main([*arguments, option]) == 64
        assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "expected", "again"),
    [
        ([0, 0], 0, False),
        ([75, 75], 75, True),
        ([0, 75], 75, True),
        ([70, CRASHED], 70, False),
        ([64, ENDED], 64, False),
        ([74, LOST], 74, False),
        ([CRASHED, ENDED], 70, True),
        ([0, LOST], 70, True),
        ([71, CRASHED], 71, True),
        ([75, ENDED], 70, True),
        ([0, 120], 70, True),  # no code of an agent's
        ([], 70, True),
    ],
)
def test_the_end_of_a_run_from_its_nodes(codes: list[int], expected: int, again: bool) -> None:
    end = outcome(codes)
    assert (end.code, end.again) == (expected, again)


def job(tmp_path: Path, *arguments: str) -> Job:
    options = parse([f"hosts={tmp_path / 'hosts'}", f"runs_root={tmp_path}", "run=a", "data.path=x", *arguments])
    return job_of(options, compose("train", TrainConfig, options.overrides))


def test_the_hosts_that_the_batch_can_be_split_over(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("".join(f"{host} slots=2\n" for host in "abc"))
    slots = {"a": 2, "b": 2, "c": 2}

    def chosen(*arguments: str) -> str:
        return "".join(most_hosts(slots, job(tmp_path, "micro_batch_size=4", *arguments).fits))

    assert chosen("global_batch_size=24") == "abc"
    assert chosen("global_batch_size=48", "batch_ramp.start=24") == "abc"
    (tmp_path / "hosts").write_text("a slots=1\n")
    assert chosen("global_batch_size=16") == "ab"
    assert chosen("global_batch_size=48", "batch_ramp.start=16") == "ab", "the ramp's first step must divide, too"
    assert chosen("global_batch_size=4") == "", "1 rank at least would be left"
    assert most_hosts(slots, lambda ranks: True) == ["a", "b", "c"]


def test_a_world_size_of_the_users_own(tmp_path: Path) -> None:
    """It must be that of the hostfile; when fewer hosts are left, it holds no more."""
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    asked = job(tmp_path, "world_size=4", "++world_size=4", "global_batch_size=128")
    assert not any("world_size=" in one for one in asked.overrides)
    assert asked.fits(2)
    with pytest.raises(UserError, match="world_size=3: there are 4 ranks; correct it, or the hostfile"):
        job(tmp_path, "world_size=3")
    with pytest.raises(UserError, match="global_batch_size=32: not a multiple of micro_batch_size=32 x 4 ranks"):
        job(tmp_path, "global_batch_size=128", "batch_ramp.start=32", "micro_batch_size=32")


def slurm_script(tmp_path: Path, *arguments: str) -> str:
    options = parse(["nodes=4", "gpus_per_node=8", "time=24:00:00", *arguments], slurm=True)
    overrides = ("data.path=x", f"runs_root={tmp_path}", "run=a", "global_batch_size=1024")
    config = compose("train", TrainConfig, (*overrides, *options.overrides))
    return script(options, config, tmp_path / "a")


def test_a_slurm_script_says_what_slurm_must_do(tmp_path: Path) -> None:
    text = slurm_script(tmp_path, "sbatch=--partition=big --account=x", "optim.lr=1e-3")
    for directive in (
        *("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=24:00:00", "--signal=USR1@120"),
        *("--requeue", "--partition=big", "--account=x", "--job-name=cloze-a"),
    ):
        assert f"#SBATCH {directive}\n" in text
    assert "srun --kill-on-bad-exit=1 " in text
    assert " world_size=32 optim.lr=1e-3 --checksum=" in text
    assert subprocess.run(["bash", "-n"], input=text.encode(), check=False).returncode == 0
    assert "--cpus-per-task=3\n" in text
    assert "scontrol requeue" in text
    quoted = slurm_script(tmp_path, """sbatch=--comment="a b" --exclusive""")
    assert "#SBATCH '--comment=a b'\n#SBATCH --exclusive\n" in quoted
    assert "requeue " not in slurm_script(tmp_path, "stop_at=5"), "it would stop at once, for ever"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("time=tomorrow", "must be minutes"),
        ("time=1:00", "must be minutes"),  # of Slurm one minute
        ("time=9", "too short: ranks stop 120 s before its end"),
        ("micro_batch_size=5", "not a multiple"),
        ("batch_ramp.start=512", "global_batch_size=512: not a multiple"),
        ("world_size=3", "there are 32 ranks"),
        ("runs_root=a b", "no blanks"),
    ],
)
def test_what_slurm_cannot_do_is_one_line(tmp_path: Path, argument: str, words: str) -> None:
    options = parse(["nodes=4", "gpus_per_node=8", "time=60", argument], slurm=True)
    arguments = ("data.path=x", "run=a", "global_batch_size=1024", *options.overrides)
    config = compose("train", TrainConfig, arguments)
    with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
        script(options, config, Path(config.runs_root) / config.run)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30:00", 5400), ("2-3", 183_600), ("1-02:03", 93_780), ("1-02:03:04", 93_784)],
)
def test_slurms_times(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def host_facts(**changes: Any) -> dict[str, Any]:
    equal = {"python": "3.11", "torch": "2.13", "deepspeed": "0.19", "code": "c", "configuration": "f", "data": "d"}
    gpu = {"name": "H200", "memory.used": "3", "ecc.errors.uncorrected.volatile.total": "0"}
    good = {
        "data_missing": None,
        "disks": {"runs_root": (2**40, 2**35)},
        "gpus": [gpu, gpu],
        "clock": 0.1,
        "machine": uuid4(),
    }
    return good | {key: changes[key] for key in changes if key in good} | {"equal": equal | changes.get("equal", {})}


GOOD_GPU, *_ = host_facts()["gpus"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"equal": {"torch": "2.12"}}, "c: torch is 2.12, a has 2.13; make them equal"),
        ({"equal": {"code": "x"}}, "c: code is x, a has c"),
        ({"clock": -7.0}, "c: its clock is off by -7.1 s"),
        ({"clock": 1.9}, None),
        (
            {"disks": {"runs_root": (2**40, 2), "data.cache_dir": (2**30, 2**31)}},
            "1.0 GiB free for data.cache_dir, 2.0",
        ),
        ({"data_missing": "/x/manifest.json"}, "c: /x/manifest.json: not there"),
        ({"gpus": [GOOD_GPU]}, "c: 1 GPUs for 2 processes"),
        ({"gpus": []}, "c: 0 GPUs for 2 processes"),
        ({"gpus": [GOOD_GPU, GOOD_GPU | {"name": "A100"}]}, "c: GPU 1: A100, others are not"),
        ({"gpus": [GOOD_GPU, GOOD_GPU, GOOD_GPU | {"name": "A100"}]}, None),  # one that is not asked for
        ({"gpus": [GOOD_GPU | {"memory.used": "9000"}, GOOD_GPU]}, "c: GPU 0: 9000 MiB in use"),
        ({"gpus": [GOOD_GPU | {"memory.used": "[N/A]"}, GOOD_GPU]}, None),
        ({"gpus": [{"error": "NVML is not there"}]}, "c: nvidia-smi: NVML is not there; repair its driver"),
        ({"gpus": [GOOD_GPU | {"ecc.errors.uncorrected.volatile.total": "2"}] * 2}, "2 uncorrected memory errors"),
        ({"gpus": [GOOD_GPU | {"ecc.errors.uncorrected.volatile.total": "[N/A]"}] * 2}, None),
    ],
)
def test_the_host_that_differs_is_named(changes: dict[str, Any], fault: str | None) -> None:
    found = {"a": host_facts(), "b": host_facts(), "c": host_facts(**changes)}
    faults = compare(found, dict.fromkeys(found, 2))
    assert bool(faults) == bool(fault), faults
    for line in faults:
        assert str(fault) in line
    assert len(table(found).splitlines()) == 4


def test_one_machine_under_two_names_is_found() -> None:
    found = {"a": host_facts(machine="m"), "b": host_facts(), "a.cluster": host_facts(machine="m")}
    (fault,) = compare(found, dict.fromkeys(found, 2))
    assert fault.startswith("a.cluster: is a under another name; name it once in the hostfile")


def test_gpus_that_are_broken_on_every_host_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    gpus = facts(["run=a", "data.path=x"])["gpus"]
    found = {host: host_facts(gpus=gpus) for host in "ab"}
    assert compare(found, dict.fromkeys(found, 8)) == [
        f"{host}: nvidia-smi: Failed to initialize NVML; repair its driver" for host in "ab"
    ]
    assert table(found).splitlines()[1].endswith(" 0")


def test_the_disk_must_hold_the_checkpoints(tmp_path: Path, corpus: Path) -> None:
    own = ["run=a", f"data.path=file://{corpus}", f"data.cache_dir={tmp_path}", "model=large"]
    told = facts(own)["disks"]
    weights = 335e6 - 30_522 * 1024  # of BERT-large, but for a vocabulary that is none here
    assert told["runs_root"][1] == pytest.approx(5 * 12 * weights, rel=0.02)
    assert told["data.cache_dir"][1] == sum(path.stat().st_size for path in corpus.glob("*/*.tar"))
    streamed = facts([*own, "data.access=stream"])["disks"]
    assert streamed["data.cache_dir"][1] == sum(path.stat().st_size for path in corpus.glob("val/*.tar"))


def test_a_host_that_does_not_answer_is_named() -> None:
    found = {"a": host_facts(), "b": {"error": "ssh: no route; see …"}}
    assert compare(found, {"a": 2, "b": 2}) == ["b: ssh: no route; see …"]
    assert "no answer" in table(found)
