"""The sets that frozen probes read, as published: which files, how they are laid out, how a task is scored.

Adding a set is an entry of `PROBES`. What is wrong with a file is one `UserError`, with file and line. Knows no models.
"""

import csv
import gzip
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cloze.errors import UserError, first_line


class Example(NamedTuple):
    """A text or two with a label, or a number; or words with a tag each."""

    texts: tuple[str, ...]
    label: str | float | tuple[str, ...]


Examples = Sequence[Example]
Lines = Sequence[tuple[int, str]]  # numbered from 1; empty ones are there
Parse = Callable[[Lines], Iterator[Example]]


class Fault(Exception):
    """What is wrong with a line of a file."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"line {number}: {message}")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One task. A path names a member of an archive behind `!`; the label of a whole file stands before `=`."""

    train: Sequence[Sequence[str]]  # files, of which the first alternative that is there is read
    test: Sequence[Sequence[str]] = ()  # (): cross-validation
    parse: Parse | None = None  # None: a text a line, and a label for each file
    metric: str  # accuracy, matthews, spearman, tag_f1
    encoding: str = "utf-8-sig"

    @property
    def wanted(self) -> str:
        return " or ".join(" and ".join(one) for one in self.train)


def find_files(folder: Path, name: str) -> tuple[list[str], list[str]] | None:
    """Files to learn from and to test on (none: cross-validation), up to two levels below `folder`; None: not there."""
    probe = PROBES[name]
    for number, train in enumerate(probe.train):
        test = probe.test[number] if probe.test else ()
        for prefix in ("", "*/", "*/*/"):
            for first in sorted(folder.glob(prefix + _file_of(train[0]))):
                root = first.parents[_file_of(train[0]).count("/")]
                if all((root / _file_of(one)).is_file() for one in (*train, *test)):
                    return [_at(root, one) for one in train], [_at(root, one) for one in test]
    return None


def read(name: str, files: Sequence[str]) -> list[Example]:
    """The examples of these files. Raises `UserError` for the first fault."""
    probe, found = PROBES[name], []
    for file in files:
        label, _, where = file.rpartition("=") if probe.parse is None else ("", "", file)
        lines = list(enumerate(_text(where, probe.encoding).split("\n"), 1))
        parse = probe.parse or _of_one_label(label)
        try:
            own = list(parse(lines))
        except Fault as fault:
            raise UserError(f"{where}: {fault}") from None
        if not own:
            raise UserError(f"{where}: holds no examples")
        found += own
    return found


def _file_of(path: str) -> str:
    return path.rpartition("=")[2].partition("!")[0]


def _at(root: Path, path: str) -> str:
    label, sign, where = path.rpartition("=")
    return f"{label}{sign}{root}/{where}"


def _text(where: str, encoding: str) -> str:
    path, _, member = where.partition("!")
    try:
        if member:
            with zipfile.ZipFile(path) as archive:
                data = archive.read(member)
        else:
            data = Path(path).read_bytes()
            data = gzip.decompress(data) if path.endswith(".gz") else data
        return data.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{where}: line {line}: not {encoding.removesuffix('-sig')}; convert it") from None
    except KeyError:
        raise UserError(f"{path}: holds no {member}; download it again") from None
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{where}: cannot be read ({first_line(error)}); download it again") from None


def _example(number: int, texts: Sequence[str], label: str | float) -> Example:
    stripped = tuple(text.strip() for text in texts)
    if not all(stripped):
        raise Fault(number, "a text is empty; remove the line")
    return Example(stripped, label)


def _table(texts: Sequence[str], label: str, header: Sequence[str] | None = None) -> Parse:
    """Columns apart by tabs, a quotation mark is text; `header` where the files have none."""

    def parse(lines: Lines) -> Iterator[Example]:
        rows = [(number, line.split("\t")) for number, line in lines if line.strip()]
        names = list(header or ())
        if not names and rows:
            names = [name.strip() for name in rows.pop(0)[1]]
        if missing := {*texts, label} - {*names}:
            raise Fault(1, f"no column {', '.join(sorted(missing))}; there are {', '.join(names) or 'none'}")
        for number, cells in rows:
            if len(cells) != len(names):
                raise Fault(number, f"{len(cells)} columns where {len(names)} belong: {', '.join(names)}")
            row = dict(zip(names, cells, strict=True))
            yield _example(number, [row[name] for name in texts], row[label])

    return parse


def _of_one_label(label: str) -> Parse:
    """A text a line, all of them with this label."""
    return lambda lines: (_example(number, [line], label) for number, line in lines if line.strip())


def _question(lines: Lines) -> Iterator[Example]:
    """TREC: `DESC:manner How did …`, of which the coarse label counts (Li and Roth 2002)."""
    for number, line in lines:
        if line.strip():
            label, _, text = line.partition(" ")
            if ":" not in label:
                raise Fault(number, f"{line[:40]!r}: LABEL:DETAIL and a question are needed")
            yield _example(number, [text], label.partition(":")[0])


def _similarity(lines: Lines) -> Iterator[Example]:
    """STS-B: two sentences and a number, CSV without a header."""
    reader = csv.reader(io.StringIO("\n".join(line for _, line in lines), newline=""))
    for cells in reader:
        if cells:
            try:
                *texts, number = cells
                score = float(number)
            except ValueError:
                raise Fault(reader.line_num, f"{cells[-1][:40]!r}: must be a number, the similarity") from None
            if len(texts) != 2:
                raise Fault(reader.line_num, f"{len(cells)} columns where 3 belong: two sentences and their similarity")
            yield _example(reader.line_num, texts, score)


def _tagged(lines: Lines) -> Iterator[Example]:
    """CoNLL: a word and its tag to a line, first and last column; a blank line ends a sentence."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in [*lines, (len(lines) + 1, "")]:
        cells = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or cells[0] == "-DOCSTART-":
            if words:
                yield Example(tuple(words), tuple(tags))
            words, tags = [], []
        elif len(cells) < 2:
            raise Fault(number, f"{line.strip()!r}: a word and its tag are needed")
        else:
            words.append(cells[0])
            tags.append(cells[-1].strip())


def _sts(language: str) -> Probe:
    files = [f"stsb-{language}-{part}.csv" for part in ("train", "test")]
    return Probe(train=[[files[0]]], test=[[files[1]]], parse=_similarity, metric="spearman")


_POLARITY, _SUBJECTIVITY = "sentence_polarity.zip!sentence_polarity/rt-polarity", "subjectivity.zip!subjectivity"

PROBES: Mapping[str, Probe] = {
    "sst2": Probe(  # Socher et al. 2013
        train=[["sst2/train.tsv"], ["SST-2/train.tsv"]], test=[["sst2/dev.tsv"], ["SST-2/dev.tsv"]],
        parse=_table(["sentence"], "label"), metric="accuracy",
    ),
    "cola": Probe(  # Warstadt et al. 2019
        train=[["cola/train.tsv"], ["CoLA/train.tsv"]], test=[["cola/dev.tsv"], ["CoLA/dev.tsv"]],
        parse=_table(["sentence"], "label", header=("source", "label", "star", "sentence")), metric="matthews",
    ),
    "mr": Probe(  # Pang and Lee 2005
        train=[[f"negative={_POLARITY}.neg", f"positive={_POLARITY}.pos"]],
        metric="accuracy", encoding="latin-1",
    ),
    "subj": Probe(  # Pang and Lee 2004
        train=[[
            f"objective={_SUBJECTIVITY}/plot.tok.gt9.5000", f"subjective={_SUBJECTIVITY}/quote.tok.gt9.5000"
        ]],
        metric="accuracy", encoding="latin-1",
    ),
    "trec": Probe(  # Li and Roth 2002
        train=[["qc.zip!qc/train.txt"]], test=[["qc.zip!qc/test.txt"]],
        parse=_question, metric="accuracy", encoding="latin-1",
    ),
    "mrpc": Probe(  # Dolan and Brockett 2005
        train=[["mrpc_train.txt"], ["msr_paraphrase_train.txt"]], test=[["mrpc_test.txt"], ["msr_paraphrase_test.txt"]],
        parse=_table(["#1 String", "#2 String"], "Quality"), metric="accuracy",
    ),
    "stsb": _sts("en"),  # Cer et al. 2017
    "stsb_zh": _sts("zh"),
    "ner": Probe(
        train=[["msra/train.conll.gz"], ["ner/train.conll"], ["conll2003/train.txt"]],
        test=[["msra/dev.conll.gz"], ["ner/dev.conll"], ["conll2003/valid.txt"]],
        parse=_tagged, metric="tag_f1",
    ),
}  # fmt: skip
