"""Objects of JSON are read however they stand in a file, in bounded memory; what lacks the field is told its keys."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.sources import json_values, lines
from data_prep.sources.base import Bad
from data_prep.sources.json_values import MISSING, at_path
from tests.unit.test_formats import items, reasons, source, texts

OBJECTS = st.lists(
    st.fixed_dictionaries(
        {"text": st.text(alphabet='a"\\{}[],:\n\ré\u2028', max_size=12).map(lambda text: f"x{text}")},
        optional={
            "meta": st.recursive(st.none() | st.integers() | st.text("}]{[", max_size=3), st.lists, max_leaves=4)
        },
    ),
    min_size=1,
    max_size=12,
)
LAYOUTS = {
    "lines": lambda values: "\n".join(map(json.dumps, values)),
    "array": json.dumps,
    "indented array": lambda values: json.dumps(values, indent=2),
    "array of lines": lambda values: "[\n" + ",\n".join(map(json.dumps, values)) + "\n]\n",
    "side by side": lambda values: "".join(map(json.dumps, values)),
    "indented side by side": lambda values: "\n".join(json.dumps(value, indent=1) for value in values),
    "lines with commas": lambda values: ",\r\n".join(map(json.dumps, values)),
    "two arrays": lambda values: json.dumps(values[:1]) + "\n" + json.dumps(values[1:], indent=1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(values=OBJECTS, unicode=st.booleans(), pieces=st.integers(1, 4))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_object_is_read_once(tmp_path, monkeypatch, layout, values, unicode, pieces):
    monkeypatch.setattr(lines, "_PLAIN_BYTES", 7)
    path = tmp_path / "a.json"
    path.write_bytes(LAYOUTS[layout](values).encode("utf-16" if unicode else "utf-8"))
    config = source("jsonl", paths=[str(path)])
    pieces = min(pieces, config.num_pieces(config.find_inputs()[0], 1))
    found = items(config, pieces)
    assert texts(found) == [value["text"] for value in values]
    assert len({item.origin for item in found}) == len(values)


def test_a_lost_line_end_costs_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "a"}\n{"text": "b"}{"text": "c}{"}\n{"text": "cut}{"\n{"text": "d"}\n'
    )
    found = items(source("jsonl", paths=[str(tmp_path / "a.jsonl")]))
    assert texts(found) == ["a", "b", "c}{", "d"]
    assert reasons(found) == ["bad_json"]


def test_a_broken_object_of_an_array_costs_itself(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"text": "a"},\n{"text": "cut\n},\n{"text": "b", "n": 1e},\n{"text": "c"}\n]')
    found = items(source("jsonl", paths=[str(tmp_path / "a.json")]))
    assert texts(found) == ["a", "c"]
    assert reasons(found) == ["bad_json", "bad_json"]
    assert [item.location.rpartition(", ")[2] for item in found if isinstance(item, Bad)] == ["line 3", "line 5"]


def test_memory_is_bounded_by_one_value(tmp_path, monkeypatch):
    for module in (lines, json_values):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)
    long = "y" * 100_000
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": long}, {"text": "b"}]))
    found = items(source("jsonl", paths=[str(tmp_path / "a.json")]))
    assert texts(found) == ["a", "b"]
    assert reasons(found) == ["line_too_long"]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("text", "t"), ("meta.content", "c"), ("a.b", "dotted"), ("list", "p\n\nq"), ("parts.text", "x\n\ny"),
        ("parts.0.text", "x"), ("deep", "s\n\nu\n\nv"), ("null", "empty"), ("meta.null", "empty"),
        ("number", "no_text_field"),
        ("nothing", "no_text_field"), ("meta", "no_text_field"), ("list.9", "no_text_field"),
    ],
)  # fmt: skip
def test_fields(tmp_path, field, expected):
    value = {
        "text": "t", "meta": {"content": "c", "null": None}, "a.b": "dotted", "list": ["p", None, "q"], "null": None,
        "parts": [{"text": "x"}, {"text": "y"}, {"other": 1}], "deep": [["s"], ["u", "v"]], "number": 3,
    }  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps(value) + "\n")
    (item,) = items(source("jsonl", paths=[str(tmp_path / "a.jsonl")], field=field))
    assert (item.reason if isinstance(item, Bad) else item.text) == expected
    assert at_path(value, "nothing") is MISSING


def test_the_keys_that_are_there_are_told(tmp_path):
    rows = [{"id": 1, "body": "x", "meta": {"title": "t", "n": 2}, "parts": [{"text": "y"}]}] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = items(source("jsonl", paths=[str(tmp_path / "a.jsonl")]))
    assert reasons(found) == ["no_text_field"] * 3
    told = "line 1: no text under text; set source.field to one of body, meta.title, parts.text"
    assert found[0].location.endswith(told)
    assert found[1].location.endswith("line 2")


def test_tables_by_columns_and_rows_without_names_are_told(tmp_path):
    """What pandas writes by itself, and lists: no advice that would read a part of it."""
    for content, word in (({"text": {"0": "a", "1": "b"}}, "orient='records'"), (["a", "b"], "one of 0, 1")):
        (tmp_path / "a.jsonl").write_text(json.dumps(content) + "\n")
        found = items(source("jsonl", paths=[str(tmp_path / "a.jsonl")]))
        assert word in found[0].location or isinstance(content, list)
    (tmp_path / "a.jsonl").write_text('["a", 1]\n["b", 2]\n')
    found = items(source("jsonl", paths=[str(tmp_path / "a.jsonl")]))
    assert found[0].location.endswith("set source.field to one of 0")
    assert texts(items(source("jsonl", paths=[str(tmp_path / "a.jsonl")], field="0"))) == ["a", "b"]
