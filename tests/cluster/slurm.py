"""A real Slurm on the two nodes of a cluster: slurmctld on node 1, a slurmd on each, with files of their own alone."""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.cluster import NODES, Cluster

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_CONFIGURATION = """
ClusterName=cloze
SlurmctldHost=node1(10.251.7.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
GresTypes=gpu
NodeName=node1 NodeAddr=10.251.7.1 CPUs=4 RealMemory=1000 Gres=gpu:1
NodeName=node2 NodeAddr=10.251.7.2 CPUs=4 RealMemory=1000 Gres=gpu:1
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    missing = [tool for tool in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(tool, path=_PATH)]
    return f"needs {', '.join(missing)} (Debian: slurm-wlm munge)" if missing else None


class Slurm:
    """Its commands, and what it says of a job."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        assert cluster.named, "Slurm finds a node's part of its configuration by the node's name"
        self._cluster, self._folder = cluster, folder
        for name in ("state", "munge", "log"):
            (folder / name).mkdir(parents=True)
        configuration = folder / "slurm.conf"
        configuration.write_text(_CONFIGURATION.format(folder=folder))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.environment = {"SLURM_CONF": str(configuration)}
        paths = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(1, "munged", "--foreground", "--force", *paths, f"--socket={folder}/munge/socket")
        self.wait_until((folder / "munge" / "socket").exists)
        self._daemon(1, "slurmctld", "-D", "-f", str(configuration))
        for node in NODES:
            self._daemon(node, "slurmd", "-D", "-f", str(configuration))
        self.wait_until(lambda: self.run("sinfo", "-h", "-o", "%D %t", check=False).split() == ["2", "idle"])

    def _daemon(self, node: int, *command: str) -> None:
        """Start it on a node."""
        self._cluster.start(command, self._folder / "log" / f"{command[0]}-{node}", self.environment, node)

    def run(self, *command: str, check: bool = True) -> str:
        """What a command prints on node 1."""
        full = ["ip", "netns", "exec", self._cluster.names[1], *command]
        env = os.environ | {"PATH": _PATH} | self.environment
        done = subprocess.run(full, capture_output=True, text=True, check=False, env=env)
        assert not check or done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.run("scontrol", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_until(self, is_so: Callable[[], bool], seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, self.logs
            time.sleep(0.1)

    @property
    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in (self._folder / "log").iterdir())
