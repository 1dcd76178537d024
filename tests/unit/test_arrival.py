"""Command lines that shells have had their hands on: sealed, opened, refused."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloze.arrival import checksum, later_wins, opened, refuse_given_twice, sealed
from cloze.errors import UserError
from launch.command import plain_deepspeed

ODD = [
    "run=a b", "wandb.tags=['{0..3}','${oc.env:NONE,x}','$(id)','%n','it`s','日本 ü']", "a='\"\\", "~b", "c=*", "d=\n",
    "deepspeed.extra={a:{enabled:true,verbose:true}}", "steps=5", "",
]  # fmt: skip
WORDS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=8), max_size=5)


def test_what_is_sealed_survives_two_shells_and_pdsh() -> None:
    """As plain deepspeed treats it: words are joined, and read by a shell on each host, `%h` by pdsh before."""
    words = sealed(ODD)
    assert not any("%" in word for word in words)
    code = "import sys; from cloze.arrival import opened; sys.stdout.buffer.write(repr(opened(sys.argv[1:])).encode())"
    quoted = f"'{sys.executable}' -c '{code}' " + " ".join(words)  # the inner shell sees the words bare
    twice = ["bash", "-c", f"bash -c {subprocess.list2cmdline([quoted])}"]
    done = subprocess.run(twice, capture_output=True, check=True)
    assert done.stdout.decode() == repr(ODD)


@given(WORDS)
def test_opened_is_what_was_sealed(words: list[str]) -> None:
    words = [word for word in words if not word.startswith(("--checksum=", "--encoded="))]
    assert opened(sealed(words)) == words
    assert opened(words) == words


def test_how_much_is_told_is_added_on_the_way() -> None:
    assert opened([*sealed(["steps=5"]), "--quiet"]) == ["steps=5", "--quiet"]


@pytest.mark.parametrize(
    "arrived",
    [
        ["deepspeed.extra=a:enabled:true", "deepspeed.extra=a:verbose:true"],
        ["steps=6"],
        ["steps=5", "zero=1"],
        [],
    ],
)
def test_what_did_not_arrive_is_told(arrived: list[str]) -> None:
    with pytest.raises(UserError, match="launch quote"):
        opened([*arrived, checksum(["steps=5"])])
    with pytest.raises(UserError, match="was cut off"):
        opened(["--encoded=abc!"])


def test_a_key_has_one_value() -> None:
    refuse_given_twice(["steps=5", "steps=5", "+a=1", "~steps", "--x=1", "--x=2", "word"])
    with pytest.raises(UserError, match=r"^steps: given twice, as 5 and as 6; give it once"):
        refuse_given_twice(["steps=5", "run=r", "steps=6"])
    with pytest.raises(UserError, match="a: given twice"):
        refuse_given_twice(["a={b:1}", "+a={c:1}"])
    assert later_wins(["a=1", "b=2", "a=3"]) == ["a=3", "b=2"]


def test_the_command_for_plain_deepspeed(tmp_path: object) -> None:
    words = plain_deepspeed(["run=x", "wandb.tags=[a b]"], None).split()
    assert words[:3] == ["deepspeed", "pretrain/train.py", "run=x"]
    assert opened(words[2:]) == ["run=x", "wandb.tags=[a b]"]
