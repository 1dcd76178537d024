"""What launch decides before it starts anything."""

import shlex
import subprocess
from pathlib import Path

import pytest

from data_prep.errors import UserError
from launch.__main__ import main, parse
from launch.command import Command, Machine, deepspeed_command, this_machine
from launch.supervise import true_exit_code

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
    return deepspeed_command(overrides, Machine(gpus=gpus, cpus=cpus), procs=procs, port=1234)


def after(command: Command, flag: str) -> str:
    return command.arguments[command.arguments.index(flag) + 1]


def test_own_options_are_taken_out_and_the_rest_passes() -> None:
    assert parse(["run=a", "procs=3", "--dry-run", *ODD]) == (3, True, ("run=a", *ODD))
    assert parse(["procs=auto"]) == (None, False, ())


@pytest.mark.parametrize("bad", ["procs=0", "procs=x", "procs=", "procs=-1", "--procs=2", "-q"])
def test_bad_options_are_one_line(bad: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        parse([bad])


def test_processes_and_threads_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    on_cpu = command()
    assert after(on_cpu, "--num_gpus") == "2"
    assert on_cpu.environment == {"CUDA_VISIBLE_DEVICES": None, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "4"}
    assert after(command(cpus=1), "--num_gpus") == "1"
    assert after(command(procs=5), "--num_gpus") == "5"
    on_gpu = command(gpus=(2, 5, 7))
    assert after(on_gpu, "--include") == "localhost:2,5,7"
    assert "DS_ACCELERATOR" not in on_gpu.environment
    assert after(command(gpus=(2, 5, 7), procs=2), "--include") == "localhost:2,5"
    with pytest.raises(UserError, match="procs=4: this machine has 3 GPUs"):
        command(gpus=(2, 5, 7), procs=4)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in command().environment


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
    assert shlex.split(str(command(*ODD)))[-len(ODD) :] == list(ODD)


@pytest.mark.parametrize(
    ("written", "launcher", "asked", "expected"),
    [
        ('{"exit_code": 75, "step": 3}', 0, False, 75),
        ('{"exit_code": 0}', 250, False, 0),
        ('{"exit_code": 70}', -9, True, 70),
        (None, 0, False, 70),  # killed launcher: deepspeed says all is well
        (None, 64, False, 64),
        (None, 71, False, 71),
        (None, -9, False, 70),
        (None, 1, False, 70),
        (None, -15, True, 75),
        ("{torn", 0, False, 70),
        ("[]", 0, False, 70),
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
    assert "--num_gpus 3" in printed
    assert printed.endswith("--module pretrain.train 'run=a b' data.path=x\n")
    with pytest.raises(UserError, match=r"micro_batch_size=0"):
        main(["--dry-run", "run=a", "data.path=x", "micro_batch_size=0"])
