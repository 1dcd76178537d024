"""`val_sources`: texts of the user's own, each a held-out split with its name, and none of it in the training text."""

import json
from pathlib import Path

import numpy as np
import pytest

from cloze.cli import compose
from cloze.corpus import verify
from cloze.corpus.manifest import parse_manifest, read_manifest, sealed_json
from cloze.corpus.shards import Split
from cloze.corpus.tokenizer import load_tokenizer
from cloze.errors import UserError
from data_prep.config import PrepConfig
from data_prep.plan import make_plan
from data_prep.prepare import main
from pretrain.data.cache import local_corpus
from pretrain.data.loader import TrainingCorpus
from tests.unit.corpora import documents, module, vocabulary, write_jsonl

NEWS, MAIL = documents(20, 1), documents(12, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 documents to train on, 5 of `news` and 1 of `mail` among them, one of those twice; and two val files."""
    path = tmp_path_factory.mktemp("val_sources")
    write_jsonl(path / "train.jsonl", [*documents(300), *NEWS[:5], NEWS[0], MAIL[3]])
    write_jsonl(path / "news.jsonl", [*NEWS, NEWS[7]])
    (path / "mail.txt").write_text("\n\n".join(MAIL) + "\n")
    vocabulary(path / "vocab.txt")
    return path


def overrides(folder: Path, out: Path, val_sources: str | None, *extra: str) -> list[str]:
    named = [] if val_sources is None else [f"val_sources={val_sources}"]
    return [
        "source=jsonl", f"source.paths=[{folder}/train.jsonl]", f"tokenizer.path={folder}/vocab.txt", f"out={out}",
        "max_len=64", "val_fraction=0.1", "objective=none", "executor.workers=1", *named, *extra,
    ]  # fmt: skip


def both(folder: Path) -> str:
    return (
        f"[{{kind: jsonl, paths: [{folder}/news.jsonl], name: news}},"
        f"{{kind: text, paths: [{folder}/mail.txt], name: mail, document: blank_line}}]"
    )


def made(folder: Path, out: Path, *extra: str, named: bool = True) -> Path:
    assert main(compose("prep", PrepConfig, overrides(folder, out, both(folder) if named else None, *extra))) == 0
    return out


@pytest.fixture(scope="module")
def corpus(folder):
    return made(folder, folder / "out")


def texts(directory: Path, split: str) -> str:
    """All that a split's samples hold, in no order."""
    manifest, tokenizer = read_manifest(directory), load_tokenizer(directory / "tokenizer").backend
    samples = Split(directory, manifest, split)
    found = samples.gather(np.arange(len(samples)), 0)
    edges = np.cumsum(found.lengths_Nx2[:, 1], dtype=np.int64)
    return " ".join(tokenizer.decode(part.tolist()) for part in np.split(found.tokens_T, edges[:-1]))


def spelled(directory: Path, text: str) -> str:
    tokenizer = load_tokenizer(directory / "tokenizer").backend
    return tokenizer.decode(tokenizer.encode(text).ids)


def test_each_source_is_a_split_and_nothing_of_it_is_trained_on(folder, corpus):
    manifest = read_manifest(corpus)
    assert list(verify.faults(corpus)) == []
    assert manifest.held_out == ("val", "val-mail", "val-news")
    assert {path.name for path in corpus.iterdir() if path.is_dir()} == {"pass-00", "tokenizer", *manifest.held_out}
    training, news, mail = manifest.documents["sources"]
    assert (training["read"], training["dropped"]) == (307, {"duplicate": 1, "in_validation": 6})
    assert (news["split"], news["read"], news["dropped"]) == ("val-news", 21, {"duplicate": 1})
    assert (mail["split"], mail["read"], mail["dropped"]) == ("val-mail", 12, {})
    assert "split" not in training
    for table in (training, news, mail, manifest.documents):
        assert table["read"] == table["kept"] + sum(table["dropped"].values())
    assert manifest.documents["read"] == 307 + 21 + 12
    assert manifest.source["paths"] == [f"{folder}/train.jsonl"]
    held, mailed = texts(corpus, "val-news"), texts(corpus, "val-mail")
    assert all(_firsts(spelled(corpus, text)) in held for text in NEWS)
    assert all(_firsts(spelled(corpus, text)) in mailed for text in MAIL)
    trained = texts(corpus, "pass-00") + texts(corpus, "val")
    assert not any(_firsts(spelled(corpus, text)) in trained for text in [*NEWS, *MAIL] if len(text) > 200)
    assert any(_firsts(spelled(corpus, text)) in trained for text in documents(300))


def _firsts(text: str) -> str:
    """The first words of a document: a sample boundary does not cut them where it begins one."""
    return " ".join(text.split()[:20])


def test_what_is_excluded_is_all_that_differs_from_a_training_text_without_it(folder, corpus, tmp_path):
    """The training text with the copies taken out by hand makes the same shards."""
    write_jsonl(folder / "clean.jsonl", documents(300))
    plain = made(folder, tmp_path / "plain", f"source.paths=[{folder}/clean.jsonl]", named=False)
    ours, theirs = read_manifest(corpus), read_manifest(plain)
    for split in ("pass-00", "val"):
        assert [s.sha256 for s in ours.split_shards(split)] == [s.sha256 for s in theirs.split_shards(split)]


@pytest.mark.parametrize("extra", [("bucket_mib=1", "executor.workers=2"), ("passes=2", "objective=nsp")])
def test_exclusion_is_exact_however_text_is_spread(folder, tmp_path, monkeypatch, extra):
    """Over many buckets and tasks, and with near-duplicates looked for."""
    pytest.importorskip("rensa")
    write_jsonl(tmp_path / "big.jsonl", [*documents(6000, 5), *NEWS])
    more = (f"source.paths=[{tmp_path}/big.jsonl]", "clean.near_duplicates=0.9")
    out = made(folder, tmp_path / "out", *extra, *more)
    manifest = read_manifest(out)
    training, news, mail = manifest.documents["sources"]
    assert training["dropped"]["in_validation"] == len(NEWS)
    assert "near_duplicate" not in {**news["dropped"], **mail["dropped"]}
    assert list(verify.faults(out)) == []
    for table in (training, news, mail, manifest.documents):
        assert table["read"] == table["kept"] + sum(table["dropped"].values())


def test_without_val_the_named_splits_are_what_is_held_out(folder, tmp_path):
    out = made(folder, tmp_path / "out", "val_fraction=0")
    manifest = read_manifest(out)
    assert manifest.held_out == ("val-mail", "val-news")
    assert manifest.documents["sources"][0]["dropped"] == {"duplicate": 1, "in_validation": 6}
    (found,) = (finding for finding in manifest.diagnosis if finding["name"] == "held_out")
    assert found["value"] == sum(manifest.splits[split].samples for split in manifest.held_out)
    assert list(verify.faults(out)) == []


def test_named_splits_make_it_version_2_and_version_1_is_read(folder, corpus, tmp_path):
    assert json.loads((corpus / "manifest.json").read_text())["version"] == 2
    plain = made(folder, tmp_path / "plain", named=False)
    body = json.loads((plain / "manifest.json").read_text())
    assert body["version"] == 1
    assert read_manifest(plain).held_out == ("val",)
    assert parse_manifest(sealed_json({**body, "version": 2}).encode(), "x") == read_manifest(plain)


@pytest.mark.parametrize(
    ("version", "words"),
    [(1, "version 1, which has no split val-news"), (3, "no field .token_types."), (4, "reads 1, 2 and 3")],
)
def test_a_version_that_does_not_fit_is_refused(corpus, version, words):
    body = json.loads((corpus / "manifest.json").read_text())
    with pytest.raises(UserError, match=words):
        parse_manifest(sealed_json({**body, "version": version}).encode(), "manifest.json")


def test_a_split_of_another_name_is_refused(corpus):
    text = (corpus / "manifest.json").read_text()
    for name in ("val-", "val-News", "val-a/b", "val-1", "validation", f"val-{'a' * 33}"):
        body = json.loads(text.replace('"val-news"', f'"{name}"'))
        with pytest.raises(UserError, match=r"manifest\.json: split"):
            parse_manifest(sealed_json(body).encode(), "manifest.json")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("[{kind: text, paths: [F/mail.txt]}]", r"val_sources\[0\]: has no name; write"),
        ("[7]", r"val_sources\[0\]: has no name; write"),
        ("[{kind: text, paths: [F/mail.txt], name: News}]", r"val_sources\[0\]: name=News: must be a lowercase"),
        ("[{kind: text, paths: [F/mail.txt], name: ../x}]", r"val_sources\[0\]: name=\.\./x: must be"),
        ("[{kind: text, paths: [F/mail.txt], name: 3}]", r"val_sources\[0\]: name=3: must be"),
        ("[{kind: text, paths: [F/mail.txt], name: a}, {kind: text, paths: [F/mail.txt], name: a}]",
         r"val_sources\[1\]: name=a: is taken by val_sources\[0\]"),
        ("[{paths: [F/mail.txt], name: a}]", r"val_sources\[0\]: has no kind"),
        ("[{kind: text, paths: [F/none.txt], name: a}]", r"val_sources\[0\]: .*none\.txt"),
        ("[{kind: text, paths: [F/mail.txt], name: a, weight: 2}]", r"val_sources\[0\]: weight=2: "),
        ("[{kind: text, paths: [F/mail.txt], name: a, fields: x}]", r"val_sources\[0\]: .*fields"),
        ("[{kind: text, paths: [F/empty.txt], name: a}]", r"val_sources\[0\]: paths: 1 files, all of them empty"),
    ],
)  # fmt: skip
def test_bad_val_sources_are_one_line(folder, tmp_path, entries, words):
    (folder / "empty.txt").write_text("")
    with pytest.raises(UserError, match=words) as caught:
        make_plan(compose("prep", PrepConfig, overrides(folder, tmp_path, entries.replace("F/", f"{folder}/"))))
    assert "\n" not in str(caught.value)


def test_a_val_source_of_which_nothing_is_left_is_one_line(folder, tmp_path):
    (tmp_path / "short.txt").write_text("ok\n")
    entries = f"[{{kind: text, paths: [{tmp_path}/short.txt], name: a, min_characters: 99}}]"
    with pytest.raises(UserError, match=r"val_sources: no document of val-a is left \(1 too_short\)"):
        main(compose("prep", PrepConfig, overrides(folder, tmp_path / "out", entries)))
    entries = f"[{{kind: text, paths: [{tmp_path}/short.txt], name: a, min_characters: 1}}]"
    with pytest.raises(UserError, match=r"val_sources: 0 documents make no sample of val-a \(dropped: 1 one_sentence"):
        main(compose("prep", PrepConfig, overrides(folder, tmp_path / "other", entries, "objective=sop")))


def test_a_training_text_that_is_all_held_out_is_one_line(folder, tmp_path):
    entries = f"[{{kind: jsonl, paths: [{folder}/train.jsonl], name: a}}]"
    with pytest.raises(UserError, match=r"0 documents make no training sample \(dropped: 1 duplicate, 306 in_valid"):
        main(compose("prep", PrepConfig, overrides(folder, tmp_path / "out", entries)))


def test_another_val_source_is_another_plan_and_none_changes_no_plan(folder, tmp_path):
    """What was finished before there were val sources is still known as finished."""

    def identity(entries: str | None) -> str:
        return make_plan(compose("prep", PrepConfig, overrides(folder, tmp_path, entries))).identity()

    entry = f"{{kind: jsonl, paths: [{folder}/news.jsonl], name: NAME}}"
    found = [identity(entries and f"[{entry.replace('NAME', entries)}]") for entries in (None, "news", "other")]
    assert len(set(found)) == 3
    assert not {"val_sources", "val_splits"} & ({*json.loads(found[0])} | {*json.loads(found[0])["config"]})


def test_peek_shows_a_named_split(corpus):
    run = module("data_prep.peek", str(corpus), "--split", "val-news", "--n", "1")
    assert (run.returncode, run.stdout.startswith("val-news ")) == (0, True)
    run = module("data_prep.peek", str(corpus), "--split", "val-x")
    assert "there are pass-00, val, val-mail, val-news" in run.stderr


def test_the_summary_and_the_preview_tell_of_training_text_and_splits_apart(folder, tmp_path, capsys):
    made(folder, tmp_path / "out")
    text = capsys.readouterr().out
    for words in ("dropped, in_validation", "val-news", "val-mail"):
        assert words in text
    assert main(compose("prep", PrepConfig, overrides(folder, tmp_path / "p", both(folder), "preview=1000"))) == 0
    assert "307 documents, " in capsys.readouterr().out
    assert not (tmp_path / "p").exists()


def test_a_copy_for_streaming_holds_every_held_out_split(corpus, tmp_path):
    copy = local_corpus(str(corpus), str(tmp_path / "cache"), 1, held_out_only=True)
    assert {path.name for path in copy.iterdir() if path.is_dir()} == {"tokenizer", "val", "val-mail", "val-news"}
    found = TrainingCorpus(copy)
    assert found.held_out == {name: read_manifest(corpus).splits[name].samples for name in found.manifest.held_out}
    for split, count in found.held_out.items():
        assert found.val_batch(np.arange(count), split).num_tokens == found.manifest.splits[split].tokens
