"""What Cloze may delete or replace: only what is provably its own and disposable. Every such place asks here.

A directory is ours, of one kind, if it bears the mark of that kind (`.cloze.json`, written when it was made) or what
only that kind of ours holds (a manifest, a configuration, a name that is a checksum of its content: earlier versions
left no mark), and if nothing else lies in it. A page is ours if its head says so. What is not ours stays, whatever
`--force` says. SECURITY.md lists the places.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cloze.errors import UserError
from cloze.files import write_whole

MARK = ".cloze.json"

_HEAD_BYTES = 4096  # of a page: its mark stands there
_MAX_TEXT_BYTES = 1 << 26  # of what a proof reads; a manifest of a million shards is smaller


class Kind(NamedTuple):
    """A kind of thing that Cloze makes."""

    name: str  # in the mark
    told: str  # for people
    layout: str  # regular expression that the path of every file in it matches, relative and with slashes
    proof: Callable[[Path], bool]  # whether an unmarked one is ours all the same


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file of an object holds; {} where there is no such thing."""
    try:
        body = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_TEXT_BYTES else None
    except (OSError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= _MAX_TEXT_BYTES else ""
    except (OSError, ValueError):
        return ""


def _is_corpus(path: Path) -> bool:
    finished = {"tokenizer", "masking", "baked_draws", "passes", "shards"} <= _json(path / "manifest.json").keys()
    return finished or {"config", "sources", "buckets", "tasks"} <= _json(path / ".work" / "plan.json").keys()


def _is_corpus_copy(path: Path) -> bool:
    manifests = [where for where in (path / "manifest.json", path / "partial" / "manifest.json") if where.is_file()]
    return any(hashlib.sha256(where.read_bytes()).hexdigest()[:16] == path.name[:16] for where in manifests)


def _is_run(path: Path) -> bool:
    try:
        body = yaml.safe_load(_text(path / "config.yaml"))
    except (yaml.YAMLError, RecursionError):
        body = None
    if isinstance(body, dict) and {"run", "runs_root", "data", "model", "global_batch_size"} <= body.keys():
        return True
    return any("sha256" in _text(found) for found in path.glob("checkpoints/step-*/MANIFEST.json"))


def _is_export(path: Path) -> bool:
    card = _text(path / "README.md")
    return (path / "config.json").is_file() and "with Cloze.\n" in card and "<!-- loading -->" in card


_TOKENIZER = r"(tokenizer\.json|tokenizer_config\.json|vocab\.txt|special_tokens_map\.json)"
_SPLIT = r"(pass-\d+|val[\w.-]*)"
_TEMPORARY = r"\.[^/]+\.([^/]+-)?\d+\.tmp"  # of a process that was killed: `files.write_whole`

_STAGES = "(bands|validation|sample|map|near|reduce)"
_WORK = rf"lock|plan\.json|manifest\.json|{_TEMPORARY}|{_STAGES}/\d{{6,}}|tmp/[^/]+-\d+-[\w.-]+(/{_TOKENIZER})?"

CORPUS = Kind(
    "corpus",
    "a corpus of `python -m data_prep`",
    rf"manifest\.json|tokenizer/{_TOKENIZER}|{_SPLIT}/(shard-)?\d+\.tar|report\.html|\.work/({_WORK})|{_TEMPORARY}",
    _is_corpus,
)
WORK = Kind(
    "work",
    "unfinished work of `python -m data_prep`",
    _WORK,
    lambda path: (path / "plan.json").is_file(),
)
CORPUS_COPY = Kind(
    "corpus copy",
    "a copy that data.cache_dir made",
    rf"(partial/)?manifest\.json|tokenizer/{_TOKENIZER}|{_SPLIT}/(shard-)?\d+\.(tar|part)|{_TEMPORARY}",
    _is_corpus_copy,
)
RUN = Kind(
    "run",
    "a run of Cloze",
    r"config\.yaml|environment\.json|status\.json|metrics[\w.-]*\.jsonl|(skipped|changes|predictions)\.jsonl|wandb_id|\.lock|"
    rf"stacks-rank\d+\.txt|report\.html|job\.sbatch|[\w.-]+\.(log|out)|tokenizer/{_TOKENIZER}|"
    rf"(checkpoints|tensorboard|wandb)/.+|{_TEMPORARY}",
    _is_run,
)
EXPORT = Kind(
    "export",
    "an export of `python -m pretrain.export`",
    rf"config\.json|generation_config\.json|model[\w.-]*\.safetensors(\.index\.json)?|{_TOKENIZER}|"
    r"README\.md|curves\.svg",
    _is_export,
)
FINETUNING = Kind(
    "fine-tuning",
    "an unfinished fine-tuning",
    rf"\.lock|wandb_id|(seed-\d+|checkpoints|tensorboard|wandb)/.+|{_TEMPORARY}",
    lambda path: False,  # its mark is the first thing in it
)
_CHECKPOINT_FILES = r"(model|optimizer)\.safetensors|state\.json|config\.yaml|MANIFEST\.json"
CHECKPOINT = Kind(
    "checkpoint",
    "a checkpoint",
    rf"{_CHECKPOINT_FILES}|share-\d+\.(safetensors|part|failed)",
    lambda path: re.fullmatch(r"(\.writing-)?step-\d{8,}(-\w*)?", path.name) is not None,  # names that we give
)


def mark(path: Path, kind: Kind, **facts: Any) -> None:
    """Make an existing directory known as ours. Raises OSError."""
    write_whole(path / MARK, f"{json.dumps({'kind': kind.name, **facts})}\n".encode())


def marked(path: Path, kind: Kind) -> dict[str, Any] | None:
    """What its mark tells, if it bears that of this kind."""
    found = _json(path / MARK)
    return found if found.get("kind") == kind.name else None


def is_of(path: Path, kind: Kind) -> bool:
    """Whether we made this directory, as this kind of thing. Other files may lie in it: see `require_own`."""
    return path.is_dir() and not path.is_symlink() and (marked(path, kind) is not None or kind.proof(path))


def foreign(path: Path, kind: Kind) -> Iterator[str]:
    """The files in it that this kind of thing has not, as paths relative to it."""
    for folder, names, files in os.walk(path):
        links = [name for name in names if Path(folder, name).is_symlink()]
        for name in sorted([*files, *links]):
            where = Path(folder, name).relative_to(path).as_posix()
            if where != MARK and not re.fullmatch(kind.layout, where):
                yield where


def is_own(path: Path, kind: Kind) -> bool:
    """Whether this directory is of this kind and holds nothing else."""
    return is_of(path, kind) and next(foreign(path, kind), None) is None


def require_own(path: Path, kind: Kind, key: str = "") -> None:
    """Raises `UserError` unless the directory may be deleted or replaced as something of this kind."""
    if not is_of(path, kind):
        raise UserError(f"{key}{path}: is not {kind.told}, so it is not replaced; name another directory")
    if (other := next(foreign(path, kind), None)) is not None:
        raise UserError(
            f"{key}{path}: holds {other}, which is no part of {kind.told}; move it away or name another directory"
        )


def remove_own(path: Path, kind: Kind, key: str = "") -> None:
    """Delete a directory of this kind. Raises `UserError` where it is not, OSError."""
    require_own(path, kind, key)
    shutil.rmtree(path)


def remove_files(path: Path, kind: Kind, below: str = "") -> bool:
    """Delete the files in it (or in what is `below` it) that this kind of thing has; False where others are left.

    Those stay. Raises OSError.
    """
    others = {*foreign(path, kind)}
    if not (others or below):
        shutil.rmtree(path)
        return True
    for file in [file for file in (path / below).rglob("*") if file.is_file() or file.is_symlink()]:
        if file.relative_to(path).as_posix() not in others:
            file.unlink(missing_ok=True)
    return not others


def clear(path: Path, kind: Kind) -> Path | None:
    """Delete what is ours in a directory whose name we give; what else is in it stays, as `left-NAME`, returned."""
    if remove_files(path, kind):
        return None
    names = (f"left-{path.name.lstrip('.')}{number}" for number in ("", *(f"-{n}" for n in range(1, 1000))))
    return path.rename(next(path.with_name(name) for name in names if not path.with_name(name).exists()))


def told(path: Path) -> str:
    """What lies there, for people: "a file", "a run of Cloze", …; "" where that is nothing, or nobody knows."""
    if path.is_file():
        return "a file"
    if not path.is_dir():
        return ""
    known = next((kind.told for kind in (CORPUS, RUN, EXPORT, CHECKPOINT) if is_of(path.resolve(), kind)), "")
    return known or ("a model" if (path / "config.json").is_file() else "")


_PAGE = '<meta name="generator" content="Cloze:'


def page_mark(what: str) -> str:
    """For the head of an HTML page that we write."""
    return f'{_PAGE} {what}">'


def require_own_file(path: Path, marks: tuple[str, ...], key: str = "") -> None:
    """Raises `UserError` unless there is no file, or one that begins with (within 4 KB) one of our `marks`.

    Marks of pages come first: a page of ours that has one is of that kind, whatever earlier versions wrote.
    """
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        is_page = _PAGE.encode() in head
        if any(each.encode() in head for each in marks if not is_page or each.startswith(_PAGE)):
            return
    raise UserError(f"{key}{path}: is there, and not one that Cloze wrote; name another file, or move it away")
