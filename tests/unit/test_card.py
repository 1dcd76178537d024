"""The model card from a run's own files, and its upload to a hub that stands on this machine."""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
import torch
import yaml
from huggingface_hub import constants
from transformers import AutoModelForPreTraining

from cloze.corpus.diagnosis import Finding, as_data
from cloze.corpus.manifest import manifest_sha256, read_manifest, write_manifest
from cloze.errors import UserError
from pretrain import card as renewed
from pretrain.evaluate import results
from pretrain.evaluate.confidence import Interval
from pretrain.evaluate.pll import Metric
from pretrain.evaluate.probing import LayerScore, ProbeResult
from pretrain.evaluate.probing import as_data as as_rows
from pretrain.export import __main__ as export
from pretrain.export import load_hugging_face
from pretrain.export.card import push, replace_section, write_card
from pretrain.export.card_facts import Options, Trained
from tests.support import Trainer, free_port, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


def card(folder: Path, corpus: Path, run: Path, options: dict[str, Any] | None = None, **state: Any) -> str:
    known = {"step": 1200, "samples": 9600, "tokens": 345678, "corpus_sha256": manifest_sha256(corpus)}
    config = {"data": {"path": str(corpus)}, "model": {"architecture": "bert", "max_positions": 512}}
    folder.mkdir(exist_ok=True)
    write_card(folder, run, Trained(**{**known, **state}), config, Options(name="books", **(options or {})))
    return (folder / "README.md").read_text()


def test_card_tells_corpus_recipe_curves_and_limits(tmp_path: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": step, "train/mlm_loss": 9 / step, "eval/mlm_loss": 9.5 / step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text(f"steps: 3\noptim: {{lr: 0.001}}\ndata: {{path: {corpus}}}\n")
    text = card(tmp_path / "out", corpus, run)
    assert "mean of the checkpoints" not in text
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "fill-mask", "tags": ["bert"]}
    manifest = read_manifest(corpus)
    passes = manifest.splits["pass-00"]
    for fact in (
        "next-sentence prediction", f"| tokens in a pass | {passes.tokens:,} |", "| tokens | 345,678 |",
        "| steps | 1,200 |", "| peak learning rate | 0.001 |", "| held-out MLM loss | 9.500 → 3.167 |",
        'pipeline("fill-mask", model="books")', f"shows it no more than {manifest.max_len}"[6:], "512 tokens at once",
    ):  # fmt: skip
        assert fact in text, fact
    assert str(corpus) not in text
    assert "![" in text
    assert ElementTree.parse(tmp_path / "out" / "curves.svg").getroot().tag.endswith("svg")


def test_card_counts_splits_with_names_as_held_out(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", val=0, named_val={"news": 21})
    text = card(tmp_path / "out", tmp_path / "corpus", tmp_path / "gone")
    assert "| passes | 1 |" in text
    assert "| held out, news | 21 samples |" in text


def with_scripts(folder: Path, meaning: str) -> Path:
    make_corpus(folder)
    finding = Finding(name="scripts", value=2, meaning=meaning, remedy="")
    write_manifest(folder, replace(read_manifest(folder), diagnosis=as_data([finding])))
    return folder


@pytest.mark.parametrize(
    ("scripts", "named", "languages"),
    [
        ("cjk 88.0%, latin 12.0%", [], ["zh"]),
        ("hiragana 50.0%, cjk 40.0%, katakana 10.0%", [], ["ja"]),
        ("latin 95.1%, greek 4.9%", [], None),
        ("latin 95.1%, greek 4.9%", ["no", "zh-Hant"], ["no", "zh-Hant"]),
    ],
)
def test_languages_are_those_that_are_named_or_that_letters_tell(
    tmp_path: Path, scripts: str, named: list[str], languages: list[str] | None
) -> None:
    corpus = with_scripts(tmp_path / "corpus", scripts)
    text = card(tmp_path / "out", corpus, tmp_path / "gone", {"languages": named, "license": "cc0-1.0"})
    front = yaml.safe_load(text.split("---")[1])
    assert front.get("language") == languages
    assert front["license"] == "cc0-1.0"
    assert f"| scripts | {scripts} |" in text
    assert ("今天" in text) == (languages == ["zh"])
    assert "whoever publishes" not in text


@pytest.mark.parametrize("options", [{"languages": ["English"]}, {"license": "all rights reserved"}])
def test_what_is_no_language_and_no_licence_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^--l(anguage English|icense all rights reserved): [^\n]+$"):
        Options(**options)


def test_card_tells_evaluations_beside_what_guessing_gives(tmp_path: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    guess = {"eval/frequencies_loss": 6.0, "eval/majority_nsp_accuracy": 0.51}
    rows = [
        {"step": step, "tokens": 2_000_000 * step, "eval/mlm_loss": 9.0 - step, "eval/nsp_accuracy": 0.8, **guess}
        for step in range(1, 7)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    estimate = {"value": 0.625, "standard_error": 0.01, "sampling_error": 0.01}
    row = {"pairs": 6700, Metric.within_word_l2r.value: estimate, "frequencies": estimate, "gain": estimate}
    pairs = {"groups": {"all": row}, "fields": {"syntax": {**row, "gain": None}}}
    results.write(str(run / "a.json"), {"format": "cloze-grammar", "data": ["/x/BLiMP.zip"], "minimal_pairs": pairs})
    layers = [LayerScore(Interval(at, at - 1, at + 1), (60.0, at - 10), None) for at in (70.0, 80.0, 75.0)]
    found = as_rows([ProbeResult("subj", "accuracy", 9, 9, 50.0, layers)])
    results.write(str(run / "b.json"), {"format": "cloze-probes", "model": "x", "results": found})
    text = card(tmp_path / "out", corpus, run, step=5)
    for fact in (
        "| MLM loss | 4.000 | 6.000 | 4.111 |", "| NSP accuracy | 80.0% | 51.0% | 50.0% |",
        "The model is off the plateau since 8.0M tokens:", "| 5 | 10,000,000 |  | 4.000 |",
        "## Grammar: BLiMP", "| all | 6,700 | 62.5 ± 1.0 | 62.5 ± 1.0 | +62.5 ± 1.0 |", "| syntax | 6,700 |",
        "| subj | accuracy | 80.0 (79.0 to 81.0) | 65.0 | 50.0 |", "| random_next |",
    ):  # fmt: skip
        assert fact in text, fact
    assert "| 6 |" not in text, "of a later step than the model's"
    assert "/x" not in text


def test_card_says_what_is_not_known(tmp_path: Path, corpus: Path) -> None:
    text = card(tmp_path, corpus, tmp_path / "gone", corpus_sha256="0" * 64)
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
    """As much of the hub as an upload needs: it keeps what was committed, and says no to a wrong token.

    Weights go by way of LFS, as the real one has it: asked for an address, put there, then named in the commit.
    """

    files: ClassVar[dict[str, bytes]] = {}
    large: ClassVar[dict[str, bytes]] = {}  # by sha256
    down: ClassVar[bool] = False
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
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return self._answer(
                {"files": [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]}
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            if self.down:
                return self._answer({"error": "the store is down"}, 400)
            wanted = json.loads(body)["objects"]
            where = {one["oid"]: {"upload": {"href": f"{root}/lfs/{one['oid']}"}} for one in wanted}
            return self._answer(
                {"transfer": "basic", "objects": [{**one, "actions": where[one["oid"]]} for one in wanted]}
            )
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.large[line["value"]["oid"]]
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer({"commitUrl": f"{root}/ann/books/commit/1", "commitOid": "1", "success": True})
        return self._answer({}, 200 if self.path.endswith("validate-yaml") else 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == f"/lfs/{hashlib.sha256(body).hexdigest()}"
        self.large[self.path.removeprefix("/lfs/")] = body
        self._answer({})

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
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet's own store is no plain HTTP
    for kept in (Hub.files, Hub.large, Hub.created):
        kept.clear()
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


CLIENTS_OWN = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@CLIENTS_OWN
def test_push_uploads_every_file(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [bert]\n---\n# books\n")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    assert push(tmp_path, "ann/books", private=True, endpoint=hub).endswith("/ann/books")
    assert Hub.files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert Hub.created[0]["name"] == "books"
    assert Hub.created[0].get("private") is True or Hub.created[0].get("visibility") == "private"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert Hub.large
    with pytest.raises(UserError, match=r"--push ann/books: failed \(.*401.*\); the model is in .*repeat") as caught:
        push(tmp_path, "ann/books", private=True, endpoint=hub)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"--push a b: failed"):
        push(tmp_path, "a b", private=True, endpoint=hub)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"nobody is logged in; run `hf auth login`, or set HF_TOKEN"):
        push(tmp_path, "ann/books", private=True, endpoint=hub)


def test_a_hub_that_is_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "right")
    with pytest.raises(UserError, match=r"--push ann/books: failed \(.*\); the model is in") as caught:
        push(tmp_path, "ann/books", private=True, endpoint=f"http://127.0.0.1:{free_port()}")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@CLIENTS_OWN
def test_the_command_pushes_and_after_a_fault_the_same_command_does(
    hub: str,
    trainer: Trainer,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In between the suite has written its table: what is pushed in the end has it, and loads by the hub's name."""
    run = trainer.run(f"data.path={corpus}", "steps=2", "checkpoint.every=1").run
    out = tmp_path / "out"
    arguments = [str(run), str(out), "--push", "ann/books", "--public"]
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(Hub, "down", True)
    assert export.main(arguments) == 64
    told = capsys.readouterr()
    assert "exported; logits equal the trainer's" in told.out
    assert "the store is down" in told.err
    assert told.err.count("\n") == 1
    exported = AutoModelForPreTraining.from_pretrained(out).state_dict()
    for place in (run, run / "checkpoints" / "step-00000002"):
        weights = load_hugging_face(place).state_dict()
        assert weights.keys() == exported.keys()
        assert all(torch.equal(weights[name], exported[name]) for name in weights)
    assert replace_section(out, "evaluation", "a table")
    assert renewed.main([str(run), str(out), "--language", "de", "--license", "mit"]) == 0
    assert capsys.readouterr().out == f"{out}/README.md\n"
    text = (out / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["language"] == ["de"]
    assert "a table" in text
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert code
    exec(code[1], {})
    assert re.fullmatch(r"(\d+\.\d% {2}.+\n){5}", capsys.readouterr().out)
    assert renewed.main([str(corpus), str(out)]) == 64
    assert f"{corpus}: no run; name the one that {out} was exported from" in capsys.readouterr().err
    assert renewed.main([str(run), str(tmp_path)]) == 64
    assert f"{tmp_path}: does not say of which step it is" in capsys.readouterr().err
    monkeypatch.setattr(Hub, "down", False)
    assert export.main(arguments) == 0
    assert f"pushed to {hub}/ann/books" in capsys.readouterr().out
    assert Hub.created[-1].get("private") is False or Hub.created[-1].get("visibility") == "public"
    assert Hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    card = Hub.files["README.md"].decode()
    assert "a table" in card
    assert 'pipeline("fill-mask", model="ann/books")' in card
    # a mean of both checkpoints is another model, and its card, anew, says so
    mean = tmp_path / "mean"
    assert export.main([str(run), str(mean), "--average", "2"]) == 0
    assert renewed.main([str(run), str(mean)]) == 0
    assert "| weights | mean of the checkpoints of steps 1, 2 |" in (mean / "README.md").read_text()
    two = [load_hugging_face(path).state_dict() for path in sorted((run / "checkpoints").glob("step-*"))]
    for name, value in AutoModelForPreTraining.from_pretrained(mean).state_dict().items():
        torch.testing.assert_close(value, sum(weights[name] for weights in two) / 2)
    assert export.main([str(run), str(tmp_path / "three"), "--average", "3"]) == 64
    assert "--average 3: " in capsys.readouterr().err
    # another checkpoint is another model
    assert export.main([str(run / "checkpoints" / "step-00000001"), str(out)]) == 64
    assert "not empty; name another directory, or add --force" in capsys.readouterr().err


@pytest.mark.slow
def test_what_export_says_of_files_in_the_way_and_of_a_lost_tokenizer(
    trainer: Trainer, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer.run(f"data.path={corpus}", "steps=1", "checkpoint.every=1").run
    (tmp_path / "file").write_text("")
    for force in ([], ["--force"]):
        assert export.main([str(run), str(tmp_path / "file"), *force]) == 64
        assert capsys.readouterr().err == f"error: {tmp_path}/file: {tmp_path}/file is a file; name another directory\n"
    shutil.rmtree(run / "tokenizer")
    assert export.main([str(run), str(tmp_path / "out")]) == 64
    assert (
        capsys.readouterr().err == f"error: {run}/tokenizer: the run's tokenizer is missing; copy the corpus's there\n"
    )
