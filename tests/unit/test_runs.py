"""Where runs stand, and the pages that are served of them: asked over HTTP as a browser does."""

import fcntl
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from cloze.errors import ExitCode, UserError
from pretrain.runs.__main__ import main
from pretrain.runs.server import Library, Server
from pretrain.telemetry.report import write_report
from pretrain.telemetry.standing import run_directories, standing_of
from tests.unit.test_report import EVIL, make_run

NOW = 1e9 + 100
STARTED = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW))


def run_of(directory: Path, *, ended: int | None = None, evaluation: dict[str, float] | None = None) -> Path:
    make_run(directory)
    environment = {"world_size": 1, "started": STARTED, "overrides": ["run=a b", "data.path=d"]}
    (directory / "environment.json").write_text(json.dumps(environment))
    if ended is not None:
        status = {"exit_code": ended, "step": 30, "time": NOW + 50}
        (directory / "status.json").write_text(json.dumps(status))
    if evaluation:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        lines[-1] = json.dumps(json.loads(lines[-1]) | evaluation)
        (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.mark.parametrize(
    ("code", "state"),
    [*((0, "finished"), (75, "stopped"), (70, "failed"), (71, "stuck"), (74, "out of disk"), (64, "refused"))],
)
def test_how_a_run_ended(tmp_path: Path, code: int, state: str) -> None:
    standing = standing_of(run_of(tmp_path / "a", ended=code))
    assert (standing.state, standing.step, standing.steps, standing.tokens) == (state, 30, 300, 192_000)
    assert standing.remaining_seconds is None
    again = "python -m pretrain.train 'run=a b' data.path=d"
    assert standing.command == (f"python -m pretrain.export {tmp_path / 'a'} out/a" if code == 0 else again)


def test_a_run_that_trains_holds_its_lock(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", ended=75)  # of an earlier start
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        standing = standing_of(run, now=1e9 + 30)
    assert standing.state == "running"
    assert standing.remaining_seconds == pytest.approx(270, abs=1)  # a second a step
    assert standing_of(run).state == "stopped"


def test_a_run_that_was_killed_left_no_word(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", ended=75)
    environment = json.loads((run / "environment.json").read_text())
    later = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW + 100))
    (run / "environment.json").write_text(json.dumps(environment | {"started": later}))
    assert standing_of(run, now=time.time() + 5000).state == "killed"
    assert standing_of(run).state == "running", "its lock may be another machine's: it spoke just now"


def test_what_a_person_should_do_now(tmp_path: Path) -> None:
    """A model that is to be trained on is not to be exported."""
    for number, (tokens, loss, words) in enumerate(
        [
            (100_000, 7.0, "train longer, with more steps: held-out MLM loss 7.000"),
            (50_000_000, 6.2, "on the plateau: "),
            (50_000_000, 9.0, "diverged: "),
            (50_000_000, 3.0, "export the model, then score or fine-tune it"),
        ]
    ):
        found = {"eval/frequencies_loss": 6.3, "train/mlm_loss": loss, "eval/mlm_loss": loss, "tokens": tokens}
        standing = standing_of(run_of(tmp_path / str(number), ended=0, evaluation=found))
        assert standing.advice.startswith(words)
        assert ("pretrain.export" in (standing.command or "")) == (loss == 3.0)


@pytest.mark.parametrize(
    ("found", "learning"),
    [
        ({"eval/mlm_loss": 3.0}, "off the plateau"),
        ({"eval/mlm_loss": 6.0}, "on the plateau"),
        ({"eval/mlm_loss": 9.0}, "diverged"),
        ({"eval/mlm_loss": 0.5}, "too good to be true"),
        ({"eval/mlm_loss": 9.0, "train/mlm_loss": 1.0}, "far better in training"),
        ({"eval/mlm_loss": 6.0, "tokens": 100}, ""),
        ({"train/loss": None}, "diverged"),
    ],
)
def test_what_its_losses_say(tmp_path: Path, found: dict[str, Any], learning: str) -> None:
    known = {"eval/frequencies_loss": 6.3, "train/mlm_loss": 6.0, "tokens": 50_000_000}
    run = run_of(tmp_path / "a", ended=0, evaluation=known | found)
    assert standing_of(run).learning == learning


def test_the_list_and_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path / "a", ended=0)
    run_of(tmp_path / "sweep" / "b", ended=75)
    (tmp_path / "sweep" / "b" / "config.yaml").write_text("steps: 300\nzero: 2\nmodel: {name: tiny, num_layers: 2}\n")
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "config.yaml").write_text("{}")
    assert run_directories(tmp_path) == [tmp_path / "a", tmp_path / "sweep" / "b"]
    assert main(["--root", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    rows = [re.split(r"\s{2,}", line) for line in printed.out.splitlines()]
    assert rows[0][:5] == ["run", "state", "step", "loss", "held-out"]
    assert rows[1][:5] == ["a", "finished", "30/300", "2.333", "3.250"]
    assert printed.err.startswith(f"2 runs in {tmp_path}; the newest: ")
    assert main(["list", "--json", "--root", str(tmp_path)]) == 0
    assert [one["state"] for one in json.loads(capsys.readouterr().out)] == ["finished", "stopped"]
    assert main(["--root", str(tmp_path), "diff", "a", "sweep/b"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["a", "b"], ["zero", "1", "2"]]
    assert main(["diff", "a", "c", "--root", str(tmp_path)]) == ExitCode.USAGE
    assert "c: no such run, neither there nor in" in capsys.readouterr().err
    assert main(["--root", str(tmp_path / "none")]) == ExitCode.USAGE


def test_a_finished_run_is_followed_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "a", ended=75)
    assert main(["follow", str(run)]) == 0
    printed = capsys.readouterr()
    assert [line.split()[:2] for line in printed.out.splitlines()[:-1]] == [
        *(["step", "10"], ["step", "20"], ["step", "30"], ["eval", "30"])
    ]
    assert printed.out.splitlines()[-1] == "python -m pretrain.train 'run=a b' data.path=d"
    assert "stopped at step 30" in printed.err


# The server


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    root = tmp_path / "runs"
    run_of(root / "a", ended=0)
    run_of(root / f"b {EVIL.replace('/', '')}", ended=75)
    with Server(Library(root), "127.0.0.1", 0, None) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server, root
        server.shutdown()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, str]:
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request(method, path, headers={key.replace("_", "-"): value for key, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_pages_are_served_and_stay_fresh(served: tuple[Server, Path]) -> None:
    server, root = served
    answer, page = ask(server, "/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "default-src &#39;none&#39;" in page
    answer, text = ask(server, "/list")
    found = json.loads(text)
    assert sorted(one["name"] for one in found["runs"]) == sorted(path.name for path in run_directories(root))
    answer, page = ask(server, "/run?run=a")
    assert answer.status == 200
    assert 'data-live="/fresh?run=a"' in page
    answer, text = ask(server, "/fresh?run=a")
    fresh = json.loads(text)
    assert fresh["texts"]["0-state"] == "finished"
    assert ask(server, "/fresh?run=a", X_Etag=fresh["etag"])[0].status == 204
    with (root / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/mlm_loss": 1.5, "time": 1000000040.0}\n{"step": 50, "trai')
        file.flush()
        answer, text = ask(server, "/fresh?run=a", X_Etag=fresh["etag"])
    assert answer.status == 200
    assert json.loads(text)["texts"]["0-step"] == "40 of 300"
    assert json.loads(text)["texts"]["0-training MLM loss"] == "1.500"
    answer, page = ask(server, "/run?run=a&run=b%20%3Cscript%3Ealert(%22x%22)%3Cscript%3E%26")
    assert answer.status == 200
    assert page.count("<script") == 2


@pytest.mark.parametrize(
    "path",
    ["/run?run=..", "/run?run=../runs/a", "/run?run=/etc", "/run", "/run?run=zz", "/etc/passwd", "/fresh?run=.."],
)
def test_nothing_but_runs_is_served(served: tuple[Server, Path], path: str) -> None:
    assert ask(served[0], path)[0].status == 404


def test_it_only_reads_and_only_for_this_machine(served: tuple[Server, Path]) -> None:
    server, _ = served
    assert ask(server, "/", "POST")[0].status == 501
    assert ask(server, "/", "HEAD")[1] == ""
    assert ask(server, "/", Host="evil.example")[0].status == 403
    with pytest.raises(UserError, match=r"others could read the runs; add --token"):
        Server(Library(Path()), "0.0.0.0", 0, None)
    with pytest.raises(UserError, match=r"name another, or --port 0"):
        Server(Library(Path()), "127.0.0.1", server.server_address[1], None)


def test_a_token_is_asked_for_once(tmp_path: Path) -> None:
    run_of(tmp_path / "a", ended=0)
    with Server(Library(tmp_path), "127.0.0.1", 0, "s3cret") as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for path in ("/", "/list", "/run?run=a", "/?token=wrong"):
            assert ask(server, path)[0].status == 403
        answer, _ = ask(server, "/?token=s3cret")
        assert answer.status == 200
        cookie = answer.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert ask(server, "/list", Cookie=cookie.partition(";")[0], Host="far.example")[0].status == 200
        server.shutdown()


def test_hundreds_of_runs(tmp_path: Path) -> None:
    row = json.dumps({"step": 10, "train/loss": 2.0, "tokens": 5, "time": 1e9}) + "\n"
    for number in range(300):
        run = tmp_path / f"run-{number:04}"
        run.mkdir()
        (run / "config.yaml").write_text("steps: 100\n")
        (run / "metrics.jsonl").write_text(row)
    library = Library(tmp_path)
    assert len(library.standings()) == 300
    started = time.perf_counter()
    library._listed = (-9.0, [])
    assert len(library.standings()) == 300
    assert time.perf_counter() - started < 5


# A real browser, where there is one


BROWSER = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=1500", "--dump-dom"]


def browsed(address: str, width: int) -> str:
    """The page as a browser has it after its scripts. Nothing is complained of on its console."""
    command = [*BROWSER, f"--window-size={width},1200", "--enable-logging=stderr", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_chart(served: tuple[Server, Path]) -> None:
    page = browsed(f"http://127.0.0.1:{served[0].server_address[1]}/run?run=a", 1440)
    page = re.sub(r"(?s)<noscript>.*?</noscript>", "", page)  # without scripts the same stand there
    assert page.count("<figure>") == page.count("<svg") == 5
    assert 'aria-label="MLM loss"' in page
    assert page.count('class="line train"') >= 4
    listed = browsed(f"http://127.0.0.1:{served[0].server_address[1]}/", 1440)
    assert '<a href="/run?run=a">a</a>' in listed
    assert "&lt;script&gt;alert" in listed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_pointing_tells_the_figures_of_the_metrics(tmp_path: Path) -> None:
    """On a page as narrow as chromium's window can be: pointed at, and zoomed."""
    page = write_report([make_run(tmp_path / "a", steps=400)], tmp_path / "r.html").read_text()
    page = re.sub(r"<meta http-equiv[^>]*>", "", page)  # it would not let the script run that plays the person
    person = """<script>
      const figure = document.querySelector("figure"), told = document.body.dataset;
      const point = (kind, share) => { const svg = figure.querySelector("svg"), area = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent(kind, { bubbles: true, pointerType: "mouse",
          clientX: area.left + share * area.width, clientY: area.top + 50 })); };
      const ticks = () => [...figure.querySelectorAll("svg text.tick")].map((each) => each.textContent).join("|");
      point("pointermove", 0.99);
      told.tip = document.getElementById("tip").textContent.replaceAll("\\n", "; ");
      told.before = ticks();
      point("pointerdown", 0.4); point("pointermove", 0.6); point("pointerup", 0.6);
      told.zoomed = ticks();
    </script></body>"""
    (tmp_path / "played.html").write_text(page.replace("</body>", person))
    found = browsed((tmp_path / "played.html").as_uri(), 500)
    data = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", found)[0]))  # type: ignore[index]
    assert data["tip"] == "step 400; training  0.15; held-out  3.25"
    assert data["before"] != data["zoomed"]
