"""The nodes of a run as launch sees them: one agent each, at the other end of a pipe (through ssh, or on this machine).

Only the working directory and the interpreter's path pass a shell, quoted; whatever else a node must know (overrides,
variables with secrets in them) is data on the agent's stdin.
"""

import io
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from launch.agent import Handshake, Task
from launch.command import LOCALHOST

LOST = 255  # ssh's own exit code: no connection, or none any more

_HANDSHAKE_SECONDS = 60.0
_CLOSE_SECONDS = 25.0  # an agent may need twice its grace
_POLL_SECONDS = 0.05


def is_local(host: str) -> bool:
    return host in (LOCALHOST, "127.0.0.1", "::1", socket.gethostname())


def on_host(host: str, module: Sequence[str], ssh: Sequence[str], lost_after: float) -> list[str]:
    """The command that runs `python -m module …` in this directory of a host."""
    command = [sys.executable, "-m", *module]
    if is_local(host):
        return command
    alive = max(1, round(lost_after / 3))
    settings = ("BatchMode=yes", "ConnectTimeout=10", f"ServerAliveInterval={alive}", "ServerAliveCountMax=3")
    flags = [part for setting in (*settings, "ControlPath=none") for part in ("-o", setting)]
    remote = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
    return [*ssh, "-T", *flags, "--", host, remote]


class Node:
    """An agent that was started on a host. What its ranks print comes with the `prefix`."""

    def __init__(self, host: str, job_id: str, ssh: Sequence[str], lost_after: float, prefix: str = "") -> None:
        self.host = host
        self.handshake: Handshake | None = None
        # A session of its own: Ctrl-C is for launch, which then asks for an orderly end. Without what tells how launch
        # was reached itself, by a tunnel perhaps: an agent takes that for how launch reached it.
        self._process = subprocess.Popen(
            on_host(host, ("launch.agent", f"{job_id}:{host}"), ssh, lost_after),
            env={name: value for name, value in os.environ.items() if name != "SSH_CONNECTION"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if prefix else None,  # else the terminal itself, where there is one
            start_new_session=True,
            bufsize=0,
        )
        pipes = ((self._process.stdout, sys.stdout, True), (self._process.stderr, sys.stderr, False))
        self._readers = [
            threading.Thread(
                target=self._read, args=[io.BufferedReader(pipe), out, has_handshake, prefix.encode()], daemon=True
            )
            for pipe, out, has_handshake in pipes
            if isinstance(pipe, io.RawIOBase)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: io.BufferedReader, out: TextIO, has_handshake: bool, prefix: bytes) -> None:
        """Take the agent's handshake, where it comes by this pipe; pass on what the ranks print."""
        with pipe:
            for line in pipe:
                if has_handshake and self.handshake is None:
                    with suppress(ValueError, TypeError):  # a login script may print first
                        self.handshake = Handshake(**json.loads(line))
                    continue
                out.buffer.write(prefix + line)
                out.flush()

    def send(self, line: str) -> None:
        """Send a line; it is lost where the agent is."""
        assert self._process.stdin
        with suppress(OSError, ValueError):
            self._process.stdin.write(f"{line}\n".encode())

    def start(self, task: Task) -> None:
        self.send(json.dumps(asdict(task)))

    @property
    def code(self) -> int | None:
        """The agent's exit code; None while it runs."""
        code = self._process.poll()
        return LOST if code is not None and code < 0 else code

    def close(self) -> None:
        """End the connection, and with it the agent: at once where there is none."""
        assert self._process.stdin
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join(1)


def connect(hosts: Sequence[str], job_id: str, ssh: Sequence[str], lost_after: float) -> dict[str, Node]:
    """Start an agent on each host, all at once; those that answer, in the order of `hosts`.

    The first one has rank 0, which speaks for the run; what the others print begins with the host's name.
    """
    nodes = [Node(host, job_id, ssh, lost_after, f"{host}: " if number else "") for number, host in enumerate(hosts)]
    deadline = time.monotonic() + _HANDSHAKE_SECONDS
    while time.monotonic() < deadline and any(node.handshake is None and node.code is None for node in nodes):
        time.sleep(_POLL_SECONDS)
    for node in nodes:
        if node.handshake is None:
            node.close()
    return {node.host: node for node in nodes if node.handshake}


def tasks(nodes: Mapping[str, Node], common: Task) -> dict[str, Task]:
    """Each node's part: where the others find rank 0, and on which of its addresses it can be reached itself."""
    handshakes = {host: node.handshake for host, node in nodes.items() if node.handshake}
    seen_from = next((handshake.launch_address for handshake in handshakes.values() if handshake.launch_address), None)
    addresses = {host: handshake.address or seen_from for host, handshake in handshakes.items()}
    first = next(iter(handshakes))
    return {
        host: Task(
            **asdict(common)
            | {
                "node_rank": rank,
                "master": (addresses[first] or "127.0.0.1") if len(handshakes) > 1 else "127.0.0.1",
                "port": handshakes[first].port,
                "address": addresses[host] if len(handshakes) > 1 else None,
            }
        )
        for rank, host in enumerate(handshakes)
    }
