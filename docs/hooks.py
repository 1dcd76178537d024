"""Pages of the site that are made, not written: the configuration reference, and the repository's own Markdown files.

mkdocs calls `on_files`; the rest needs no mkdocs.
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from cloze import cli
from cloze.schema import CONF
from data_prep.config import PrepConfig
from finetune.config import EmbeddingsConfig, FinetuneConfig, PredictConfig, SuiteConfig
from launch.options import HELP
from pretrain import plan
from pretrain.config import TrainConfig
from pretrain.evaluate.config import GrammarConfig
from pretrain.evaluate.frozen_config import ProbesConfig, WordsConfig

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/cloze-pretrain/cloze/blob/main/"
COPIED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
COPIED |= {"SECURITY.md": "security.md"}
COMMANDS = (
    ("Preparation", "python -m data_prep key=value …", "prep", PrepConfig, CONF),
    ("Pretraining", "deepspeed pretrain/train.py key=value …", "train", TrainConfig, CONF),
    ("Grammar", "python -m pretrain.grammar key=value …", "grammar", GrammarConfig, CONF / "evaluate"),
    ("Fine-tuning", "python -m finetune key=value …", "finetune", FinetuneConfig, CONF / "finetune"),
    ("Suites of tasks", "python -m finetune.suite key=value …", "suite", SuiteConfig, CONF / "finetune"),
    ("Labelling a file", "python -m finetune.predict key=value …", "predict", PredictConfig, CONF / "finetune"),
    (
        "Evaluating embeddings",
        "python -m finetune.embeddings key=value …",
        "embeddings",
        EmbeddingsConfig,
        CONF / "finetune",
    ),
    ("Frozen probes", "python -m pretrain.probes key=value …", "probes", ProbesConfig, CONF / "evaluate"),
    ("Words", "python -m pretrain.words key=value …", "words", WordsConfig, CONF / "evaluate"),
)
WITH_ARGUMENTS = (
    *("data_prep.verify", "data_prep.peek", "data_prep.report", "pretrain.checkpoint", "pretrain.report"),
    "pretrain.runs",
    *("pretrain.export", "pretrain.card", "finetune.grid", "finetune.report", "finetune.probe", "finetune.compress"),
    "launch.demo",
)


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: add the pages that are not files of docs/."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> dict[str, str]:
    copies = {name: relinked((ROOT / source).read_text(encoding="utf-8")) for source, name in COPIED.items()}
    return {"reference.md": reference(), **copies}


def relinked(text: str) -> str:
    """The Markdown of a file at the repository's root as it stands in the site."""

    def target(match: re.Match[str]) -> str:
        path, anchor = match.groups()
        if path.startswith("docs/"):
            return f"]({path.removeprefix('docs/')}{anchor})"
        return f"]({COPIED.get(path, REPOSITORY + path)}{anchor})"

    return re.sub(r"\]\((?!https?:|#)([^)#\s]+)([^)]*)\)", target, text)


def reference() -> str:
    """Every key of every command: meaning, unit and default, as `--help` has them."""
    return "\n".join(_reference_lines()) + "\n"


def _reference_lines() -> Iterator[str]:
    yield "# Configuration"
    yield ""
    yield "Made from the schema and from `conf/`, as `--help` is. A key is set on the command line, `optim.lr=3e-4`; a"
    yield "group chooses a file of values, `model=large`, and single keys then override them. The defaults of a group's"
    yield "keys are those of its default option. `--cfg job` prints what a command line comes to."
    for title, command, config_name, schema, folder in COMMANDS:
        yield from ("", f"## {title}", "", f"`{command}`", "")
        for group, options in cli.groups(schema).items():
            yield from (f"### `{group}=`", "", "| option | values |", "|---|---|")
            for option in options:
                yield f"| `{option}` | {_cell(_opening_comment(folder / group / f'{option}.yaml'))} |"
            yield ""
        yield from (f"### Keys of {title.lower()}", "", "| key | default | meaning |", "|---|---|---|")
        for key in cli.keys(config_name, schema):
            if key.default is not None:
                yield f"| `{key.name}` | {_default(key.default)} | {_cell(key.meaning)} |"
    yield from ("", "## Launch", "", "```text", HELP.strip(), "```")
    yield from ("", "## Plan", "", "`python -m pretrain.plan key=value …` takes training's keys, and:", "")
    yield from ("| key | default | meaning |", "|---|---|---|")
    for field in fields(plan.PlanConfig):
        value = getattr(plan.DEFAULTS, field.name)
        yield f"| `{field.name}` | {_default(str(value))} | {_cell(field.metadata['help'])} |"
    yield from ("", "## Commands with arguments", "")
    for name in WITH_ARGUMENTS:
        module = import_module(name)
        command = import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
        yield from ("```text", command.PARSER.format_help().strip(), "```", "")


def _default(value: str) -> str:
    return "**required**" if value == "required" else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _opening_comment(path: Path) -> str:
    """What a file of values says of itself, but for its example commands."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or text.startswith(("Corpus:", "...")):
            break
        if not text.startswith("@package"):
            words.append(text)
    return " ".join(words)
