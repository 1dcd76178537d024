"""The command as a user runs it: what it makes, that it makes it again to the byte, and what it says of bad input."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard

from cloze.cli import compose
from cloze.corpus import verify
from cloze.corpus.manifest import read_manifest, sealed_json
from cloze.corpus.masking import draw_masks
from cloze.corpus.peek import peek
from cloze.corpus.shards import Split
from cloze.errors import ExitCode, UserError
from data_prep.config import PrepConfig
from data_prep.plan import claimed, make_plan
from data_prep.prepare import main
from data_prep.sources import text as text_source
from data_prep.stages import documents as documents_module
from data_prep.stages.sample import SAMPLE, sampled_pieces
from tests import support
from tests.unit.corpora import ROOT, documents, files_of, module, prep, real, vocabulary, write_jsonl


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A corpus of 400 documents in two plain and two compressed files, and a vocabulary that spells it."""
    folder = tmp_path_factory.mktemp("prep")
    texts = documents(400)
    write_jsonl(folder / "a.jsonl", texts[:150])
    write_jsonl(folder / "b.jsonl", texts[150:200])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "x", texts[200:300]).read_bytes()))
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(write_jsonl(folder / "x", texts[300:]).read_bytes()))
    (folder / "x").unlink()
    vocabulary(folder / "vocab.txt")
    return folder


def overrides(work: Path, out: Path, *extra: str) -> list[str]:
    base = ["source=jsonl", f"source.paths=[{work}/*.jsonl*]", f"tokenizer.path={work}/vocab.txt", "max_len=64"]
    return [*base, "val_fraction=0.1", f"out={out}", "executor.workers=1", *extra]


@pytest.fixture(scope="module")
def corpus(work):
    run = prep(*overrides(work, work / "out"))
    assert run.returncode == 0, run.stderr
    return work / "out", run


def faults(directory: Path) -> list[str]:
    return list(verify.faults(directory))


def test_a_corpus_is_made(corpus):
    out, run = corpus
    manifest = read_manifest(out)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "pass-00", "tokenizer", "val"]
    assert manifest.documents["read"] == manifest.documents["kept"] + sum(manifest.documents["dropped"].values()) == 400
    assert manifest.splits["pass-00"].samples > 10 * manifest.splits["val"].samples / 3 > 0
    assert manifest.max_len == 64
    assert manifest.masking.max_predictions == 12
    assert faults(out) == []
    for word in ("read", "kept", "samples", "tokens", "mean length", "random next", "MB/s", "shards"):
        assert word in run.stdout
    assert "map: " in run.stderr
    assert "\x1b" not in run.stdout + run.stderr


def test_samples_are_pairs_of_the_corpus(corpus, work):
    """Every segment, decoded, is a run of some document; a true next follows on in it."""
    out, _ = corpus
    words = (work / "vocab.txt").read_text().split("\n")
    spelled = ["".join(text.lower().split()) for text in documents(400)]
    manifest = read_manifest(out)
    split = Split(out, manifest, "pass-00")
    lone = Counter()
    for index in range(0, len(split), 7):
        sample = split.gather(np.array([index]), 0)
        first, total = sample.lengths_Nx2[0].tolist()
        tokens = [words[token].removeprefix("##") for token in sample.tokens_T.tolist()]
        assert (tokens[0], tokens[first - 1], tokens[total - 1]) == ("[CLS]", "[SEP]", "[SEP]")
        a, b = "".join(tokens[1 : first - 1]), "".join(tokens[first : total - 1])
        assert any(a in text for text in spelled)
        assert any(b in text for text in spelled)
        if not sample.random_next_N[0]:
            lone[any(a in text and b in text for text in spelled)] += 1
    assert lone[True] > 0 == lone[False]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves files to the collector
def test_plain_webdataset_reads_the_shards(corpus):
    out, _ = corpus
    manifest = read_manifest(out)
    total = tokens = 0
    for shard in manifest.split_shards("pass-00"):
        for block in webdataset.WebDataset(str(out / shard.split / shard.name), shardshuffle=False).decode():
            total += len(block["lengths.npy"])
            tokens += len(block["tokens.npy"])
            assert block["mask_positions.npy"].shape == block["mask_tokens.npy"].shape
    statistics = manifest.splits["pass-00"]
    assert (total, tokens) == (statistics.samples, statistics.tokens)


@pytest.mark.parametrize(
    "extra", [("executor.workers=2",), ("tokenizer.path=null", "tokenizer.vocab_size=300", "passes=2")]
)
def test_byte_identical_whatever_the_workers(work, tmp_path, extra):
    for workers in (1, 2):
        run = prep(*overrides(work, tmp_path / str(workers), *extra, f"executor.workers={workers}"))
        assert run.returncode == 0, run.stderr
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_byte_identical_whatever_the_tasks_and_files(work, corpus, tmp_path, monkeypatch):
    """How the input is cut into files and tasks, and in which order tasks run, does not show in the shards."""
    from data_prep.sources import base, lines

    monkeypatch.setattr(base, "_MIN_TASK_BYTES", 3000)
    monkeypatch.setattr(lines, "_COMPRESSED_BYTES", 100)
    monkeypatch.setattr(lines, "_PLAIN_BYTES", 100)
    texts = documents(400)
    random.Random(1).shuffle(texts)
    path = write_jsonl(tmp_path / "all.jsonl", texts)
    config = compose("prep", PrepConfig, overrides(work, tmp_path / "out", f"source.paths=[{path}]"))
    plan = _run_here(config, reverse=True)
    assert len(plan.tasks) > 20
    expected, found = files_of(corpus[0]), files_of(tmp_path / "out")
    assert {name: data for name, data in found.items() if name.endswith(".tar")} == {
        name: data for name, data in expected.items() if name.endswith(".tar")
    }


def _run_here(config, reverse=False):
    """All tasks in this process, without an executor."""
    from data_prep.plan import claimed, make_plan
    from data_prep.stages.finish import finish
    from data_prep.stages.map import MAP
    from data_prep.stages.reduce import REDUCE
    from data_prep.stages.tokenizer import make_tokenizer

    plan = make_plan(config)
    with claimed(plan) as complete:
        assert not complete
        facts = make_tokenizer(plan)
        for stage in (MAP, REDUCE):
            numbers = range(stage.num_tasks(plan))
            for number in reversed(numbers) if reverse else numbers:
                stage.run_task(plan, number)
        finish(plan, facts)
    return plan


@pytest.mark.parametrize("objective", ["sop", "none"])
def test_other_objectives(work, tmp_path, objective):
    run = prep(*overrides(work, tmp_path / "out", f"objective={objective}"))
    assert run.returncode == 0, run.stderr
    statistics = read_manifest(tmp_path / "out").splits["pass-00"]
    share = statistics.random_next / statistics.samples
    assert share == 0 if objective == "none" else 0.4 < share < 0.6
    assert faults(tmp_path / "out") == []


def test_passes_pair_anew_and_val_stays(work, tmp_path):
    run = prep(*overrides(work, tmp_path / "out", "passes=2", "masking.baked_draws=2", "bucket_mib=1"))
    assert run.returncode == 0, run.stderr
    manifest = read_manifest(tmp_path / "out")
    assert set(manifest.splits) == {"pass-00", "pass-01", "val"}
    first, second = (Split(tmp_path / "out", manifest, name) for name in ("pass-00", "pass-01"))
    everything = [s.gather(np.arange(len(s)), 0).tokens_T.tolist() for s in (first, second)]
    assert sorted(everything[0]) != sorted(everything[1])
    assert faults(tmp_path / "out") == []


def test_held_out_documents_are_never_trained_on(tmp_path, work):
    texts = [f"{text} Number {i} of the list." for i, text in enumerate(documents(200))]
    path = write_jsonl(tmp_path / "twice.jsonl", texts + texts)
    run = prep(*overrides(work, tmp_path / "out", f"source.paths=[{path}]", "val_fraction=0.3", "objective=none"))
    assert run.returncode == 0, run.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.documents["dropped"] == {"duplicate": 200}
    numbers = {name: numbers_in(work, tmp_path / "out", name) for name in ("pass-00", "val")}
    assert not numbers["pass-00"] & numbers["val"]
    assert 30 < len(numbers["val"]) < 90


def test_the_tokenizer_learns_nothing_of_held_out_text(tmp_path, work):
    """Which documents are held out follows from their texts: as in a run whose vocabulary is given."""
    texts = [f"{text} Number {i} of the list." for i, text in enumerate(documents(200))]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    same = (f"source.paths=[{path}]", "val_fraction=0.3", "objective=none")
    assert prepare(work, tmp_path / "given", *same) == 0
    sides = {name: numbers_in(work, tmp_path / "given", name) for name in ("pass-00", "val")}
    base = ["source=jsonl", *same, "max_len=64", f"out={tmp_path / 'trained'}"]
    plan = make_plan(compose("prep", PrepConfig, base))
    with claimed(plan):
        counted = set()
        for number in range(SAMPLE.num_tasks(plan)):
            SAMPLE.run_task(plan, number)
            counted |= {word for word in sampled_pieces(plan, number) if word.isdigit()}
    assert counted == sides["pass-00"]
    assert not counted & sides["val"]
    assert len(sides["val"]) > 30


def test_no_long_document_lies_on_both_sides(work, tmp_path, monkeypatch):
    """Its parts scatter apart, but the split is that of the whole, also where a file hands it on in pieces."""
    monkeypatch.setattr(documents_module, "MAX_DOCUMENT_CHARACTERS", 300)
    monkeypatch.setattr(text_source, "PART_BYTES", 2000)
    lines = [[f"{line}. Number {i} of the list." for line in text.split(". ")] for i, text in enumerate(documents(60))]
    (tmp_path / "long.txt").write_text("\n\n".join(map("\n".join, lines)))
    extra = ("source=text", f"source.paths=[{tmp_path}/long.txt]", "val_fraction=0.3", "objective=none")
    assert prepare(work, tmp_path / "out", *extra) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.documents["read"] > 120  # parts
    numbers = {name: numbers_in(work, tmp_path / "out", name) for name in ("pass-00", "val")}
    assert not numbers["pass-00"] & numbers["val"]
    assert len(numbers["pass-00"] | numbers["val"]) == 60
    assert 5 < len(numbers["val"]) < 35


def numbers_in(work: Path, out: Path, name: str) -> set[str]:
    """What stands behind "number" in a split."""
    words = (work / "vocab.txt").read_text().split("\n")
    split = Split(out, read_manifest(out), name)
    text = " ".join(words[token] for token in split.gather(np.arange(len(split)), 0).tokens_T.tolist())
    return {part.split(" ")[0] for part in text.replace(" ##", "").split("number ")[1:]}


# -- again ----------------------------------------------------------------------------------------------------------


def test_a_finished_corpus_is_left_alone(corpus, work):
    out, _ = corpus
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run = prep(*overrides(work, out, "executor.workers=2"))
    assert run.returncode == 0
    assert "complete" in run.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_kill_and_run_again_gives_the_same_bytes(corpus, work, tmp_path):
    """SIGKILL of the driver, and of what it has started, at growing delays; then the command once more."""
    extra = ["tokenizer.path=null", "tokenizer.vocab_size=300", "executor.workers=2"]
    whole = tmp_path / "whole"
    assert prep(*overrides(work, whole, *extra)).returncode == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "data_prep", *overrides(work, out, *extra)]
    kills = 0
    for delay in (0.7, 1.1, 1.5, 1.9, 2.3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(delay)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        victim = process.pid if kills % 2 or not children else int(children[-1])
        os.kill(victim, signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        kills += process.returncode != 0
        if victim != process.pid and process.returncode:
            assert process.returncode == ExitCode.FAILED, stderr.decode()
            assert b"run the same command again" in stderr
            assert b"Traceback" not in stderr
        if (out / "manifest.json").exists():  # written last: this kill, if it was one, came after the work was done
            assert read_manifest(out).shards
            break
    assert kills
    run = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert files_of(out) == files_of(whole)


DIES = """
import os, signal, sys
from data_prep import plan
from data_prep.stages import finish
from data_prep.stages import tokenizer
from data_prep.config import PrepConfig
from cloze.cli import hydra_command
from data_prep.prepare import main

def dies(*arguments, **keywords):
    if {condition}:
        os.kill(os.getpid(), signal.SIGKILL)

{module}.{name} = dies
sys.exit(hydra_command("prep", PrepConfig)(main)())
"""


@pytest.mark.parametrize(
    ("module", "name", "condition"),
    [
        ("tokenizer.wordpiece", "train_tokenizer", "True"),
        ("tokenizer", "save_tokenizer", "True"),
        ("finish", "write_manifest", "True"),
        ("finish", "clear_up", "True"),  # the manifest is there
        ("plan", "remove_files", "len(arguments) == 2 and arguments[0].name == '.work'"),  # and plan.json is gone
    ],
)
def test_killed_where_chance_seldom_strikes(work, tmp_path, module, name, condition):
    trained = ("tokenizer.path=null", "tokenizer.vocab_size=300")
    if not (work / "whole").exists():
        assert prepare(work, work / "whole", *trained) == 0
    program = DIES.format(module=module, name=name, condition=condition)
    command = [sys.executable, "-c", program, *overrides(work, tmp_path / "out", *trained)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "out" / ".work").exists()
    assert prepare(work, tmp_path / "out", *trained) == 0
    assert files_of(tmp_path / "out") == files_of(work / "whole")


def test_a_library_of_another_version_is_refused_halfway(work, tmp_path, monkeypatch):
    """It could have cut or spelled the other half in another way. A finished corpus is left alone."""
    from data_prep import plan

    made = make_plan(compose("prep", PrepConfig, overrides(work, tmp_path / "out")))
    with claimed(made):
        pass
    installed = plan.metadata.version
    monkeypatch.setattr(plan.metadata, "version", lambda name: "99" if name == "tokenizers" else installed(name))
    with pytest.raises(UserError, match=r"unfinished preparation of another plan \(other versions\.tokenizers\)"):
        prepare(work, tmp_path / "out")
    monkeypatch.undo()
    assert prepare(work, tmp_path / "out") == 0
    monkeypatch.setattr(plan.metadata, "version", lambda name: "99")
    assert prepare(work, tmp_path / "out") == 0


def test_another_plan_is_refused(corpus, work, tmp_path):
    out, _ = corpus
    run = prep(*overrides(work, out, "seed=2"))
    assert_refused(run, "finished corpus of another plan")
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / ".work").mkdir()
    (tmp_path / "out" / ".work" / "plan.json").write_text('{"config": {"seed": 1}}')
    assert_refused(prep(*overrides(work, tmp_path / "out", "seed=2")), r"seed")


def test_a_foreign_directory_is_refused(work, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    assert_refused(prep(*overrides(work, tmp_path)), "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert_refused(prep(*overrides(work, tmp_path / "thesis.tex")), "is a file")
    assert_refused(prep(*overrides(work, tmp_path / "thesis.tex" / "out")), "thesis.tex")
    assert_refused(prep(*overrides(work, tmp_path / ("x" * 300))), "too long")
    assert_refused(prep(*overrides(work, Path("/proc/x/y"))), "out=/proc/x/y", "name another directory")


def test_a_directory_by_its_url(corpus, work, tmp_path):
    run = prep(*overrides(work, Path("x"), f"out=file://{tmp_path}/not/yet/there"))
    assert run.returncode == 0, run.stderr
    assert files_of(tmp_path / "not" / "yet" / "there") == files_of(corpus[0])


def test_a_plan_that_a_loss_of_power_emptied_is_one_line(work, tmp_path):
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / ".work" / "plan.json").write_bytes(b"")
    assert_refused(prep(*overrides(work, tmp_path / "out")), "plan.json is damaged", "name a new directory or remove")


@pytest.mark.parametrize("seconds", [0, 0.2, 0.5, 1, 2])
def test_control_c_leaves_no_traceback(work, tmp_path, seconds):
    """As a terminal sends it, to the whole process group, from the first lines of ours on; then the run goes on."""
    command = [sys.executable, "-m", "data_prep", *overrides(work, tmp_path / "out", "executor.workers=2")]
    command += ["tokenizer.path=null", "tokenizer.vocab_size=300"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0) as run:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        while run.poll() is None and not children.read_text():  # before that Python itself may be on its way
            time.sleep(0.005)
        time.sleep(seconds)
        os.killpg(run.pid, signal.SIGINT)
        _, stderr = run.communicate(timeout=60)
    assert b"Traceback" not in stderr, stderr.decode()
    assert run.returncode in (-signal.SIGINT, ExitCode.STOPPED, ExitCode.OK)
    assert (b"error: interrupted; the same command goes on" in stderr) == (run.returncode == ExitCode.STOPPED)


def test_a_second_preparation_at_once_is_refused(work, tmp_path):
    import fcntl

    (tmp_path / "out" / ".work").mkdir(parents=True)
    with (tmp_path / "out" / ".work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(prep(*overrides(work, tmp_path / "out")), "another preparation is at work")


# -- bad input --------------------------------------------------------------------------------------------------------


def assert_refused(run: subprocess.CompletedProcess, *words: str, code: int = ExitCode.USAGE) -> None:
    assert run.returncode == code, run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.stderr
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in errors[0]


def prepare(work: Path, out: Path, *extra: str) -> int:
    """In this process up to the workers: quicker than a command."""
    return main(compose("prep", PrepConfig, overrides(work, out, *extra)))


BAD = {
    "unknown key": (["sorce=jsonl"], ["sorce"]),
    "unknown option": (["source=parquette"], ["source=parquette", "jsonl"]),
    "missing path": (["source.paths=[nothing-*.jsonl]"], ["nothing-*.jsonl"]),
    "wrong type": (["max_len=long"], ["max_len"]),
    "out of range": (["val_fraction=1.5"], ["val_fraction=1.5"]),
    "missing tokenizer": (["tokenizer.path=nowhere"], ["tokenizer.path=nowhere"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_command_lines(work, tmp_path, case):
    extra, words = BAD[case]
    assert_refused(prep(*overrides(work, tmp_path / "out", *extra)), *words)
    assert not (tmp_path / "out").exists()


def source_of(tmp_path: Path, name: str, data: bytes) -> str:
    (tmp_path / name).write_bytes(data)
    return f"source.paths=[{tmp_path / name}]"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.jsonl", b"", ["empty"]),
        ("blank.jsonl", b"\n\n\n", ["no document"]),
        ("hollow.jsonl", b'{"text": " "}\n', ["no document", "1 empty"]),
        ("broken.jsonl", b'{"text": "good enough"}\n{"text": "cut\n', ["1 of 2", "max_bad_fraction", "line 2"]),
        (
            "other.jsonl",
            b'{"body": "x"}\n',
            ["no_text_field", "line 1: no text under text; set source.field to one of body", "max_bad_fraction"],
        ),
        ("lone.jsonl", b'{"text": "Only one sentence."}\n', ["no training sample"]),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a b. c d."}\n' * 99, mtime=0)[:-5], ["cut.jsonl.gz", "restore"]),
        ("alien.jsonl.zst", b"not zstd at all", ["alien.jsonl.zst", "restore"]),
    ],
)
@pytest.mark.parametrize("tokenizer", ["given", "trained"])
def test_bad_corpora(work, tmp_path, name, data, words, tokenizer):
    if tokenizer == "trained" and name not in ("blank.jsonl", "hollow.jsonl", "broken.jsonl"):
        pytest.skip("the same path as with a given tokenizer")
    extra = ["tokenizer.path=null", "tokenizer.vocab_size=100"] if tokenizer == "trained" else []
    run = prep(*overrides(work, tmp_path / "out", source_of(tmp_path, name, data), "val_fraction=0", *extra))
    assert_refused(run, *words)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_one_document_corpus_has_no_random_next(work, tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", [" ".join(documents(20))])
    assert prepare(work, tmp_path / "out", f"source.paths=[{path}]", "val_fraction=0") == 0
    statistics = read_manifest(tmp_path / "out").splits["pass-00"]
    assert statistics.samples > 0 == statistics.random_next
    assert faults(tmp_path / "out") == []


def test_dirty_text_is_repaired_and_counted(work, tmp_path):
    lines = [json.dumps({"text": text}).encode() for text in documents(30)]
    lines += [b'{"text": "bad \xff byte. Here it is. And more."}', b'{"text": "nul \\u0000 char. A cat. On a mat."}']
    lines += [b'{"text": "lone \\ud800 surrogate. A cat. On a mat."}', b"{broken"]
    lines += [json.dumps({"text": "word " * 2000}).encode(), json.dumps({"text": "x" * 100_000 + ". A cat."}).encode()]
    lines += [json.dumps({"text": "[SEP] [MASK] [CLS]. " * 200}).encode()]
    extra = source_of(tmp_path, "dirty.jsonl", b"\n".join(lines))
    assert prepare(work, tmp_path / "out", extra) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.documents["repaired"] == {"invalid_utf8": 1, "nul_characters": 1, "lone_surrogates": 1}
    assert manifest.documents["dropped"] == {"bad_json": 1}
    assert faults(tmp_path / "out") == []
    for name in manifest.splits:
        split = Split(tmp_path / "out", manifest, name)
        gathered = split.gather(np.arange(len(split)), 0)
        specials = np.isin(gathered.tokens_T, [manifest.tokenizer.cls_id, manifest.tokenizer.sep_id])
        assert specials.sum() == 3 * len(split)
        assert not np.isin(gathered.tokens_T, [manifest.tokenizer.mask_id, manifest.tokenizer.pad_id]).any()


def test_a_document_of_ten_megabytes_on_one_line(work, tmp_path):
    big = " ".join(documents(1)[0] for _ in range(10_000_000 // len(documents(1)[0])))
    path = tmp_path / "big.txt"
    path.write_text(big + "\n\n" + "\n\n".join(documents(20)))
    started = time.process_time()
    assert prepare(work, tmp_path / "out", "source=text", f"source.paths=[{path}]") == 0
    assert time.process_time() - started < 30
    assert read_manifest(tmp_path / "out").documents["read"] == 20 + 10
    assert faults(tmp_path / "out") == []


def test_a_vocabulary_beyond_two_bytes(work, tmp_path):
    path = vocabulary(tmp_path / "vocab.txt", *(f"extra{i}" for i in range(70_000)), "zzz")
    source = write_jsonl(tmp_path / "a.jsonl", [text + " Zzz." for text in documents(30)])
    assert prepare(work, tmp_path / "out", f"tokenizer.path={path}", f"source.paths=[{source}]") == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.tokenizer.vocab_size > 70_000
    tokens_T = Split(tmp_path / "out", manifest, "pass-00").gather(np.arange(20), 0).tokens_T
    assert tokens_T.dtype == np.uint32
    assert (tokens_T > 65_535).any()
    assert faults(tmp_path / "out") == []


@pytest.mark.parametrize("mebibytes", [1, 3])
def test_a_full_disk_is_one_line_and_nothing_looks_finished(work, tmp_path, mebibytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no test mount a small disk")
    source = write_jsonl(tmp_path / "a.jsonl", documents(9000))
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={mebibytes}m none {disk} && shift 0 && "$@"; code=$?; '
         f"find {disk} -name manifest.json -o -name '*.tar' >&2; exit $code", "sh",
         sys.executable, "-m", "data_prep", *overrides(work, disk / "out", f"source.paths=[{source}]")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert_refused(run, "make room", code=ExitCode.DISK)
    assert "manifest.json" not in run.stderr


def test_it_runs_where_torch_cannot_be_imported(work, tmp_path):
    """Driver and workers alike; the same shards come out."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'deepspeed'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    run = prep(*overrides(work, tmp_path / "out"), env={"PYTHONPATH": path})
    assert run.returncode == 0, run.stderr
    for name in ("verify", "peek"):
        assert module(f"data_prep.{name}", str(tmp_path / "out"), env={"PYTHONPATH": path}).returncode == 0


# -- verify and peek --------------------------------------------------------------------------------------------------


def test_verify_finds_every_kind_of_damage(corpus, tmp_path):
    def damaged(change, *words):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(corpus[0], tmp_path / "c")
        change(tmp_path / "c")
        found = faults(tmp_path / "c")
        assert found, change
        assert all("\n" not in fault for fault in found)
        for word in words:
            assert any(word in fault for fault in found), (word, found)

    def flip(path: Path, offset: int) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    shard = next((corpus[0] / "pass-00").glob("*.tar"))
    name, size = f"pass-00/{shard.name}", shard.stat().st_size
    rng = random.Random(0)
    for offset in [0, size - 1, *(rng.randrange(size) for _ in range(10))]:
        damaged(lambda c, offset=offset: flip(c / name, offset), shard.name, "sha256")
    damaged(lambda c: (c / name).unlink(), shard.name)
    damaged(lambda c: (c / name).write_bytes(shard.read_bytes()[:-1024]), shard.name)
    damaged(
        lambda c: flip(c / "tokenizer" / "vocab.txt", 3) or (c / "tokenizer" / "tokenizer.json").unlink(), "tokenizer"
    )
    damaged(lambda c: (c / "manifest.json").unlink(), "manifest.json")
    damaged(lambda c: (c / "manifest.json").write_text("{"), "manifest.json")

    def edit(key, value):
        def change(c: Path) -> None:
            body = json.loads((c / "manifest.json").read_text())
            table = body
            for part in key[:-1]:
                table = table[part]
            table[key[-1]] = value(table[key[-1]])
            (c / "manifest.json").write_text(sealed_json(body))

        return change

    damaged(edit(["masking", "seed"], lambda seed: seed + 1), "mask draw 0")
    damaged(edit(["splits", "val", "random_next"], lambda count: count + 1), "split val")
    damaged(edit(["objective"], lambda _: "none"), "objective none")


def test_verify_looks_at_every_draw(tmp_path, monkeypatch):
    """Shards in which each draw is the first one once more."""
    monkeypatch.setattr(support, "draw_masks", lambda samples, draw, *rest: draw_masks(samples, 0, *rest))
    support.make_corpus(tmp_path, samples=40, val=0, baked_draws=3, shards_per_split=1)
    found = [fault for fault in faults(tmp_path) if "mask draw" in fault]
    assert {re.search(r"mask draw (\d)", fault)[1] for fault in found} == {"1", "2"}


def test_verify_commands(corpus, tmp_path):
    sound = module("data_prep.verify", str(corpus[0]))
    assert sound.returncode == 0
    assert "is sound" in sound.stdout
    missing = module("data_prep.verify", str(tmp_path))
    assert_refused(missing, "manifest.json")
    assert module("data_prep.verify").returncode == ExitCode.USAGE


def test_peek(corpus):
    shown = module("data_prep.peek", str(corpus[0]), "--n", "2", "--split", "val", "--seed", "3")
    assert shown.returncode == 0
    assert shown.stdout.count("tokens, ") == 2
    assert "[MASK]{" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert [str(text) for text in peek(corpus[0], "val", 2, 3)] == [str(text) for text in peek(corpus[0], "val", 2, 3)]
    assert_refused(module("data_prep.peek", str(corpus[0]), "--split", "test"), "--split test", "pass-00")


# -- real text --------------------------------------------------------------------------------------------------------


def test_docstrings(tmp_path, work):
    import email

    extra = ["source=docstrings", f"source.paths=[{Path(email.__file__).parent}]", "source.min_characters=100"]
    assert prepare(work, tmp_path / "out", *extra) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.documents["kept"] > 50
    assert manifest.documents["dropped"]["too_short"] > 50


@pytest.mark.slow
def test_books(tmp_path):
    paths = f"source.paths=[{real('books-small.jsonl.zst')}]"
    run = prep("source=jsonl", paths, f"out={tmp_path}", "tokenizer.vocab_size=8192", "executor.workers=2")
    assert run.returncode == 0, run.stderr
    statistics = read_manifest(tmp_path).splits["pass-00"]
    assert statistics.samples > 25_000
    assert 0.48 < statistics.random_next / statistics.samples < 0.52
    assert faults(tmp_path) == []
    with tarfile.open(next((tmp_path / "pass-00").iterdir())) as tar:
        assert all(member.mtime == 0 for member in tar)
