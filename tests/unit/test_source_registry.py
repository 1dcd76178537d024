"""A kind of source, a stage: each is one new file, and nothing else knows of it."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from cloze.cli import compose
from cloze.corpus import verify
from cloze.corpus.manifest import read_manifest
from cloze.errors import UserError
from data_prep.config import PrepConfig
from data_prep.executors.local import LocalExecutor
from data_prep.plan import Plan, claimed, make_plan
from data_prep.sources.base import Source
from data_prep.stages.base import Stage
from tests.unit.corpora import ROOT, documents, write_jsonl

TOY = '''"""Numbers written out: as many documents as asked for, of no file at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from cloze.errors import UserError
from cloze.schema import doc
from data_prep.sources.base import Bad, Document, InputFile, Source, Span, origin


@dataclass(frozen=True, kw_only=True)
class NumberSource(Source, kind="numbers"):
    malformed: ClassVar[frozenset[str]] = frozenset({"unlucky"})
    needs_paths: ClassVar[bool] = False

    count: int = doc("how many numbers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise UserError(f"source.count={self.count}: must be at least 1")

    def find_inputs(self) -> list[InputFile]:
        size = self.count * 2**12  # so that there are several tasks
        return [InputFile("numbers", size, 1, size, self.count)]

    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        for number in range(span.begin, span.end):
            if number == 13:
                yield Bad("unlucky", f"number {number}")
            else:
                text = f"This is number {number}. After it comes {number + 1}. Nobody counts on."
                yield Document(text, f"number {number}", origin("numbers", number), False)
'''
VALUES = "# Numbers\nkind: numbers\npaths: []\ncount: 900\nmin_characters: 1\nmax_bad_fraction: 0.1\nweight: 1.0\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product as it stands, and two more files."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("cloze", "conf", "data_prep"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data_prep" / "sources" / "numbers.py").write_text(TOY)
    (folder / "conf" / "source" / "numbers.yaml").write_text(VALUES)
    return folder


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_source_is_one_file_and_its_values(tree: Path, tmp_path: Path) -> None:
    """With workers, alone and in a mixture; the second start finds the corpus finished."""
    text = write_jsonl(tmp_path / "a.jsonl", documents(30))
    mixture = f"sources=[{{kind: jsonl, paths: [{text}]}},{{kind: numbers, count: 40, weight: 2}}]"
    common = ("tokenizer.vocab_size=200", "max_len=32", "executor.workers=2")
    for out, given, kinds in (
        ("alone", ("source=numbers", "source.count=700"), {"numbers": 700}),
        ("mixed", (mixture,), {"jsonl": 30, "numbers": 40}),
    ):
        done = run(tree, *given, f"out={tmp_path / out}", *common)
        assert done.returncode == 0, done.stderr
        assert "map: 2/2" in done.stderr or out == "mixed"
        found = read_manifest(tmp_path / out).documents
        assert {source["kind"]: source["read"] for source in found["sources"]} == kinds
        assert found["dropped"] == {"unlucky": 1}
        assert list(verify.faults(tmp_path / out)) == []
    again = run(tree, "source=numbers", "source.count=700", f"out={tmp_path / 'alone'}", *common)
    assert "nothing to do" in again.stdout


@pytest.mark.slow
def test_its_keys_are_its_own(tree: Path, tmp_path: Path) -> None:
    shown = run(tree, "source=numbers", "--help").stdout
    assert "how many numbers [900]" in shown
    assert not re.search(r"^ +source\.field ", shown, re.MULTILINE)
    mine = "kind, paths, min_characters, max_bad_fraction, weight, count"
    for given, line in (
        ("source.field=text", f"source.field: of no use to source=numbers, whose keys are {mine}"),
        ("source.count=0", "source.count=0: must be at least 1"),
        (
            "source.cuont=1",
            "source.cuont: no such key (did you mean source.count?); write source.count=1, or see --help",
        ),
    ):
        refused = run(tree, "source=numbers", f"out={tmp_path / 'x'}", given)
        assert (refused.returncode, refused.stderr) == (64, f"error: {line}\n")
    refused = run(tree, "source=numbers", f"out={tmp_path / 'x'}", "source.max_bad_fraction=0")
    assert "1 of 900 items are malformed (first: unlucky at number 13)" in refused.stderr


def test_what_is_found_is_what_has_values() -> None:
    assert set(Source.kinds) == {path.stem for path in (ROOT / "conf" / "source").glob("*.yaml")}
    for kind, source in Source.kinds.items():
        assert source.__module__ == f"data_prep.sources.{kind}"


@pytest.mark.parametrize("kind", sorted(Source.kinds))
def test_a_key_of_another_source_is_refused(kind: str) -> None:
    own = [field.name for field in fields(Source.kinds[kind])]
    for key in {"document", "field"} - set(own):
        expected = rf"^source\.{key}: of no use to source={kind}, whose keys are {', '.join(own)}$"
        with pytest.raises(UserError, match=expected):
            compose("prep", PrepConfig, ["out=x", f"source={kind}", "source.paths=[x]", f"source.{key}=file"])
        expected = rf"^sources\[0\]: {key}: of no use to {kind}, whose keys are {', '.join(own)}$"
        with pytest.raises(UserError, match=expected):
            make_plan(compose("prep", PrepConfig, ["out=x", f"sources=[{{kind: {kind}, paths: [x], {key}: file}}]"]))


# -- stages -----------------------------------------------------------------------------------------------------------


def _three(plan: Plan) -> int:
    return 3


def _square(plan: Plan, number: int, path: Path) -> None:
    path.write_text(f"{number**2} of {len(plan.tasks)}")


SQUARES = Stage("squares", _three, _square)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_executor_runs_any_stage(tmp_path: Path, workers: int) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", documents(3))
    overrides = ["source=jsonl", f"source.paths=[{text}]", f"out={tmp_path / 'out'}", f"executor.workers={workers}"]
    plan = make_plan(compose("prep", PrepConfig, overrides))
    with claimed(plan):
        executor = LocalExecutor(plan)
        assert sorted(executor.run(SQUARES, [0, 2])) == [0, 2]
        executor.close(failed=False)
        results = SQUARES.results(plan)
        assert [path.exists() for path in results] == [True, False, True]
        assert results[2].read_text() == "4 of 1"
