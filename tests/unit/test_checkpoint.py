"""Checkpoints: whole or not there, whatever goes wrong, and the newest whole one is found."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from cloze.errors import DiskError, UserError
from pretrain import checkpoint
from pretrain.checkpoint import Fragment, LossScale, Retention, Snapshot, TrainingState, Writer, WriterOptions
from pretrain.checkpoint import format as checkpoint_format
from pretrain.checkpoint import writer as checkpoint_writer
from pretrain.checkpoint.__main__ import main
from tests.support import lose_renames, make_identity

SHAPES = {"a.weight": (3, 4), "a.bias": (5,), "b.weight": (2, 2, 2)}
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "MANIFEST.json")


def make_state(step: int, **changes: Any) -> TrainingState:
    values: dict[str, Any] = {
        "step": step, "samples": 16 * step, "tokens": 300 * step, "seconds": 1.5, "optimizer_steps": step,
        "rollbacks": 0, "loss_scale": LossScale(), "identity": make_identity(), "wandb_id": None,
    }  # fmt: skip
    return TrainingState(**(values | changes))


def make_snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    moments = {
        f"{name}.{kind}": torch.rand(shape, generator=generator)
        for name, shape in SHAPES.items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return Snapshot(make_state(step), weights, moments, f"run: r\nstep: {step}\n")


def same(one: Snapshot, other: Snapshot) -> bool:
    tensors = all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in ((one.weights, other.weights), (one.moments, other.moments))
    )
    return tensors and (one.state, one.config_yaml) == (other.state, other.config_yaml)


def quiet(text: str) -> None:
    raise AssertionError(text)


# Round trip


def test_round_trip(tmp_path: Path) -> None:
    written = make_snapshot(7)
    path = checkpoint.write(tmp_path, written)
    assert path == tmp_path / "step-00000007"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert checkpoint.verify(path) == []
    assert same(checkpoint.load(path), written)
    assert checkpoint.newest_verified(tmp_path, quiet) == path
    assert (tmp_path / "LATEST").read_text() == "step-00000007\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["LATEST", "step-00000007"]


def test_the_files_are_what_they_say(tmp_path: Path) -> None:
    """Any reader of safetensors and JSON can do without us."""
    written = make_snapshot(3)
    path = checkpoint.write(tmp_path, written)
    weights = safetensors.torch.load_file(path / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in weights.items()} == SHAPES
    assert json.loads((path / "state.json").read_text())["samples"] == 48
    listed = json.loads((path / "MANIFEST.json").read_text())["files"]
    for name in FILES[:-1]:
        data = (path / name).read_bytes()
        assert listed[name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a pickle")

    for owner, name in (
        (pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads"), (pickle, "Pickler"),
        (pickle, "Unpickler"), (torch, "save"), (torch, "load"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    assert same(checkpoint.load(checkpoint.write(tmp_path, make_snapshot(1))), make_snapshot(1))


def test_the_newest_is_by_step_not_by_name_or_time(tmp_path: Path) -> None:
    for step in (100_000_000, 5, 99_999_999):
        checkpoint.write(tmp_path, make_snapshot(step))
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-00000008").write_text("a file")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step-00000005",
        "step-99999999",
        "step-100000000",
    ]


def test_a_name_is_given_to_what_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is synced before the rename that makes it count, LATEST too."""
    done: list[str] = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda self, target: [done.append("named"), rename(self, target)][1])
    monkeypatch.setattr(Path, "replace", lambda self, target: [done.append("named"), replace(self, target)][1])
    checkpoint.write(tmp_path, make_snapshot(1))
    first, second = (i for i, what in enumerate(done) if what == "named")
    assert {*FILES, ".writing-step-00000001"} <= {*done[:first]}
    assert {".LATEST.tmp", tmp_path.name} <= {*done[first:second]}


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.newest_verified(tmp_path, quiet) is None
    assert checkpoint.newest_verified(tmp_path / "nowhere", quiet) is None


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{f"{how.__name__} {name}": (lambda path, how=how, name=name: how(path / name))
       for how in (flip, cut) for name in FILES},
    **{f"grow {name}": (lambda path, name=name: grow(path / name)) for name in FILES},
    **{f"no {name}": (lambda path, name=name: (path / name).unlink()) for name in FILES},
    **{f"empty {name}": (lambda path, name=name: (path / name).write_bytes(b"")) for name in FILES},
    "swapped": lambda path: [
        (path / "model.safetensors").rename(path / "x"),
        (path / "optimizer.safetensors").rename(path / "model.safetensors"),
        (path / "x").rename(path / "optimizer.safetensors"),
    ],
    "weights of another step": lambda path: shutil.copy(path.with_name("step-00000002") / "model.safetensors", path),
    "a folder for a file": lambda path: [(path / "state.json").unlink(), (path / "state.json").mkdir()],
    "nothing in it": lambda path: [file.unlink() for file in path.iterdir()],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, make_snapshot(step))
    newest = tmp_path / "step-00000003"
    DAMAGE[damage](newest)
    faults = checkpoint.verify(newest)
    assert faults
    assert all("\n" not in fault for fault in faults)
    told: list[str] = []
    assert checkpoint.newest_verified(tmp_path, told.append) == tmp_path / "step-00000002"
    (line,) = told
    assert str(newest) in line
    assert faults[0] in line
    assert "\n" not in line


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["files", "bytes", *FILES]), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_manifest_is_a_fault_not_an_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    path = folder / "step-00000001"
    if not path.exists():
        checkpoint.write(folder, make_snapshot(1))
        shutil.copy(path / "MANIFEST.json", folder / "right")
    right = (folder / "right").read_text()
    body = json.loads(right)
    kind = data.draw(st.sampled_from(["all", "files", "entry", "bytes", "sha256"]))
    value = data.draw(json_values)
    if kind == "all":
        body = value
    elif kind == "files":
        body["files"] = value
    else:
        name = data.draw(st.sampled_from(FILES[:-1]))
        if kind == "entry":
            body["files"][name] = value
        else:
            body["files"][name][kind] = value
    (path / "MANIFEST.json").write_text(json.dumps(body, indent=1) + "\n")
    assert checkpoint.verify(path) or body == json.loads(right)


@pytest.mark.parametrize(
    "content", ["1e999", "[" * 100_000, '{"files": {"model.safetensors": {"bytes": 1e999, "sha256": "a"}}}', "\ud800"]
)
def test_a_manifest_that_is_hard_to_read(tmp_path: Path, content: str) -> None:
    path = checkpoint.write(tmp_path, make_snapshot(1))
    (path / "MANIFEST.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert checkpoint.verify(path)


def rewrite(path: Path, name: str, data: bytes) -> None:
    """Replace a file and make its checksum right: what only a hand, or a bug of ours, can do."""
    (path / name).write_bytes(data)
    body = json.loads((path / "MANIFEST.json").read_text())
    body["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "MANIFEST.json").write_text(json.dumps(body, indent=1) + "\n")
    assert checkpoint.verify(path) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "3"), ("step", None), ("step", 4), ("step", True), ("samples", 1.5), ("samples", -5),
        ("samples", 10**30), ("optimizer_steps", -1), ("seconds", None), ("seconds", float("nan")), ("wandb_id", 3),
        ("loss_scale", "1"), ("loss_scale", {"value": 1.0}), ("identity", None), ("identity", {"seed": [1]}),
    ],
)  # fmt: skip
def test_a_state_of_the_wrong_kind_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    path = checkpoint.write(tmp_path, make_snapshot(3))
    body = json.loads((path / "state.json").read_text())
    for changed in ({**body, key: value}, {k: v for k, v in body.items() if k != key}):
        rewrite(path, "state.json", json.dumps(changed).encode())
        with pytest.raises(UserError, match=r"cannot be loaded.*remove it to resume from the one before") as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)


Tensors = dict[str, torch.Tensor]
LIES: dict[str, Callable[[Tensors, str], object]] = {
    "transposed": lambda tensors, name: tensors.update({name: tensors[name].t().contiguous()}),
    "too short": lambda tensors, name: tensors.update({name: tensors[name].flatten()[:7].clone()}),
    "missing": lambda tensors, name: tensors.pop(name),
    "one too many": lambda tensors, name: tensors.update({f"{name}.x": torch.zeros(3)}),
    "half": lambda tensors, name: tensors.update({name: tensors[name].half()}),
    "NaN": lambda tensors, name: tensors[name].view(-1)[3:4].fill_(float("nan")),
    "infinite": lambda tensors, name: tensors[name].view(-1)[3:4].fill_(float("-inf")),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_tensors_that_do_not_belong_are_refused(tmp_path: Path, name: str, lie: str) -> None:
    """Though every checksum is right. What is wrong with weights alone shows in the moments, which are not theirs."""
    path = checkpoint.write(tmp_path, make_snapshot(3))
    tensors = {key: value.clone() for key, value in safetensors.torch.load_file(path / name).items()}
    LIES[lie](tensors, "a.weight" if name.startswith("model") else "a.weight.exp_avg")
    rewrite(path, name, safetensors.torch.save(tensors))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_mean_squares_are_not_negative(tmp_path: Path) -> None:
    """The next update would make the weights NaN."""
    path = checkpoint.write(tmp_path, make_snapshot(3))
    tensors = safetensors.torch.load_file(path / "optimizer.safetensors")
    tensors["a.weight.exp_avg_sq"].view(-1)[5] = -1e-9
    rewrite(path, "optimizer.safetensors", safetensors.torch.save(tensors))
    with pytest.raises(UserError, match=r"a\.weight\.exp_avg_sq holds negative numbers"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["state.json", "config.yaml", "MANIFEST.json"])
def test_a_text_of_enormous_size_is_not_read(tmp_path: Path, name: str) -> None:
    path = checkpoint.write(tmp_path, make_snapshot(3))
    huge = (path / name).read_bytes() + b" " * 2**21
    if name == "MANIFEST.json":
        (path / name).write_bytes(huge)
        assert "larger than any that we write" in checkpoint.verify(path)[0]
    else:
        rewrite(path, name, huge)
        with pytest.raises(UserError, match=f"{name}: larger than any that we write"):
            checkpoint.load(path)


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("data", [b"", b"null", b"\xff\xfe\xfd", b"\x80\x04K\x01."])
def test_a_file_of_another_format_is_one_line(tmp_path: Path, name: str, data: bytes) -> None:
    path = checkpoint.write(tmp_path, make_snapshot(3))
    rewrite(path, name, data)
    if name == "config.yaml" and data in (b"", b"null"):
        assert checkpoint.load(path).config_yaml == data.decode()
    else:
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)


# Crashes inside `write`


@contextmanager
def at_every_line(of: Callable[..., Any], action: Callable[[int], None]) -> Iterator[None]:
    """Call `action(n)` before the n-th line that a function executes (loops counted)."""
    count = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            action(count)
        return local

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code is of.__code__ else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("over", ["nothing", "a damaged one", "leftovers"])
def test_killed_at_any_line_of_write(tmp_path: Path, over: str) -> None:
    """The folder as a SIGKILL before each line would leave it."""
    folder, states = tmp_path / "checkpoints", tmp_path / "states"
    checkpoint.write(folder, make_snapshot(1))
    if over == "a damaged one":
        flip(checkpoint.write(folder, make_snapshot(2)) / "model.safetensors")
    elif over == "leftovers":
        (folder / ".writing-step-00000002").mkdir()
        (folder / ".writing-step-00000002" / "model.safetensors").write_bytes(b"half")
        (folder / ".writing-step-00000002" / "share-00001.safetensors").write_bytes(b"half")

    with at_every_line(checkpoint.write, lambda n: shutil.copytree(folder, states / f"{n:03d}")):
        checkpoint.write(folder, make_snapshot(2))
    shutil.copytree(folder, states / "end")

    seen = set()
    for state in sorted(states.iterdir()):
        first, second = state / "step-00000001", state / "step-00000002"
        assert same(checkpoint.load(first), make_snapshot(1))
        newest = checkpoint.newest_verified(state, lambda _: None)
        assert newest is not None
        seen.add(newest.name)
        if newest == second:
            assert same(checkpoint.load(second), make_snapshot(2))
        assert (state / (state / "LATEST").read_text().strip()).is_dir() or over == "a damaged one"
        # Whoever comes next can write it again.
        checkpoint.clear_unfinished(state)
        assert not list(state.glob(".writing-*"))
        checkpoint.write(state, make_snapshot(2))
        assert same(checkpoint.load(second), make_snapshot(2))
        assert (state / "LATEST").read_text() == "step-00000002\n"
    assert seen == {"step-00000001", "step-00000002"}
    assert len(list(states.iterdir())) > 25


OPERATIONS = (
    (Path, "mkdir"), (Path, "write_text"), (Path, "iterdir"), (Path, "unlink"), (Path, "rename"), (Path, "replace"),
    (Path, "stat"), (os, "fsync"), (os, "open"), (checkpoint_format, "save_file"),
    (checkpoint_writer, "save_file"), (hashlib, "file_digest"), (shutil, "rmtree"),
)  # fmt: skip


@contextmanager
def failing_at(call: int, error: Exception) -> Iterator[None]:
    """Let the given call among those of `OPERATIONS` raise, once."""
    count = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                raise error
            return real(*arguments, **options)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, wrapped(getattr(owner, name)))
        yield


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_an_operation_that_fails(tmp_path: Path, error: Exception) -> None:
    """Whichever it is: the older checkpoint stays, a new one is whole or not there, nothing lies about."""
    for call in range(1, 200):
        folder = tmp_path / str(call)
        checkpoint.write(folder, make_snapshot(1))
        with failing_at(call, error), suppress(type(error)):
            checkpoint.write(folder, make_snapshot(2))
            break
        assert same(checkpoint.load(folder / "step-00000001"), make_snapshot(1))
        names = {path.name for path in folder.iterdir()} - {"LATEST", "step-00000001", ".LATEST.tmp"}
        assert names <= {"step-00000002"}
        if names:
            assert same(checkpoint.load(folder / "step-00000002"), make_snapshot(2))
    assert 30 < call < 199


# Retention


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12, unique=True),
    st.integers(1, 5),
    st.sampled_from([0, 1, 5, 10]),
    st.integers(0, 2),
    st.frozensets(st.integers(1, 60), max_size=30),
)
def test_retention_equals_the_rule(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[int],
    keep_last: int,
    keep_every: int,
    later: int,
    kept: frozenset[int],
) -> None:
    """The last k up to the one just written, the multiples and those named. Later ones are damaged: no reason to go."""
    folder = tmp_path_factory.mktemp("retain")
    for step in steps:
        checkpoint.path_of(folder, step).mkdir()
    ordered = sorted(steps)
    newest = ordered[max(0, len(ordered) - 1 - later)]
    rules = Retention(keep_last=keep_last, keep_every=keep_every, keep_steps=kept)
    removed = checkpoint.retain(folder, newest, rules)
    upto = [step for step in ordered if step <= newest]
    expected = {step for step in upto[:-keep_last] if step not in kept and not (keep_every and step % keep_every == 0)}
    assert {path.name for path in removed} == {f"step-{step:08d}" for step in expected}
    left = {path.name for path in folder.iterdir()}
    assert left == {f"step-{step:08d}" for step in steps if step not in expected}
    assert f"step-{newest:08d}" in left


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5, unique=True),
    st.integers(1, 3),
    st.frozensets(st.integers(1, 20), max_size=6),
    st.integers(0, 2),
)
def test_the_mean_of_the_latest_equals_the_rule(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], count: int, damaged: frozenset[int], later: int
) -> None:
    """Against fractions, element by element: the last sound ones up to the one that is named."""
    folder = tmp_path_factory.mktemp("mean")
    ordered, told = sorted(steps), list[str]()
    newest = ordered[max(0, len(ordered) - 1 - later)]
    for step in steps:
        path = checkpoint.write(folder, make_snapshot(step))
        if step in damaged and step != newest:
            flip(path / "model.safetensors")
    sound = [step for step in ordered if step <= newest and (step == newest or step not in damaged)]
    if len(sound) < count:
        with pytest.raises(UserError, match=f"--average {count}: .* holds {len(sound)} sound up to step {newest}"):
            checkpoint.latest(checkpoint.path_of(folder, newest), count, told.append)
        return
    found = checkpoint.latest(checkpoint.path_of(folder, newest), count, told.append)
    assert [checkpoint.step_of(path) for path in found] == sound[-count:]
    assert len(told) == sum(step in damaged for step in ordered if sound[-count] < step < newest)
    mean = checkpoint.mean_weights(found)
    assert mean.keys() == SHAPES.keys()
    for name, value in mean.items():
        every = [make_snapshot(step).weights[name].flatten().tolist() for step in sound[-count:]]
        expected = [float(sum(map(Fraction, column)) / count) for column in zip(*every, strict=True)]
        assert value.dtype == torch.float32
        assert value.shape == SHAPES[name]
        assert value.flatten().tolist() == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_a_mean_of_none_and_of_different_models_is_one_line(tmp_path: Path) -> None:
    snapshot = make_snapshot(1)
    first = checkpoint.write(tmp_path, snapshot)
    wide = {name: torch.cat([value, value]) for name, value in snapshot.weights.items()}
    moments = {name: torch.cat([value, value]) for name, value in snapshot.moments.items()}
    other = checkpoint.write(tmp_path, Snapshot(make_state(2), wide, moments, "run: r\n"))
    with pytest.raises(UserError, match=r"step-00000002: is of another model than .*step-00000001; average fewer"):
        checkpoint.mean_weights([first, other])
    with pytest.raises(UserError, match=r"--average 0: must be at least 1"):
        checkpoint.latest(first, 0, quiet)


def test_a_half_removed_checkpoint_does_not_look_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.write(tmp_path, make_snapshot(step))

    def interrupted(path: Path) -> None:
        (path / "model.safetensors").unlink()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.retain(tmp_path, 2, Retention(keep_last=1))
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000002"]
    monkeypatch.undo()
    checkpoint.clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000002"]


# Shares


def fragments_of(snapshot: Snapshot, cuts: Callable[[int], list[int]]) -> list[Fragment]:
    """Each tensor of the snapshot cut at the given places."""
    result = []
    for name, weight in snapshot.weights.items():
        tensors = {"weight": weight} | {kind: snapshot.moments[f"{name}.{kind}"] for kind in checkpoint.MOMENTS}
        for kind, tensor in tensors.items():
            places = [0, *sorted(cuts(tensor.numel())), tensor.numel()]
            result += [
                Fragment(name, kind, start, tensor.flatten()[start:end].clone())
                for start, end in pairwise(places)
                if end > start
            ]
    return result


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_assembled_from_any_cuts_in_any_order(data: st.DataObject) -> None:
    snapshot = make_snapshot(4)
    parts = fragments_of(snapshot, lambda size: data.draw(st.lists(st.integers(0, size), max_size=3)))
    full = checkpoint.assemble(data.draw(st.permutations(parts)), SHAPES)
    assert all(torch.equal(full["weight"][name], value) for name, value in snapshot.weights.items())
    for name, value in snapshot.moments.items():
        base, _, kind = name.rpartition(".")
        assert torch.equal(full[kind][base], value)


def test_shares_that_do_not_cover_all_are_refused() -> None:
    parts = fragments_of(make_snapshot(4), lambda size: [size // 2])
    for broken in (parts[1:], parts[:-1], [*parts, parts[0]], [parts[0]._replace(start=1), *parts[1:]]):
        with pytest.raises(ValueError, match="do not fit together"):
            checkpoint.assemble(broken, SHAPES)


# The writer


def writer(folder: Path, told: list[str], rank: int = 0, num_writers: int = 1, **changes: Any) -> Writer:
    options = {"retention": Retention(keep_last=9), "patience_seconds": 20.0} | changes
    return Writer(folder, WriterOptions(rank=rank, num_writers=num_writers, **options), told.append)


def submit(to: Writer, step: int, share: Callable[[int], bool] = lambda number: True) -> None:
    """Hand in the fragments with the numbers that `share` takes."""
    snapshot = make_snapshot(step)
    parts = fragments_of(snapshot, lambda size: [size // 3, size // 2])
    mine = [part for number, part in enumerate(parts) if share(number)]
    to.submit(snapshot.state, mine, SHAPES, snapshot.config_yaml)


def test_one_writer(tmp_path: Path) -> None:
    told: list[str] = []
    one = writer(tmp_path, told, retention=Retention(keep_last=2))
    for step in (1, 2, 3):
        submit(one, step)
    one.close()
    assert told == []
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert same(checkpoint.load(tmp_path / "step-00000003"), make_snapshot(3))
    assert (tmp_path / "LATEST").read_text() == "step-00000003\n"


@pytest.mark.parametrize("first", [0, 1, 2])
def test_three_writers_in_any_order(tmp_path: Path, first: int) -> None:
    told: list[str] = []
    ranks = [writer(tmp_path, told, rank, 3) for rank in range(3)]
    for step in (5, 6):
        for turn in range(3):
            rank = (first + turn) % 3
            submit(ranks[rank], step, lambda number, rank=rank: number % 3 == rank)
    for one in ranks:
        one.close()
    assert told == []
    assert all(same(checkpoint.load(checkpoint.path_of(tmp_path, step)), make_snapshot(step)) for step in (5, 6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000005", "step-00000006"]


def test_a_rank_without_a_share_writes_nothing(tmp_path: Path) -> None:
    other = writer(tmp_path, [], rank=1, num_writers=1)
    submit(other, 1)
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_a_share_that_never_comes(tmp_path: Path) -> None:
    told: list[str] = []
    one = writer(tmp_path, told, 0, 2, patience_seconds=0.1)
    submit(one, 1, lambda number: number % 2 == 0)
    with pytest.raises(DiskError, match="the share of rank 1 did not appear"):
        one.close()
    assert len(told) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_is_gone_is_not_waited_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the process could not end: the thread that waits would hold it for all of its patience."""
    monkeypatch.setattr(checkpoint_writer, "_HURRIED_SECONDS", 0.1)
    one = writer(tmp_path, [], 0, 2, patience_seconds=600)
    submit(one, 1, lambda number: number % 2 == 0)
    one.shorten_patience()
    with pytest.raises(DiskError, match="the share of rank 1 did not appear"):
        one.close()


class Disk:
    """Stands for `save_file` on a disk that may be full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.full, self._error, self._real = True, error, safetensors.torch.save_file
        monkeypatch.setattr(checkpoint_format, "save_file", self.save)
        monkeypatch.setattr(checkpoint_writer, "save_file", self.save)

    def save(self, tensors: Any, path: Path, **options: Any) -> None:
        self._real(tensors, path, **options)
        if self.full:
            path.write_bytes(path.read_bytes()[:50])
            raise self._error


ERRORS = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("error", ERRORS)
def test_a_full_disk_costs_a_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    told: list[str] = []
    checkpoint.write(tmp_path, make_snapshot(1))
    disk = Disk(monkeypatch, error)
    one = writer(tmp_path, told, retention=Retention(keep_last=1))
    submit(one, 2)
    submit(one, 3)  # waits for the one before
    assert "step-00000002: not saved" in told[0]
    assert "No space left on device" in told[0]
    assert "free space and run the same command again" in told[0]
    disk.full = False
    submit(one, 4)
    submit(one, 5)
    one.close()  # what failed before does not count any more
    assert len(told) <= 2  # the second may have met the disk when it was free again
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000005"]


@pytest.mark.parametrize("error", ERRORS)
def test_a_full_disk_at_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    checkpoint.write(tmp_path, make_snapshot(1))
    Disk(monkeypatch, error)
    one = writer(tmp_path, [], retention=Retention(keep_last=1))
    submit(one, 2)
    with pytest.raises(DiskError, match="step-00000002: not saved"):
        one.close()
    assert same(checkpoint.load(tmp_path / "step-00000001"), make_snapshot(1))  # not let go for one that failed
    assert {path.name for path in tmp_path.iterdir()} == {"LATEST", "step-00000001"}


def test_a_share_that_cannot_be_written_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 does not wait for it with all its patience; the next checkpoint finds the disk free."""
    told: list[str] = []
    disk = Disk(monkeypatch, ERRORS[1])
    ranks = [writer(tmp_path, told, rank, 2, patience_seconds=600) for rank in range(2)]
    for step in (1, 2):
        for rank in (1, 0):
            submit(ranks[rank], step, lambda number, rank=rank: number % 2 == rank)
            ranks[rank].wait()
        disk.full = False
    for one in ranks:
        one.close()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000002"]
    assert "rank 1 could not write its share" in told[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000002"]


@pytest.mark.parametrize("name", ["step-00000002", "share-00001.safetensors", "LATEST"])
def test_a_renaming_whose_answer_is_lost_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As by a network file system that is asked twice: there is nothing to warn of."""
    monkeypatch.setattr(os, "replace", lose_renames({name: "the answer"}))
    told: list[str] = []
    ranks = [writer(tmp_path, told, rank, 2) for rank in range(2)]
    for rank in (1, 0):
        submit(ranks[rank], 2, lambda number, rank=rank: number % 2 == rank)
        ranks[rank].close()
    assert told == []
    assert checkpoint.newest_verified(tmp_path, told.append) == tmp_path / "step-00000002"
    assert (tmp_path / "LATEST").read_text() == "step-00000002\n"


def test_a_renaming_that_is_lost_costs_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told like a full disk; the one before it is kept for it."""
    monkeypatch.setattr(os, "replace", lose_renames({"step-00000002": "the renaming"}))
    told: list[str] = []
    one = writer(tmp_path, told, retention=Retention(keep_last=1))
    for step in (1, 2):
        submit(one, step)
        one.wait()
    assert "step-00000002: not saved ([Errno 5] its renaming was lost" in told[0]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]
    submit(one, 3)
    one.close()
    assert len(told) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"LATEST", "step-00000003"}


def test_three_failures_in_a_row_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    Disk(monkeypatch, ERRORS[0])
    one = writer(tmp_path, told)
    for step in (1, 2, 3):
        assert one.failure is None
        submit(one, step)
        assert not one.busy(20)
    assert isinstance(one.failure, DiskError)
    assert "step-00000003: not saved" in str(one.failure)
    assert len(told) == 3


def test_a_late_share_does_not_meet_another_try_at_its_step(tmp_path: Path) -> None:
    """Rank 1 was too slow; after a rollback the same step comes again, and its old share is there first."""
    ranks = [writer(tmp_path, [], rank, 2, patience_seconds=0.1) for rank in range(2)]
    submit(ranks[0], 3, lambda number: number % 2 == 0)
    assert not ranks[0].busy(20)
    other = make_snapshot(9)._replace(state=make_state(3))
    for rank, one in enumerate(ranks):
        one._options = replace(one._options, patience_seconds=20.0)
        if rank:
            submit(one, 3, lambda number: number % 2 == 1)  # of the first try
            one.wait()
    parts = fragments_of(other, lambda size: [size // 3, size // 2])
    for rank, one in enumerate(ranks):
        one.submit(other.state, parts[rank::2], SHAPES, other.config_yaml)
    for one in ranks:
        one.close()
    assert same(checkpoint.load(tmp_path / "step-00000003"), other)


def test_another_start_of_the_run_does_not_meet_old_shares(tmp_path: Path) -> None:
    submit(writer(tmp_path, [], 1, 2, token="old"), 3, lambda number: number % 2 == 1)
    one = writer(tmp_path, [], 0, 2, patience_seconds=0.1, token="new")
    submit(one, 3, lambda number: number % 2 == 0)
    with pytest.raises(DiskError, match="the share of rank 1 did not appear"):
        one.close()


def test_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`submit` returns while the file is still being written; the next one waits for it."""
    release, real = threading.Event(), checkpoint.write

    def slow(*arguments: Any) -> Path:
        assert release.wait(10)
        return real(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write", slow)
    one = writer(tmp_path, [])
    submit(one, 1)
    assert checkpoint.list_checkpoints(tmp_path) == []
    threading.Timer(0.1, release.set).start()
    submit(one, 2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]
    one.close()
    assert len(checkpoint.list_checkpoints(tmp_path)) == 2


# The command


def test_the_command_lists_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def called(path: Path) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["checkpoint", str(path)])
        code = main()
        output = capsys.readouterr()
        return code, (output.out + output.err).splitlines()

    assert called(tmp_path)[0] == 64
    for step in (1, 2):
        checkpoint.write(tmp_path / "checkpoints", make_snapshot(step))
    code, lines = called(tmp_path)
    assert code == 0
    assert [line.split()[-1] for line in lines[:2]] == ["verified", "verified"]
    assert lines[2:] == [f"next: python -m pretrain.export {tmp_path} out/{tmp_path.name}"]
    (tmp_path / "checkpoints" / "step-00000001" / "notes").symlink_to("nowhere")
    assert called(tmp_path)[0] == 0
    flip(tmp_path / "checkpoints" / "step-00000002" / "optimizer.safetensors")
    code, lines = called(tmp_path / "checkpoints")
    assert code == 64
    assert lines[0].endswith("verified")
    assert "optimizer.safetensors: its checksum differs" in lines[1]
