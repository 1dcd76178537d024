"""What a message tells to write is written, and the command goes further than before."""

import io
import re
import shlex
import threading
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

from cloze import cli, ownership
from cloze.corpus.manifest import read_manifest
from cloze.errors import ExitCode, UserError
from cloze.patience import telling
from data_prep.config import PrepConfig
from finetune.config import EmbeddingsConfig, FinetuneConfig, PredictConfig, SuiteConfig
from pretrain.config import TrainConfig
from pretrain.evaluate.config import GrammarConfig
from pretrain.evaluate.frozen_config import ProbesConfig, WordsConfig
from tests.unit.test_report import make_run

GIVEN: dict[str, tuple[type[Any], Sequence[str]]] = {
    "train": (TrainConfig, ("run=r", "data.path=d")),
    "prep": (PrepConfig, ("source=text", "source.paths=[a.txt]", "out=o")),
    "finetune": (FinetuneConfig, ("task=classification", "model=m", "data.train=a", "out=o")),
    "predict": (PredictConfig, ("model=m", "in=a.tsv", "out=b.tsv")),
    "suite": (SuiteConfig, ("model=m", "suite=glue", "out=o")),
    "embeddings": (EmbeddingsConfig, ("model=m", "sts=[a.tsv]")),
    "grammar": (GrammarConfig, ("model=m", "data=[a.zip]")),
    "probes": (ProbesConfig, ("model=m", "data=[a]")),
    "words": (WordsConfig, ("model=m",)),
}

# What people type, by command
TYPED = {
    "train": [
        *("lr=1e-3", "learning_rate=1e-3", "optim.learning_rate=1e-3", "batch_size=8", "hidden_size=9"),
        "dropout=0.1",
        *("model=bert-base", "model=BERT-tiny", "optim=Adam", "recipe=cramed", "precision=float16", "precision=half"),
        *("stepz=9", "steps", "optim.lr:1e-3", "steps = 9", "bf16", "fp16=true", "wandb=false", "wandb.mode=off"),
        *("wandb=true", "data=corpus", "budget=2", "eval=100", "weight_decay=0.1", "warmup_ratio=0.1", "train-iters=9"),
        *("mlm_probability=0.3", "model_name=bert-base", "zero=offload", "data.access=streaming", "path=a"),
        "run_name=x",
        *("+seed=3", "seed=1,2", "data.dir=a b", "seed=3 steps=4", "data.path=a(b", "schedule=step_decay"),
    ],
    "prep": [
        *("source.paths=a.txt", "source.files=[a.txt]", "source.path=b.txt", "input=b.txt", "output=p"),
        "vocab_size=100",
        *("source=txt", "source=json", "max_length=64", "masking=wwm", "workers=3", "num_proc=2", "tokenizer=bert"),
        *("tokenizer.type=bpe", "tokenizer.kind=sentencepiece", "objective=mlm", "lowercase=true", "executor=slurm"),
        *("source.paths=a,b", "val_fraction=5%", "line_by_line=true"),
    ],
    "finetune": [
        *("lr=3", "num_train_epochs=3", "max_length=64", "lora=8", "lora.r=8", "head=CRF", "precision=fp16", "seeds=5"),
        *("columns=[text,label]", "data.columns=text,label", "test_file=a.tsv", "data.validation=a.tsv", "task=NER"),
        *("task=sentiment", "model_name_or_path=bert", "output_dir=p"),
    ],
    "predict": ["batch_size=3", "columns=text", "precision=bfloat16"],
    "suite": ["tasks=cola", "learning_rate=3e-5", "epoch=3"],
    "embeddings": ["sts=a.tsv", "max_length=64"],
    "grammar": ["data=a.zip", "txt=[a]"],
    "probes": ["data=probes", "sample=3"],
    "words": ["words=king", "tops=3"],
}  # fmt: skip
_AGAIN = re.compile(
    "no such|not a |is a list|keys of its own|several|has no value"
)  # what else is asked for is further
FILLED = {"warmup_fraction": "0.1", "steps": "9", "batch_tokens": "3", "freeze_layers": "1"}  # what only a user knows


def refused(name: str, overrides: Sequence[str]) -> str | None:
    """The one line of the refusal; None where they are taken."""
    schema, _ = GIVEN[name]
    told = io.StringIO()

    def compose() -> int:
        cli.compose(name, schema, overrides)
        return 0

    with redirect_stderr(told):
        if cli.guarded(compose, schema) == ExitCode.OK:
            return None
    (line,) = told.getvalue().splitlines()
    return line.removeprefix("error: ")


def remedies(line: str) -> list[list[str]]:
    """What a line tells to write instead, each as the words of a shell."""
    found = []
    if match := re.search(r"(?:; write|brackets around it:|quotes away:|for text write) (.*)$", line):
        text = re.split(r", or see --help| \((?=[a-z-])| and source=text|; there are | without \+", match[1])[0]
        found.append(shlex.split(text))
    if not found and (match := re.search(r"^(\S+?)=\S*: no such (?:option|value|task) \(did you mean (\S+)\?\)", line)):
        found.append([f"{match[1]}={match[2]}"])
    if not found and (match := re.search(r"; (\S+) is ([\d.]+); correct the value", line)):
        found.append([f"{line.partition('=')[0]}={match[2]}"])
    return found


def filled(word: str) -> str:
    """With a value where the line has … ."""
    key, _, value = word.partition("=")
    return f"{key}={value.replace('…', FILLED.get(key.rpartition('.')[2], '9'))}"


@pytest.mark.parametrize("name", TYPED)
def test_what_it_says_to_write_is_taken(name: str) -> None:
    """A line that names no remedy must list what there is."""
    _, given = GIVEN[name]
    for typed in TYPED[name]:
        key = typed.partition("=")[0]
        base = [one for one in given if one.partition("=")[0] != key]
        line = refused(name, [*base, typed])
        if line is None:  # a list of one, say, that is read as it stands
            continue
        found = remedies(line)
        assert found or "there are " in line or "--multirun" in line, line
        for words in found:
            mended = [filled(word) for word in words]
            keys = {word.partition("=")[0] for word in mended}
            after = refused(name, [*(one for one in base if one.partition("=")[0] not in keys), *mended])
            assert after is None or not _AGAIN.search(after), f"{typed}\n{line}\n{mended}\n{after}"


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_missing_is_asked_for_until_it_is_there(name: str) -> None:
    """`add run=…` after `add data.path=…`: each line goes one further."""
    schema, given = GIVEN[name]
    values = {one.partition("=")[0]: one for one in given}
    overrides: list[str] = ["source=text"] if schema is PrepConfig else []
    for _ in range(6):
        line = refused(name, overrides)
        if line is None or not (match := re.search(r"add (\S+)=…", line)):
            break
        assert values[match[1]] not in overrides
        overrides.append(values[match[1]])
    assert line is None or name in ("embeddings", "grammar"), line


def test_no_word_is_taken_for_another_that_has_nothing_to_do_with_it() -> None:
    for name, typed in (("train", "help"), ("train", "verbose"), ("finetune", "metric=f1"), ("train", "device=cuda")):
        line = refused(name, [*GIVEN[name][1], typed])
        assert line
        assert "did you mean" not in line, line


def test_launch_names_what_sweeps() -> None:
    given = ["data.path=d", "run=r${optim.lr}", "optim.lr=0.1,0.2", "procs=2", "--multirun"]
    code, (line,) = run("launch", *given)
    assert code == ExitCode.USAGE
    words = shlex.split(line.partition("; write ")[2])
    assert words == ["deepspeed", "--module", "pretrain.train", *given[:3], "--multirun"]
    assert find_spec(words[2])


@pytest.mark.usefixtures("places")
def test_launch_starts_no_process_for_a_corpus_that_is_not_there() -> None:
    code, (line,) = run("launch", "run=r", "data.path=nowhere", "model=tiny")
    assert code == ExitCode.USAGE
    assert line.startswith("error: nowhere/manifest.json: not there; name a directory")
    assert not Path("runs/r").exists()


def assert_exists(command: Sequence[str]) -> None:
    """That a command's module is there, and takes the keys that it names."""
    assert command[:2] == ["python", "-m"]
    assert find_spec(command[2])
    if command[2] == "launch" and len(command) > 3:
        cli.compose("train", TrainConfig, command[3:])


def run(module: str, *arguments: str) -> tuple[int, list[str]]:
    """Exit code, and the lines of stderr."""
    told = io.StringIO()
    with redirect_stderr(told), redirect_stdout(io.StringIO()):
        found = import_module(module)
        main = found.main if hasattr(found, "main") else import_module(f"{module}.__main__").main
        code = main(list(arguments))
    return code, told.getvalue().splitlines()


@pytest.fixture
def places(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of everything that is confused with something else."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A line.\n")
    Path("corpus").symlink_to(corpus)
    make_run(Path("runs/a"))
    Path("runs/a/checkpoints/1").mkdir(parents=True)
    Path("ft").mkdir()
    Path("ft/metrics.json").write_text('{"unk_share": {}, "guessing": {}}')
    Path("runs/a/status.json").write_text('{"exit_code": 0, "step": 30, "time": 2e9}')
    for name, kind in (("run", ownership.RUN), ("empty", None)):
        Path(name).mkdir()
        if kind:
            ownership.mark(Path(name), kind)
    return tmp_path


@pytest.mark.usefixtures("places")
def test_a_place_of_another_kind_is_called_what_it_is() -> None:
    for path, told in (("run", "is a run of Cloze, no corpus"), ("text.txt", "is a file, no corpus")):
        with pytest.raises(UserError, match=told):
            read_manifest(Path(path))
    code, lines = run("finetune.compress", "run", "o")
    assert code == ExitCode.USAGE
    assert lines[-1].startswith("error: ")
    code, (line,) = run("pretrain.words", "model=run")
    assert "is a run of Cloze, not yet a model; make one: " in line
    assert_exists(shlex.split(line.rpartition("make one: ")[2]))
    code, (line,) = run("pretrain.words", "model=corpus")
    assert line.startswith("error: model=corpus: is a corpus of `python -m data_prep`, no model; name a directory")


MESSAGES: list[tuple[str, tuple[str, ...]]] = [
    *(("data_prep.verify", (path,)) for path in ("nowhere", "text.txt", "run")),
    *(("data_prep.peek", ("corpus", "--split", "train")), ("data_prep.report", ("run",))),
    *(("pretrain.report", (path,)) for path in ("nowhere", "corpus", "run")),
    *(("pretrain.checkpoint", ("corpus",)), ("pretrain.export", ("corpus", "o")), ("pretrain.card", ("run", "empty"))),
    *(("pretrain.runs", ("diff", "a", "b")), ("pretrain.runs", ("--root", "empty"))),
    *(("finetune.grid", ("empty",)), ("finetune.report", ("empty",)), ("finetune.compress", ("corpus", "o"))),
    *(("launch", ("run=r", "data.path=corpus", "procs=0")), ("launch", ("chek",)), ("launch", ("run=r",))),
    *(("pretrain.plan", ("gpu=rtx",)), ("pretrain.plan", ("tokens=many",)), ("finetune.probe", ("empty", "x"))),
]  # fmt: skip


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(("module", "arguments"), MESSAGES)
def test_every_refusal_says_what_to_do_and_its_commands_exist(module: str, arguments: tuple[str, ...]) -> None:
    code, lines = run(module, *arguments)
    assert code == ExitCode.USAGE
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert re.search(r"[;(]| use |there are|did you mean", line), line
    for command in re.findall(r"python -m [\w.]+\w", line):
        assert_exists(command.split())


class End(NamedTuple):
    """How a command is started, what takes long in it and is left out here, and how its last line begins."""

    module: str
    arguments: Sequence[str]
    last: str
    left_out: Mapping[str, Any] = MappingProxyType({})


ENDS = (
    End("data_prep.verify", ["corpus"], "next: python -m launch data.path=corpus run=corpus "),
    End("data_prep.peek", ["corpus", "--n", "1"], "next: python -m data_prep.report corpus"),
    End("data_prep.report", ["corpus", "--out", "c.html"], "c.html: open it in a browser; next: python -m launch"),
    End("pretrain.report", ["runs/a"], "open it in a browser; live pages of all runs: python -m pretrain.runs"),
    End("pretrain.runs", ["--root", "runs"], "next: export the model, then score or fine-tune it:"),
    End("pretrain.plan", ["model=tiny", "gpu=h100"], "nothing is started; "),
    End(
        "pretrain.export",
        ["runs/a", "out/a"],
        "out/a: saved; next: python -m pretrain.words model=out/a",
        {"pretrain.export.hugging_face.export": lambda *_, **__: 0.0},
    ),
    End("pretrain.words", ["m"], "model=m: looked at; ", {"pretrain.evaluate.word_vectors.report": lambda _: ""}),
    End(
        "pretrain.grammar",
        ["model=m", "data=[a]"],
        "scored; nothing is saved, out=FILE.json keeps it",
        {"pretrain.evaluate.grammar.score": lambda _: ({}, [])},
    ),
    End(
        "pretrain.grammar",
        ["model=m", "data=[a]", "out=g.json"],
        "scored; g.json has all digits",
        {"pretrain.evaluate.grammar.score": lambda _: ({}, [])},
    ),
    End(
        "pretrain.probes",
        ["m", "data=[a]"],
        "scored; nothing is saved, out=FILE.json keeps it",
        {
            "pretrain.evaluate.probing.run_probes": lambda _: [],
            "pretrain.evaluate.probing.markdown": lambda _: "",
            "pretrain.evaluate.probing.as_data": lambda _: [],
        },
    ),
    End(
        "finetune.predict",
        ["m", "a.tsv", "b.tsv"],
        "b.tsv: finished, every row of a.tsv",
        {"finetune.predict.predict": lambda _: 3},
    ),
    End(
        "finetune.compress",
        ["m", "o"],
        "o: saved; ",
        {
            "finetune.onnx_export.compress": lambda *_: {
                **dict.fromkeys(("pytorch", "onnx", "onnx_int8")), "score": "f1", "bytes": {}
            },
            "finetune.side_by_side.lines": lambda *_: [],
        },
    ),
    End("pretrain.runs", ["--root", "runs", "diff", "a"], "compared; nothing is written; next: python -m "),
    End("pretrain.runs", ["--root", "runs", "follow", "a"], "runs/a: finished at step 30; now: export the model"),
    End(
        "pretrain.checkpoint",
        ["runs/a"],
        "next: python -m pretrain.export runs/a out/a",
        {
            "pretrain.checkpoint.__main__.list_checkpoints": lambda folder: [folder / "1"],
            "pretrain.checkpoint.__main__.verify": lambda _: [],
        },
    ),
    End(
        "pretrain.card",
        ["runs/a", "m"],
        "m/README.md: written; read it before you publish",
        {
            "pretrain.card._trained": lambda _: SimpleNamespace(step=-1),
            "pretrain.card.ownership": SimpleNamespace(RUN="run", is_of=lambda *_: True),
            "pretrain.card.write_card": lambda *_: None,
            "pretrain.card.yaml": SimpleNamespace(safe_load=lambda _: {}),
        },
    ),
    End(
        "finetune",
        ["task=classification", "model=m", "data.train=a", "data.dev=text.txt", "out=ft"],
        "ft: finished; report.html shows what it gets wrong; next: python -m finetune.predict ft text.txt",
        {"finetune.__main__.finetune": lambda _: {}},
    ),
    End(
        "finetune.grid",
        ["ft"],
        "1 models; nothing is saved",
        {"finetune.grid.found": lambda _: {Path("ft"): {}}, "finetune.grid.markdown": lambda _: ""},
    ),
    End("finetune.report", ["ft"], "ft/r.html: open it", {"finetune.report.write_page": lambda *_: Path("ft/r.html")}),
    End("finetune.probe", ["m", "a [MASK]"], "m: looked at; nothing", {"finetune.probe.fill_masks": lambda *_: [[]]}),
    End(
        "finetune.embeddings",
        ["m", "sts=[a.tsv]"],
        "model=m: scored; nothing is saved",
        {
            "finetune.embeddings.read_judged": lambda _: ([], []),
            "finetune.embeddings._similarity": lambda *_: [],
            "finetune.embeddings._table": lambda *_: "",
            "finetune.embedder.load_embedder": lambda *_: (None, None),
            "pretrain.evaluate.states.random_encoder": lambda *_: None,
        },
    ),
    End(
        "finetune.suite",
        ["model=m", "suite=glue", "out=ft"],
        "ft: finished; the model and the page (report.html) of each task",
        {
            "finetune.suite._settings": lambda *_: SimpleNamespace(),
            "finetune.suite.replace": lambda _, **keys: SimpleNamespace(**keys),
            "finetune.suite._result": lambda *_: {},
            "finetune.suite.markdown": lambda *_: "",
            "finetune.page.write_page": lambda *_: None,
        },
    ),
)  # fmt: skip


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.module)
def test_the_last_line_says_where_it_stands_and_what_comes_next(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    for target, stub in end.left_out.items():
        monkeypatch.setattr(target, stub)
    code, lines = run(end.module, *end.arguments)
    assert code == ExitCode.OK
    assert lines[-1].startswith(end.last)
    command = lines[-1].partition("next: ")[2]
    if command.startswith("python"):
        assert_exists(shlex.split(command))


def test_what_takes_long_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("cloze.patience._SECONDS", 0.01)
    told = threading.Event()
    monkeypatch.setattr("cloze.patience.log", SimpleNamespace(info=lambda line: (lines.append(line), told.set())))
    lines: list[str] = []
    with telling(lambda: "map: 3/8 tasks"):
        assert told.wait(60)
    assert lines[0] == "map: 3/8 tasks: 0 s"
    said = len(lines)
    assert told.wait(0.05)
    assert len(lines) == said, "over is over"
