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


def recipe_rows(runs: dict[str, Any]) -> Iterator[str]:
    for fast, plain in zip(*(runs[name]["curve"] for name in ("fast", "plain")), strict=True):
        cells = [
            f"{row['mlm_loss']:.3f} | {row['mlm_accuracy']:.1%} | {row['nsp_accuracy']:.1%}" for row in (fast, plain)
        ]
        yield f"| {fast['step']:,} | {fast['tokens'] / 1e6:.1f} million | {' | '.join(cells)} |"


def test_the_recipes_are_their_runs() -> None:
    runs = json.loads((RESULTS / "recipes.json").read_text(encoding="utf-8"))["runs"]
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    page, rows = text.splitlines(), [*recipe_rows(runs)]
    start = page.index(rows[0])
    assert page[start : start + len(rows)] == rows
    assert f"{runs['fast']['minutes']} and {runs['plain']['minutes']} minutes" in text
    apart = runs["plain"]["curve"][-1]["mlm_loss"] - runs["fast"]["curve"][-1]["mlm_loss"]
    assert f"**{apart:.2f} nats" in text
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    fast, plain = (runs[name]["curve"][-1] for name in ("fast", "plain"))
    assert f"{fast['mlm_loss']:.2f} nats and {fast['mlm_accuracy']:.0%} of the masked words" in readme
    assert f"without its curriculum {plain['mlm_loss']:.2f} and {plain['mlm_accuracy']:.0%};" in readme


def interval(gain: list[float]) -> str:
    return f"{gain[0]:+.1f} ({gain[1]:+.1f} to {gain[2]:+.1f})"


def beyond_the_loss(plain: dict[str, Any], fast: dict[str, Any], films: dict[str, Any]) -> Iterator[str]:
    """Grammar and frozen probes of the plain run beside those of the fast one with the same seed."""
    for name in ("all", "agreement", "morphology"):
        ours, theirs = fast["grammar"][name], plain["grammar"][name]
        pairs = (ours["within_word_l2r"], theirs["score"], ours["gain"], theirs["gain"])
        told = [f"{value:{'+' if number > 1 else ''}.1f} ± {error:.1f}" for number, (value, error) in enumerate(pairs)]
        yield f"| BLiMP, {name} | {' | '.join(told)} |"
    hour = {one["task"]: one for one in films["probes"] if one["encoder"] == "the hour of one core"}
    for name, theirs in plain["probes"].items():
        own = fast["probes"]
        ours = own[name]["layers"][-1] if name in own else hour[name.lower().replace("-", "")]
        gains = f"{interval(ours['gain'])} | {interval(theirs['gain'])}"
        yield f"| frozen, {name} | {ours['model']:.1f} | {theirs['model']:.1f} | {gains} |"


def test_the_plain_run_knows_what_its_page_says() -> None:
    names = ("mini_plain", "mini_seed_2", "mini_films")
    plain, *others = (json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert "\n".join(beyond_the_loss(plain, *others)) in page
    scores = plain["sst2"]["accuracy"]
    assert f"plain has {fmean(scores):.1f} ± {stdev(scores) / len(scores) ** 0.5:.1f}," in " ".join(page.split())


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


def both_seeds_rows(first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    for name in ("all", "agreement", "morphology"):
        own = [run["grammar"][name] for run in (first, second)]
        cells = [f"{one['within_word_l2r'][0]:.1f} ± {one['within_word_l2r'][1]:.1f}" for one in own]
        cells += [f"{one['gain'][0]:+.1f} ± {one['gain'][1]:.1f}" for one in own]
        yield f"| {name} | {' | '.join(cells)} |"


def both_ends_rows(run: dict[str, Any]) -> Iterator[str]:
    """Of each probe the last layer and random weights there, and the gains of the last layer and of the embeddings."""
    for name, probe in run["probes"].items():
        first, last = probe["layers"][0], probe["layers"][-1]
        gains = [f"{gain:+.1f} ({low:+.1f} to {high:+.1f})" for gain, low, high in (last["gain"], first["gain"])]
        cells = [
            f"{probe['majority']:.1f}",
            f"{last['model']:.1f}",
            f"{last['random'][0]:.1f} ± {last['random'][1]:.1f}",
        ]
        yield f"| {name} | {' | '.join([*cells, *gains])} |"


def finetuned_means(run: dict[str, Any]) -> Iterator[str]:
    for row in run["finetuned"]:
        told = [f"{fmean(x):.1f} ± {stdev(x) / len(x) ** 0.5:.1f}" for x in (row["pretrained"], row["random"])]
        yield f"| {row['task']}, {row['examples']:,} examples | {row['score']} | {' | '.join(told)} |"


def test_the_second_seed_is_its_runs() -> None:
    first, second = (
        json.loads((RESULTS / f"mini_{name}.json").read_text(encoding="utf-8")) for name in ("fast", "seed_2")
    )
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    page, weak = text.splitlines(), second["tags_at_regularization_1"]
    assert f"at 1 it is {weak['model']:.1f} against {weak['random']:.1f}" in " ".join(text.split())
    assert f"{second['grammar']['cpu_seconds']} CPU seconds" in text
    for expected in ([*both_seeds_rows(first, second)], [*both_ends_rows(second)], [*finetuned_means(second)]):
        start = page.index(expected[0])
        assert page[start : start + len(expected)] == expected
        assert not page[start + len(expected)].startswith("|")


def continued_rows(run: dict[str, Any]) -> Iterator[str]:
    for row in run["rows"]:
        new, old = (f"{row[key]['mlm_loss']:.3f} / {row[key]['mlm_accuracy']:.1%}" for key in ("new", "old"))
        tokens = f"{row['tokens']:,}" if row["tokens"] else ""
        yield f"| {row['text']} | {row['encoder']} | {tokens} | {new} | {old} |"


def test_the_small_cases_of_going_on_are_their_runs() -> None:
    run = json.loads((RESULTS / "continued.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "continue.md").read_text(encoding="utf-8").splitlines()
    rows = [*continued_rows(run)]
    assert page[(start := page.index(rows[0])) : start + len(rows)] == rows
    assert not page[start + len(rows)].startswith("|")
    words = " ".join(" ".join(page).split())
    assert f"{run['least_cpu_seconds']:.0f} to {run['most_cpu_seconds']:.0f} CPU seconds" in words
    for text, loss in run["frequencies_loss"].items():
        assert f"{loss:.3f} for {text}" in words


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
