"""A corpus that is prepared straight into object storage: a real S3 server, kills, refusals, and training's cache."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cloze.cli import compose
from cloze.corpus.manifest import NAME, read_manifest
from cloze.corpus.shards import Split
from cloze.errors import UserError
from data_prep.config import PrepConfig
from data_prep.plan import claimed, make_plan
from pretrain.data.cache import local_corpus
from tests.unit.corpora import ROOT, documents, files_of, prep, vocabulary, write_jsonl


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    for number in range(2):
        write_jsonl(folder / f"{number}.jsonl", documents(1500, number))
    vocabulary(folder / "vocab.txt")
    return folder


def overrides(work: Path, out: str) -> list[str]:
    return [
        "source=jsonl", f"source.paths=[{work}/*.jsonl]", f"out={out}", f"work={work}/prep-work", "max_len=64",
        "bucket_mib=1", "passes=2", f"tokenizer.path={work}/vocab.txt", "executor.workers=2",
    ]  # fmt: skip


def objects(store, place: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{place}/"): store.cat_file(name) for name in store.find(place)}


@pytest.mark.slow
def test_killed_while_it_uploads_then_the_same_bytes(store, work, tmp_path):
    url = "s3://bucket/corpora/books"
    assert prep(*overrides(work, str(work / "local"))).returncode == 0
    command = [sys.executable, "-m", "data_prep", *overrides(work, url)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not any(name.endswith(".tar") for name in store.find("bucket/corpora/books")):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert f"corpora/books/{NAME}" not in objects(store, "bucket")
    again = prep(*overrides(work, url))
    assert again.returncode == 0, again.stderr
    assert objects(store, "bucket/corpora/books") == files_of(work / "local")
    assert not list((work / "prep-work").iterdir())  # nothing of it stays here
    finished = prep(*overrides(work, url))
    assert "books is complete: nothing to do" in finished.stdout

    copy = local_corpus(url, str(tmp_path / "cache"), 1)
    manifest = read_manifest(copy)
    split = Split(copy, manifest, "pass-01")
    assert len(split) == manifest.splits["pass-01"].samples
    assert split.gather(np.array([0, len(split) - 1]), 0).lengths_Nx2.shape == (2, 2)

    with pytest.raises(UserError, match="holds a finished corpus of another plan"):
        begin(work, url, "seed=2")


def begin(work: Path, url: str, *extra: str) -> bool:
    """Claim the place as a preparation does, and give it up unfinished. Returns whether it is finished."""
    with claimed(make_plan(compose("prep", PrepConfig, [*overrides(work, url), *extra]))) as finished:
        return finished


def test_what_lies_there_is_left_alone(store, work):
    store.pipe_file("bucket/photos/cat.jpg", b"meow")
    with pytest.raises(UserError, match=r"out=s3://bucket/photos: is not empty \(cat\.jpg\)"):
        begin(work, "s3://bucket/photos")
    assert not begin(work, "s3://bucket/begun")
    with pytest.raises(UserError, match=r"out=s3://bucket/begun: holds an unfinished .* \(other seed\)"):
        begin(work, "s3://bucket/begun", "seed=2")


def test_another_machine_goes_on_without_the_first_ones_work(store, work, tmp_path):
    """And the other way round: what this machine thinks it has uploaded is forgotten when it is gone."""
    assert not begin(work, "s3://bucket/moved")
    assert not begin(work, "s3://bucket/moved", f"work={tmp_path}")
    (folder,) = tmp_path.iterdir()
    (folder / ".work/reduce").mkdir()
    (folder / ".work/reduce/000000").write_text("")
    assert not begin(work, "s3://bucket/moved", f"work={tmp_path}")
    assert (folder / ".work/reduce/000000").exists()
    store.rm("bucket/moved", recursive=True)
    assert not begin(work, "s3://bucket/moved", f"work={tmp_path}")
    assert not (folder / ".work/reduce/000000").exists()
    shutil.rmtree(tmp_path)


def test_objects_are_read_and_watched(store):
    """Found by a listing, asked for one by one when they are read, as in a worker."""
    for number in range(2):
        store.pipe_file(f"bucket/in/{number}.txt", f"Text {number}.".encode())
    source = compose("prep", PrepConfig, ["source=text", "source.paths=[s3://bucket/in/*.txt]", "out=x"]).source
    files = source.find_inputs()
    spans = [span for task in source.split(files) for span in task]
    fsspec.filesystem("s3").invalidate_cache()
    assert [item.text for item in source.read(files, spans)] == ["Text 0.", "Text 1."]
    store.pipe_file("bucket/in/1.txt", b"Text 2.")
    with pytest.raises(UserError, match=r"1\.txt: changed since"):
        list(source.read(files, spans))


@pytest.mark.slow
@pytest.mark.parametrize("url", ["s3://no-such-bucket/x", "https://127.0.0.1:9/x", "nonsense://x"])
def test_a_place_that_cannot_be_written_is_one_line(store, work, url):
    with pytest.raises(UserError, match=rf"^{url}[^\n]+$"):
        begin(work, url)


@pytest.mark.slow
def test_without_credentials_there_is_one_line(store, work, tmp_path):
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED", "AWS_SHARED_CREDENTIALS_FILE")
    run = prep(*overrides(work, "s3://bucket/x"), env=dict(zip(names, ("", "", "true", str(tmp_path)), strict=True)))
    assert run.returncode == 64, run.stderr
    assert run.stderr.startswith("error: s3://bucket/x")
    assert "credentials" in run.stderr
    assert run.stderr.count("\n") == 1
