"""What a fine-tuning sends to TensorBoard and W&B, by the sinks of pretraining: nobody's fault there stops it.

Metrics bear their seed (`seed-1/train_loss`), over the optimizer steps of that seed.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloze.errors import ExitCode, UserError
from finetune.config import FinetuneConfig, facts
from pretrain.config import WandbConfig, WandbMode
from pretrain.telemetry.sinks import HarmlessSink, Sink, TensorBoardSink
from pretrain.telemetry.wandb_sink import RunId, WandbSink


@dataclass(frozen=True)
class _Tracked:
    """What W&B has to know."""

    run: str
    wandb: WandbConfig


class Tracker:
    """The trackers that a configuration asks for; perhaps none."""

    def __init__(self, config: FinetuneConfig, folder: Path) -> None:
        """They keep what they have on disk in `folder`. Raises `UserError` where one is asked for and not installed."""
        self._sinks: list[Sink] = []
        self._step = 0  # the newest
        lost = "metrics.json will have the scores"
        if os.environ.get("RANK", "0") != "0":  # of several: one tells
            return
        if config.log.tensorboard:
            make_board = lambda: TensorBoardSink(folder / "tensorboard", None)  # noqa: E731
            self._sinks.append(HarmlessSink("TensorBoard", make_board, lost))
        if config.wandb.mode is not WandbMode.disabled:
            tracked = _Tracked(Path(config.out).name, WandbConfig(**asdict(config.wandb), artifact=False))
            run_id = RunId(folder)  # an unfinished one goes on as the same
            make = lambda: WandbSink(tracked, folder, run_id, facts(config))  # noqa: E731
            self._sinks.append(HarmlessSink("W&B", make, lost))

    def log(self, seed: int, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers of one seed after `step` optimizer steps of it; what is no finite number is passed over."""
        numbers = {
            f"seed-{seed}/{name}": float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._step = step
        for sink in self._sinks:
            sink.log(step, numbers)

    def log_scores(self, seed: int, scores: Mapping[str, float]) -> None:
        """Those of a seed that is learned."""
        self.log(seed, self._step, scores)

    def close(self, exit_code: int) -> None:
        for sink in self._sinks:
            sink.close(exit_code)


@contextmanager
def tracking(config: FinetuneConfig, folder: Path) -> Iterator[Tracker]:
    """A tracker that is closed at the end, with how it ended."""
    tracker, code = Tracker(config, folder), int(ExitCode.FAILED)
    try:
        yield tracker
        code = ExitCode.OK
    except KeyboardInterrupt:
        code = ExitCode.STOPPED
        raise
    except UserError as error:
        code = error.exit_code
        raise
    finally:
        tracker.close(code)
