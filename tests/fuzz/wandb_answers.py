"""Answers of W&B's server at random, to its own client, as a run uses it: `python -m tests.fuzz.wandb_answers`.

Each round is a run of some rows, with a server that changes a share of its answers, from the first one or from when the
run has begun: their status, or their body, in bytes or in the values of its JSON. Nothing may come out of it: no
exception, no signal; every row stands in metrics.jsonl. `--seed N --rounds 1` makes a round again.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloze.cli import compose
from cloze.log import log
from pretrain.config import TrainConfig
from pretrain.telemetry.sinks import open_telemetry
from tests.fuzz.fuzz import change_bytes, change_json
from tests.wandb_stub import KEY, WandbStub, wandb_stub

STEPS = 30
STATUSES = (
    200,
    201,
    204,
    206,
    301,
    302,
    304,
    307,
    400,
    401,
    403,
    404,
    409,
    410,
    413,
    418,
    429,
    500,
    502,
    503,
    504,
    599,
)


def changing(rng: random.Random, share: float, status: int, data: bytes) -> tuple[int, bytes]:
    if rng.random() > share:
        return status, data
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(STATUSES), data
    if kind == 1:
        return status, rng.randbytes(rng.choice((0, 1, 100, 100_000)))
    if kind == 2:
        return status, change_bytes(rng, data)
    changed = change_json(rng, data)
    return (rng.choice(STATUSES) if kind == 3 else status), changed


def fuzz_run(stub: WandbStub, folder: Path, seed: int) -> tuple[int, float]:
    """One run against a stub that W&B's client is told of; (answers that were changed, seconds of the longest `log`).

    Raises what comes out of it; AssertionError where a row is lost.
    """
    rng, changed = random.Random(seed), 0

    def change(status: int, data: bytes) -> tuple[int, bytes]:
        nonlocal changed
        found = changing(rng, share, status, data)
        changed += found != (status, data)
        return found

    share, from_the_start = rng.choice((0.1, 0.5, 1.0)), rng.random() < 0.4
    if from_the_start:
        stub.change = change
    config = compose("train", TrainConfig, ["run=r", "data.path=d", "steps=300", "wandb.mode=auto"])
    telemetry = open_telemetry(config, folder, resume_step=None, wandb_id=None, resolved={"steps": 300})
    stub.change = change
    longest = 0.0
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        telemetry.log(step, {"train/loss": 9 / step})
        longest = max(longest, time.perf_counter() - start)
    telemetry.close(0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(step, 9 / step) for step in range(1, STEPS + 1)]
    return changed, longest


@contextmanager
def told_of(stub: WandbStub, folder: Path) -> Iterator[None]:
    """W&B's client as it starts in a new process, which knows this server and waits for it no longer than 2 s."""
    import wandb

    own = {"BASE_URL": stub.url, "API_KEY": KEY, "CONFIG_DIR": str(folder), "INIT_TIMEOUT": "2", "FINISH_TIMEOUT": "2"}
    os.environ.update({f"WANDB_{name}": value for name, value in own.items()})
    wandb.teardown()
    try:
        yield
    finally:
        wandb.teardown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=2**62)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    options = parser.parse_args()
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # that the client sends to who started it
        signal.signal(number, lambda number, _: signals.append(number))
    rounds, answers, longest, end = 0, 0, 0.0, time.monotonic() + options.seconds
    while rounds < options.rounds and time.monotonic() < end:
        with tempfile.TemporaryDirectory() as folder, wandb_stub() as stub, told_of(stub, Path(folder)):
            (Path(folder) / "run").mkdir()
            log.info(f"seed {options.seed + rounds}")
            changed, slowest = fuzz_run(stub, Path(folder) / "run", options.seed + rounds)
        rounds, answers, longest = rounds + 1, answers + changed, max(longest, slowest)
        assert not signals, signals
    print(f"{rounds} rounds, {answers} changed answers; the longest wait for a row {1e3 * longest:.0f} ms; no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
