"""Weights & Biases: what a run sends there, and what it does where that is not answered.

Whatever goes wrong is raised, for `HarmlessSink`, or told in one line. Training waits `_INIT_SECONDS` for it at the
start and `_FINISH_SECONDS` at the end, never in between: W&B's own process sends what lies in the run's directory. What
it could not send stays there, for `wandb sync`. WANDB_* variables mean what W&B says; what the configuration names
comes first.
"""

import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from cloze.errors import ORDERLY_ENDS, ExitCode
from cloze.files import write_whole
from cloze.log import log
from cloze.redact import redact, redact_overrides, redact_text
from pretrain.config import WandbConfig, WandbMode
from pretrain.telemetry.harmless import Harmless, reason

WANDB_ID_NAME = "wandb_id"
AXES = ("samples", "tokens")  # what has been trained on, in every row: to draw other metrics over instead of steps

_DEFAULT_PROJECT = "cloze"
_INIT_SECONDS = 20.0  # then the run goes on offline
_FINISH_SECONDS = 20.0  # then what is not uploaded stays on disk: whoever preempts us kills after 30
_ARTIFACT_SECONDS = 1800.0
_DELETED = re.compile(r"(?i)\b409\b|previously created and deleted")


class Tracked(Protocol):
    """What W&B has to know of a configuration."""

    @property
    def run(self) -> str: ...

    @property
    def wandb(self) -> WandbConfig: ...


class RunId:
    """The id of a run in W&B: a checkpoint's, else the run directory's, else WANDB_RUN_ID, else a new one.

    The run directory keeps it, and behind it those that it has given up.
    """

    def __init__(self, folder: Path, from_checkpoint: str | None = None) -> None:
        """Raises `OSError`."""
        self._path = folder / WANDB_ID_NAME
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        words = [word for word in text.split() if re.fullmatch(r"[\w-]{1,128}", word)]
        kept, self._given_up = (words[0], words[1:]) if words else ("", [])
        if from_checkpoint in self._given_up:
            from_checkpoint = None
        self.value = from_checkpoint or kept or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        if self.value != kept:
            self._keep()

    def renew(self) -> None:
        """Give it up for a new one. Raises `OSError`."""
        self._given_up = [self.value, *self._given_up]
        self.value = secrets.token_hex(4)
        self._keep()

    def _keep(self) -> None:
        write_whole(self._path, "".join(f"{word}\n" for word in (self.value, *self._given_up)).encode())


class WandbSink:
    """One W&B run.

    The step is sent as a metric of that name, with every other one drawn over it: W&B refuses its own step to fall,
    which a resume from a checkpoint needs. Offline segments of one run do not join: each starts with the rows of the
    `history` before it, so that the newest one is the whole run; so does a run whose predecessor was deleted there.
    """

    def __init__(
        self,
        config: Tracked,
        run_dir: Path,
        run_id: RunId,
        resolved: Mapping[str, Any],
        history: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._run: Any = None
        self._run_dir, self._artifact, self._listener = run_dir, config.wandb.artifact, _Listener(self._told)
        self._evaluation: dict[str, Any] = {}  # the newest
        self._closing = False
        mode, known = wandb_mode(config), run_id.value
        if mode == "disabled":
            return
        if mode == "online":
            start = lambda: _start("online", config, run_dir, run_id.value, resolved, self._listener)  # noqa: E731
            self._go_online(start, run_id)
            if self._run is None:
                _wandb().teardown()  # frees the run id that the failed attempt holds
                mode = "offline"
        self._offline = mode == "offline"
        if self._offline:
            self._run = _start("offline", config, run_dir, run_id.value, resolved, self._listener)
            self._log_sync_command()  # a run that is killed says nothing at its end
        for axis in ("step", *AXES):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="step")
        for row in history if self._offline or run_id.value != known else ():
            self._run.log({key: value for key, value in row.items() if value is not None and key != "time"})

    def _go_online(self, start: Callable[[], Any], run_id: RunId) -> None:
        """Reach W&B, with a new id where it has a run of this one no more. Or say why not."""
        faults: list[BaseException] = []
        with Harmless(faults.append):
            self._run = start()
        if faults and _DELETED.search(str(faults[0])):
            old = run_id.value
            run_id.renew()
            log.info(
                f"W&B: run {old} was deleted there; this one goes on as {run_id.value}, with all that it has logged"
            )
            faults.clear()
            with Harmless(faults.append):
                self._run = start()
        if self._run is None:
            log.info(f"W&B: not reached ({reason(faults[0])}); the run is kept on disk")
        else:
            log.info(f"W&B: {self._run.url}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is None:
            return
        self._run.log({**metrics, "step": step})
        if evaluation := {key: value for key, value in metrics.items() if key.startswith("eval/")}:
            same = self._evaluation if self._evaluation.get("step") == step else {}  # of one step there may be two
            axes = {key: metrics[key] for key in AXES if key in metrics}
            self._evaluation = {**same, "step": step, **axes, **evaluation}

    def rollback(self, step: int) -> None:
        """Nothing: our own step axis may fall."""

    def close(self, exit_code: int) -> None:
        if self._run is None:
            return
        if exit_code not in ORDERLY_ENDS:
            _alert(self._run, self._run_dir, f"exit code {exit_code}, see {self._run_dir}")
        if self._evaluation:
            rows = [[key, float(value)] for key, value in self._evaluation.items()]
            table = _wandb().Table(columns=["metric", "value"], data=rows)
            self._run.log({"step": self._evaluation["step"], "final_evaluation": table})
        latest = self._run_dir / "checkpoints" / "LATEST"
        if self._artifact and latest.exists():
            self._send(latest.parent / latest.read_text().strip())
        self._closing, sent = True, not self._offline
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            sent = False
        if not sent or self._listener.refused:
            self._log_sync_command()

    def _send(self, checkpoint: Path) -> None:
        """Send a checkpoint as an artifact, and wait for that where anybody takes it."""
        name = f"{self._run_dir.name}-checkpoint"
        sending = self._run.log_artifact(str(checkpoint), name=name, type="checkpoint")
        if not self._offline and not self._listener.waiting and not self._listener.refused:
            with Harmless(lambda error: log.info(f"W&B: {checkpoint} was not sent ({reason(error)})")):
                sending.wait(timeout=_ARTIFACT_SECONDS)

    def _told(self, what: str) -> None:
        if not self._closing:  # then the command that sends it says enough
            log.info(f"W&B: {what}; training goes on, and what is not sent lies in {self._run_dir / 'wandb'}")

    def _log_sync_command(self) -> None:
        flag = "" if self._offline else "--include-online "  # of which it thinks that they are sent
        log.info(f"W&B: send this run with  wandb sync {flag}{Path(self._run.dir).parent}")


class _Listener:
    """Hears what W&B would print, which is silent otherwise, and tells of each kind of fault once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.refused = self.waiting = False  # W&B sends no more; it has tried in vain and tries again

    def info(self, text: str) -> None:
        if not self.waiting and re.search(r"(?i)retrying|retry loop", text):
            self.waiting = True
            self._tell(f"does not answer as it should ({_plain(text)}), and is tried again")

    def warning(self, text: str) -> None:
        if not self.refused and "wandb sync" in text:
            self.refused = True
            self._tell(f"takes no more of this run (W&B says: {_plain(text)})")

    error = warning


def _plain(text: str) -> str:
    """The first sentence of what W&B says, without its prefixes."""
    words = re.sub(r"(?m)^(?:wandb: )?(?:WARNING |ERROR )?", "", text).split()
    return redact_text(re.split(r"(?<=[.!]) ", " ".join(words))[0].rstrip(".!"))


def raise_alert(config: Tracked, run_dir: Path, story: str) -> None:
    """Alert of a run that ended while nobody in it could: rank 0 was killed, or hung. Never raises.

    Nothing where W&B is not reached: an alert that waits on a disk warns nobody.
    """
    with Harmless(lambda error: log.info(f"W&B: no alert was sent ({reason(error)})")):
        known = (run_dir / WANDB_ID_NAME).exists()
        if config.wandb.mode is not WandbMode.disabled and known and wandb_mode(config) == "online":
            run = _start("online", config, run_dir, RunId(run_dir).value, {}, _Listener(lambda _: None))
            _alert(run, run_dir, story)
            run.finish(exit_code=ExitCode.FAILED)


def wandb_mode(config: Tracked) -> str:
    """online, offline or disabled: as the configuration says; under `auto` as W&B's own variables and settings do."""
    mode = config.wandb.mode
    if mode is WandbMode.auto and os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    wandb = _wandb()
    if mode in (WandbMode.disabled, WandbMode.offline):
        return str(mode.value)
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if mode is WandbMode.auto:  # also `wandb offline`, which writes a file
        known = {"dryrun": "offline", "offline": "offline", "disabled": "disabled"}.get(settings.mode)
        if known:
            return known
    settings.mode = "online"  # else no key would be looked for
    if wandb.login(prompt=False, verify=False):
        return "online"
    log.info(
        f"W&B: no API key on {socket.gethostname()}, so the run is kept on disk (`wandb login` there first sends it "
        "online)"
    )
    return "offline"


def _wandb() -> Any:
    try:
        import wandb  # an optional extra, and seconds to import
    except ImportError:
        raise RuntimeError("not installed (pip install 'cloze[wandb]')") from None
    return wandb


def _start(
    mode: str, config: Tracked, run_dir: Path, run_id: str, resolved: Mapping[str, Any], listener: _Listener
) -> Any:
    wandb = _wandb()
    limits = {"init_timeout": _INIT_SECONDS, "finish_timeout": _FINISH_SECONDS}
    settings = wandb.Settings(
        silent=True,
        console="off",
        finish_timeout_raises=True,
        **{key: value for key, value in limits.items() if f"WANDB_{key.upper()}" not in os.environ},
    )
    wandb.termsetup(settings, listener)
    own = config.wandb
    with _redacted_argv():
        return wandb.init(
            mode=mode,
            project=own.project or os.environ.get("WANDB_PROJECT") or _DEFAULT_PROJECT,
            entity=own.entity,
            name=os.environ.get("WANDB_NAME") or config.run,
            tags=[redact_text(tag) for tag in own.tags] or None,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=redact(resolved),
            settings=settings,
        )


def _alert(run: Any, run_dir: Path, text: str) -> None:
    run.alert(title=f"{run_dir.name} failed", text=redact_text(text))


@contextmanager
def _redacted_argv() -> Iterator[None]:
    """W&B stores the command line in plain text."""
    original = sys.argv
    sys.argv = [original[0], *redact_overrides(original[1:])]
    try:
        yield
    finally:
        sys.argv = original
