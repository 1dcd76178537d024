"""What people type: any path, numbers as they write them, words of other tools, options with dashes; and `--help`."""

import dataclasses
import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.override_parser.types import QuotedString
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze import cli
from cloze.cli.commands import COMMANDS, examples
from cloze.cli.explanation import written_as
from cloze.cli.overrides import as_meant, parsed, quoted
from cloze.cli.schemas import groups, key_names
from cloze.cli.synonyms import OPTIONS, SECTIONS, SYNONYMS, meaning_of, plain
from cloze.errors import ExitCode, UserError
from data_prep import main as prepare
from data_prep.config import PrepConfig
from data_prep.executors.array import ArrayExecutor
from data_prep.executors.base import Unfinished
from finetune.config import FinetuneConfig
from launch.options import NAMES
from pretrain import plan
from pretrain.config import TrainConfig
from tests.support import environment
from tests.unit.test_docs import SCHEMAS

ALL: tuple[type[Any], ...] = (*(schema for _, schema in SCHEMAS.values()), plan.PlanConfig)
GIVEN = ("run=r", "data.path=d")


def train(*overrides: str) -> TrainConfig:
    return cli.compose("train", TrainConfig, [*GIVEN, *overrides])


def refusal(capsys: pytest.CaptureFixture[str], command: Any, *arguments: str) -> str:
    """The one line of a command that is refused."""
    assert command(list(arguments)) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line.removeprefix("error: ")


# Text as it was typed


@pytest.mark.parametrize(
    "text",
    [
        *("2024_01_15", "5e-4", "0x10", "1_000", ".5", "true", "null", "a,b", "a b", "x#y", "$HOME", "{a}", "[a]"),
        *("数据", "it's", "a=b", "(1)", "'a", "1:2", "@x", "007", "a;b", 'say "no"', "%", "*", "a&b"),
    ],
)
def test_a_name_is_the_text_that_was_typed(text: str) -> None:
    assert as_read(text) == text


def as_read(text: str) -> str:
    """What becomes of it as the name of a run."""
    (override,) = as_meant(TrainConfig, [f"run={text}"])
    value = parsed(override.partition("=")[2])
    assert isinstance(value, str | QuotedString)
    return value if isinstance(value, str) else value.text


@settings(max_examples=25)
@given(st.text("aZ09 ._-=()[]{}#~'\",;:$&|<>*?!%@^`数é\t", min_size=1, max_size=12))
def test_any_path_comes_through(text: str) -> None:
    """But for Hydra's own quotes, and interpolations."""
    if text.strip() and text[0] not in "'\"" and "${" not in text:
        assert as_read(text).strip() == text.strip()


def test_a_quoted_path_survives_all_of_hydra() -> None:
    config = train("data.path=it's", "run=2024_01_15", f"data.cache_dir={quoted('a' + chr(92))}", "init_from='b c'")
    assert config.run == "2024_01_15"
    assert (config.data.path, config.data.cache_dir, config.init_from) == ("it's", "a\\", "b c")


def test_null_is_none_where_there_may_be_none() -> None:
    typed = ["init_from=null", "run=null", "init_from=true"]
    assert as_meant(TrainConfig, typed) == ["init_from=null", "run='null'", "init_from='true'"]


def test_lists_and_mixtures_hold_any_path() -> None:
    config = cli.compose("prep", PrepConfig, ["out=o", "source=text", "source.paths=[it's,数据/x y,s3://b/c=d]"])
    assert config.source.paths == ["it's", "数据/x y", "s3://b/c=d"]
    config = cli.compose("prep", PrepConfig, ["out=数", "sources=[{kind: text, paths: [数据, a b]}]"])
    assert (config.out, config.sources) == ("数", [{"kind": "text", "paths": ["数据", "a b"]}])


@pytest.mark.parametrize(("typed", "steps"), [("1e5", 100_000), ("3E4", 30_000), ("1.5e3", 1500), ("1_000", 1000)])
def test_a_whole_number_is_one_however_it_is_written(typed: str, steps: int) -> None:
    assert as_meant(TrainConfig, [f"steps={typed}"]) == [f"steps={steps}"]


def test_what_is_no_whole_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"^steps=1\.5: is not a whole number"):
        train("steps=1.5")
    assert as_meant(TrainConfig, ["steps=1e-3", "steps=many"]) == ["steps=1e-3", "steps=many"]


def test_a_sweep_over_names_stays_one() -> None:
    assert as_meant(TrainConfig, ["run=a,b", "steps=1e3"], sweep=True) == ["run=a,b", "steps=1000"]
    assert as_meant(TrainConfig, ["run=a,b"]) == ["run='a,b'"]


# Words of other tools


def test_every_synonym_names_a_key_that_is_there() -> None:
    keys = {name for schema in ALL for name, _ in key_names(schema)} | {*NAMES}
    for word, meanings in SYNONYMS.items():
        assert word == word.lower()
        assert "-" not in word
        for meaning in meanings:
            assert meaning.key in keys, (word, meaning.key)
            assert meaning.value.format("x") or meaning.note
    options = {(group, option) for schema in ALL for group, found in groups(schema).items() for option in found}
    for (group, word), option in OPTIONS.items():
        assert word == plain(word)
        assert (group, option) in options or group in keys
    assert {*SECTIONS.values()} <= keys


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("lr=3", "optim.lr=3"),
        ("optim.learning_rate=3", "optim.lr=3"),
        ("batch_size=32", "global_batch_size=32"),
        ("per_device_train_batch_size=8", "micro_batch_size=8"),
        ("train-iters=9", "steps=9"),
        ("max_steps=9", "steps=9"),
        ("num_train_epochs=3", "steps=…"),
        ("warmup_steps=100", "schedule.warmup_fraction=…"),
        ("mlm_probability=0.3", "data.masking_probability=0.3"),
        ("model_name_or_path=bert-base-uncased", "init_from=bert-base-uncased"),
        ("output_dir=x", "run=…"),
        ("bf16=true", "precision=bf16"),
        ("optimizer=adam", "optim=adamw"),
        ("save_steps=5", "checkpoint.every=5"),
    ],
)
def test_the_word_of_another_tool_names_our_key(capsys: pytest.CaptureFixture[str], typed: str, written: str) -> None:
    key, _, value = typed.partition("=")
    names = [name for name, _ in key_names(TrainConfig)]
    meaning = meaning_of(key, names)
    assert meaning
    assert written_as(meaning, value, groups(TrainConfig)).startswith(written)


def test_what_it_says_to_write_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    def command(arguments: list[str]) -> int:
        return cli.guarded(lambda: bool(train(*arguments)), TrainConfig)

    line = refusal(capsys, command, "optim.learning_rate=3e-4")
    assert line == "optim.learning_rate: no such key (did you mean optim.lr?); write optim.lr=3e-4"
    assert train(*shlex.split(line.partition("; write ")[2])).optim.lr == 3e-4


def test_the_same_word_means_another_key_elsewhere() -> None:
    finetuning = [name for name, _ in key_names(FinetuneConfig)]
    preparing = [name for name, _ in key_names(PrepConfig)]
    assert meaning_of("output_dir", finetuning).key == "out"  # type: ignore[union-attr]
    assert meaning_of("--max-seq-length", finetuning).key == "max_len"  # type: ignore[union-attr]
    assert meaning_of("mlm_probability", preparing).key == "masking.probability"  # type: ignore[union-attr]
    assert meaning_of("nonsense", preparing) is None


@pytest.mark.parametrize(
    ("typed", "option"),
    [
        *(("recipe=bert", "bert_2018"), ("model=bert-base-uncased", "base"), ("model=bert-large", "large")),
        *(("model=ModernBERT-base", "modernbert_base"), ("optim=adam", "adamw"), ("schedule=wds", "wsd")),
    ],
)
def test_an_option_by_meaning(typed: str, option: str) -> None:
    group, _, word = typed.partition("=")
    assert cli.nearest(word, groups(TrainConfig)[group], group) == f" (did you mean {option}?)"


# What other parsers would answer with their usage


def commands() -> Iterator[tuple[str, list[str], str]]:
    yield "data_prep", ["--out", "X"], "--out=X: options are written without dashes here; write out=X"
    yield "data_prep", ["source=text", "out=o", "source.paths=a,b"], "source.paths=a,b: is a list; write "
    yield (
        "pretrain.train",
        ["--gpus", "8", "run=r"],
        "--gpus=8: no such option; processes are started by python -m launch procs=8",
    )
    yield "pretrain.train", [*GIVEN, "seed=1,2"], "seed=1,2: has several values; add --multirun"
    yield "pretrain.train", [*GIVEN, "steps"], "steps: has no value; write steps=…"
    yield "launch", ["chek"], "chek: not a key=value (did you mean check?)"
    yield "launch", ["--gpus", "8"], "--gpus=8: options are written without dashes here; write procs=8"
    yield "finetune", ["lr=3"], "lr: no such key (did you mean optim.lr?); write optim.lr=3"
    yield "data_prep", ["out=o", "sources=[{kind: txt, paths: [x]}]"], "sources[0]: kind=txt: no such kind (did you"


@pytest.mark.parametrize(("module", "arguments", "line"), [*commands()])
def test_one_line_that_says_what_to_write(
    capsys: pytest.CaptureFixture[str], module: str, arguments: list[str], line: str
) -> None:
    assert refusal(capsys, importlib.import_module(module).main, *arguments).startswith(line)


# --help


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_name_what_there_is(name: str) -> None:
    """Which `test_docs` composes, where pages have the same lines."""
    command, schema = COMMANDS[name], next((schema for known, schema in SCHEMAS.values() if known == name), None)
    schema = TrainConfig if name == "plan" else schema
    assert command.about
    for example in examples(command):
        program, *arguments = shlex.split(example)
        assert program == "deepspeed" or importlib.util.find_spec(arguments[1])
        if schema:
            own = [field.name for field in dataclasses.fields(plan.PlanConfig)] if name == "plan" else []
            keys = {*(key for key, _ in key_names(schema)), *groups(schema), *own}
            assert {argument.partition("=")[0] for argument in arguments if "=" in argument} <= keys


def test_help_begins_with_what_and_how() -> None:
    text = cli.help_text("prep", PrepConfig, ["source=jsonl"])
    lines = text.splitlines()
    assert lines[1].startswith("Turns raw text into a corpus")
    assert text.count("\n  python -m data_prep ") == 3
    assert max(map(len, lines)) <= 112
    assert "source.field" in text
    assert "\n\n  clean: what is mended and what is dropped\n" in text


def test_plan_needs_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "required" not in text
    assert "tokens to train on" in text
    assert "gpu=cpu" in text


# What commands leave, and say


def test_every_command_prints_in_any_locale() -> None:
    code = "from cloze.cli.terminal import outlive_terminal; outlive_terminal(); print('数 é'); print('\\udcff')"
    for encoding, told in (("ascii", b"\\u6570 \\xe9\n\\udcff\n"), ("utf-8", "数 é\n".encode() + b"\xff\n")):
        given = environment() | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, told)


def test_the_corrected_command_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A refused preparation leaves no plan behind that would stand in the way."""
    lines = [
        json.dumps({"body": f"Line {number} of this text is here. It has another sentence."}) for number in range(9)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    given = ["source=jsonl", f"source.paths=[{tmp_path}/a.jsonl]", f"out={tmp_path}/o", "tokenizer.vocab_size=100"]
    given += ["executor.workers=1", "diagnosis.ignore=[unknown_tokens]"]
    assert prepare([*given, "source.field=content"]) == ExitCode.USAGE
    error = capsys.readouterr().err.splitlines()[-1]
    assert "line 1: no text under content; set source.field to one of body" in error
    assert not (tmp_path / "o").exists()
    assert prepare([*given, "source.field=body"]) == ExitCode.OK
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"{tmp_path}/o: finished; next: python -m data_prep.verify {tmp_path}/o"


def test_a_call_of_an_array_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_prep.executors.array._TELL_SECONDS", 0.05)
    monkeypatch.setattr("data_prep.executors.array._POLL_SECONDS", 0.03)
    executor = object.__new__(ArrayExecutor)
    executor._patience_seconds, executor._plan = 0.3, SimpleNamespace(work=tmp_path)  # type: ignore[assignment]
    (tmp_path / "plan.json").touch()
    with pytest.raises(Unfinished):
        executor.wait_for(tmp_path / "result", "map: 3 of 8 tasks of the other 2 calls are done")
    assert (
        "map: 3 of 8 tasks of the other 2 calls are done; waiting since 0 s, at most 0.3 s" in capsys.readouterr().err
    )


def test_plan_counts_tokens_and_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["model=base", "gpu=h100", "nodes=2", "tokens=10B"]) == 0
    text = capsys.readouterr().out
    assert "16 h100 x accumulation 1 x micro-batch 16" in text
    assert "305,176 steps, 10.0 G tokens" in text
    assert plan.PlanConfig(**(asdict(plan.DEFAULTS) | {"tokens": "1.5e9"})).num_tokens == 1_500_000_000
    assert [plan.long(hours) for hours in (0.2, 3.25, 100)] == ["12 minutes", "3.25 hours", "4.17 days"]
    assert plan.main(["tokens=many"]) == ExitCode.USAGE
    assert "write 10B, 300M or 5e9" in capsys.readouterr().err


def test_plan_measures_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["model=tiny", "gpu=cpu", "steps=10"]) == 0
    text = capsys.readouterr().out
    assert "measured here just now" in text
    assert "GPU" not in text
    gpu = plan.gpu_of(replace(plan.DEFAULTS, gpu="cpu"))
    assert 0 < gpu.fp32_tflops <= gpu.peak_tflops < 100
    assert gpu.memory_gib > 0.5
