"""Two machines on one: network namespaces that are joined by a veth pair, with an sshd in each.

They share the file system, the processes (told apart by namespace) and the clock; they share no loopback and no port.
Several such pairs may stand side by side, one for each process that makes one: names carry its id, and addresses are
seen in their namespaces alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support import ROOT, TINY, environment, later_wins, read_metrics

NODES = (1, 2)
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def why_not() -> str | None:
    """What is missing to make such machines here."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("ip", "sshd", "ssh-keygen", "pdsh") if not shutil.which(tool, path=_PATH)]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2 openssh-server openssh-client pdsh)"
    name = f"cloze-try-{os.getpid()}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "exec", name, "ip", "link", "add", "try0", "type", "veth", "peer", "name", "try1")
    except AssertionError as error:
        return f"cannot make network namespaces here: {error}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False, env={"PATH": _PATH})
    return None


class Cluster:
    """node1 and node2, each with one slot in `hosts`.

    Where they are `named`, each knows its own name, and that resolves as Debian has it: to 127.0.1.1 on node 1, and on
    node 2 not at all.
    """

    def __init__(self, folder: Path, *, named: bool = False) -> None:
        self.folder, self.named = folder, named
        self.names = {node: f"cloze{os.getpid()}-{node}" for node in NODES}
        self.hosts = folder / "hosts"
        self.hosts.write_text("".join(f"node{node} slots=1\n" for node in NODES))
        self.ssh_config = folder / "ssh_config"
        self._sshd: dict[int, subprocess.Popen[bytes]] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        for name in self.names.values():
            _run("ip", "netns", "add", name)
        if named:
            for node, own in ((1, "127.0.1.1 node1\n10.251.7.2 node2\n"), (2, "10.251.7.1 node1\n")):
                hosts = self._own_etc(node) / "hosts"
                hosts.parent.mkdir(parents=True)
                hosts.write_text(f"127.0.0.1 localhost\n{own}")
        links = {node: f"cz{os.getpid()}-{node}"[-15:] for node in NODES}
        _run("ip", "link", "add", links[1], "type", "veth", "peer", "name", links[2])
        for node, name in self.names.items():
            _run("ip", "link", "set", links[node], "netns", name, "name", "eth0")
            self.inside(node, "ip", "address", "add", f"10.251.7.{node}/24", "dev", "eth0")
            self.inside(node, "ip", "link", "set", "lo", "up")
            self.link(node, "up")
        self._keys()
        for node in NODES:
            self.start_sshd(node)

    def _own_etc(self, node: int) -> Path:
        """What `ip netns exec` puts over /etc."""
        return Path("/etc/netns") / self.names[node]

    def _enter(self, node: int) -> list[str]:
        """What comes before a command that a node shall run."""
        enter = ["ip", "netns", "exec", self.names[node]]
        name = ["unshare", "--uts", "sh", "-c", f'hostname node{node} && exec "$@"', "sh"]
        return [*enter, *name] if self.named else enter

    def inside(self, node: int, *command: str) -> None:
        _run("ip", "netns", "exec", self.names[node], *command)

    def link(self, node: int, state: str) -> None:
        self.inside(node, "ip", "link", "set", "eth0", state)

    def _keys(self) -> None:
        for name in ("host", "user"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        self.ssh_config.write_text(
            "".join(f"Host node{node}\n  HostName 10.251.7.{node}\n" for node in NODES)
            + f"Host *\n  IdentityFile {self.folder / 'user'}\n  IdentitiesOnly yes\n  UserKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking no\n  LogLevel ERROR\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)

    def start_sshd(self, node: int, *settings: str) -> None:
        """Start or restart a node's sshd, with more lines of configuration."""
        self.stop_sshd(node)
        config = self.folder / f"sshd{node}"
        lines = [
            *(f"ListenAddress 10.251.7.{node}", f"HostKey {self.folder / 'host'}", "PermitRootLogin yes"),
            *(
                f"AuthorizedKeysFile {self.folder / 'user.pub'}",
                "StrictModes no",
                "PidFile none",
                "UsePAM no",
                *settings,
            ),
        ]
        config.write_text("\n".join(lines) + "\n")
        sshd = shutil.which("sshd", path=_PATH)
        assert sshd
        self._sshd[node] = subprocess.Popen(
            [*self._enter(node), sshd, "-D", "-f", str(config)], stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 10
        ssh = ["ip", "netns", "exec", self.names[node], "ssh", "-F", str(self.ssh_config), f"node{node}", "true"]
        while subprocess.run(ssh, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, f"sshd of node {node} does not answer"
            time.sleep(0.1)

    def stop_sshd(self, node: int) -> None:
        if node in self._sshd:
            self._sshd[node].kill()
            self._sshd.pop(node).wait()

    def processes(self, node: int) -> list[psutil.Process]:
        """Whatever runs in the node, but for the sshd itself and what a kill has left as a zombie."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True, check=True)
        found = []
        for pid in listed.stdout.split():
            with suppress(psutil.Error):
                process = psutil.Process(int(pid))
                own = node in self._sshd and process.pid == self._sshd[node].pid
                if not own and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self, node: int) -> list[psutil.Process]:
        return [process for process in self.processes(node) if "pretrain.train" in _arguments(process)[2:5]]

    def kill(self, node: int) -> None:
        """The whole node: its link and all its processes."""
        self.link(node, "down")
        self.stop_sshd(node)
        for process in self.processes(node):
            with suppress(psutil.Error):
                process.kill()

    def revive(self, node: int) -> None:
        self.link(node, "up")
        if node not in self._sshd:
            self.start_sshd(node)

    def start(
        self, command: Sequence[str], log: Path, more: Mapping[str, str] | None = None, node: int = 1
    ) -> subprocess.Popen[bytes]:
        """Start a command on a node, its output into `log`."""
        full = [*self._enter(node), *command]
        env = environment() | {"DS_ACCELERATOR": "cpu", "PATH": _PATH} | dict(more or {})
        del env["PYTHONPATH"]  # the working directory is enough, as on a real cluster
        with log.open("wb") as file:
            process = subprocess.Popen(full, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self._started.append(process)
        return process

    def close(self) -> None:
        for node in NODES:
            self.kill(node)
        for process in self._started:
            process.wait()
        for name in self.names.values():
            _run("ip", "netns", "delete", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


class Training:
    """A run by `python -m launch` on both nodes; launch itself runs on the node `at`."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *arguments: str,
        hosts: Path | None = None,
        at: int = 1,
        more: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run, self.log = folder / "run", folder / "log"
        own = (f"hosts={hosts or cluster.hosts}", f"ssh=ssh -F {cluster.ssh_config}", f"runs_root={folder}", "run=run")
        command = [sys.executable, "-m", "launch", *later_wins(*own, *TINY, *arguments)]
        self.process = cluster.start(command, self.log, more, at)

    def wait_for(self, step: int, seconds: float = 120) -> None:
        self.wait_until(lambda: any(line["step"] >= step for line in read_metrics(self.run)), seconds)

    def wait_until(self, is_so: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def wait(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            self.process.send_signal(signal.SIGKILL)
            raise AssertionError(self.output) from None

    @property
    def restarts(self) -> int:
        return self.output.count("; restart ")

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def losses(self) -> dict[int, float]:
        """By step; of a step that was trained twice, the later."""
        return {line["step"]: line["train/loss"] for line in read_metrics(self.run) if "train/loss" in line}


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": _PATH})
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _arguments(process: psutil.Process) -> list[str]:
    try:
        found: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return found
