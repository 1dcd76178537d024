"""Every type of a Parquet column that can hold text, read as text; what is none, named."""

import subprocess
import sys

import pytest

from cloze.errors import UserError
from data_prep.sources.base import Bad
from tests.support import ROOT, environment
from tests.unit.test_formats import items, source

pyarrow = pytest.importorskip("pyarrow")
TEXTS = ["über", "two", None, "vier"]
BYTES = [None if text is None else text.encode() for text in TEXTS]
LISTS = [["a", "b"], None, [], ["c", None]]
P = pyarrow
COLUMNS = {
    "string": (P.array(TEXTS), TEXTS),
    "large_string": (P.array(TEXTS, P.large_string()), TEXTS),
    "string_view": (P.array(TEXTS, P.string_view()), TEXTS),
    "binary": (P.array(BYTES), TEXTS),
    "large_binary": (P.array(BYTES, P.large_binary()), TEXTS),
    "binary_view": (P.array(BYTES, P.binary_view()), TEXTS),
    "fixed_size_binary": (P.array([b"abc", None, b"def", b"ghi"], P.binary(3)), ["abc", None, "def", "ghi"]),
    "dictionary": (P.array(TEXTS).dictionary_encode(), TEXTS),
    "dictionary_of_bytes": (P.array(BYTES).dictionary_encode(), TEXTS),
    "list": (P.array(LISTS), ["a\n\nb", None, None, "c"]),
    "large_list": (P.array(LISTS, P.large_list(P.binary())), ["a\n\nb", None, None, "c"]),
    "list_of_dictionary": (P.array(LISTS, P.list_(P.dictionary(P.int32(), P.string()))), ["a\n\nb", None, None, "c"]),
    "fixed_size_list": (
        P.array([["a", "b"], None, ["c", "d"], ["e", "f"]], P.list_(P.string(), 2)),
        ["a\n\nb", None, "c\n\nd", "e\n\nf"],
    ),
    "list_of_lists": (P.array([[["a"], ["b"]], None, [], [["c", "d"]]]), ["a\n\nb", None, None, "c\n\nd"]),
    "of.text": (P.array([{"text": "x"}, None, {"text": None}, {"text": "y"}]), ["x", None, None, "y"]),
    "of.many.parts": (P.array([{"many": {"parts": ["p", "q"]}}, None, {"many": None}, None]), ["p\n\nq", *[None] * 3]),
    "all.text": (
        P.array([[{"text": "x", "n": 1}, {"text": "y", "n": 2}], None, [], None]),
        ["x\n\ny", None, None, None],
    ),
    "of.map.value": (
        P.array(
            [{"map": [("k", "x"), ("l", "y")]}, None, {"map": None}, {"map": [("k", "z")]}],
            P.struct([("map", P.map_(P.string(), P.string()))]),
        ),
        ["x\n\ny", None, None, "z"],
    ),
    "list_of_nulls": (P.array([[None], None, [], [None, None]]), [None] * 4),
    "nulls": (P.nulls(4), [None] * 4),
    "with.dot": (P.array(TEXTS), TEXTS),
}


@pytest.mark.parametrize("field", COLUMNS)
def test_every_type_of_text(tmp_path, field):
    from pyarrow import parquet

    array, expected = COLUMNS[field]
    nested = pyarrow.types.is_nested(array.type) and "." in field
    columns = {"number": range(4), field.partition(".")[0] if nested else field: array, "other": TEXTS}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=2)
    found = items(source("parquet", paths=[str(tmp_path / "a.parquet")], field=field), 2)
    assert [None if isinstance(item, Bad) else item.text for item in found] == expected
    assert {item.reason for item in found if isinstance(item, Bad)} <= {"empty"}
    assert not any(item.repaired for item in found if not isinstance(item, Bad))


def test_one_bad_byte_is_repaired_and_costs_no_file(tmp_path):
    from pyarrow import parquet

    texts = pyarrow.array([b"caf\xe9", b"good", None, b"\xc3\xa9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    *found, last = items(source("parquet", paths=[str(tmp_path / "a.parquet")]))
    assert (found[0].text, found[0].repaired) == ("caf\ufffd", True)
    assert (found[1].text, found[1].repaired) == ("good", False)
    assert found[2].reason == "empty"
    assert found[2].reason not in source("parquet").malformed
    assert last.text == "é"


def test_what_could_be_the_text_is_named(tmp_path):
    from pyarrow import parquet

    columns = {"id": [1], "body": [b"x"], "meta": [{"title": "y", "year": 3}]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"no column of text named text; set source\.field to one of body, meta\.title$"
    ):
        items(source("parquet", paths=[str(tmp_path / "a.parquet")]))
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="no column of it holds text"):
        items(source("parquet", paths=[str(tmp_path / "b.parquet")]))


@pytest.mark.parametrize("name", ["wikipedia", "somebody/books"])
def test_a_data_set_that_is_a_script_is_one_line(tmp_path, name, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*_):
        raise RuntimeError(f"Dataset scripts are no longer supported, but found {name}.py\nmore")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(UserError) as caught:
        items(source("hub", paths=[name]))
    line = str(caught.value)
    assert "\n" not in line
    assert f"{name}: is a script" in line
    assert f"hf://datasets/{name}@~parquet/**/*.parquet" in line
    assert ("wikimedia/wikipedia@20231101.en" in line) == (name == "wikipedia")


def test_the_command_reads_lists(tmp_path):
    """In processes of its own: here another module has imported pyarrow.compute."""
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"text": [[f"a line of number {n} .", f"and {n} more ."] * 9 for n in range(60)]}),
        tmp_path / "x.parquet",
    )
    command = [sys.executable, "-m", "data_prep", "source=parquet", f"source.paths=[{tmp_path}/x.parquet]"]
    command += [f"out={tmp_path}/out", "tokenizer.vocab_size=100", "source.min_characters=0"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=False, capture_output=True, text=True)
    assert (done.returncode, "60 read, 60 kept" in done.stderr + done.stdout) == (0, True), done.stderr
