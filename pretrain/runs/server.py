"""Pages of runs for a browser: live, read-only, on this machine's own address unless a token guards them.

Python's own HTTP server; nothing is written, and no path of a request is ever a path of the disk: runs are found by the
names under which they are listed. What a page shows is read as it grows, in bounded memory.
"""

import hmac
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from http import HTTPStatus
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from cloze.errors import ExitCode, UserError
from cloze.log import log
from cloze.templates import render
from pretrain.runs.listing import HEAD, cells
from pretrain.telemetry.metrics_file import METRICS_NAME, MetricsFile
from pretrain.telemetry.report import RunData, fresh, read_run, report_page, script_hash
from pretrain.telemetry.standing import Standing, run_directories, standing_of

_OPEN_FILES = 16  # whose rows are kept between two requests
_MOST_COMPARED = 8
_LIST_SECONDS = 2.0  # a list is as old at most
_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")
_COOKIE = "cloze_token"


class NotFound(Exception):
    """There is no such page."""


class Library:
    """The runs under one directory, read once and kept as long as nothing changes. For several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: OrderedDict[str, MetricsFile] = OrderedDict()
        self._lock = threading.Lock()
        self._standings: dict[Path, tuple[tuple[Any, ...], Standing]] = {}
        self._listed: tuple[float, list[tuple[str, Standing]]] = (-_LIST_SECONDS, [])

    def standings(self) -> list[tuple[str, Standing]]:
        """(name, where it stands) of every run; the newest first."""
        with self._lock:
            if time.monotonic() < self._listed[0] + _LIST_SECONDS:
                return self._listed[1]
            found = [(self._name(path), self._standing(path)) for path in run_directories(self.root)]
            found.sort(key=lambda one: (one[1].state != "running", -one[1].seen))
            self._listed = time.monotonic(), found
            return found

    def runs(self, names: Sequence[str]) -> list[RunData]:
        """What is known of the runs of these names now. Raises `NotFound`, or `UserError` of one without metrics."""
        with self._lock:
            known = {self._name(path): path for path in run_directories(self.root)}
            if not names or len(names) > _MOST_COMPARED or not {*names} <= known.keys():
                raise NotFound
            return [read_run(known[name], name, self._file(name, known[name])) for name in names]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _file(self, name: str, path: Path) -> MetricsFile:
        file = self._files.pop(name, None) or MetricsFile(path / METRICS_NAME)
        self._files[name] = file
        while len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def _standing(self, path: Path) -> Standing:
        stamp = tuple(_stamp(path / name) for name in (METRICS_NAME, "status.json", "environment.json", "config.yaml"))
        known = self._standings.get(path)
        if known is None or known[0] != stamp or known[1].state == "running":  # whose end may leave no word
            self._standings[path] = stamp, standing_of(path)
        return self._standings[path][1]


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    server: "Server"
    server_version, sys_version, protocol_version = "cloze", "", "HTTP/1.1"

    def do_GET(self) -> None:
        """A page, or why there is none."""
        try:
            self._answer()
        except NotFound:
            self._text(HTTPStatus.NOT_FOUND, "no such run; / lists those that are there")
        except UserError as error:
            self._text(HTTPStatus.NOT_FOUND, str(error))
        except (BrokenPipeError, ConnectionResetError):  # the browser went away
            self.close_connection = True

    do_HEAD = do_GET

    def _answer(self) -> None:
        asked = urlsplit(self.path)
        query = parse_qs(asked.query)
        if not self._may(query):
            return
        names, library = query.get("run", []), self.server.library
        match asked.path:
            case "/":
                self._send(list_page(), "text/html")
            case "/list":
                self._json(list_data(library.standings()))
            case "/run":
                live = f"/fresh?{urlencode({'run': names}, doseq=True, quote_via=quote)}"
                self._send(report_page(library.runs(names), live=live), "text/html")
            case "/fresh":
                self._json(fresh(library.runs(names)))
            case _:
                raise NotFound

    def _may(self, query: dict[str, list[str]]) -> bool:
        """Whether this browser may read; one that another site's name led here may not."""
        token = self.server.token
        if token is None:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if host not in _NAMES:
                self._text(HTTPStatus.FORBIDDEN, "served to this machine only")
                return False
            return True
        kept = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        given = query.get("token", [kept.value if kept else ""])[0]
        if not hmac.compare_digest(given.encode(), token.encode()):
            self._text(HTTPStatus.FORBIDDEN, "add ?token=… to the address: the one that --token gave")
            return False
        self._cookie = f"{_COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/" if "token" in query else None
        return True

    _cookie: str | None = None

    def _json(self, body: dict[str, Any]) -> None:
        text = json.dumps(body, ensure_ascii=False)
        tag = sha256(text.encode()).hexdigest()[:16]
        if self.headers.get("X-Etag") == tag:
            self._send("", "application/json", HTTPStatus.NO_CONTENT)
        else:
            self._send(json.dumps(body | {"etag": tag}, ensure_ascii=False), "application/json")

    def _text(self, status: HTTPStatus, text: str) -> None:
        self._send(text, "text/plain", status)

    def _send(self, text: str, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        body = text.encode()
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            **({"Set-Cookie": self._cookie} if self._cookie else {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """To whom asks for more; a request may hold a token."""
        log.debug(f"{self.command} {urlsplit(self.path).path}")


class Server(ThreadingHTTPServer):
    """Listens until it is closed."""

    daemon_threads = True

    def __init__(self, library: Library, host: str, port: int, token: str | None) -> None:
        """Raises `UserError` where the address may not be listened on, or cannot be."""
        if not token and not _is_loopback(host):
            raise UserError(f"--host {host}: others could read the runs; add --token, or leave --host out")
        self.library, self.token = library, token or None
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--host {host} --port {port}: {error}; name another, or --port 0 for a free one"
            ) from error

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/" + (f"?token={quote(self.token)}" if self.token else "")


def serve(root: Path, host: str, port: int, token: str | None) -> int:
    """Serve until Ctrl-C; the address goes to stdout."""
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; name the one that holds the runs with --root")
    with Server(Library(root), host, port, token) as server:
        print(server.address, flush=True)
        log.info(f"serving {len(run_directories(root))} runs in {root}; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("ended; nothing was written")
    return ExitCode.OK


def list_page() -> str:
    """All runs, with a box that filters and boxes that choose what to compare; its script asks for `list_data`."""
    folder = Path(__file__).parent / "templates"
    script = (folder / "runs.js").read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{script_hash(script)}'; connect-src 'self'"
    return render(__file__, "runs.html", title="Cloze: runs", mark="", policy=policy, script=script, head=HEAD)


def list_data(standings: Sequence[tuple[str, Standing]]) -> dict[str, Any]:
    """What the list shows: text, which the script puts in as text."""
    now = time.time()
    rows = [
        {"name": name, "state": one.state.split()[0], "learning": one.learning, "cells": [name, *cells(one, now)[1:]],
         "share": one.share, "advice": one.advice}
        for name, one in standings
    ]  # fmt: skip
    return {"runs": rows}


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
