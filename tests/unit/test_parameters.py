"""No function takes more than six parameters: one that needs more wants a type."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cloze", "data_prep", "pretrain", "launch", "finetune")
MOST = 6


def too_many(source: str) -> list[str]:
    """`line: name(count)` of every function beyond six parameters, `self` and `cls` aside.

    `*args` and such do not count. The constructors of dataclasses and named tuples stand in no source: they are fields.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > MOST:
                found.append(f"{node.lineno}: {getattr(node, 'name', 'lambda')}({count})")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_takes_more_than_six_parameters(package: str) -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{found}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for found in too_many(path.read_text(encoding="utf-8"))
    ]
    assert not offenders, "\n".join(offenders)


def test_what_counts() -> None:
    assert too_many("def f(a, b, /, c, d, *, e, f, **rest): pass") == []
    assert too_many("def f(a, b, /, c, d, *, e, f, g): pass") == ["1: f(7)"]
    assert too_many("class C:\n    def f(self, a, b, c, d, e, f, *more): pass") == []
    assert too_many("class C:\n    def f(self, a, b, c, d, e, f, g): pass") == ["2: f(7)"]
    assert too_many("f = lambda a, b, c, d, e, f, g: 0") == ["1: lambda(7)"]
