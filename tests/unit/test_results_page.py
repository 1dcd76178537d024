"""The figures of docs/results.md, and of the pages beside it, are those that the runs left in benchmarks/results."""

import json
import runpy
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Any

import pytest

from tests.support import ROOT

RESULTS = ROOT / "benchmarks" / "results"
STUCK = runpy.run_path(str(ROOT / "benchmarks" / "stuck.py"))


def curve_rows(run: dict[str, Any]) -> Iterator[str]:
    for row in run["curve"]:
        tokens, loss = f"{row['tokens'] / 1e6:.1f} million", f"{row['mlm_loss']:.3f}"
        yield f"| {row['step']:,} | {tokens} | {loss} | {row['mlm_accuracy']:.1%} | {row['nsp_accuracy']:.1%} |"
    yield f"| guessing | | {run['frequencies_loss']:.3f} | | {run['majority_nsp_accuracy']:.1%} |"


def grammar_rows(run: dict[str, Any]) -> Iterator[str]:
    for name in ("all", "agreement", "morphology"):
        found = run["grammar"][name]
        cells = [f"{value:.1f} ± {error:.1f}" for value, error in (found["within_word_l2r"], found["frequencies"])]
        yield f"| {name} | {cells[0]} | {cells[1]} | {found['gain'][0]:+.1f} ± {found['gain'][1]:.1f} |"


def probe_rows(run: dict[str, Any]) -> Iterator[str]:
    for name, probe in run["probes"].items():
        last = probe["layers"][-1]
        random, (gain, low, high) = last["random"], last["gain"]
        cells = [f"{probe['majority']:.1f}", f"{last['model']:.1f}", f"{random[0]:.1f} ± {random[1]:.1f}"]
        yield f"| {name.upper()} | {' | '.join(cells)} | {gain:+.1f} ({low:+.1f} to {high:+.1f}) |"


def finetuned_rows(run: dict[str, Any]) -> Iterator[str]:
    for row in run["finetuned"]:
        cells = [f"{row[start]['mean']:.1f} ± {row[start]['std']:.1f}" for start in ("pretrained", "random")]
        yield f"| {row['task']} | {row['lr']} | {cells[0]} | {cells[1]} |"


def test_the_hour_of_one_core_is_its_run() -> None:
    run = json.loads((RESULTS / "mini_fast.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    for rows in (curve_rows, grammar_rows, probe_rows, finetuned_rows):
        expected = [*rows(run)]
        start = page.index(expected[0])
        assert page[start : start + len(expected)] == expected
        assert not page[start + len(expected)].startswith("|")


def films_rows(run: dict[str, Any]) -> Iterator[str]:
    for row in run["finetuned"]:
        mean, error = fmean(row["accuracy"]), stdev(row["accuracy"]) / len(row["accuracy"]) ** 0.5
        head = "[CLS]" if row["pooling"] == "cls" else "mean"
        yield f"| {row['encoder']} | {head} | {row['lr']} | {mean:.1f} ± {error:.1f} |"


def films_probes(run: dict[str, Any]) -> Iterator[str]:
    for probe in run["probes"]:
        gain, low, high = probe["gain"]
        told = f"{probe['model']:.1f} | {gain:+.1f} ({low:+.1f} to {high:+.1f})"
        yield f"| {probe['task'].upper()} | {probe['encoder']} | {told} |"


def test_the_films_are_their_runs() -> None:
    run = json.loads((RESULTS / "mini_films.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    page, hour = text.splitlines(), run["hour_seed_2"]
    assert f"seed 2: {hour['mlm_loss']:.3f} nats and {hour['mlm_accuracy']:.1%}" in " ".join(text.split())
    rows = [*films_rows(run)]
    assert page[(start := page.index(rows[0])) : start + len(rows)] == rows
    for row in films_probes(run):
        assert row in page


def test_the_disturbed_run_is_its_run() -> None:
    run = json.loads((RESULTS / "disturbed.json").read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    first, second, third = (kill["step"] for kill in run["kills"])
    assert f"at steps {first}, {second} and {third}," in page
    apart = max(abs(a - b) for a, b in zip(run["calm"], run["disturbed"], strict=True))
    assert apart <= run["largest_difference"] + 1e-5
    assert f"is {run['largest_difference']:.1e} nats" in page


SICK = {
    "fast-1": "left",
    "high": "trapped",
    "low": "slow",
    "repeat": "unlike",
    "leak": "unlike",
    "diverge": "diverged",
}


def sick_runs() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / "stuck.json").read_text(encoding="utf-8"))["runs"]
    return found


@pytest.mark.parametrize("run", sick_runs(), ids=lambda run: run["name"])
def test_the_doctor_knows_each_sick_run_and_its_page_says_how(run: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "stuck.md").read_text(encoding="utf-8")
    last = STUCK["verdicts"](run)[-1]
    assert last.state == SICK[run["name"]]
    tokens, held_out, training, _ = run["curve"][-1]
    cells = (run["told"], " ".join(f"`{word}`" for word in run["overrides"]), f"{tokens / 1e6:.2f} million")
    assert f"| {' | '.join(cells)} | {training:.2f} | {held_out:.2f} | {run['frequencies_loss']:.2f} |" in page
    assert f"{last.line}\n" in page


def test_the_seeds_with_the_bias_and_without_are_their_runs() -> None:
    page = (ROOT / "docs" / "stuck.md").read_text(encoding="utf-8")
    arms = json.loads((RESULTS / "stuck.json").read_text(encoding="utf-8"))["arms"]
    assert [len(arm["curves"]) for arm in arms] == [len(runs) for runs in STUCK["ARMS"].values()]
    for arm in arms:
        assert STUCK["told_ends"](arm) in page


def test_the_picture_of_the_sick_runs_is_drawn_from_their_figures() -> None:
    runs = sick_runs()
    assert [run["name"] for run in runs] == [*SICK]
    assert (ROOT / "docs" / "images" / "stuck.svg").read_text(encoding="utf-8") == STUCK["draw"](runs)
