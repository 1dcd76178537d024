"""A server that answers as W&B's does what its client asks of it, on loopback, and can refuse, fail or fall silent.

It knows what a run needs: GraphQL for the run itself (`UpsertBucket`, `RunResumeStatus`), for its files and alerts, and
the file stream that rows of metrics go to. A run that was deleted is answered as W&B does: 409, for ever.
"""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

KEY = "0" * 40  # of the form of a W&B key

FEATURES: list[dict[str, Any]] = []  # of a server: none that are optional


@dataclass
class Run:
    """What the server knows of a run."""

    lines: dict[str, list[str]] = field(default_factory=dict)  # of each streamed file
    config: str = "{}"
    tags: tuple[str, ...] = ()
    project: str = ""
    display_name: str = ""
    exit_code: int | None = None
    deleted: bool = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics, without what W&B adds."""
        lines = map(json.loads, self.lines.get("wandb-history.jsonl", []))
        return [{key: value for key, value in line.items() if not key.startswith("_")} for line in lines]


@dataclass
class WandbStub:
    """`fault(what)` makes an answer a status (409, 503), or "silence". `what` is a GraphQL operation or "stream".

    `change` makes another status and body of those of an answer.
    """

    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # in order
    alerts: list[str] = field(default_factory=list)
    fault: Callable[[str], int | str | None] = lambda _: None
    change: Callable[[int, bytes], tuple[int, bytes]] = lambda status, data: (status, data)
    over: threading.Event = field(default_factory=threading.Event)  # ends what is silent
    stale: threading.Event = field(default_factory=threading.Event)  # set when something was refused or left unanswered

    def answer(self, operation: str, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """(status, body) to a GraphQL query."""
        name, project = given.get("name") or given.get("runName") or given.get("run"), given.get("project") or "p"
        whose = {"id": "p", "name": project, "entity": {"id": "e", "name": "somebody"}}
        if operation == "Viewer":
            viewer = {"id": "v", "entity": "somebody", "username": "somebody", "email": "", "flags": "{}"}
            return 200, {"viewer": viewer | {"admin": False, "teams": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return 200, {"serverInfo": {"features": FEATURES}}
        if operation == "RunResumeStatus":
            run = self.runs.get(str(name))
            return 200, {"model": whose | {"bucket": self._bucket(str(name), run) if run and not run.deleted else None}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(str(name), Run())
            if run.deleted:
                return 409, {
                    "errors": [{"message": f"run {name} was previously created and deleted; try a new run name"}]
                }
            run.config = given.get("config") or run.config
            run.tags, run.project = tuple(given.get("tags") or run.tags), given.get("project") or run.project
            run.display_name = given.get("displayName") or run.display_name
            bucket = self._bucket(str(name), run) | {"project": whose, "sweepName": None, "description": ""}
            return 200, {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": each, "uploadUrl": f"{self.url}/upload/{name}"} for each in given["files"]]
            return 200, {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":  # of which it has the content already
            sequence = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
            return 200, {"createArtifact": {"artifact": artifact}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(f"{given['title']}: {given['text']}")
            return 200, {"notifyScriptableRunAlert": {"success": True}}
        return 200, {}

    @staticmethod
    def _bucket(name: str, run: Run) -> dict[str, Any]:
        history = run.lines.get("wandb-history.jsonl", [])
        counts = {f"{what}LineCount": len(run.lines.get(f, [])) for what, f in (("log", "output.log"), ("events", "e"))}
        return counts | {
            "id": f"id-{name}", "name": name, "displayName": run.display_name, "config": run.config,
            "tags": [*run.tags], "historyLineCount": len(history),
            "historyTail": json.dumps(history[-1:]), "eventsTail": "[]",
            "summaryMetrics": "{}", "notes": "", "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def stream(self, name: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Take lines of a run's files."""
        run = self.runs.setdefault(name, Run())
        if run.deleted:
            return 409, {"error": "run was deleted"}
        for file, part in (body.get("files") or {}).items():
            lines = run.lines.setdefault(file, [])
            lines[int(part.get("offset") or 0) :] = part["content"]
        if body.get("complete"):
            run.exit_code = int(body.get("exitcode") or 0)
        return 200, {"exitcode": None, "limits": {}}


class _Handler(http.server.BaseHTTPRequestHandler):
    stub: WandbStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.endswith(("/graphql", "/file_stream")):  # W&B's own telemetry
            self._reply(self.path, lambda: (200, {}))
            return
        data = json.loads(raw)
        if self.path.endswith("/graphql"):
            operation = data.get("operationName") or data["query"].split("(")[0].split("{")[0].split()[-1]
            self._reply(operation, lambda: self._graphql(operation, data.get("variables") or {}))
        else:
            self._reply("stream", lambda: self.stub.stream(self.path.split("/")[-2], data))

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply("upload", lambda: (200, {}))

    def do_GET(self) -> None:
        self._reply(self.path, lambda: (404, {}))

    def _graphql(self, operation: str, variables: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, body = self.stub.answer(operation, variables)
        return status, body if "errors" in body else {"data": body}

    def _reply(self, what: str, answer: Callable[[], tuple[int, dict[str, Any]]]) -> None:
        self.stub.asked.append(what)
        fault = self.stub.fault(what)
        if fault:
            self.stub.stale.set()
        if fault == "silence":
            self.stub.over.wait()
            self.close_connection = True
            return
        status, body = (fault, {"error": "a fault"}) if isinstance(fault, int) else answer()
        status, data = self.stub.change(status, json.dumps(body).encode())
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Nothing: a client that is gone is what some tests are about."""


@contextmanager
def wandb_stub() -> Iterator[WandbStub]:
    """A server that runs; its `url` is for WANDB_BASE_URL."""
    stub = WandbStub()
    handler = type("Handler", (_Handler,), {"stub": stub})
    with _Server(("127.0.0.1", 0), handler) as server:
        stub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield stub
        finally:
            stub.over.set()
            server.shutdown()
            thread.join()
