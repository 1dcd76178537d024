"""Sinks against what lies on disk, redaction against secrets one must not find."""

import io
import json
import math
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze.cli import compose
from cloze.errors import DiskError, UserError
from cloze.log import log
from cloze.redact import redact, redact_overrides
from pretrain.config import TrainConfig
from pretrain.dist import Process
from pretrain.telemetry.console import Console
from pretrain.telemetry.sinks import (
    HarmlessSink,
    JsonlSink,
    Telemetry,
    TensorBoardSink,
    open_telemetry,
    sink_of_your_own,
)
from pretrain.telemetry.wandb_sink import RunId, WandbSink, raise_alert, wandb_mode


def config(*overrides: str) -> TrainConfig:
    return compose("train", TrainConfig, ["run=r", "data.path=d", "steps=300", *overrides])


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file; their times are checked and taken out."""
    objects = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(abs(item.pop("time") - time.time()) < 300 for item in objects)
    return objects


def test_jsonl_one_object_per_step_and_null_for_what_json_cannot_say(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, None)
    sink.log(10, {"train/loss": 6.5, "samples": 640})
    assert lines(path) == [{"step": 10, "train/loss": 6.5, "samples": 640}]  # flushed at once
    sink.log(10, {"eval/mlm_loss": 5.5, "samples": 640})  # an evaluation bears the axes, too
    sink.log(20, {"train/loss": math.nan, "train/grad_norm": math.inf})
    sink.log(20, {})
    sink.close(0)
    assert lines(path) == [
        {"step": 10, "train/loss": 6.5, "samples": 640, "eval/mlm_loss": 5.5},
        {"step": 20, "train/loss": None, "train/grad_norm": None},
    ]
    assert next(iter(lines(path)[0])) == "step"
    assert path.read_text().count('"samples"') == 1
    sink = JsonlSink(path, 20)  # a resume may evaluate at its first step
    sink.log(20, {"eval/mlm_loss": 5.25})
    sink.close(0)
    assert lines(path)[1] == {"step": 20, "train/loss": None, "train/grad_norm": None, "eval/mlm_loss": 5.25}


@settings(deadline=None)
@given(
    logged=st.lists(st.tuples(st.integers(0, 50), st.floats()), max_size=30),
    torn=st.integers(0, 30),
    resume=st.integers(0, 60),
)
def test_jsonl_after_a_kill_holds_the_lines_up_to_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, logged: list[tuple[int, float]], torn: int, resume: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    sink = JsonlSink(path, None)
    steps = sorted(step for step, _ in logged)
    for step, (_, value) in zip(steps, logged, strict=True):
        sink.log(step, {"x": value})
    sink.close(1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - torn])
    remaining = whole[: len(whole) - torn].decode()
    expected = [line for line in remaining.splitlines(keepends=True) if line.endswith("}\n")]
    sink = JsonlSink(path, resume)
    sink.log(resume + 1, {"x": 1.0})
    sink.close(0)
    assert lines(path) == [
        *(item for item in map(json.loads, expected) if item["step"] <= resume and item.pop("time")),
        {"step": resume + 1, "x": 1.0},
    ]
    kept, names = remaining.encode().splitlines(keepends=True), {p.name for p in path.parent.iterdir()}
    dropped = [line for line in kept if not line.endswith(b"}\n") or json.loads(line)["step"] > resume]
    assert names == {"metrics.jsonl", *(["metrics.rolled-back.jsonl"] if dropped else [])}


def test_jsonl_starts_anew_without_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    JsonlSink(path, None).close(0)
    assert path.read_text() == ""


def test_jsonl_on_a_full_disk_is_one_line_with_its_exit_code() -> None:
    full = Path("/dev/full")
    sink = JsonlSink.__new__(JsonlSink)
    with full.open("r+b", buffering=0) as file:
        sink._path, sink._row, sink._file = full, {"step": -1}, file
        with pytest.raises(DiskError, match="No space left on device; free space") as caught:
            sink.log(1, {"x": 1.0})
    assert caught.value.exit_code == 74


def test_redact_hides_secrets_and_nothing_else() -> None:
    clear = {
        "run": "books",
        "tokenizer": {"path": "t", "lowercase": True},
        "tokens": 5,
        "max_predictions": 20,
        "keep_last": 3,
        "nothing_token": None,
        "url": "s3://bucket/prefix?versionId=3",
        "mail": "a@b.c",
        "web": "http://127.0.0.1:8765/a@v1?page=2#top",
        "hub": "hub:org/books@v1:train",
        "list": [1, {"monkey": "yes", "keyboard": 1}],
    }
    assert redact(clear) == clear
    hidden = {
        "wandb_api_key": "hunter2",
        "hfToken": "hunter2",
        "nested": {"aws_secret_access": "hunter2", "password": {"deep": "hunter2"}, "list": [{"APIKey": "hunter2"}]},
        "path": "s3://me:hunter2@host/books",
        "odd": "postgresql+psycopg://me:hun/ter2hunter2@host/db",
        "git": "https://hunter2@github.com/x",
        "at": "https://me:hunter2@hunter2@host/x",
        "tags": ["file:///x?token=hunter2", "https://h:80/#access_token=hunter2", "gs://b?auth=hunter2"],
        "text": "the key hf_hunter2hunter2hunter2hunter2",
        "signed": "https://h/x?a=1&X-Amz-Signature=hunter2&b=2",
    }
    text = json.dumps(redact(hidden))
    assert "hunter2" not in text
    assert json.loads(text)["path"] == "s3://[redacted]@host/books"
    assert json.loads(text)["signed"] == "https://h/x?a=1&X-Amz-Signature=[redacted]&b=2"
    assert "hunter2" in json.dumps(hidden), "redact must not change its argument"
    assert redact_overrides(["run=a=b", "+store.secret=x=y", "plain", "d=s3://a:b@c"]) == [
        "run=a=b", "+store.secret=[redacted]", "plain", "d=s3://[redacted]@c",
    ]  # fmt: skip


def test_no_line_that_is_printed_tells_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    for say in (log.info, log.warning, log.error):
        say("r: empty; looking into checkpoint.upload=%s and %s", "file:///x?token=hunter2", "s3://me:hunter2@host/b")
    printed = capsys.readouterr().err
    assert "hunter2" not in printed
    assert printed.count("checkpoint.upload=file:///x?token=[redacted] and s3://[redacted]@host/b\n") == 3


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def finished_wandb_records(path: Path) -> list[Any]:
    """The records once the last one is on disk: W&B's own process writes them a moment after `finish`."""
    for _ in range(200):
        records = list(wandb_records(path))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{path} has no exit record among {len(records)}")


def history(records: list[Any]) -> list[dict[str, Any]]:
    """What was logged, without what W&B adds."""
    rows: list[dict[str, Any]] = []
    for record in records:
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return rows


@pytest.fixture
def no_wandb_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # a prompt would fail


@pytest.mark.usefixtures("no_wandb_key")
def test_wandb_without_a_key_writes_an_offline_run_that_reads_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "store.api_key=hunter2"])
    resolved = {"steps": 300, "store": {"api_key": "hunter2"}, "data": {"path": "s3://me:hunter2@host/books"}}
    telemetry = open_telemetry(config("wandb.tags=[a]"), tmp_path, resume_step=None, wandb_id=None, resolved=resolved)
    for step in (10, 20):
        telemetry.log(step, {"train/loss": 5.0 + step, "samples": step * 64, "tokens": step * 6400})
    telemetry.log(20, {"eval/mlm_loss": 4.0, "eval/samples": 7, "samples": 1280, "tokens": 128_000})
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    printed = capfd.readouterr().err
    assert printed.count("no API key") == 1
    assert f"wandb sync {folder}\n" in printed, "a run that is killed can be sent, too"
    telemetry.close(0)
    assert f"wandb sync {folder}\n" in capfd.readouterr().err
    assert telemetry.wandb_id == (tmp_path / "wandb_id").read_text().strip()
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"hunter2" not in file.read_bytes(), file
    records = finished_wandb_records(next(folder.glob("*.wandb")))
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name, list(run.tags)) == (telemetry.wandb_id, "cloze", "r", ["a"])
    sent = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert sent["store"] == {"api_key": "[redacted]"}
    assert sent["data"] == {"path": "s3://[redacted]@host/books"}
    *rows, table = history(records)
    assert rows == [
        {"step": 10, "train/loss": 15.0, "samples": 640, "tokens": 64_000},
        {"step": 20, "train/loss": 25.0, "samples": 1280, "tokens": 128_000},
        {"step": 20, "eval/mlm_loss": 4.0, "eval/samples": 7, "samples": 1280, "tokens": 128_000},
    ]
    assert table["step"] == 20
    shown = json.loads((folder / "files" / table["final_evaluation/path"]).read_text())
    final = {"step": 20, "samples": 1280, "tokens": 128_000, "eval/mlm_loss": 4.0, "eval/samples": 7}
    assert dict(shown["data"]) == final
    metrics = [record.metric for record in records if record.HasField("metric")]
    assert {"step", "samples", "tokens"} <= {metric.name for metric in metrics}
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)
    assert next(record.exit.exit_code for record in records if record.HasField("exit")) == 0


@pytest.mark.usefixtures("no_wandb_key")
def test_a_run_that_was_killed_and_resumed_offline_is_one_run(tmp_path: Path) -> None:
    """Offline segments do not join: the newest one holds what counts of those before it."""
    for resume_step, steps in ((None, (10, 20, 30)), (20, (25, 35))):
        telemetry = open_telemetry(config("log.every=5"), tmp_path, resume_step=resume_step, wandb_id=None, resolved={})
        for step in steps:
            telemetry.log(step, {"train/loss": math.nan if step == 10 else float(step), "samples": step})
        telemetry.close(75)
    newest = max((tmp_path / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)
    records = finished_wandb_records(next(newest.glob("*.wandb")))
    assert [row["step"] for row in history(records)] == [10, 20, 25, 35]
    assert history(records)[0] == {"step": 10, "samples": 10}
    assert next(record.run.run_id for record in records if record.HasField("run")) == telemetry.wandb_id


@pytest.mark.usefixtures("no_wandb_key")
def test_a_failed_run_alerts_and_its_newest_checkpoint_is_an_artifact(tmp_path: Path) -> None:
    newest = tmp_path / "checkpoints" / "step-00000002"
    newest.mkdir(parents=True)
    (newest / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "LATEST").write_text(newest.name + "\n")
    sink = WandbSink(config("wandb.artifact=true"), tmp_path, RunId(tmp_path, "abc"), {})
    sink.log(1, {"x": 1.0})
    sink.close(70)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    records = finished_wandb_records(next(folder.glob("*.wandb")))
    (alert,) = [record.alert for record in records if record.HasField("alert")]
    assert alert.title == f"{tmp_path.name} failed"
    assert "exit code 70" in alert.text
    artifacts = [record.request.log_artifact.artifact for record in records if record.HasField("request")]
    artifacts += [record.artifact for record in records if record.HasField("artifact")]
    (artifact,) = [artifact for artifact in artifacts if artifact.name]
    assert (artifact.name, artifact.type) == (f"{tmp_path.name}-checkpoint", "checkpoint")
    assert [entry.path for entry in artifact.manifest.contents] == ["state.json"]


OWN_SINK = """
class Down:
    def __init__(self, run_dir, resume_step, resolved): raise RuntimeError("the tracker does not answer")
class Own:
    def __init__(self, run_dir, resume_step, resolved):
        self.path = run_dir / "own.txt"
        self.path.write_text(f"{resume_step} {resolved['api_key']}\\n")
    def log(self, step, metrics):
        if step == 3: raise RuntimeError("the tracker is gone")
        self.path.write_text(self.path.read_text() + f"{step} {metrics['x']}\\n")
    def rollback(self, step): pass
    def close(self, exit_code): self.path.write_text("closed")
"""


def test_a_sink_of_ones_own_gets_everything_and_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_sink_of_a_test.py").write_text(OWN_SINK)
    monkeypatch.syspath_prepend(tmp_path)
    asked = config("log.sinks=[own_sink_of_a_test:Own,own_sink_of_a_test:Down]", "wandb.mode=disabled")
    telemetry = open_telemetry(asked, tmp_path, resume_step=None, wandb_id=None, resolved={"api_key": "hunter2"})
    for step in range(5):
        telemetry.log(step, {"x": step / 2})
    telemetry.close(0)
    assert (tmp_path / "own.txt").read_text() == "None [redacted]\n0 0.0\n1 0.5\n2 1.0\n"
    printed = capsys.readouterr().err
    for sink, reason in (("Own", "the tracker is gone"), ("Down", "the tracker does not answer")):
        off = f"own_sink_of_a_test:{sink}: off for this run: {reason}; metrics.jsonl has everything\n"
        assert printed.count(off) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    for wrong in ("nowhere:Own", "own_sink_of_a_test:Other", "own_sink_of_a_test", ""):
        with pytest.raises(UserError, match=r"log\.sinks=\[.*module:factory"):
            sink_of_your_own(wrong)


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **members: Any) -> None:
    module = ModuleType("wandb")
    settings = SimpleNamespace(settings=SimpleNamespace(mode="online"))
    base = {"Settings": dict, "setup": lambda _: settings, "termsetup": lambda *_: None, "login": lambda **_: False}
    vars(module).update(base | members)
    monkeypatch.setitem(sys.modules, "wandb", module)


class Broken(Exception):
    """Not derived from anything that we could name."""


class FakeRun:
    def __init__(self, fail_at: str) -> None:
        self.fail_at, self.calls, self.dir = fail_at, [], "runs/r/wandb/offline/files"

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> None:
            self.calls.append(name)
            if name == self.fail_at:
                raise Broken("the service died\nand so on")

        return call


@pytest.mark.parametrize("fail_at", ["init", "define_metric", "log", "finish"])
def test_wandb_faults_cost_one_line_and_never_the_run(
    fail_at: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FakeRun(fail_at)

    def init(**_: Any) -> FakeRun:
        if fail_at == "init":
            raise Broken("the service died\nand so on")
        return run

    fake_wandb(monkeypatch, init=init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    sink = HarmlessSink("W&B", lambda: WandbSink(config(), tmp_path, RunId(tmp_path, "abc"), {}))
    for step in range(3):
        sink.log(step, {"x": 1.0})
    sink.close(0)
    printed = capsys.readouterr().err
    assert printed.count("W&B: off for this run: the service died; metrics.jsonl has everything\n") == 1
    assert "and so on" not in printed
    assert run.calls.count("log") == {"init": 0, "define_metric": 0, "log": 1, "finish": 3}[fail_at]


def test_wandb_that_cannot_be_reached_goes_on_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modes: list[str] = []

    def init(mode: str, **_: Any) -> FakeRun:
        modes.append(mode)
        if mode == "online":
            raise Broken("no route to host")
        return run

    run = FakeRun("")
    fake_wandb(monkeypatch, init=init, login=lambda **_: True, teardown=lambda: modes.append("teardown"))
    sink = WandbSink(config("wandb.mode=online"), tmp_path, RunId(tmp_path, "abc"), {}, [{"step": 1}])
    sink.close(0)
    assert modes == ["online", "teardown", "offline"]
    assert run.calls.count("log") == 1, "the steps before are in this one"
    printed = capsys.readouterr().err
    assert "not reached (no route to host)" in printed
    assert "wandb sync runs/r/wandb/offline\n" in printed


def test_wandb_that_does_not_take_all_in_time_says_how_to_send_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(FakeRun):
        url = "https://w.b/r"

        def finish(self, exit_code: int) -> None:
            raise TimeoutError

    settings: list[dict[str, Any]] = []
    init = lambda **given: settings.append(given["settings"]) or Slow("")  # noqa: E731
    fake_wandb(monkeypatch, init=init, login=lambda **_: True)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "7")
    WandbSink(config("wandb.mode=online"), tmp_path, RunId(tmp_path, "abc"), {}).close(0)
    assert capsys.readouterr().err.count("wandb sync --include-online runs/r/wandb/offline\n") == 1
    assert settings[0]["finish_timeout"] < 30, "who preempts us kills after 30 s"
    assert "init_timeout" not in settings[0], "W&B has its own variable"


@pytest.mark.parametrize("silent", ["", "retrying request", "use `wandb sync`"])
def test_a_checkpoint_is_waited_for_where_somebody_takes_it(
    silent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waited: list[float] = []

    class Sending(FakeRun):
        url = "https://w.b/r"

        def log_artifact(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(wait=lambda timeout: waited.append(timeout))

    newest = tmp_path / "checkpoints" / "step-00000002"
    newest.mkdir(parents=True)
    (tmp_path / "checkpoints" / "LATEST").write_text(newest.name + "\n")
    listeners: list[Any] = []
    hear = lambda _, listener: listeners.append(listener)  # noqa: E731
    fake_wandb(monkeypatch, init=lambda **_: Sending(""), login=lambda **_: True, termsetup=hear)
    own = config("wandb.mode=online", "wandb.artifact=true")
    sink = WandbSink(own, tmp_path, RunId(tmp_path, "abc"), {})
    if silent:
        listeners[-1].info(silent)
        listeners[-1].warning(silent)
    sink.close(0)
    assert len(waited) == (0 if silent else 1)


@pytest.mark.parametrize(
    ("variables", "mode", "expected"),
    [
        ({"WANDB_MODE": "dryrun"}, "auto", "offline"),
        ({"WANDB_MODE": "offline"}, "auto", "offline"),
        ({"WANDB_MODE": "disabled"}, "auto", "disabled"),
        ({"WANDB_DISABLED": "true"}, "auto", "disabled"),
        ({"WANDB_DISABLED": "false"}, "auto", "online"),
        ({"WANDB_MODE": "run"}, "auto", "online"),
        ({"WANDB_MODE": "online"}, "offline", "offline"),
        ({"WANDB_MODE": "offline"}, "online", "online"),
        ({}, "auto", "online"),
    ],
)
def test_variables_of_wandb_mean_what_it_says(
    variables: dict[str, str], mode: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a key. What the configuration names comes first."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    known = {"WANDB_API_KEY": "0" * 40, "WANDB_CONFIG_DIR": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    for name, value in (known | variables).items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    try:
        assert wandb_mode(config(f"wandb.mode={mode}")) == expected
    finally:
        wandb.teardown()


def test_names_come_from_the_configuration_then_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []
    fake_wandb(monkeypatch, init=lambda **given: asked.append(given) or FakeRun(""), login=lambda **_: True)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)

    def started(folder: str, *own: str) -> tuple[str, ...]:
        (tmp_path / folder).mkdir()
        WandbSink(config("wandb.mode=offline", *own), tmp_path / folder, RunId(tmp_path / folder), {})
        return asked[-1]["project"], asked[-1]["name"], asked[-1]["id"]

    assert started("a")[:2] == ("cloze", "r")
    for name, value in {"WANDB_PROJECT": "theirs", "WANDB_NAME": "shown", "WANDB_RUN_ID": "known"}.items():
        monkeypatch.setenv(name, value)
    assert started("b") == ("theirs", "shown", "known")
    tags = "wandb.tags=[a,'https://me:hunter2@host/x?token=hunter3']"
    assert started("c", "wandb.project=ours", tags)[0] == "ours"
    assert asked[-1]["tags"] == ["a", "https://[redacted]@host/x?token=[redacted]"]


@pytest.mark.parametrize(("key", "alerts"), [(True, ["alert", "finish"]), (False, [])])
def test_launch_alerts_of_a_run_whose_rank_0_could_not(
    key: bool, alerts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the same W&B run; where W&B is not reached, nothing is left on the disk that would hide the run's own."""
    run, asked = FakeRun(""), []

    def init(**given: Any) -> FakeRun:
        asked.append((given["mode"], given["id"]))
        return run

    fake_wandb(monkeypatch, init=init, login=lambda **_: key)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    raise_alert(config(), tmp_path, "node2: lost")
    assert asked == [], "it never began"
    (tmp_path / "wandb_id").write_text("abc\n")
    raise_alert(config(), tmp_path, "node2: lost")
    assert asked == ([("online", "abc")] if key else [])
    assert run.calls == alerts
    raise_alert(config("wandb.mode=disabled"), tmp_path, "node2: lost")
    assert len(asked) == key
    run.fail_at = "alert"
    raise_alert(config(), tmp_path, "never raises")


def test_wandb_not_installed_or_disabled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    HarmlessSink("W&B", lambda: WandbSink(config(), tmp_path, RunId(tmp_path, "abc"), {})).log(1, {"x": 1.0})
    assert "pip install 'cloze[wandb]'" in capsys.readouterr().err
    telemetry = open_telemetry(config("wandb.mode=disabled"), tmp_path, resume_step=None, wandb_id="kept", resolved={})
    telemetry.close(0)
    assert telemetry.wandb_id == "kept"
    assert capsys.readouterr().err == ""


def test_an_id_that_was_given_up_is_not_taken_again(tmp_path: Path) -> None:
    """Also where the run is killed before a checkpoint has the new one."""
    run_id = RunId(tmp_path, "old")
    run_id.renew()
    assert run_id.value != "old"
    assert RunId(tmp_path, "old").value == run_id.value
    assert RunId(tmp_path).value == run_id.value
    assert RunId(tmp_path, "moved").value == "moved"


def test_wandb_id_comes_from_the_checkpoint_then_from_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_wandb(monkeypatch, init=lambda **_: FakeRun(""))

    def opened(wandb_id: str | None) -> str | None:
        telemetry = open_telemetry(config(), tmp_path, resume_step=None, wandb_id=wandb_id, resolved={})
        telemetry.close(0)
        return telemetry.wandb_id

    first = opened(None)
    assert first is not None
    assert opened(None) == first
    assert opened("moved") == "moved"
    assert opened(None) == "moved"


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry([], None)
    telemetry.log(1, {"train/loss": 1.0})
    telemetry.close(0)
    other: Any = None  # a process group, which speaking does not need
    Process(1, 2, 1, torch.device("cpu"), other).log.warning("nothing")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_tensorboard_events_read_back_and_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = TensorBoardSink(tmp_path, None)
    sink.log(10, {"train/loss": 2.5})
    sink.close(0)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def events() -> list[tuple[int, float]]:
        found = EventAccumulator(str(tmp_path))
        found.Reload()
        return [(event.step, event.value) for event in found.Scalars("train/loss")]

    assert events() == [(10, 2.5)]
    sink = TensorBoardSink(tmp_path, 10)
    for step in (20, 30):
        sink.log(step, {"train/loss": 9.0})
    sink.rollback(20)  # what came after did not count
    sink.log(25, {"train/loss": 2.0})
    sink.close(0)
    assert events() == [(10, 2.5), (20, 9.0), (25, 2.0)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'cloze\[tensorboard\]'"):
        TensorBoardSink(tmp_path, None)


def test_console_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(300, terminal=False)
    training = {
        "train/loss": 6.1234, "train/mlm_loss": 5.9, "train/nsp_loss": 0.65, "train/lr": 1e-4,
        "throughput/tokens_per_second": 12345.0, "samples": 6400,
    }  # fmt: skip
    console.log(100, training)
    console.log(100, {"eval/mlm_loss": 5.5, "eval/mlm_accuracy": 0.211, "eval/samples": 100})
    console.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 100/300  loss 6.123  mlm 5.900  nsp 0.650  lr 1.0e-04  12.3k tok/s  eta 0:00:0")
    assert second == "eval 100/300  mlm_loss 5.500  mlm_accuracy 21.1%"


def test_the_eta_of_a_run_with_a_time_budget_is_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(10**15, terminal=False, seconds_left=3600.0)
    console.log(1, {"train/loss": 1.0})
    assert re.search(r"eta (1:00:00|0:59:5\d)$", capsys.readouterr().err.strip())


def test_console_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    console = Console(300, 100, terminal=True)
    speed = {"throughput/tokens_per_second": 12345.0, "throughput/mfu": 0.456}
    console.log(200, {"train/loss": 6.1234, "eval/mlm_loss": 5.5, **speed})
    log.info("[not markup]")
    console.close()
    printed = capsys.readouterr().err
    (bar,) = (line for line in printed.splitlines() if "200/300" in line and "eval" not in line)
    assert re.search(r"loss 6\.123  mfu 45\.6%  12\.3k tok/s  eta 0:00:\d\d", bar)
    assert "eval 200/300  mlm_loss 5.500" in printed
    assert "[not markup]" in printed
