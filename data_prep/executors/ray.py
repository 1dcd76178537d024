"""Tasks of a Ray cluster (cloze[ray])."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from cloze.errors import UserError, first_line
from data_prep.config import RayConfig
from data_prep.executors.base import Executor, WorkerDied
from data_prep.executors.local import become_worker
from data_prep.plan import Plan
from data_prep.stages.base import Stage

_RETRIES = 20  # of a task whose worker or machine was lost


class RayExecutor(Executor, kind="ray"):
    """Tasks of a Ray cluster, one per CPU; `out` lies where all its machines see it. Ray runs a lost task again."""

    def __init__(self, plan: Plan) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("executor=ray: needs Ray: pip install 'cloze[ray]'") from None
        self._ray, self._plan = ray, plan
        config = plan.config.executor
        assert isinstance(config, RayConfig)
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        try:
            try:
                ray.init(config.address or "auto", **options)
            except ConnectionError:
                if config.address or os.environ.get("RAY_ADDRESS"):
                    raise
                ray.init("local", num_cpus=config.workers, **options)  # there is no cluster here
        except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
            raise UserError(
                f"executor=ray: {first_line(error)}; start the cluster (`ray start --head`) or correct executor.address"
            ) from error

    def close(self, failed: bool) -> None:
        self._ray.shutdown()

    def run(self, stage: Stage, numbers: Iterable[int]) -> Iterator[int]:
        """Run tasks of one stage; yield the number of each when it is done. Raises what a task raised."""
        remote = self._ray.remote(max_retries=_RETRIES)(_ray_task)
        plan = self._ray.put(self._plan)
        waiting = deque(numbers)
        running: dict[Any, int] = {}
        while waiting or running:
            slots = self._plan.config.executor.workers or int(self._ray.cluster_resources().get("CPU", 1))
            while waiting and len(running) < slots:
                number = waiting.popleft()
                running[remote.remote(plan, stage, number)] = number
            done, _ = self._ray.wait(list(running))
            for reference in done:
                number = running.pop(reference)
                try:
                    error = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError:
                    raise  # our own bug, with its traceback
                except self._ray.exceptions.RayError as lost:
                    raise WorkerDied(
                        f"{stage.name} task {number}: lost again and again ({first_line(lost)}); run the same command "
                        "again to go on"
                    ) from lost
                if error is not None:
                    raise error
                yield number


def _ray_task(plan: Plan, stage: Stage, number: int) -> UserError | None:
    become_worker()
    try:
        stage.run_task(plan, number)
    except UserError as error:
        return error
    return None
