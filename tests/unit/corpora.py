"""Small corpora made by code, and where the real ones are."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUZZ = int(os.environ.get("CLOZE_FUZZ", "1"))  # so many times the usual number of examples for the fuzz targets
TEXT = "the cat sat on mat and a dog ran off with red hats under blue skies while rain fell"
WORDS = TEXT.split()


def real(name: str) -> Path:
    """A file of the corpora that are no part of the repository; skips the test where it is absent."""
    path = Path(os.environ.get("CLOZE_TEST_DATA", ROOT.parent / "shared" / "data")) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there (CLOZE_TEST_DATA names the directory of real corpora)")
    return path


def sentence(rng: random.Random) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randint(3, 12))]
    return " ".join(words).capitalize() + rng.choice(".!?")


def documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(sentence(rng) for _ in range(rng.randint(1, 30))) for _ in range(count)]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def vocabulary(path: Path, *extra: str) -> Path:
    """A vocab.txt in which every word of `documents` can be spelled."""
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    pieces = [*letters, *(f"##{c}" for c in letters if c.isalnum()), *WORDS]
    tokens = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *extra])
    path.write_text("\n".join(tokens) + "\n")
    return path


def prep(*overrides: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`python -m data_prep …` as a user runs it."""
    return module("data_prep", *overrides, cwd=cwd, env=env)


def module(name: str, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    command = [sys.executable, "-m", name, *arguments]
    return subprocess.run(command, cwd=cwd or ROOT, env=environment, capture_output=True, text=True, timeout=120)


def files_of(corpus: Path) -> dict[str, bytes]:
    """Every file of a finished corpus by its relative path."""
    return {str(path.relative_to(corpus)): path.read_bytes() for path in sorted(corpus.rglob("*")) if path.is_file()}
