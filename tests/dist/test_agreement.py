"""How ranks meet, and what they must have alike: one line for the job, the same code on all ranks, nobody left."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.support import Job, Result, Trainer, free_port, make_corpus

ON_RANK_1 = (
    "import os, socket, sys, time\nif os.environ['RANK'] == '1':\n    socket.gethostname = lambda: 'node2'\n    "
)
SEED_2 = ON_RANK_1 + "sys.argv[sys.argv.index('seed=1')] = 'seed=2'"
SOON = "import pretrain.rendezvous; pretrain.rendezvous._SPEAK_SECONDS = 0.2\n"


def late(rank: int, sign: Path) -> str:
    """Python that has a rank wait for a file."""
    return (
        SOON
        + f"import os, time\nwhile os.environ['RANK'] == '{rank}' and not os.path.exists('{sign}'): time.sleep(0.02)"
    )


def the_line(result: Result) -> str:
    assert set(result.codes) == {64}, result.stderrs
    assert not any("Traceback" in text for text in result.stderrs), result.stderrs
    (line,) = result.errors
    assert result.metrics == [], "nothing was trained"
    return line


def wait_for(job: Job, rank: int, words: str) -> None:
    end, path = time.monotonic() + 100, job.logs / f"stderr-{rank}"
    while words not in (text := path.read_text() if path.exists() else ""):
        assert time.monotonic() < end, text
        assert job.codes()[rank] is None, text
        time.sleep(0.02)


def test_another_seed_on_one_node(trainer: Trainer, corpus: Path) -> None:
    """As of a YAML file that was changed there."""
    line = the_line(trainer.run(f"data.path={corpus}", "seed=1", ranks=2, before=SEED_2))
    assert line.endswith(f"error: node2 (rank 1): seed is 2, {os.uname().nodename} (rank 0) has 1; make them equal")


def test_another_corpus_at_the_same_place(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "other", seed=4)
    before = ON_RANK_1 + f"sys.argv = [word.replace('{corpus}', '{tmp_path}/other') for word in sys.argv]"
    line = the_line(trainer.run(f"data.path={corpus}", ranks=2, before=before))
    assert line.startswith("error: node2 (rank 1): the corpus (its manifest's sha256) is ")


def test_a_run_directory_that_one_node_has_for_itself(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    before = ON_RANK_1 + f"sys.argv = [word.replace('{tmp_path}/a', '{tmp_path}/b') for word in sys.argv]\n"
    before += "import pretrain.agreement; pretrain.agreement._TOKEN_SECONDS = 0.1"
    line = the_line(trainer.run(f"data.path={corpus}", f"runs_root={tmp_path}/a", ranks=2, before=before))
    assert line.startswith("error: node2 (rank 1): runs_root=")
    assert f"does not see what {os.uname().nodename} (rank 0) writes there; all hosts must share it" in line
    assert not list((tmp_path / "a").rglob(".cloze-*"))
    again = trainer.run(f"data.path={corpus}", f"runs_root={tmp_path}/a", ranks=2)
    assert again.codes == (0, 0), again.stderrs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("import importlib.metadata as m; v = m.version; m.version = lambda p: '9' if p == 'deepspeed' else v(p)",
         "deepspeed is 9, "),
        ("import pretrain.agreement as a; a.source_hash = lambda packages: 'abc'", "code is abc, "),
        ("real = time.time; time.time = lambda: real() - 3600", "s ahead of that of node2 (rank 1)"),
        ("sys.argv.append('data.cache_gib=9'); sys.argv.append('seed=9')", "seed is 9, "),
    ],
)  # fmt: skip
def test_what_else_must_be_alike(trainer: Trainer, corpus: Path, change: str, words: str) -> None:
    assert words in the_line(trainer.run(f"data.path={corpus}", ranks=2, before=ON_RANK_1 + change))


@pytest.mark.slow
def test_one_machine_under_two_names(trainer: Trainer, corpus: Path) -> None:
    """As deepspeed's node launcher starts it, once for each line of the hostfile."""
    before = "import os; os.environ |= {'CROSS_RANK': os.environ['RANK'], 'CROSS_SIZE': '2'}"
    here = os.uname().nodename
    name = {"MASTER_ADDR": own_address()}
    result = trainer.run(f"data.path={corpus}", ranks=2, before=before, env=name)
    assert f"{here} (rank 0) and {here} (rank 1): are one machine under two names" in the_line(result)
    result = trainer.run(f"data.path={corpus}", ranks=2, before=before)
    assert result.codes == (0, 0), "who says 127.0.0.1 means it"


def own_address() -> str:
    """Of this machine, but not its loopback; where there is none, a name for that."""
    import psutil

    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            if entry.family.name == "AF_INET" and not entry.address.startswith("127."):
                return str(entry.address)
    return os.uname().nodename


def test_a_mistake_of_one_node_ends_all_with_its_line(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    before = ON_RANK_1 + f"sys.argv = [word.replace('{corpus}', '{tmp_path}/none') for word in sys.argv]"
    result = trainer.run(f"data.path={corpus}", ranks=2, before=before)
    assert result.codes == (64, 64), result.stderrs
    assert f"error: rank 1: {tmp_path}/none/manifest.json: not there" in result.stderrs[1]
    assert result.stderrs[0] == ""


# Waiting


def test_waiting_is_told_and_ends(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    port = free_port()
    where = {"MASTER_PORT": str(port)}
    job = trainer.start(f"data.path={corpus}", ranks=2, before=late(1, tmp_path / "go"), env=where)
    wait_for(job, 0, f"waiting for 1 of 2 ranks at 127.0.0.1:{port} (rank 1)")
    (tmp_path / "go").touch()
    assert job.wait().codes == (0, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_waits_ends_when_asked(trainer: Trainer, corpus: Path, tmp_path: Path, number: int) -> None:
    """Rank 0, with a third one still to come; and so does rank 1 with it, which waits there, too."""
    job = trainer.start(f"data.path={corpus}", ranks=3, before=late(2, tmp_path / "go"))
    wait_for(job, 0, "waiting for 1 of 3 ranks")
    wait_for(job, 0, "(rank 2)")
    job.signal(0 if number == signal.SIGTERM else 1, number)
    end = time.monotonic() + 60
    while None in job.codes()[:2]:
        assert time.monotonic() < end, [path.read_text() for path in sorted(job.logs.glob("stderr-*"))]
        time.sleep(0.02)
    assert job.codes() == [75, 75, None]
    assert "Traceback" not in (job.logs / "stderr-0").read_text() + (job.logs / "stderr-1").read_text()
    job.kill()


@pytest.mark.slow
def test_a_rank_that_finds_no_rank_0_ends_when_asked(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    for master, words in (("127.0.0.1", "rank 0: Connection refused"), ("no.such.name.invalid", "is not a name that")):
        job = trainer.start(
            f"data.path={corpus}", ranks=2, before=late(0, tmp_path / "go"), env={"MASTER_ADDR": master}
        )
        wait_for(job, 1, "rank 1: waiting for 1 of 2 ranks at ")
        wait_for(job, 1, words)
        job.signal(1, signal.SIGTERM)
        end = time.monotonic() + 60
        while job.codes()[1] is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert job.codes()[1] == 75
        job.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "reason"),
    [
        ("eth9", "", "eth9"),
        ("lo", ON_RANK_1 + "import torch.distributed as d; d.init_process_group = lambda *_, **__: time.sleep(600)",
         "no connection within 2 s"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_reach_each_other(
    trainer: Trainer, corpus: Path, name: str, before: str, reason: str
) -> None:
    """Also where one of them is never heard of: the other's group stands still in C++, and both end."""
    soon = "import pretrain.rendezvous; pretrain.rendezvous._GROUP_SECONDS = 2\n"
    env = {"GLOO_SOCKET_IFNAME": name}
    line = the_line(trainer.run(f"data.path={corpus}", ranks=2, before=soon + before, env=env))
    assert f"do not reach the others by the network interface GLOO_SOCKET_IFNAME={name} (" in line
    assert reason in line


@pytest.mark.slow
def test_a_second_job_at_the_same_port(trainer: Trainer, corpus: Path) -> None:
    """As two plain deepspeeds on a machine: the second says what to add, the first does not notice."""
    port = free_port()
    same = {"MASTER_PORT": str(port), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    first = trainer.start(f"data.path={corpus}", "steps=100000", ranks=2, env=same)
    first.wait_for(3)
    second = trainer.start(f"data.path={corpus}", "steps=5", ranks=2, env=same)
    end = time.monotonic() + 60
    while second.codes()[0] is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    line = (second.logs / "stderr-0").read_text().strip()
    assert second.codes()[0] == 64
    assert line.startswith(f"error: port {port} of ")
    assert "add --master_port=" in line
    assert "\n" not in line
    second.signal(1, signal.SIGTERM)  # as deepspeed does then
    second.wait()
    assert first.codes() == [None, None]
    first.signal(0, signal.SIGTERM)
    assert first.wait().codes == (75, 75)
    shutil.rmtree(second.run, ignore_errors=True)
