"""Does each test catch what it is there for? Puts one fault after another into a copy of the product: mutants.toml.

    python tests/mutants/run.py                 # all, after their tests have passed without a fault
    python tests/mutants/run.py --only 3,17     # these
    python tests/mutants/run.py --results F.json  # and write them there, for --compare
    python tests/mutants/run.py --compare BEFORE.json AFTER.json  # the table of README.md, nothing is run

Exits 1 where one is missed or stands in the code no more. No part of the gate: minutes of CPU.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("mutants.toml")
NEEDED = (
    "cloze",
    "conf",
    "data_prep",
    "docs",
    "finetune",
    "launch",
    "pretrain",
    "tests",
    "pyproject.toml",
    "README.md",
)
_LONGEST_SECONDS = 200


class Mutant(NamedTuple):
    """One fault."""

    what: str
    path: str
    old: str
    new: str
    test: str


class Result(NamedTuple):
    """caught, MISSED or does not apply; and how long the test took."""

    verdict: str
    seconds: float
    note: str = ""


def read_table() -> list[Mutant]:
    return [Mutant(**row) for row in tomllib.loads(TABLE.read_text(encoding="utf-8"))["mutant"]]


def why_not(mutant: Mutant, root: Path) -> str | None:
    """Why a mutant cannot be made: its text must stand in its file exactly once."""
    path = root / mutant.path
    count = path.read_text(encoding="utf-8").count(mutant.old) if path.is_file() else -1
    if count == 1:
        return None
    product = (
        file for folder in ("cloze", "data_prep", "pretrain", "launch", "finetune") for file in _sources(root, folder)
    )
    others = [
        str(file.relative_to(root))
        for file in product
        if file != path and mutant.old in file.read_text(encoding="utf-8")
    ]
    found = {-1: "no such file", 0: "not in it"}.get(count, f"{count} times in it")
    return f"{mutant.path}: {found}; {'it stands in ' + ', '.join(others) if others else 'nor anywhere else'}"


def _sources(root: Path, folder: str) -> list[Path]:
    return sorted((root / folder).rglob("*.py"))


def run_tests(root: Path, *tests: str) -> tuple[bool, bool, str]:
    """(whether some test failed, whether some passed, the end of the output)."""
    # No compiled files: within a second a file of the same size would be taken for the one before.
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    env.setdefault("CLOZE_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", *tests]
    with subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=_LONGEST_SECONDS * len(tests))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return True, False, "it hung"
    summary = output.strip().splitlines()[-1] if output.strip() else ""
    return process.returncode == 1, " passed" in summary, output


def try_mutant(mutant: Mutant, root: Path) -> Result:
    if reason := why_not(mutant, root):
        return Result("does not apply", 0.0, reason)
    path = root / mutant.path
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
    started = time.monotonic()
    try:
        failed, _, output = run_tests(root, mutant.test)
    finally:
        path.write_text(whole, encoding="utf-8")
    first = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", output, re.MULTILINE)
    return Result("caught" if failed else "MISSED", time.monotonic() - started, first.group(1) if first else "")


def copied(into: Path) -> Path:
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, into)
    return into


def compare(before: Path, after: Path) -> None:
    """The table of README.md, on stdout."""
    one, two = (json.loads(path.read_text()) for path in (before, after))
    print("| | fault | in | must be caught by | before | after |\n|---|---|---|---|---|---|")
    for number, mutant in enumerate(read_table(), 1):
        test = mutant.test.removeprefix("tests/").replace("::test_", "<br>test_")
        told = (
            f"{found[mutant.what][0]}, {found[mutant.what][1]:.0f} s" if mutant.what in found else ""
            for found in (one, two)
        )
        print(f"| {number} | {mutant.what} | {mutant.path} | {test} | {' | '.join(told)} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="numbers, by comma")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2)
    options = parser.parse_args()
    if options.compare:
        compare(*options.compare)
        return 0
    only = {int(number) for number in options.only.split(",") if number}
    mutants = {n: mutant for n, mutant in enumerate(read_table(), 1) if not only or n in only}
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="cloze-mutants-") as folder:
        root = copied(Path(folder))
        tests = dict.fromkeys(mutant.test for mutant in mutants.values())
        failed, passed, output = run_tests(root, *tests)
        if failed or not passed:
            print(output, "\nerror: the tests fail without any fault; mend them first", file=sys.stderr)
            return 1
        for number, mutant in mutants.items():
            result = results[mutant.what] = try_mutant(mutant, root)
            print(f"{number:3} {result.verdict:14} {result.seconds:5.1f} s  {mutant.what}", flush=True)
            if result.verdict != "caught":
                print(f"    {mutant.test}\n    {result.note}", flush=True)
    counts = [result.verdict for result in results.values()]
    print(", ".join(f"{counts.count(verdict)} {verdict}" for verdict in sorted(set(counts))))
    if options.results:
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    return int(set(counts) != {"caught"})


if __name__ == "__main__":
    sys.exit(main())
