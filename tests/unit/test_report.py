"""The report page: parsed as a browser would, held against the metrics it was made from."""

import base64
import hashlib
import json
import math
import re
import shutil
import statistics
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloze import cli
from cloze.errors import UserError
from pretrain.config import TrainConfig, as_data
from pretrain.report import main
from pretrain.telemetry import report
from pretrain.telemetry.charts import Lines, as_script, chart_data, training_seconds
from pretrain.telemetry.metrics_file import MetricsFile
from pretrain.telemetry.predictions import Gap, Guess, read_predictions, write_gaps, write_guesses
from pretrain.telemetry.recipes import differences
from pretrain.telemetry.report import (
    RunData,
    Table,
    duration,
    read_run,
    run_facts,
    thinned,
    told_mixture,
    write_report,
)

VOID = {"meta", "br", "link", "img", "input"}
EVIL = '<script>alert("x")</script>&'


class Page(HTMLParser):
    """Tags, ids, references and text of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open_tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make_run(directory: Path, steps: int = 30, scale: float = 1.0) -> Path:
    directory.mkdir(parents=True)
    rows = []
    for step in range(10, steps + 1, 10):
        row = {
            "step": step,
            "train/loss": scale * 70 / step,
            "train/mlm_loss": None if step == 20 else scale * 60 / step,
            "train/lr": 1e-4,
            "throughput/tokens_per_second": 100.0 * step,
            "samples": step * 64,
            "tokens": step * 6400,
            "time": 1e9 + step,
        }
        rows.append(row | ({"eval/mlm_loss": scale * 3.25, "eval/mlm_accuracy": 0.25} if step == steps else {}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "config.yaml").write_text(
        f"run: '{EVIL}'\nsteps: 300\nmodel: {{name: tiny, num_layers: 2}}\nzero: 1\n"
    )
    (directory / "environment.json").write_text(json.dumps({"world_size": 2, "gpus": [], "host": EVIL}))
    return directory


def test_one_self_contained_page_over_two_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / EVIL.replace("/", "")), make_run(tmp_path / "b" / "plain", scale=2)]
    out = write_report(runs, tmp_path / "deep" / "r.html", [Table("Predictions & more", ("<ol>",), [("guess",)])])
    text = out.read_text()
    page = Page(text)
    assert text.count("<script") == 2, "ours, and its data"
    assert page.references == [], "nothing may be fetched"
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\s\"'<]+", text)
    assert len(text) < 500_000
    for expected in (
        EVIL, "plain", "Predictions & more", "<ol>", "guess", "30 of 300", "1,920", "192,000", "7.000 → 2.333",
        "14.000 → 4.667",
        "3.250", "6.500", "25.0%", "2 x CPU", "20 s", "tiny: 2 layers",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "NSP" not in text.partition("<script>")[0], "no curve and no line for what was not logged"
    assert {chart["title"] for chart in data_of(text)["charts"]} == {
        *("MLM loss", "MLM accuracy", "Total loss", "Learning rate", "Throughput")
    }
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def data_of(text: str) -> dict[str, Any]:
    """What the script of a page draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    body: dict[str, Any] = json.loads(found[1])
    return body


def lines_of(text: str, title: str) -> dict[str, tuple[list[float], list[float]]]:
    """Name of a line: (steps, values)."""
    data = data_of(text)
    (chart,) = [chart for chart in data["charts"] if chart["title"] == title]
    return {one["name"]: (data["grids"][one["grid"]].get("step"), one["y"]) for one in chart["series"]}


def test_readers_without_scripts_see_every_chart(tmp_path: Path) -> None:
    text = write_report([make_run(tmp_path / "a", steps=400)], tmp_path / "r.html").read_text()
    drawn = text.partition("<noscript>")[2].partition("</noscript>")[0]
    assert drawn.count("<svg") == len(data_of(text)["charts"])
    assert drawn.count('<path class="line') == sum(len(chart["series"]) for chart in data_of(text)["charts"])
    assert "NaN" not in drawn
    assert "nan" not in drawn


def test_what_came_of_a_number_that_was_varied_is_drawn(tmp_path: Path) -> None:
    """A run that diverged is no dot."""
    runs = [make_run(tmp_path / name, scale=scale) for name, scale in (("a", 1), ("b", 2), ("c", 3))]
    for run, rate in zip(runs, ("0.001", "0.0001", "0.1"), strict=True):
        (run / "config.yaml").write_text(f"run: {run.name}\nsteps: 300\noptim: {{lr: {rate}}}\n")
    rows = (runs[2] / "metrics.jsonl").read_text().replace('"eval/mlm_loss": 9.75', '"eval/mlm_loss": null')
    (runs[2] / "metrics.jsonl").write_text(rows)
    text = write_report(runs, tmp_path / "r.html").read_text()
    section = text.partition("What came of it")[2].partition("Curves")[0]
    assert "held-out MLM loss<small> by optim.lr</small>" in section
    assert sorted(re.findall(r">(a|b|c)</text>", section)) == ["a", "b"]
    assert "7.000 → 2.333" in text


def test_only_its_own_script_may_run(tmp_path: Path) -> None:
    text = write_report([make_run(tmp_path / "a")], tmp_path / "r.html").read_text()
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    told = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{told}&#39;; connect-src &#39;none&#39;" in text


def test_figures_are_those_of_the_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=60)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = write_report([run], tmp_path / "r.html").read_text()
    steps, losses = lines_of(text, "MLM loss")["training"]
    assert steps == [row["step"] for row in rows]
    assert losses == [pytest.approx(row["train/mlm_loss"], rel=1e-4) if row["train/mlm_loss"] else None for row in rows]
    assert lines_of(text, "MLM loss")["held-out"] == ([60], [3.25])


def test_a_spike_shows_however_long_the_run(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": 9e9 if step == 4321 else 2.0, "time": 1e9 + step} for step in range(5000)]
    data = chart_data([Lines("a", rows, {})])
    (line,) = data["charts"][0]["series"]
    assert len(line["y"]) <= 500
    assert max(line["high"]) == 9e9
    assert min(line["low"]) == 2.0
    assert len(as_script(chart_data([Lines(str(i), rows, {}) for i in range(8)]))) < 400_000


def test_marks_tell_where_a_run_was_resumed_changed_and_rolled_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=200)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[10:]:
        row["time"] += 7200
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "changes.jsonl").write_text('{"step": 100, "changed": {"optim.lr": ["1e-4", "5e-5"]}}\n{"st')
    (run / "metrics.rolled-back.jsonl").write_text('{"step": 150}\n{"step": 160}\n{"step": 155}\n')
    marks = data_of(write_report([run], tmp_path / "r.html").read_text())["marks"]
    told = {(mark["kind"], mark["step"]): mark["text"] for mark in marks}
    assert told["resume", 110] == "run: step 110: went on after 2.0 h"
    assert told["change", 100] == "run: step 100: changed: optim.lr 1e-4 → 5e-5"
    assert {step for kind, step in told if kind == "rollback"} == {150}
    assert training_seconds(rows)[-1] == 190, "the pause is no training"


def test_a_comparison_never_replaces_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", scale=2)]
    assert main([str(runs[0])]) == 0
    own = (runs[0] / "report.html").read_bytes()
    capsys.readouterr()
    assert main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'compared.html'}\n"
    assert main([*map(str, runs), "--out", str(runs[1] / "report.html")]) == 64
    assert (runs[0] / "report.html").read_bytes() == own


def test_keys_in_which_runs_differ_stand_in_a_table(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    (runs[1] / "config.yaml").write_text("run: b\nsteps: 300\nmodel: {name: mini, num_layers: 2}\nzero: 1\n")
    text = Page(write_report(runs, tmp_path / "r.html").read_text()).text
    section = text.partition("In what they differ")[2].partition("Curves")[0]
    assert section.split() == ["ab", "model.nametinymini"]


def test_two_runs_say_which_is_ahead_and_whether_that_counts(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", scale=2)]
    ahead = "a is ahead: held-out MLM loss 3.250, b 6.500"
    for config, rows, told in (
        ("seed: 2", 3, f"{ahead}They differ in their seeds alone."),
        ("zero: 2\noptim: {lr: 1}", 3, f"{ahead}They differ in optim.lr, zero."),
        ("zero: 2", 2, "They have seen different numbers of tokens"),
        ("data: {path: other}", 3, f"their losses do not compareBy them {ahead}."),
    ):
        (runs[0] / "config.yaml").write_text("steps: 300\nzero: 1\nseed: 1\ndata: {path: one}\noptim: {lr: 2}\n")
        changed = dict(line.split(": ", 1) for line in config.splitlines())
        lines = (runs[0] / "config.yaml").read_text().splitlines()
        own = [
            f"{key}: {changed.get(key, line.partition(': ')[2])}" for line in lines for key in [line.partition(":")[0]]
        ]
        (runs[1] / "config.yaml").write_text("\n".join(own))
        found = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
        found[-1]["tokens"] = 6400 * 10 * rows
        (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        text = Page(write_report(runs, tmp_path / "r.html").read_text()).text
        assert told in text.replace("\n", ""), told


def test_what_a_run_does_otherwise_than_its_recipe() -> None:
    plain = as_data(asdict(cli.compose("train", TrainConfig, ["run=r", "data.path=d", "recipe=fast"])))
    assert differences(plain) == ("fast", [])
    plain["optim"]["weight_decay"] = 0.5
    assert differences(plain) == ("fast", [("optim.weight_decay", "0.01", "0.5")])
    usual = as_data(asdict(cli.compose("train", TrainConfig, ["run=r", "data.path=d", "model=tiny", "seed=3"])))
    assert differences(usual) == (None, [("seed", "1", "3")])


def test_a_metrics_file_is_read_as_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole lines once, the newest again, in bounded memory; another file from its beginning."""
    monkeypatch.setattr("pretrain.telemetry.metrics_file._MOST_ROWS", 100)
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    assert (file.refresh(), file.rows) == (False, [])
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert (file.refresh(), file.rows) == (True, [{"step": 1, "a": 1}])
    path.write_text('{"step": 1, "a": 1, "eval/b": 2}\n{"step": 2, "a": 3}\n')
    assert file.refresh()
    assert file.rows == [{"step": 1, "a": 1, "eval/b": 2}, {"step": 2, "a": 3}]
    assert not file.refresh()
    with path.open("a") as more:
        for step in range(3, 5000):
            more.write(json.dumps({"step": step, "a": step} | ({"eval/b": step} if step % 250 == 0 else {})) + "\n")
    file.refresh()
    rows = file.rows
    assert len(rows) < 250
    assert rows[-1]["step"] == 4999
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert {row["step"] for row in rows if "eval/b" in row} == {1, *range(250, 5000, 250)}
    other = tmp_path / "other"
    other.write_text('{"step": 9}\n')
    other.replace(path)
    assert (file.refresh(), file.rows) == (True, [{"step": 9}])
    path.unlink()
    assert (file.refresh(), file.rows) == (True, [])


def test_predictions_over_time(tmp_path: Path) -> None:
    """Six evaluations side by side; what was told again counts; another text begins anew."""
    run = make_run(tmp_path / "run")
    assert read_predictions(run) == ([], [])
    gaps = [Gap("The cat", "on the mat .", "sat"), Gap(EVIL, "", "x")]
    write_gaps(run, gaps)
    write_gaps(run, gaps)
    for step in (10, 20, 30, 20):
        write_guesses(run, step, [Guess("sat" if step > 10 else "the", step / 100), Guess("y", 0.5)])
    with (run / "predictions.jsonl").open("a") as file:
        file.write('{"step": 40, "gue')
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 6
    assert [step for step, _ in read_predictions(run).guesses] == [10, 20]
    text = Page(write_report([run], tmp_path / "r.html").read_text()).text
    section = text.partition("What it would fill in")[2].partition("Summary")[0]
    assert 'data-step="step 10">the' in (tmp_path / "r.html").read_text(), "what a phone shows in the place of the head"
    assert " ".join(section.split()).startswith("held-out textstep 10step 20 The cat sat on the mat . the 10% sat 20%")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_s_arithmetic() -> None:
    """Round ticks; an axis that one diverged run does not take; means without a bias."""
    code = """
    const r = require(process.argv[1]);
    console.log(JSON.stringify([r.linearTicks(0, 100, 5), r.logTicks(0.01, 100), r.timeTicks(0, 7000, 3),
      r.domain([[3, 9], [2e5, 4e5]], false), r.domain([[0.5]], false), r.smoothed([1, null, 1], 0.9),
      r.nearest([1, 5, 9], 6),
      [r.short(1234567), r.short(4500), r.short(5e-4), r.short(5e-4, 0.002)], r.clock(7200)]))
    """
    script = Path(report.__file__).parent / "templates" / "report.js"
    done = subprocess.run(["node", "-e", code, str(script)], capture_output=True, text=True, check=True, timeout=60)
    linear, logarithmic, times, robust, flat, smooth, index, short, clock = json.loads(done.stdout)
    assert linear == [0, 20, 40, 60, 80, 100]
    assert logarithmic == [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
    assert times == [0, 3600]
    assert robust == pytest.approx([2.64, 9.36])
    assert flat[0] < 0.5 < flat[1]
    assert smooth == [1, None, 1]
    assert (index, short, clock) == (1, ["1.235M", "4,500", "5e-4", "0.0005"], "2 h")


def test_splits_with_names_stand_beside_val(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    plain = write_report([run], tmp_path / "plain.html").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[0] |= {"eval/news/mlm_loss": 5.5}
    rows[-1] |= {"eval/news/mlm_loss": 4.125, "eval/mail/nsp_accuracy": 0.75}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(run, "run").named("eval/mlm_loss") == ["eval/news/mlm_loss"]
    assert read_run(run, "run").named("train/mlm_loss") == []
    found = write_report([run], tmp_path / "r.html").read_text()
    text = Page(found).text
    for expected in ("held-out MLM loss, news", "5.500 → 4.125", "held-out NSP accuracy, mail", "75.0%"):
        assert expected in text, expected
    assert lines_of(found, "MLM loss")["held-out, news"] == ([10, 30], [5.5, 4.125])
    assert "NSP accuracy" not in plain
    assert list(lines_of(found, "NSP accuracy")) == ["held-out, mail"]  # which val has not


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / "demo"), make_run(tmp_path / "b" / "demo")]
    text = Page(write_report(runs, tmp_path / "r.html").read_text()).text
    assert str(runs[0]) in text
    assert str(runs[1]) in text


def test_curves_over_tokens(tmp_path: Path) -> None:
    """As two runs with different batches want to be compared."""
    run = make_run(tmp_path / "a")
    assert main([str(run), "--x", "tokens", "--out", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert 'data-axis="tokens"' in text
    assert data_of(text)["grids"][0]["tokens"] == [64_000, 128_000, 192_000]
    assert data_of(text)["grids"][0]["seconds"] == [0, 10, 20]
    assert read_run(run, "a").series("train/lr", "tokens") == ([64_000, 128_000, 192_000], [1e-4] * 3)
    assert read_run(run, "a").series("eval/mlm_loss", "tokens") == ([192_000], [3.25])
    assert main([str(run), "--x", "epochs"]) == 64


def test_null_is_a_gap_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')
    steps, values = read_run(run, "a").series("train/mlm_loss")
    assert steps == [10, 20, 30]
    assert values[0] == 6.0
    assert math.isnan(values[1])


def test_a_run_without_metrics_is_one_line_and_exit_64(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (tmp_path / "absent", tmp_path):
        assert main([str(run)]) == 64
        printed = capsys.readouterr()
        assert re.fullmatch(rf"error: {re.escape(str(run))}/metrics.jsonl: no metrics in it; [^\n]*\n", printed.err)
        assert printed.out == ""
    assert main([]) == 64
    run = make_run(tmp_path / "a")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml or environment.json is damaged"):
        read_run(run, "a")


def test_the_page_lands_in_the_first_run_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    (run / "config.yaml").unlink()
    (run / "environment.json").unlink()
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    Page((run / "report.html").read_text())


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), max_size=2500))
def test_thinned_curves_are_means_of_neighbours(values: list[float]) -> None:
    steps = list(range(0, 10 * len(values), 10))
    thin_steps, thin_values = thinned(steps, values)
    assert len(thin_steps) == len(thin_values) <= 1000
    assert thin_steps[-1:] == steps[-1:]
    size = max(1, math.ceil(len(values) / 1000))
    for i, value in enumerate(thin_values):
        part = [v for v in values[i * size : (i + 1) * size] if not math.isnan(v)]
        assert math.isnan(value) if not part else math.isclose(value, statistics.fmean(part), abs_tol=1e-6)


def test_durations_for_people() -> None:
    assert [duration(s) for s in (4.2, 185, 3720, 90000)] == ["4 s", "3 min 05 s", "1 h 02 min", "25 h 00 min"]


def test_curves_of_the_configuration_are_drawn(tmp_path: Path) -> None:
    """Of all runs that have one, in one chart a key; constant ones and other lists are none."""
    for name, text in (
        ("a", "model:\n  dropout: [[0, 0.1], [1, 0]]\nloss: {nsp_weight: [[0, 1], [1, 1]]}\nlog: {sinks: [x]}\n"),
        ("b", "optim: {lr: [geometric, [0, 1.0e-3], [1, 1.0e-5]]}\nmodel: {dropout: [[0, 0.3], [0.5, 0]]}\n"),
    ):
        (make_run(tmp_path / name) / "config.yaml").write_text(text)
    drawn = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "drawn.html").read_text()
    charts = {chart["title"]: chart for chart in data_of(drawn)["charts"] if chart.get("axis") == "share"}
    assert [*charts] == ["model.dropout as it was set", "optim.lr as it was set"]
    first, second = charts["model.dropout as it was set"]["series"]
    assert (first["y"][0], first["y"][-1], second["y"][0], second["y"][-1]) == (0.1, 0, 0.3, 0)
    rows = [{"step": 300, "curves/model.dropout": 0.0}]
    for steps, there in ((300, False), (400, True)):
        found = chart_data([Lines("a", rows, {"steps": steps, "model": {"dropout": [[0, 0.1], [1, 0]]}})])
        assert ("model.dropout as it was set" in str(found)) == there, "what is past is drawn as it was trained"


def test_a_mixture_and_phases_are_told_without_folders() -> None:
    mixture = [{"path": "/home/me/en", "weight": 0.7}, {"path": "/home/me/de", "weight": [[0, 0.3], [1, 0.6]]}]
    phases = [{"from": 0.5, "data.path": "/home/me/long", "optim.lr": 1e-4}, {"from": 0.8, "data.mixture": mixture}]
    config = {"data": {"path": None, "mixture": mixture}, "phases": phases}
    run = RunData(
        label="r", directory=Path("r"), metrics=[{"step": 1}], config=config, config_yaml="", environment={}, told={}
    )
    facts = run_facts(run)
    assert facts["mixture"] == "en 0.7, de 0.3 → 0.6"
    assert facts["phases"] == "from 0.5: data.path long, optim.lr 0.0001; from 0.8: en 0.7, de 0.3 → 0.6"
    assert "corpus" not in facts
    by_size = {"data": {"mixture": [{"path": "a"}, {"path": "b"}], "temperature": 0.3}}
    assert told_mixture(by_size) == {"mixture": "a, b, by their samples to the power of 0.3"}
    assert told_mixture({"data": {"mixture": [{"of": "another version"}]}}) == {}
