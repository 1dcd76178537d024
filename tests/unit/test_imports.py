"""No modules import each other in a circle: neither at the top, nor for types alone, nor inside a function."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cloze", "data_prep", "pretrain", "launch", "finetune")


def modules(root: Path, packages: tuple[str, ...]) -> dict[str, Path]:
    """Every module by its name, a package by that of its `__init__.py`."""
    paths = (path for package in packages for path in sorted((root / package).rglob("*.py")))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules among those `known` that a module imports; a package that finds its modules imports them all."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{name}: line {node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from (found for found in (inner if inner in known else node.module,) if found in known)
        elif isinstance(node, ast.Attribute) and node.attr == "iter_modules":
            yield from (other for other in known if other.rpartition(".")[0] == name)


def circle(root: Path, packages: tuple[str, ...]) -> list[str] | None:
    """Modules each of which imports the one before it, and the first the last; None where there are none such."""
    known = modules(root, packages)
    graph = {name: {*imported(name, path, known)} - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(ROOT, PACKAGES) is None


@pytest.mark.parametrize(
    "way_back", ["import house.upper", "from house import upper", "def f():\n    from house.upper import g", None]
)
def test_a_circle_is_found(tmp_path: Path, way_back: str | None) -> None:
    (tmp_path / "house").mkdir()
    for name, text in {"__init__": "", "upper": "from house.lower import f\n", "lower": way_back or ""}.items():
        (tmp_path / "house" / f"{name}.py").write_text(text)
    assert (circle(tmp_path, ("house",)) is None) == (way_back is None)


def test_a_package_that_finds_its_modules_imports_them(tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "__init__.py").write_text("import pkgutil\nn = [*pkgutil.iter_modules(__path__)]\n")
    (tmp_path / "found" / "one.py").write_text("from found import n\n")
    assert circle(tmp_path, ("found",)) is not None
