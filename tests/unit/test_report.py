"""The report page: parsed as a browser would, held against the metrics it was made from."""

import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloze.errors import UserError
from pretrain.report import main
from pretrain.telemetry.report import Table, duration, read_run, thinned, write_report

VOID = {"meta", "br", "link", "img"}
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
    assert "script" not in page.tags
    assert all(reference.startswith("#") for reference in page.references), "nothing may be fetched"
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(page.ids) == len(set(page.ids)), "ids of several SVGs must not meet"
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    for expected in (
        EVIL, "plain", "Predictions & more", "<ol>", "guess", "30 of 300", "1,920", "192,000", "7.000 → 2.333",
        "14.000 → 4.667",
        "3.250", "6.500", "25.0%", "2 x CPU", "20 s", "tiny: 2 layers",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "NSP" not in page.text, "no curve and no line for what was not logged"
    assert text.count("<svg") == 5
    assert "#010203" not in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


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
    assert found.count("<svg") == plain.count("<svg") + 1  # NSP accuracy, which val has not


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / "demo"), make_run(tmp_path / "b" / "demo")]
    text = Page(write_report(runs, tmp_path / "r.html").read_text()).text
    assert str(runs[0]) in text
    assert str(runs[1]) in text


def test_curves_over_tokens(tmp_path: Path) -> None:
    """As two runs with different batches want to be compared."""
    run = make_run(tmp_path / "a")
    assert main([str(run), "--x", "tokens", "--out", str(tmp_path / "r.html")]) == 0
    text = Page((tmp_path / "r.html").read_text()).text
    assert re.search(r"^ *tokens$", text, re.MULTILINE)
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
    plain = write_report([make_run(tmp_path / "c"), make_run(tmp_path / "d")], tmp_path / "plain.html").read_text()
    drawn = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "drawn.html").read_text()
    assert drawn.count("<svg") == plain.count("<svg") + 2
    assert "model.dropout as it was set" in Page(drawn).text
    assert "optim.lr as it was set" in Page(drawn).text
    assert "nsp_weight as it was set" not in Page(drawn).text
