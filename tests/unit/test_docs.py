"""What README and docs/ say holds: commands compose, keys and messages exist, the walk-through runs as it stands."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hydra.errors import HydraException

from cloze import cli
from cloze.errors import ExitCode, UserError
from data_prep.config import PrepConfig
from docs import hooks
from finetune.config import EmbeddingsConfig, FinetuneConfig, PredictConfig, SuiteConfig
from launch.options import Options, parse
from pretrain import plan
from pretrain.config import TrainConfig
from pretrain.evaluate.config import GrammarConfig
from pretrain.evaluate.frozen_config import ProbesConfig, WordsConfig
from tests.support import ROOT, Trainer, environment
from tests.unit.tiny_bert import write_tiny_bert

PACKAGES = ("cloze", "data_prep", "pretrain", "finetune", "launch")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SCHEMAS: dict[str, tuple[str, type[Any]]] = {
    "data_prep": ("prep", PrepConfig),
    "pretrain.train": ("train", TrainConfig),
    "pretrain.grammar": ("grammar", GrammarConfig),
    "finetune": ("finetune", FinetuneConfig),
    "finetune.suite": ("suite", SuiteConfig),
    "finetune.predict": ("predict", PredictConfig),
    "finetune.embeddings": ("embeddings", EmbeddingsConfig),
    "pretrain.probes": ("probes", ProbesConfig),
    "pretrain.words": ("words", WordsConfig),
}
OTHER_PROGRAMS = {"cd", "curl", "git", "grep", "pytest", "ray", "ssh", "wandb", ".venv/bin/pre-commit"}
NOT_RUN = "<!-- not run"


class Block(NamedTuple):
    line: int
    commands: list[list[str]]
    is_run: bool


def blocks(path: Path) -> Iterator[Block]:
    """The shell blocks of a page. In a `console` block commands follow `$ `, in a plain one the first word tells."""
    lines = path.read_text(encoding="utf-8").split("\n")
    fence, start = None, 0
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if fence is None:
            fence, start = line[3:], number
            continue
        body = "\n".join(lines[start + 1 : number]).replace("\\\n", " ").split("\n")
        if fence == "console":
            body = [line[2:] for line in body if line.startswith("$ ")]
        elif fence not in ("bash", "sh"):
            body = [line for line in body if line.startswith(("python -m ", "deepspeed ", "make ", "sbatch "))]
        commands = [command for line in body if (command := shlex.split(line, comments=True))]
        if commands:
            yield Block(start + 1, commands, is_run=not (start and lines[start - 1].startswith(NOT_RUN)))
        fence = None


def overrides_of(arguments: list[str]) -> list[str]:
    """Overrides without what is left out (…), and of a sweep its first run."""
    if "--multirun" in arguments:
        arguments = [re.sub(r"(?<==)([^\[{,]+),.*", r"\1", one) for one in arguments if one != "--multirun"]
    return [one for one in arguments if "…" not in one]


@cache
def required_keys(config_name: str, schema: type[Any]) -> tuple[str, ...]:
    return tuple(key.name for key in cli.keys(config_name, schema) if key.default == "required")


def composes(config_name: str, schema: type[Any], arguments: list[str]) -> None:
    """With what a block leaves out filled in, where a key must be given."""
    given = {one.partition("=")[0] for one in arguments}
    source = next((one[7:] for one in arguments if one.startswith("source=")), "docstrings")
    required = [*required_keys(config_name, schema)]
    required += ["source.paths"] if config_name == "prep" and source != "docstrings" else []
    filled = [f"{key}={'[x]' if key == 'source.paths' else 'x'}" for key in required if key not in given]
    corpora = {"data.path", "data.mixture"}
    filled += ["data.path=x"] if config_name == "train" and not given & corpora else []
    filled += ["init_from=x"] if config_name == "train" and "init_from" not in given else []
    if "executor=array" in arguments and "executor.num_tasks" not in given:
        filled += ["executor.task_index=0", "executor.num_tasks=1"]  # Slurm's
    cli.compose(config_name, schema, [*filled, *arguments])


def check(command: list[str]) -> None:
    """Raises where the program, the module, the target, the extra, the option or a key does not exist."""
    program, *arguments = command
    if program in OTHER_PROGRAMS:
        return
    if program == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {one for one in arguments if "=" not in one} <= set(targets)
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", " ".join(arguments)))):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    elif program == "sbatch":
        check(shlex.split(arguments[arguments.index("--wrap") + 1]))
    elif program == "deepspeed":
        first = next(i for i, one in enumerate(arguments) if one.endswith((".py", "pretrain.train")))
        assert arguments[first] in ("pretrain/train.py", "pretrain.train")
        composes("train", TrainConfig, overrides_of(arguments[first + 1 :]))
    else:
        assert program == "python", command
        assert arguments[0] == "-m", command
        check_module(arguments[1], arguments[2:])


def check_module(module: str, arguments: list[str]) -> None:
    spec = find_spec(module)
    assert spec, module
    if spec.submodule_search_locations:
        spec = find_spec(f"{module}.__main__")
    assert spec
    assert spec.origin
    if module in SCHEMAS:
        composes(*SCHEMAS[module], overrides_of(arguments))
    elif module == "launch":
        words = arguments[1:] if arguments[:1] in (["check"], ["slurm"]) else arguments
        composes(
            "train",
            TrainConfig,
            overrides_of(list(parse(overrides_of(words), slurm=arguments[:1] == ["slurm"]).overrides)),
        )
    elif module == "pretrain.plan":
        plan.composed([one for one in arguments if not one.startswith(("data.path=", "data.mixture="))])
    else:
        source = Path(spec.origin).read_text()
        assert all(f'"{one}"' in source for one in arguments if one.startswith("-")), arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_and_compose(page: Path) -> None:
    for block in blocks(page):
        for command in block.commands:
            try:
                check(command)
            except Exception as error:
                raise AssertionError(f"{page.name}:{block.line}: {shlex.join(command)}: {error}") from error
    for module in re.findall(r"`python -m ([\w.]+)", page.read_text(encoding="utf-8")):
        assert find_spec(module), f"{page.name}: python -m {module}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_lines_paste_into_any_shell(shell: str) -> None:
    """Brackets that are not quoted, zsh takes for a pattern of files: "no matches found"."""
    commands = [shlex.join(command) for page in PAGES for block in blocks(page) for command in block.commands]
    raw = [line for page in PAGES for line in raw_lines(page)]
    bare = [line for line in raw if re.search(r"(?<=\s)[\w.+~]+=[^\s'\"]*[\[{*?]", line)]
    assert bare == [], "quote them"
    assert len(commands) > 100
    if shutil.which(shell):
        words = [word for line in raw for word in shlex.split(line, comments=True)]
        script = "\n".join(f"printf '%s\\n' {line}" for line in raw)
        done = subprocess.run([shell, "-c", script], capture_output=True, text=True, timeout=60)
        assert (done.stderr, done.stdout.splitlines()) == ("", words)


def raw_lines(page: Path) -> list[str]:
    """The commands of a page's shell blocks as they stand there, lines that go on joined."""
    text = page.read_text(encoding="utf-8")
    found = []
    for kind, body in re.findall(r"^```(console|bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = body.replace("\\\n", " ").split("\n")
        lines = [line[2:] for line in lines if line.startswith("$ ")] if kind == "console" else lines
        found += [line for line in lines if line.strip() and "…" not in line and not re.search(r"[|<>&;$`]", line)]
    return [line for line in found if not line.lstrip().startswith("#")]


def test_the_check_finds_mistakes() -> None:
    for line in (
        "python -m data_prep out=x max_length=128",
        "python -m data_preparation out=x",
        "python -m launch hosts=h runn=x",
        "python -m pretrain.export runs/x out/x --forced",
        "deepspeed pretrain/train.py model=huge",
        "make tests",
        "pip install 'cloze[everything]'",
        "rm -rf x",
    ):
        with pytest.raises((AssertionError, UserError, HydraException)):
            check(shlex.split(line))


def test_keys_in_the_text_exist() -> None:
    """`optim.lr` (the first part tells that it is one of ours) and `zero=2` in running text and tables."""
    known = {key.name for name, schema in SCHEMAS.values() for key in cli.keys(name, schema)}
    options = {option.name for option in fields(Options)} | {option.name for option in fields(plan.PlanConfig)}
    keys = known | options | {group for _, schema in SCHEMAS.values() for group in cli.groups(schema)}
    sections = {name.partition(".")[0] for name in known if "." in name}
    files = re.compile(r"\.(py|md|json|jsonl|yaml|tsv|npy|tar|txt|safetensors|onnx)\b")
    for page in [page for page in PAGES if page.name not in ("LOG.md", "formats.md")]:
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*)?`", prose):
            if code.partition(".")[0] in sections and not files.search(code):
                assert code in known or code.endswith("."), f"{page.name}: {code}"
        for code in re.findall(r"`([a-z_.]+)=[^`]*`", prose):
            assert code in keys, f"{page.name}: {code}="


def test_messages_in_the_text_exist() -> None:
    """What faults.md quotes stands in the sources, but for what varies (…)."""
    sources = "".join(path.read_text() for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py")))
    literal = re.sub(r'"\s*\n\s*f?"', "", sources)  # literals that go on in the next line
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE)
    quoted = [message for cell in cells for message in re.findall(r"`([^`]*[: ][^`]*)`", cell)]
    assert len(quoted) > 60
    for message in quoted:
        for part in (part.strip(" :=") for part in message.split("…")):
            assert part in literal, f"{message}: {part!r} is in no source"


def test_exit_codes_are_told() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == list(ExitCode)


def test_the_reference_has_every_key_and_option() -> None:
    text = hooks.reference()
    for name, schema in SCHEMAS.values():
        for key in cli.keys(name, schema):
            assert key.default is None or f"| `{key.name}` |" in text
            assert key.default is None or key.meaning, key.name
        for options in cli.groups(schema).values():
            assert all(f"| `{option}` |" in text for option in options)
    assert not re.search(r"^\| `\w+` \|\s*\|$", text, re.MULTILINE), "an option without a word on what it is"
    sources = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    found = [path.relative_to(ROOT).with_suffix("") for path in sources if "PARSER = " in path.read_text()]
    parsers = {".".join(path.parts).removesuffix(".__main__") for path in found}
    assert parsers == {*hooks.WITH_ARGUMENTS}
    assert all(f"usage: python -m {name} " in text for name in parsers)
    assert re.search(r"--split SPLIT +pass-00, pass-01, …, val, or val-NAME \[pass-00\]", text)
    assert re.search(r"--seed SEED +which samples: the same seed shows the same \[0\]", text)
    assert "Choices" not in cli.help_text("finetune", FinetuneConfig)
    assert "lost_after=S" in text
    assert "| `mfu` |" in text


def test_contributing_tells_every_contract_and_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    table = re.search(r"^\| contract \|.*\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table
    assert re.findall(r"^\| (.*?) \|", table[1], re.MULTILINE) == [contract["name"] for contract in contracts]
    rooms = re.search(r"^\| package \|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert rooms
    for package in PACKAGES:
        (row,) = re.findall(rf"^\| `{package}` \|(.*)$", rooms[1], re.MULTILINE)
        named = set(re.findall(r"`(\w+)/`", row))
        inner = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert named <= inner, package
        if package not in ("cloze", "finetune"):
            assert named == inner, package


def test_help_is_quick() -> None:
    """It needs neither torch nor transformers, which take seconds; `plan` knows GPUs by way of torch."""
    quick = (
        "pretrain.train",
        "pretrain.export",
        "pretrain.card",
        "pretrain.grammar",
        "finetune.compress",
        "finetune.probe",
        "finetune.__main__",
        "finetune.suite",
        "finetune.grid",
        "finetune.predict",
        "finetune.embeddings",
        "pretrain.probes",
        "pretrain.words",
        "pretrain.report",
        "pretrain.runs.__main__",
    )
    for modules, forbidden in ((quick, "torch"), ((*quick, "pretrain.plan"), "transformers")):
        source = f"import sys, {', '.join(modules)}; sys.exit('{forbidden}' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", source], env=environment(), check=False).returncode == 0, forbidden


def test_the_tables_of_scaling_are_the_benchmarks() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())["rows"]
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| (\w+), ZeRO (\d) \| (.*) \|$", text, re.MULTILINE)
    assert [(model, int(stage), cells.split(" | ")) for model, stage, cells in told] == [
        (row["model"], row["stage"], [f"{share:.0%}" for share in row["efficiency"]]) for row in rows
    ]


def test_links_from_the_root_lead_into_the_site() -> None:
    assert hooks.relinked("[a](docs/data.md#x) [b](LICENSE) [c](https://x.y) [d](CHANGELOG.md)") == (
        f"[a](data.md#x) [b]({hooks.REPOSITORY}LICENSE) [c](https://x.y) [d](changelog.md)"
    )
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = {next(iter(page.values())) for section in navigation for page in next(iter(section.values()))}
    assert listed == {*hooks.pages(), *(path.name for path in (ROOT / "docs").glob("*.md"))}


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == version


# README's walk-through, at a small size

SMALL = {
    "data_prep": ["tokenizer.vocab_size=400", "val_fraction=0.1", "max_len=32"],
    "deepspeed": ["steps=2", "eval.every=2", "checkpoint.every=2", "wandb.mode=disabled", "precision=fp32"],
    "finetune": ["epochs=1", "max_len=16"],
}
SMALL["deepspeed"] += ["model.hidden_size=32", "model.intermediate_size=64", "data.workers=0", "micro_batch_size=64"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the walk-through names, and nothing else."""
    words = [f"{a}{b}" for a in ("ba", "ko", "mi", "ru", "ta") for b in ("n", "lo", "se", "ti", "wu")]
    texts = [
        " ".join(" ".join(words[(i * j + k * (i % 7 + 1)) % 25] for k in range(9)) + "." for j in range(12))
        for i in range(1, 61)
    ]
    (tmp_path / "books-small.jsonl.zst").write_bytes(_zstd("".join(json.dumps({"text": t}) + "\n" for t in texts)))
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text("\n\n".join(texts[number::3]))
    for name in ("train.tsv", "dev.tsv"):
        rows = "".join(f"{text[:40]}\t{number % 2}\n" for number, text in enumerate(texts))
        (tmp_path / name).write_text(f"sentence\tlabel\n{rows}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _zstd(text: str) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(text.encode())


def run(command: list[str], trainer: Trainer, cwd: Path) -> None:
    """Run one command of the walk-through, small: training in forked processes, preparation in a fresh one."""
    program, *arguments = command
    if program == "deepspeed":
        overrides = [one for one in arguments if "=" in one]
        done = trainer.run(*overrides, *SMALL["deepspeed"], "runs_root=runs", ranks=2, cwd=cwd)
        assert done.codes == (0, 0), done.stderrs
        return
    assert program == "python"
    module, rest = arguments[1], arguments[2:] + SMALL.get(arguments[1], [])
    if module == "launch":
        run(["deepspeed", "global_batch_size=128", "expect.max_len=[32]", *rest], trainer, cwd)
        return
    if module.startswith("data_prep"):
        subprocess.run([sys.executable, "-m", module, *rest], cwd=cwd, env=environment(), check=True, timeout=100)
        return
    sys.argv = [module, *rest]
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"{module}.__main__" if module == "finetune" else module, run_name="__main__", alter_sys=True)
    assert stop.value.code == 0, command


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests have imported the commands
def test_the_walk_through_runs(
    workplace: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(os, "environ", os.environ | {"DS_ACCELERATOR": "cpu"})
    for block in blocks(ROOT / "README.md"):
        for command in block.commands if block.is_run else []:
            run(command, trainer, workplace)
    for made in ("shards/books/manifest.json", "runs/books/report.html", "out/books/model.safetensors"):
        assert (workplace / made).is_file(), made
    assert "accuracy" in json.loads((workplace / "out/sst2/metrics.json").read_text())
    python = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    for source in python:
        exec(compile(source, "README.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_page_of_ones_own_text_runs(
    workplace: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(os, "environ", os.environ | {"DS_ACCELERATOR": "cpu"})
    page = ROOT / "docs" / "own_text.md"
    assert all(block.is_run for block in blocks(page))
    for block in blocks(page):
        for command in block.commands:
            run(command, trainer, workplace)
    assert len((workplace / "labels.tsv").read_text().splitlines()) == 61
    for source in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(source, page.name, "exec"), {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_page_of_languages_runs(
    workplace: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(os, "environ", os.environ | {"DS_ACCELERATOR": "cpu"})
    shutil.copytree(workplace / "texts", workplace / "english")
    syllables = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "io", "u")]
    long = [
        f"{a}{b}{c}" for a in syllables[::3] for b in syllables[::5] for c in syllables[::7]
    ]  # more than 400 tokens
    rows = [" ".join(long[start::step]) + "." for step in (89, 97) for start in range(step)]  # each word twice
    (workplace / "texts" / "long.txt").write_text("\n\n".join(rows))
    page = ROOT / "docs" / "languages.md"
    assert all(block.is_run for block in blocks(page))
    for block in blocks(page):
        for command in block.commands:
            run(command, trainer, workplace)
    card = (workplace / "out" / "both" / "README.md").read_text()
    assert "mine 0.7, en 0.3 → 0.1" in card
    assert (workplace / "runs/more/checkpoints/step-00000002").is_dir()


TASKS = {  # files that docs/finetuning.md names, for a tiny model
    "a.tsv": "sentence\tlabel\n" + "good film\tx\nbad film\ty\n" * 4,
    "reviews.tsv": "sentence\ngood film\n",
    "glue/rte/test.tsv": "index\tsentence1\tsentence2\n0\tgood\tfilm\n",
    "glue/rte/train.tsv": "sentence1\tsentence2\tlabel\n" + "good\tfilm\tentailment\nbad\tfilm\tnot_entailment\n" * 4,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_blocks_of_fine_tuning_run(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One after another, as a reader would, on the cheapest data that will do."""
    write_tiny_bert(tmp_path / "out" / "books", layers=1)
    for name, text in TASKS.items():
        for path in (tmp_path / name, tmp_path / name.replace("train", "dev").replace("a.tsv", "b.tsv")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setitem(SMALL, "finetune.suite", ["num_seeds=2", "epochs=1", "tasks=[rte]", "max_len=16"])
    for block in blocks(ROOT / "docs" / "finetuning.md"):
        for command in block.commands if block.is_run else []:
            run(command, trainer, tmp_path)
    for made in ("out/sst2/model.safetensors", "out/grid/5e-05-32/metrics.json", "out/glue/results.md"):
        assert (tmp_path / made).is_file(), made
    assert (tmp_path / "out" / "sst2-onnx" / "model-int8.onnx").is_file()
    assert re.fullmatch(r"index\tprediction\n0\t(not_)?entailment\n", (tmp_path / "submission/RTE.tsv").read_text())


def test_blocks_are_run_or_say_why_not() -> None:
    for page in ("README.md", "docs/tutorial.md", "docs/finetuning.md"):
        found = list(blocks(ROOT / page))
        assert sum(not block.is_run for block in found) == (ROOT / page).read_text().count(NOT_RUN)
        assert all(not block.is_run for block in found) == (page == "docs/tutorial.md")
