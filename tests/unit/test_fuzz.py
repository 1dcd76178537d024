"""A few rounds of the fuzzer, the same ones each time: hours of it run by hand (docs/reliability.md)."""

from pathlib import Path

import pytest

from tests.fuzz.fuzz import TARGETS, fuzz


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "published model"])  # which takes seconds
def test_what_comes_from_others_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    rounds, findings = fuzz(TARGETS[name], tmp_path / "f", iter(range(6)), 300.0)
    assert findings == []
    assert rounds == 6


def test_the_fuzzer_sees_what_should_not_be(tmp_path: Path) -> None:
    """Another exception, a file written elsewhere, a process started."""
    elsewhere, target = tmp_path / "elsewhere", TARGETS["hostfile"]

    def careless(folder: Path) -> None:
        text = (folder / "hostfile").read_bytes()
        if text != b"# two\ngpu1 slots=8\ngpu2 slots=8 # the other\n":
            elsewhere.write_text("")
            raise KeyError

    _, findings = fuzz(type(target)(target.make, careless), tmp_path / "f", iter(range(3)), 300.0)
    assert sorted(finding.what.partition(" ")[0] for finding in findings) == ["KeyError", "outside"]
