"""Docstrings of Python code, read with `ast` and never imported: real prose on every machine."""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import ClassVar

from cloze.errors import UserError
from cloze.schema import doc
from cloze.storage import local_path
from data_prep.sources.base import Bad, Document, InputFile, Span, origin
from data_prep.sources.files import FileSource, resolved

_NO_PROSE = ("__pycache__", "test", "tests")  # directories of code with next to no docstrings
_DOCSTRING_SHARE = 8  # one byte in about so many of Python code is docstring


@dataclass(frozen=True, kw_only=True)
class DocstringSource(FileSource, kind="docstrings"):
    malformed: ClassVar[frozenset[str]] = frozenset({"unparsable"})
    needs_paths: ClassVar[bool] = False

    paths: list[str] = doc("directories of Python code; none = the standard library and what is installed")

    def find_paths(self) -> list[str]:
        """Every Python file below the directories."""
        directories = self.paths or sorted({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
        return list(
            dict.fromkeys(path for name in directories for path in resolved(name, _python_files(local_path(name))))
        )

    def text_bytes(self, size: int) -> int:
        """The docstrings' share of the code."""
        return size // _DOCSTRING_SHARE

    def num_pieces(self, file: InputFile, task_bytes: int) -> int:
        """One: a file is parsed as a whole."""
        return 1

    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        """The docstrings of one Python file."""
        code = Path(file.path).read_bytes()
        if b'"""' not in code and b"'''" not in code:
            return  # as good as surely without docstrings worth reading, and parsing is slow
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's code
                tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            yield Bad("unparsable", file.path)
            return
        todo: list[ast.AST] = [tree]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text:
                    line = node.body[0].lineno
                    yield Document(_prose(cleandoc(text)), f"{file.path}:{line}", origin(file.path, line), False)
            for branch in ("body", "orelse", "handlers", "finalbody", "cases"):  # expressions hold no docstrings
                todo += getattr(node, branch, ())


def _python_files(directory: Path) -> Iterator[Path]:
    if not directory.is_dir():
        other = "it is a file, and source=docstrings reads Python code; for text add source=text"
        fault = other if Path(directory).is_file() else "no such directory of Python code; correct the path"
        raise UserError(f"source.paths: {directory}: {fault}")
    for folder, names, filenames in os.walk(directory):
        passed_over = _NO_PROSE if Path(folder) != directory else (*_NO_PROSE, "site-packages")
        names[:] = sorted(name for name in names if name not in passed_over)
        yield from (Path(folder, name) for name in sorted(filenames) if name.endswith(".py"))


def _prose(docstring: str) -> str:
    """Without lines of code (doctests) and rulers, which no one reads as sentences."""
    lines = docstring.split("\n")
    kept = [
        line
        for line in lines
        if not line.lstrip().startswith((">>>", "... ")) and (any(map(str.isalnum, line)) or not line.strip())
    ]
    return "\n".join(kept)
