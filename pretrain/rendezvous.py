"""How the ranks of a job meet: through a store on rank 0's machine, told of while it lasts, ended by a signal.

torch's own meeting is silent and deaf for as long as it takes. Here the main thread sees signals and speaks, a second
one talks to the store, a third forms the process group, which nothing can interrupt. Ranks meet in a *round*: torchrun
keeps one store for all restarts, so what an earlier round has left must not be taken for this one. On the way ranks
learn by which interface they reach each other, which gloo would take from the host's name.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Generic, NoReturn, TypeVar
from uuid import uuid4

import torch.distributed as torch_dist
from torch._C._distributed_c10d import (  # which torch.distributed has, but no type checker sees
    PrefixStore,
    Store,
    TCPStore,
)

from cloze.errors import ExitCode, PeerFailed, PeerLost, Stopped, UserError, first_line
from cloze.log import log
from pretrain.launchers import Ranks, port_remedy
from pretrain.machine import interface_of, machine_id

T = TypeVar("T")

_Card = dict[str, Any]  # what a rank tells the others of itself

_INTERFACE, _LOOPBACK = "GLOO_SOCKET_IFNAME", "127.0.0.1"
_POLL_SECONDS, _MOST_POLL_SECONDS = 0.02, 0.2  # between two looks: more and more
_SPEAK_SECONDS = 10.0
_CONNECT_SECONDS = 1.0
_STORE_TIMEOUT = timedelta(seconds=300)
_GROUP_SECONDS = 120.0  # for all to connect to all, once all are there
_INTRUDER_SECONDS = 10.0
_LEAVE_SECONDS = 5.0  # for the others to hear that we leave


class NoConnection(UserError):
    """The ranks found each other, but cannot talk; `reason` is what the system says."""

    one_rank_only = True

    def __init__(self, reason: str) -> None:
        over = f"{_INTERFACE}={os.environ[_INTERFACE]}" if _INTERFACE in os.environ else "the one of the host name"
        super().__init__(
            f"{socket.gethostname()}: its ranks do not reach the others by the network interface {over} ({reason}); "
            f"set {_INTERFACE} on every host to the one that the others reach (`ip address` lists them)"
        )
        self.reason = reason


class _Background(Generic[T]):
    """An action in a thread of its own, which does not keep the process alive."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, args=[action], daemon=True).start()

    def _run(self, action: Callable[[], T]) -> None:
        try:
            self._results.append(action())
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            self._error = error
        finally:
            self._done.set()

    def wait(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def result(self) -> T:
        """Of an action that is done. Raises what it raised."""
        if self._error:
            raise self._error
        return self._results[0]


class Meeting(Generic[T]):
    """One rank's way to the others, to what `form(store)` makes of them: the process group."""

    def __init__(self, ranks: Ranks, form: Callable[[Store], T]) -> None:
        self._ranks, self._form = ranks, form
        self._at = f"{ranks.master}:{ranks.port}"
        self._nonce = uuid4().hex
        self._num_missing, self._missing = 1, "rank 0"  # as far as this rank knows
        self._speaks = True
        self._leaving = threading.Event()
        self._poll_seconds = _POLL_SECONDS
        self._round = ""  # the prefix of its keys, once this rank is in it
        self._num_others = 0  # of the round, that hear rank 0
        self._local = self._seen = ""  # our address towards rank 0, and rank 0's as we see it
        # torchrun's agent has the store, and ranks come and go
        self._store_is_ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)

    def run(self, requested: Callable[[], bool]) -> T:
        """Meet. Raises `Stopped` when that is `requested`, other `UserError`s where it cannot be."""
        talk = _Background(self._talk)
        spoken = time.monotonic()
        while not talk.wait(_POLL_SECONDS):
            if requested():
                self._leaving.set()
                talk.wait(_LEAVE_SECONDS)
                raise Stopped(f"stopped while waiting for the other ranks at {self._at}; the same command starts again")
            if self._speaks and time.monotonic() - spoken > _SPEAK_SECONDS:
                spoken = time.monotonic()
                log.info(self._waiting())
        return talk.result()

    def _waiting(self) -> str:
        size = self._ranks.world_size
        if self._num_missing:
            return f"waiting for {self._num_missing} of {size} ranks at {self._at} ({self._missing})"
        return f"waiting for {size} ranks to connect to each other over {os.environ.get(_INTERFACE, 'the network')}"

    # In the thread that talks to the store

    def _talk(self) -> T:
        store = self._open()
        try:
            all_ranks = self._enter(store) if self._ranks.rank else self._gather(store)
            self._num_missing = 0
            self._choose_interface(all_ranks)
            return self._connect(store)
        except torch_dist.DistError as error:
            raise PeerLost(f"{self._at}: rank 0 is gone ({first_line(error)}); what it says tells why") from error

    def _open(self) -> Store:
        if self._ranks.rank or not self._store_is_ours:
            self._seen = self._reach()
            return self._client()
        return TCPStore(
            _LOOPBACK,
            self._ranks.port,
            is_master=True,
            timeout=_STORE_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=self._listen().detach(),
        )

    def _client(self) -> Store:
        return TCPStore(self._seen or _LOOPBACK, self._ranks.port, timeout=_STORE_TIMEOUT, wait_for_workers=False)

    def _listen(self) -> socket.socket:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            return socket.create_server(("", self._ranks.port), family=family, backlog=1024, dualstack_ipv6=both)
        except OSError as error:
            with socket.socket() as probe:
                probe.bind(("", 0))
                free = probe.getsockname()[1]
            raise UserError(
                f"port {self._ranks.port} of {socket.gethostname()}, where the ranks would meet: "
                f"{os.strerror(error.errno or 0)} (another job?); {port_remedy(os.environ, free)}"
            ) from error

    def _reach(self) -> str:
        """Rank 0's address, once something listens there."""
        while True:
            try:
                with socket.create_connection((self._ranks.master, self._ranks.port), _CONNECT_SECONDS) as probe:
                    self._local = probe.getsockname()[0]
                    return str(probe.getpeername()[0])
            except socket.gaierror:
                self._missing = f"rank 0: {self._ranks.master} is not a name that this machine knows"
            except OSError as error:
                self._missing = f"rank 0: {error.strerror or 'no answer'}"
            if self._leaving.wait(self._pause()):
                raise Stopped("stopped while waiting")

    def _gather(self, store: Store) -> list[_Card]:
        """As rank 0: open a round, and close it when all are in it."""
        size = self._ranks.world_size
        self._round = uuid4().hex
        store.set(f"{self._round}/siblings", self._siblings())
        store.set("round", self._round)
        keys = {rank: f"{self._round}/rank/{rank}" for rank in range(1, size)}
        found: dict[int, _Card] = {}
        while True:
            for rank in [rank for rank, key in keys.items() if rank not in found and store.check([key])]:
                found[rank] = json.loads(store.get(keys[rank]))
            self._num_others = len(found)
            missing = [rank for rank in keys if rank not in found]
            if not missing:
                break
            self._num_missing = len(missing)
            names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            self._missing = f"rank{'s' if len(missing) > 1 else ''} {names}"
            self._heed(store)
            time.sleep(self._pause())
        for rank, card in sorted(found.items()):
            if card["of"] != size:
                wrong = f"WORLD_SIZE={size} on rank 0, {card['of']} on rank {rank}; start all by the same command"
                self._end(store, ExitCode.USAGE, wrong)
                raise UserError(wrong)
        all_ranks = [self._card(), *(found[rank] for rank in sorted(found))]
        store.set(f"{self._round}/all", json.dumps(all_ranks))
        return all_ranks

    def _enter(self, store: Store) -> list[_Card]:
        """As another rank: enter the newest round, until one is closed with us in it."""
        card = json.dumps(self._card())
        while True:
            newest = store.get("round").decode() if store.check(["round"]) else self._round
            if newest != self._round and not store.check([f"{newest}/end"]):
                key = f"{newest}/rank/{self._ranks.rank}"
                if self._is_of_other_job(store, newest) or store.compare_set(key, "", card).decode() != card:
                    self._intrude()
                else:
                    self._round, self._speaks = newest, False  # rank 0 does
            if self._round and store.check([f"{self._round}/all"]):
                all_ranks: list[_Card] = json.loads(store.get(f"{self._round}/all"))
                if self._card() in all_ranks:
                    return all_ranks
            self._heed(store)
            time.sleep(self._pause())

    def _card(self) -> _Card:
        return {
            "nonce": self._nonce,
            "of": self._ranks.world_size,
            "machine": machine_id(),
            "seen": self._seen,
        }

    def _siblings(self) -> str:
        """What deepspeed's ranks on one node have in common, and another job's have not."""
        node = os.environ.get("CROSS_RANK")
        return f"{machine_id()} {node} {os.getppid()}" if node else ""

    def _is_of_other_job(self, store: Store, prefix: str) -> bool:
        theirs, ours = store.get(f"{prefix}/siblings").decode(), self._siblings()
        return bool(ours) and theirs != ours and theirs.rpartition(" ")[0] == ours.rpartition(" ")[0]

    def _intrude(self) -> None:
        """Another job meets here, unless torchrun's store still tells of the round before ours."""
        if not self._store_is_ours:
            return
        if self._leaving.wait(_INTRUDER_SECONDS):  # our own rank 0 tells that it has no port, and we are ended
            raise Stopped("stopped while waiting")
        raise UserError(
            f"{self._at}: the ranks of another job meet there; see that MASTER_ADDR and RANK are of this one, and "
            f"{port_remedy(os.environ, self._ranks.port + 1)}"
        )

    def _heed(self, store: Store) -> None:
        """Leave, where we or another rank of the round was told to."""
        if self._round and store.check([f"{self._round}/end"]):
            self._follow(store, store.get(f"{self._round}/end").decode())
        if self._leaving.is_set():
            self._end(store, ExitCode.STOPPED, "stopped while waiting")
            raise Stopped("stopped while waiting")

    def _end(self, store: Store, code: ExitCode, reason: str) -> None:
        """Have all ranks of the round leave with this code. Raises `PeerFailed` where one of them said so before."""
        if not self._round:
            return
        said = f"{code.value} {self._nonce} {reason}"
        first = store.compare_set(f"{self._round}/end", "", said).decode()
        if first != said:
            self._follow(store, first)
        self._take_leave(store)

    def _follow(self, store: Store, end: str) -> NoReturn:
        code, _, reason = end.split(" ", 2)
        self._take_leave(store)
        raise PeerFailed(reason, ExitCode(int(code)))

    def _take_leave(self, store: Store) -> None:
        """Tell that we know; the store ends with rank 0, so it waits until all do."""
        left = f"{self._round}/left"
        store.add(left, 1)
        end = time.monotonic() + _LEAVE_SECONDS
        while store.add(left, 0) <= self._num_others and self._num_others and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    def _pause(self) -> float:
        self._poll_seconds = min(_MOST_POLL_SECONDS, 1.1 * self._poll_seconds)
        return self._poll_seconds

    def _choose_interface(self, all_ranks: list[_Card]) -> None:
        """Tell gloo by which interface the others reach us, where the user has not."""
        machine = all_ranks[0]["machine"]
        from_outside = [card["seen"] for card in all_ranks if card["machine"] != machine]
        if not from_outside:
            address = _LOOPBACK
        elif machine == machine_id():
            address = from_outside[0]
        else:
            address = self._local
        if _INTERFACE not in os.environ and (name := interface_of(address)):
            os.environ[_INTERFACE] = name

    def _connect(self, store: Store) -> T:
        """Form the group. What one rank finds wrong it tells: the others would wait for it."""
        watch = self._client()  # the group waits in the other
        forming = _Background(lambda: self._form(PrefixStore(f"{self._round}/group", store)))
        end = time.monotonic() + _GROUP_SECONDS
        while not forming.wait(self._pause()):
            self._heed(watch)
            if time.monotonic() > end:
                self._fail(watch, f"no connection within {_GROUP_SECONDS:.0f} s")
        try:
            return forming.result()
        except RuntimeError as error:
            self._fail(watch, first_line(error))

    def _fail(self, store: Store, reason: str) -> NoReturn:
        self._end(store, ExitCode.USAGE, reason)
        raise NoConnection(reason)
