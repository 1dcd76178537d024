"""What stands in front of the tests' S3 server: keys expire here, and it may be busy, as at AWS's own."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

_ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>{}</Message></Error>"


@dataclass
class Front:
    """Requests signed with a key of `expired` are refused, the next `busy` ones are put off; the rest goes through."""

    url: str = ""
    expired: set[str] = field(default_factory=set)
    busy: int = 0

    def refusal(self, authorization: str) -> tuple[int, str] | None:
        """(status, body) of S3's answer, where there is one."""
        if any(f"Credential={key}/" in authorization for key in self.expired):
            return 400, _ERROR.format("ExpiredToken", "The provided token has expired.")
        if self.busy:
            self.busy -= 1
            return 503, _ERROR.format("SlowDown", "Please reduce your request rate.")
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    front: Front
    upstream: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if refusal := self.front.refusal(self.headers.get("Authorization", "")):
            self._reply(refusal[0], {"Content-Type": "application/xml"}, refusal[1].encode())
            return
        connection = HTTPConnection(self.upstream, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        self._reply(answer.status, dict(answer.getheaders()), answer.read())
        connection.close()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        left_out = ("content-length", "transfer-encoding", "connection", "date", "server")
        for name, value in headers.items():
            if name.lower() not in left_out:
                self.send_header(name, value)
        size = next((value for name, value in headers.items() if name.lower() == "content-length"), str(len(body)))
        self.send_header("Content-Length", size if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def front_of(url: str) -> Iterator[Front]:
    """A front of the S3 server at `url`."""
    front = Front()
    handler = type("Handler", (_Handler,), {"front": front, "upstream": urlsplit(url).netloc})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        front.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield front
        finally:
            server.shutdown()
            thread.join()


def write_key(path: Path, key: str) -> dict[str, str]:
    """A file of credentials as AWS's tools share it; the variables that name it, and no key of their own."""
    text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\naws_session_token = token\n"
    path.write_text(text)
    return {"AWS_SHARED_CREDENTIALS_FILE": str(path), "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
