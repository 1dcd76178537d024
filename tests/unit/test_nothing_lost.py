"""What Cloze deletes or replaces (the table in SECURITY.md): each place with something of somebody else's beside it."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cloze import cli, ownership, storage
from cloze.errors import UserError
from cloze.ownership import CHECKPOINT, CORPUS, CORPUS_COPY, EXPORT, RUN, WORK, Kind
from data_prep import report as corpus_report
from data_prep.config import PrepConfig
from data_prep.plan import Plan, abandon, claimed, clear_up, make_plan
from data_prep.stages.base import disk_errors
from finetune import suite
from launch import demo, slurm
from launch.options import Options
from pretrain import checkpoint
from pretrain.checkpoint.mirror import Mirror
from pretrain.config import TrainConfig
from pretrain.data import cache
from pretrain.export.hugging_face import refuse_within, replaced_directory
from pretrain.run_directory import RunDirectory, refuse_lost, saved_step
from pretrain.telemetry.report import write_report
from pretrain.telemetry.sinks import JsonlSink
from pretrain.watchdog import Watchdog
from tests.support import make_corpus
from tests.unit.corpora import prep
from tests.unit.test_cache import let_go, size_of
from tests.unit.test_checkpoint import flip, make_snapshot

CONFIG = "run: a\nruns_root: runs\ndata: {path: x}\nmodel: {name: tiny}\nglobal_batch_size: 8\ncheckpoint: {every: 2}\n"


def files_of(path: Path) -> dict[str, bytes]:
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


def a_run(path: Path) -> Path:
    """As an earlier version left it: without a mark."""
    checkpoint.write(path / "checkpoints", make_snapshot(2))
    (path / "config.yaml").write_text(CONFIG)
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    return path


def an_export(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("An encoder pretrained by … with Cloze.\n\n<!-- loading -->\n<!-- /loading -->\n")
    return path


def a_corpus(path: Path) -> Path:
    make_corpus(path, samples=40, val=4)
    return path


MAKERS: dict[Kind, Callable[[Path], Path]] = {RUN: a_run, EXPORT: an_export, CORPUS: a_corpus}


# The rule


@pytest.mark.parametrize("kind", MAKERS, ids=lambda kind: kind.name)
def test_a_thing_is_of_one_kind_with_its_mark_or_what_only_we_write(tmp_path: Path, kind: Kind) -> None:
    """Its mark alone, and without one what an earlier version made; a foreign file in it, however deep, protects it."""
    path = MAKERS[kind](tmp_path / "it")
    ownership.require_own(path, kind)
    for other in {*MAKERS} - {kind}:
        with pytest.raises(UserError, match=f"is not {other.told}"):
            ownership.remove_own(path, other)
    (path / "notes").mkdir()
    (path / "notes" / "mine.txt").write_text("x")
    before = files_of(path)
    with pytest.raises(UserError, match=r"holds notes/mine\.txt, which is no part of") as caught:
        ownership.remove_own(path, kind)
    assert "\n" not in str(caught.value)
    assert files_of(path) == before
    shutil.rmtree(path / "notes")
    ownership.remove_own(path, kind)
    assert not path.exists()


def test_a_link_is_nothing_of_ours(tmp_path: Path) -> None:
    export = an_export(tmp_path / "export")
    (tmp_path / "link").symlink_to(export)
    with pytest.raises(UserError, match="is not an export"):
        ownership.remove_own(tmp_path / "link", EXPORT)
    (export / "model.safetensors").write_text("")
    (export / "vocab").symlink_to(tmp_path)
    with pytest.raises(UserError, match="holds vocab"):
        ownership.remove_own(export, EXPORT)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"kind": "run"}', '{"kind": ["export"]}', "\x00"])
def test_another_mark_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / ownership.MARK).write_text(content)
    assert not ownership.is_of(tmp_path, EXPORT)


# data.cache_dir (case 49)


def test_making_room_leaves_what_is_not_the_caches(tmp_path: Path) -> None:
    """A user's directories go neither to make room, nor do they take any."""
    make_corpus(tmp_path / "one", samples=300)
    make_corpus(tmp_path / "two", samples=300, seed=1)
    store = tmp_path / "cache"
    mine = {"photos/a.jpg": b"x" * 9_000_000, f"{'0' * 16}/manifest.json": b"{}", "books/manifest.json": b"{}"}
    for name, data in mine.items():
        (store / name).parent.mkdir(parents=True)
        (store / name).write_bytes(data)
    room = 1.5 * max(size_of(cache.read_manifest(tmp_path / name)) for name in ("one", "two")) / 2**30
    first = cache.local_corpus(str(tmp_path / "one"), str(store), room)
    let_go()
    second = cache.local_corpus(str(tmp_path / "two"), str(store), room)
    let_go()
    assert not first.exists()
    assert all((store / name).read_bytes() == data for name, data in mine.items())
    (second / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="copies in which somebody keeps more"):
        cache.local_corpus(str(tmp_path / "one"), str(store), room)
    assert (second / "notes.txt").read_text() == "x"
    let_go()


def test_a_copy_of_an_earlier_version_is_known_by_its_name(tmp_path: Path) -> None:
    """Which is its manifest's checksum; of one that is half copied, too."""
    make_corpus(tmp_path / "one", samples=100)
    copy = cache.local_corpus(str(tmp_path / "one"), str(tmp_path / "cache"), 1)
    let_go()
    (copy / ownership.MARK).unlink()
    assert ownership.is_own(copy, CORPUS_COPY)
    (copy / "partial").mkdir()
    (copy / "manifest.json").rename(copy / "partial" / "manifest.json")
    assert ownership.is_own(copy, CORPUS_COPY)
    other = copy.rename(copy.with_name("books"))
    assert not ownership.is_own(other, CORPUS_COPY)


def test_a_copy_goes_into_no_foreign_directory(tmp_path: Path) -> None:
    make_corpus(tmp_path / "one", samples=100)
    copy = cache.local_corpus(str(tmp_path / "one"), str(tmp_path / "cache"), 1)
    let_go()
    shutil.rmtree(copy)
    (copy / "val").mkdir(parents=True)
    (copy / "val" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds val/mine\.txt, which no copy does"):
        cache.local_corpus(str(tmp_path / "one"), str(tmp_path / "cache"), 1)
    assert [*files_of(copy)] == ["val/mine.txt"]
    let_go()


# Exports, fine-tuned and compressed models (case 50)


def replace(out: Path, *, force: bool | None) -> None:
    with replaced_directory(out, force=force) as temporary:
        (temporary / "config.json").write_text('{"new": 1}')


def test_force_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    for name, make in (("run", a_run), ("corpus", a_corpus)):
        path = make(tmp_path / name)
        before = files_of(path)
        with pytest.raises(UserError, match="is not an export"):
            replace(path, force=True)
        assert files_of(path) == before
    export = an_export(tmp_path / "export")
    (export / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which is no part of an export"):
        replace(export, force=True)
    assert (export / "thesis.tex").exists()
    (export / "thesis.tex").unlink()
    replace(export, force=True)
    assert [*files_of(export)] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "export", "run"]


def test_a_link_is_no_place_for_an_export(tmp_path: Path) -> None:
    """Told at once: nothing could be put in its place in the end, whatever space is free."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        link = rf"to-{name}: is a link; name the directory itself, .*{name}, or another"
        with pytest.raises(UserError, match=link), replaced_directory(tmp_path / f"to-{name}"):
            pass
    assert not [*(tmp_path / "empty").iterdir()]


def test_what_comes_into_an_empty_out_meanwhile_stays(tmp_path: Path) -> None:
    """Fine-tuning and compressing take hours, and look at `out` before and after."""
    out = tmp_path / "out"
    out.mkdir()

    def train() -> None:
        with replaced_directory(out) as temporary:
            (temporary / "model").write_text("")
            (out / "mine.txt").write_text("x")

    with pytest.raises(UserError, match="not empty"):
        train()
    assert [*files_of(tmp_path)] == ["out/mine.txt"]


def test_no_export_into_a_run_or_a_corpus_or_above_its_run(tmp_path: Path) -> None:
    run, corpus = a_run(tmp_path / "runs" / "a"), a_corpus(tmp_path / "corpus")
    for out in (run, run / "model", run / "checkpoints" / "x", corpus / "x" / "y"):
        with pytest.raises(UserError, match=r"name a directory outside it|to be exported"):
            refuse_within(out, run)
    for out in (tmp_path / "runs", tmp_path, tmp_path / "corpus" / ".."):
        with pytest.raises(UserError, match="which is to be exported; name another directory"):
            refuse_within(out, run)
    refuse_within(tmp_path / "out", run)


# Pages


def test_a_page_replaces_a_page_of_its_kind_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, corpus = a_run(tmp_path / "a"), a_corpus(tmp_path / "corpus")
    thesis, page = tmp_path / "thesis.html", tmp_path / "page.html"
    thesis.write_text("<!doctype html><title>Mine</title>")
    with pytest.raises(UserError, match="not one that Cloze wrote; name another file"):
        write_report([run], thesis)
    assert corpus_report.main([str(corpus), "--out", str(thesis)]) == 64
    assert "not one that Cloze wrote" in capsys.readouterr().err
    assert thesis.read_text() == "<!doctype html><title>Mine</title>"
    for _ in range(2):
        write_report([run], page)
    assert corpus_report.main([str(corpus), "--out", str(page)]) == 64
    for _ in range(2):
        assert corpus_report.main([str(corpus)]) == 0
    with pytest.raises(UserError, match="not one that Cloze wrote"):
        write_report([run], corpus / "report.html")


# Runs (cases 51 and 52)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "seed: 3\n"),
        ("config.yaml", "[not, ours"),
        ("metrics.jsonl", '{"step": 5, "train/loss": 2.0}\n'),
        ("environment.json", "{}"),
        ("status.json", "{}"),
        ("tokenizer/vocab.txt", "[PAD]"),
        ("checkpoints/model.pt", "x"),
    ],
)
def test_a_directory_of_another_tool_is_no_run(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / "runs" / "a"
    (path / name).parent.mkdir(parents=True)
    (path / name).write_text(content)
    with pytest.raises(UserError, match="which no run of Cloze wrote; name another run or runs_root") as caught:
        RunDirectory(path)
    assert "\n" not in str(caught.value)
    assert files_of(path) == {name: content.encode()}


def test_files_of_ones_own_beside_a_run_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    RunDirectory(tmp_path).close()
    RunDirectory(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "x"


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    path = a_run(tmp_path / "a")
    RunDirectory(path).close()
    assert ownership.marked(path, RUN) == {"kind": "run", "saved_step": 2}


@pytest.mark.parametrize("how", ["damaged", "moved", "emptied"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_without_its_checkpoints_does_not_start_again(tmp_path: Path, how: str, earlier: bool) -> None:
    """Of an earlier version metrics tell it: of the steps after the second save, which had waited for the first."""
    path = a_run(tmp_path / "a")
    (path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    if not earlier:
        RunDirectory(path).close()
    if how == "damaged":
        with (path / "checkpoints" / "step-00000002" / "model.safetensors").open("ab") as file:
            file.write(b"x")
    elif how == "moved":
        (path / "checkpoints").rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(path / "checkpoints")
        (path / "checkpoints").mkdir()
    for _ in range(2):  # and the second time it is no other
        directory = RunDirectory(path)
        with pytest.raises(UserError, match="put one back from a copy, or name another run, with init_from=") as caught:
            refuse_lost(path)
        directory.write_status(64, 0)
        directory.close()
    told = str(caught.value)
    assert "saved up to step 2" in told
    assert ("model.safetensors: not" in told) == (how == "damaged")
    assert "\n" not in told


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 5)))
    RunDirectory(tmp_path).close()
    refuse_lost(tmp_path)


def test_an_orderly_end_tells_that_something_was_saved(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "status.json").write_text('{"exit_code": 75, "step": 7}')
    assert saved_step(tmp_path) == 7
    (tmp_path / "status.json").write_text('{"exit_code": 70, "step": 7}')
    assert saved_step(tmp_path) == 0


def test_no_row_of_metrics_is_lost(tmp_path: Path) -> None:
    path, kept = tmp_path / "metrics.jsonl", tmp_path / "metrics.rolled-back.jsonl"
    rows = [json.dumps({"step": step, "x": step / 2}) + "\n" for step in range(1, 6)]
    path.write_text("".join(rows))
    JsonlSink(path, 3).close(0)
    assert (path.read_text(), kept.read_text()) == ("".join(rows[:3]), "".join(rows[3:]))
    JsonlSink(path, 3).close(0)  # nothing to drop: nothing is kept twice
    sink = JsonlSink(path, 3)
    sink.rollback(2)
    sink.close(0)
    JsonlSink(path, None).close(0)
    assert path.read_text() == ""
    assert kept.read_text() == "".join([*rows[3:], rows[2], *rows[:2]])


# Checkpoints


def test_retention_leaves_what_is_not_the_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, make_snapshot(step))
    (tmp_path / "step-00000001" / "evaluation.json").write_text("x")
    (tmp_path / "step-mine").mkdir()
    (tmp_path / "step-mine" / "a").write_text("x")
    checkpoint.retain(tmp_path, 3, checkpoint.Retention(keep_last=1))
    kept = [name for name in files_of(tmp_path) if not name.startswith("step-00000003/")]
    assert kept == ["LATEST", "left-writing-step-00000001/evaluation.json", "step-mine/a"]


def test_a_checkpoint_over_a_damaged_one_leaves_what_lies_in_it(tmp_path: Path) -> None:
    for _ in range(2):
        damaged = checkpoint.write(tmp_path, make_snapshot(1))
        flip(damaged / "model.safetensors")
        (damaged / "notes.txt").write_text("x")
    checkpoint.write(tmp_path, make_snapshot(1))
    assert checkpoint.verify(tmp_path / "step-00000001") == []
    for name in ("left-step-00000001", "left-step-00000001-1"):
        assert files_of(tmp_path / name) == {"notes.txt": b"x"}


def test_what_is_half_written_goes_and_nothing_else(tmp_path: Path) -> None:
    for name, file in ((".writing-step-00000001-1ab", "share-00001.part"), (".writing-mine", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("x")
    (tmp_path / ".writing-step-00000002").mkdir()
    (tmp_path / ".writing-step-00000002" / "mine").write_text("x")
    checkpoint.clear_unfinished(tmp_path)
    assert [*files_of(tmp_path)] == [".writing-mine/a", "left-writing-step-00000002/mine"]


def test_the_mirror_removes_its_own_files_only(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for step in (1, 2, 3):
        path = checkpoint.write(tmp_path / "run", make_snapshot(step))
        Mirror(str(store), checkpoint.Retention(keep_last=9)).push(path)
    (store / "step-00000001" / "notes.txt").write_text("x")
    (store / "books").mkdir()
    (store / "books" / "a").write_text("x")
    mirror = Mirror(str(store), checkpoint.Retention(keep_last=1))
    mirror.push(checkpoint.write(tmp_path / "run", make_snapshot(4)))
    names = [name for name in files_of(store) if not name.startswith("step-00000004/")]
    assert names == ["books/a", "step-00000001/notes.txt"]
    mirror.remove_after(0)
    assert storage.listed(str(store)) == {"books", "step-00000001"}


# Preparation and demo


def test_the_end_of_a_preparation_leaves_what_others_put_beside_it(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    ours = ("map/000000", "tmp/host-12-map-000001", "tmp/host-12-tokenizer/vocab.txt")
    for name in (*ours, "map.txt", "mine/x", "map/notes", "tmp/x", "reduce/x/000001"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("")
    others = {"map.txt", "map/notes", "mine/x", "reduce/x/000001", "tmp/x"}
    assert not ownership.remove_files(tmp_path, WORK, "tmp")
    assert files_of(tmp_path).keys() == {*others, "map/000000", "plan.json"}
    assert not ownership.remove_files(tmp_path, WORK)
    assert files_of(tmp_path).keys() == others


def prep_plan(tmp_path: Path, *overrides: str) -> Plan:
    (tmp_path / "a.txt").write_text("One sentence. Another one.\n\nA third.\n")
    out = f"out={tmp_path / 'out'}"
    return make_plan(cli.compose("prep", PrepConfig, [out, "executor.workers=1", *overrides]))


def test_another_tools_work_folder_is_no_preparation(tmp_path: Path) -> None:
    plan = prep_plan(tmp_path, "source=text", f"source.paths=[{tmp_path}/a.txt]")
    (plan.work / "map").mkdir(parents=True)
    (plan.work / "build.log").write_text("x")
    with pytest.raises(UserError, match=r"holds \.work/build\.log, which no preparation wrote"), claimed(plan):
        pass
    assert files_of(plan.out) == {".work/build.log": b"x"}
    clear_up(plan)  # as after the last shard
    assert files_of(plan.out) == {".work/build.log": b"x"}


@pytest.mark.parametrize(
    "name", ["tmp/x", "map/000000", "reduce/a/b", "lock", "manifest.json", "sample/000000", "mine"]
)
def test_without_a_plan_no_work_is_ours(tmp_path: Path, name: str) -> None:
    """`.work` and `tmp` are anybody's names: what only looks like results is neither removed nor built upon."""
    plan = prep_plan(tmp_path, "source=text", f"source.paths=[{tmp_path}/a.txt]")
    (plan.work / name).parent.mkdir(parents=True)
    (plan.work / name).write_text("precious")
    with pytest.raises(UserError, match=rf"holds \.work/{name}, which no preparation wrote"), claimed(plan):
        pass
    assert files_of(plan.out) == {f".work/{name}": b"precious"}


def test_what_is_put_beside_unfinished_work_stays(tmp_path: Path) -> None:
    """Through a start that goes on, and one whose input is refused."""
    plan = prep_plan(tmp_path, "source=text", f"source.paths=[{tmp_path}/a.txt]")
    with claimed(plan):
        pass
    for name in ("tmp/mine.txt", "map/mine.txt", "tmp/host-1-map-000000", "map/000000"):
        (plan.work / name).parent.mkdir(exist_ok=True)
        (plan.work / name).write_text("x")
    with claimed(plan) as complete:
        assert not complete
    assert {".work/tmp/mine.txt", ".work/map/mine.txt", ".work/map/000000"} <= files_of(plan.out).keys()
    assert ".work/tmp/host-1-map-000000" not in files_of(plan.out)
    abandon(plan)
    assert [*files_of(plan.out)] == [".work/map/mine.txt", ".work/tmp/mine.txt"]


@pytest.mark.parametrize("what", ["a file for .work", "a link to nowhere"])
def test_an_out_that_cannot_be_made_is_one_line(tmp_path: Path, what: str) -> None:
    plan = prep_plan(tmp_path, "source=text", f"source.paths=[{tmp_path}/a.txt]")
    if what == "a link to nowhere":
        plan.out.symlink_to(tmp_path / "nowhere")
    else:
        plan.out.mkdir()
        plan.work.write_text("x")
    with pytest.raises(UserError, match=r"File exists.*name another directory"), disk_errors(plan), claimed(plan):
        pass


def test_source_beside_sources_is_refused(tmp_path: Path) -> None:
    """Case 57: one of them would not be read."""
    mixture = f"sources=[{{kind: text, paths: [{tmp_path}/a.txt]}}]"
    with pytest.raises(UserError, match="sources: and source is given, too; put it into the list"):
        prep_plan(tmp_path, mixture, "source=text", f"source.paths=[{tmp_path}/b.txt]")
    assert len(prep_plan(tmp_path, mixture).sources) == 1


def test_a_batch_script_replaces_one_of_ours_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    config = cli.compose("train", TrainConfig, ["run=a", "data.path=x", f"runs_root={tmp_path}"])
    options = Options(nodes=1, gpus_per_node=1, time="1:00:00")
    for _ in range(2):
        assert slurm.submit(options, config) == 0
    script = tmp_path / "a" / slurm.SCRIPT_NAME
    script.write_text("#!/bin/bash\necho mine\n")
    with pytest.raises(UserError, match="not one that Cloze wrote"):
        slurm.submit(options, config)
    assert script.read_text() == "#!/bin/bash\necho mine\n"


def test_the_table_of_a_suite_replaces_one_of_ours_only(tmp_path: Path) -> None:
    for name, ours in (("results.md", suite._FIRST_LINE), ("results.json", '{"mrpc": {"pretrained": {')):
        path = tmp_path / name
        path.write_text("mine")
        with pytest.raises(UserError, match="not one that Cloze wrote"):
            ownership.require_own_file(path, (suite._FIRST_LINE, '"pretrained": {'))
        path.write_text(ours)
        ownership.require_own_file(path, (suite._FIRST_LINE, '"pretrained": {'))
    rows = [["mrpc", "f1", "1.0 ± 0.1"]]
    assert suite.table(["task", "score, %", "this model"], rows).startswith(suite._FIRST_LINE)


def test_stacks_of_an_earlier_hang_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stacks-rank0.txt").write_text("earlier\n")
    monkeypatch.setattr(os, "_exit", lambda code: None)
    dog = Watchdog(0, tmp_path, 0, 0)
    dog.give_up(1.0, 1.0)
    dog.close()
    text = (tmp_path / "stacks-rank0.txt").read_text()
    assert text.startswith("earlier\n")
    assert "test_stacks_of_an_earlier_hang_stay" in text


def test_what_a_run_was_told_is_in_its_report(tmp_path: Path) -> None:
    path = a_run(tmp_path / "a")
    (path / "status.json").write_text('{"exit_code": 0, "step": 2, "verdict": "is no better than guessing"}')
    (path / "changes.jsonl").write_text('{"step": 1, "changed": {"optim.lr": ["0.1", "0.2"]}}\n')
    page = write_report([path], tmp_path / "page.html").read_text()
    for text in ("is no better than guessing", "changed at step 1", "optim.lr 0.1 -&gt; 0.2"):
        assert text in page


def test_a_fresh_demo_removes_an_earlier_demo_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = demo.Paths(tmp_path / "shards" / "demo", tmp_path / "runs" / "demo", tmp_path / "out" / "demo")
    a_corpus(paths.shards), a_run(paths.run), an_export(paths.model)
    (paths.model / "mine.txt").write_text("x")
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"holds mine\.txt"):
        demo.remove_earlier(paths)
    assert files_of(tmp_path) == before
    (paths.model / "mine.txt").unlink()
    demo.remove_earlier(paths)
    assert not any(path.exists() for path in paths)
    (kept,) = (tmp_path / "runs").iterdir()
    assert files_of(kept) == {"metrics.jsonl": before["runs/demo/metrics.jsonl"]}
    assert f"metrics are in {kept}" in capsys.readouterr().out
    demo.remove_earlier(paths)  # nothing is there


def test_the_kinds_are_told_apart() -> None:
    kinds = (CORPUS, CORPUS_COPY, RUN, EXPORT, CHECKPOINT, WORK)
    assert len({kind.name for kind in kinds}) == len(kinds)


def test_what_preparation_and_cache_really_write_is_known(tmp_path: Path) -> None:
    """Not what the tests' own writer makes: the names of the shards are the product's."""
    (tmp_path / "a.txt").write_text("\n\n".join(f"One is {n}. Two comes after {n}. Three is more." for n in range(60)))
    given = (f"source.paths=[{tmp_path}/a.txt]", "tokenizer.vocab_size=200", "max_len=32", "val_fraction=0.2")
    done = prep("source=text", *given, f"out={tmp_path / 'out'}", "executor.workers=1")
    assert done.returncode == 0, done.stderr
    assert ownership.is_own(tmp_path / "out", CORPUS)
    copy = cache.local_corpus(str(tmp_path / "out"), str(tmp_path / "cache"), 1.0)
    assert ownership.is_own(copy, CORPUS_COPY)
    (tmp_path / "out" / "notes.txt").touch()
    assert not ownership.is_own(tmp_path / "out", CORPUS)
