"""The model card from a run's own files, and its upload to a hub that stands on this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
import yaml

from data_prep.errors import UserError
from data_prep.manifest import manifest_sha256, read_manifest
from pretrain.card import push, replace_section, write_card
from pretrain.checkpoint import LossScale, TrainingState
from tests.support import make_corpus, make_identity


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


def card(folder: Path, corpus: Path, run: Path, **state: Any) -> str:
    known = {"step": 1200, "samples": 9600, "tokens": 345678, "identity": make_identity(data=manifest_sha256(corpus))}
    rest = {"seconds": 1.0, "optimizer_steps": 1, "rollbacks": 0, "loss_scale": LossScale(), "wandb_id": None}
    told = TrainingState(**{**known, **rest, **state})
    config = {"data": {"path": str(corpus)}, "model": {"architecture": "bert", "max_positions": 512}}
    folder.mkdir(exist_ok=True)
    write_card(folder, "books", run, told, config)
    return (folder / "README.md").read_text()


def test_card_tells_corpus_recipe_curves_and_limits(tmp_path: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": step, "train/mlm_loss": 9 / step, "eval/mlm_loss": 9.5 / step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text(f"steps: 3\noptim: {{lr: 0.001}}\ndata: {{path: {corpus}}}\n")
    text = card(tmp_path / "out", corpus, run)
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "fill-mask", "tags": ["bert"]}
    manifest = read_manifest(corpus)
    passes = manifest.splits["pass-00"]
    for fact in (
        "next-sentence prediction", f"| tokens in a pass | {passes.tokens:,} |", "| tokens | 345,678 |",
        "| steps | 1,200 |", "| peak learning rate | 0.001 |", "| held-out MLM loss | 9.500 → 3.167 |",
        'AutoTokenizer.from_pretrained("books")', f"shows it no more than {manifest.max_len}"[6:], "512 tokens at once",
    ):  # fmt: skip
        assert fact in text, fact
    assert str(corpus) not in text
    assert "![" in text
    assert ElementTree.parse(tmp_path / "out" / "curves.svg").getroot().tag.endswith("svg")


def test_card_says_what_is_not_known(tmp_path: Path, corpus: Path) -> None:
    text = card(tmp_path, corpus, tmp_path / "gone", identity=make_identity())
    assert "It was not at hand" in text
    assert "![" not in text
    assert not (tmp_path / "curves.svg").exists()


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path, corpus: Path) -> None:
    before = card(tmp_path, corpus, tmp_path / "gone")
    for body in ("first \\1", "second"):
        assert replace_section(tmp_path, "evaluation", body)
    after = (tmp_path / "README.md").read_text()
    head, tail = before.split("On no task so far; `python -m finetune.suite` does it.")
    assert after == head + "second" + tail
    assert not replace_section(tmp_path, "curves", "x")
    assert not replace_section(tmp_path / "none", "evaluation", "x")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs: it keeps what was committed, and says no to a wrong token."""

    files: ClassVar[dict[str, bytes]] = {}
    created: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        root = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.headers.get("Authorization") != "Bearer right":
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self._answer({"url": f"{root}/ann/books", "name": "ann/books"})
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._answer(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer({"commitUrl": f"{root}/ann/books/commit/1", "commitOid": "1", "success": True})
        return self._answer({}, 200 if self.path.endswith("validate-yaml") else 404)

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer right"
        self._answer({"sha": "0", "id": "ann/books", "siblings": []} if known else {}, 200 if known else 401)

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HF_TOKEN", "right")
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_uploads_every_file(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [bert]\n---\n# books\n")
    (tmp_path / "config.json").write_text("{}")
    assert push(tmp_path, "ann/books", private=True, endpoint=hub).endswith("/ann/books")
    assert Hub.files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert Hub.created[0]["name"] == "books"
    assert Hub.created[0].get("private") is True or Hub.created[0].get("visibility") == "private"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match=r"--push ann/books: refused \(.*401.*\); the model is in") as caught:
        push(tmp_path, "ann/books", private=True, endpoint=hub)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"--push a b: refused"):
        push(tmp_path, "a b", private=True, endpoint=hub)
