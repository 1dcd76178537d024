"""Which rank is gone, and whether memory ran out, as far as this machine tells."""

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import peers
from pretrain.peers import Peer, Peers, cause_of_kill, killed_for_memory, this_process


def test_who_is_gone_and_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 5\noom_kill 3\n")
    monkeypatch.setattr(peers, "VMSTAT", vmstat)
    monkeypatch.setattr(peers, "_WAIT_SECONDS", 0.0)
    here = this_process()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        known = Peers([here, here._replace(pid=other.pid), Peer("elsewhere", here.namespace, other.pid)])
        assert known.told() == ""
        other.kill()
        monkeypatch.setattr(peers, "_WAIT_SECONDS", 20.0)
        for _ in range(2):  # as a zombie, and when it is reaped
            assert known.told() == " (rank 1 on this machine)"
            other.wait(20)
    vmstat.write_text("oom_kill 4\n")
    assert known.told().startswith(" (rank 1 on this machine; the kernel has killed for want of memory: ")
    assert cause_of_kill(3).startswith("the kernel has killed for want of memory: ")
    assert cause_of_kill(4).startswith("perhaps for want of memory: the kernel's log (dmesg) tells")
    vmstat.unlink()
    assert killed_for_memory() == 0
    assert cause_of_kill(3).startswith("perhaps for want of memory: ")
    assert known.told() == " (rank 1 on this machine)"
